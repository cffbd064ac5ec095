"""Drawing of street scenes: `canvas` projects and paints, `things` draws objects, `scene` composes them."""

from segcore.demo.street.scene import draw_scene

__all__ = ["draw_scene"]
