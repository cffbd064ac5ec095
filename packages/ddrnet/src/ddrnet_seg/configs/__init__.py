"""DDRNet's model dataclass and its configurations. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from segcore.config.schema import Experiment, ModelConfig
from segcore.errors import UserError

if TYPE_CHECKING:
    from ddrnet_seg.model import DDRNet


@dataclass(frozen=True)
class DDRNetConfig(ModelConfig):
    """Deep dual-resolution network."""

    variant: Literal["23_slim", "23", "39"] = "23_slim"
    """Size of the network, by the authors' names."""
    auxiliary: bool = True
    """Build the auxiliary head, which only training uses."""
    auxiliary_weight: float = 0.4
    """Weight of the auxiliary head's loss."""
    align_corners: bool = False
    """Convention of the last resize: False for the authors' and MMSegmentation's weights, True for the seed's."""

    def __post_init__(self) -> None:
        if not self.auxiliary_weight > 0:
            raise UserError(
                f"model.auxiliary_weight is {self.auxiliary_weight}; give more than 0, or no auxiliary head"
            )

    def build(self) -> DDRNet:
        """Return the model with random weights; downloads nothing."""
        from ddrnet_seg.model import DDRNet

        return DDRNet(**self.arguments())


def experiments() -> dict[str, Callable[[], Experiment]]:
    """Return every configuration of this package by name."""
    from ddrnet_seg.configs import cityscapes, toy

    modules = (toy, cityscapes)
    return {name: build for module in modules for name, build in vars(module).items() if name.startswith("ddrnet_")}
