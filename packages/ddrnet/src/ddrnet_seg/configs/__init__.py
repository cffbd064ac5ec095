"""DDRNet's model dataclass and its configurations. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from segcore.config.fields import BUILD, setting
from segcore.config.schema import Experiment, ModelConfig

if TYPE_CHECKING:
    from ddrnet_seg.model import DDRNet


@dataclass(frozen=True)
class DDRNetConfig(ModelConfig):
    """Deep dual-resolution network."""

    variant: Literal["23_slim", "23", "39"] = setting("23_slim", stated=True, commands=BUILD)
    """Variant of the network, by the authors' names."""
    auxiliary: bool = setting(True, commands=())
    """Build the auxiliary head, which only training uses."""
    auxiliary_weight: float = setting(0.4, above=0, commands=())
    """Weight of the auxiliary head's loss."""
    align_corners: bool = False
    """Corner alignment of the last resize: False for the authors' and MMSegmentation's weights, True for pyradd's."""

    def build(self) -> DDRNet:
        """Return the model with random weights; downloads nothing."""
        from ddrnet_seg.model import DDRNet

        return DDRNet(**self.arguments())


def experiments() -> dict[str, Callable[[], Experiment]]:
    """Return every configuration of this package by name."""
    from ddrnet_seg.configs import camvid, cityscapes, own_data, toy

    modules = (toy, own_data, camvid, cityscapes)
    return {name: build for module in modules for name, build in vars(module).items() if name.startswith("ddrnet_")}
