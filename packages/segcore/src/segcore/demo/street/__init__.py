"""Drawing of street scenes: `canvas` projects and paints, `things` stand and drive, `scene` puts all together."""

from segcore.demo.street.scene import draw_scene

__all__ = ["draw_scene"]
