"""DDRNet's model dataclass, its variants and its configurations. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from segcore.config.fields import BUILD, setting
from segcore.config.schema import Experiment, ModelConfig

if TYPE_CHECKING:
    from ddrnet_seg.model import DDRNetSegmentor


class Variant(NamedTuple):
    """The sizes of a network."""

    planes: int
    """Channels of the stem, p; the high-resolution branch has 2p."""
    blocks: tuple[int, ...]
    """Residual blocks of layer1, layer2, each round of stage 3 (one or two) and stage 4."""
    head: int
    """Channels inside the heads."""
    classifier: int
    """Channels before the ImageNet classifier."""


VARIANTS = {
    "23_slim": Variant(32, (2, 2, 2, 2), 64, 1024),
    "23": Variant(64, (2, 2, 2, 2), 128, 2048),
    "39": Variant(64, (3, 4, 3, 3, 3), 256, 2048),
}


@dataclass(frozen=True)
class DDRNet(ModelConfig):
    """Deep dual-resolution network."""

    variant: Literal["23_slim", "23", "39"] = setting("23_slim", stated=True, commands=BUILD)
    """Size of the network, by the authors' names."""
    auxiliary: bool = setting(True, commands=())
    """Build the auxiliary head, which only training uses."""
    auxiliary_weight: float = setting(0.4, above=0, commands=())
    """Weight of the auxiliary head's loss."""
    loss: Literal["ohem", "ohem_pyradd", "cross_entropy"] = setting("ohem", commands=())
    """On both heads: online hard example mining as in MMSegmentation, as in the seed project, or on all pixels."""
    ohem_threshold: float = setting(0.9, above=0, most=1, commands=())
    """Pixels whose true class has a lower probability are hard."""
    ohem_min_kept: int = setting(131_072, least=1, commands=())
    """At least so many pixels of a forward pass on one device count as hard."""
    align_corners: bool = False
    """Convention of the last resize: False for the authors' and MMSegmentation's weights, True for the seed's."""

    def build(self) -> DDRNetSegmentor:
        """Return the model with random weights; downloads nothing."""
        from ddrnet_seg.model import DDRNetSegmentor

        return DDRNetSegmentor(self)


def experiments() -> dict[str, Callable[[], Experiment]]:
    """Return every configuration of this package by name."""
    from ddrnet_seg.configs import cityscapes, toy

    modules = (toy, cityscapes)
    return {name: build for module in modules for name, build in vars(module).items() if name.startswith("ddrnet_")}
