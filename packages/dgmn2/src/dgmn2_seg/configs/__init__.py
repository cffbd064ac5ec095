"""DGMN2's model dataclass, its backbones and its configurations. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from segcore.config.fields import BUILD, setting
from segcore.config.schema import Experiment, ModelConfig

if TYPE_CHECKING:
    from dgmn2_seg.model import DGMN2Segmentor

Size = Literal["tiny", "small", "medium", "large"]
Head = Literal["fpn", "setr_naive", "setr_pup", "setr_mla"]


class Variant(NamedTuple):
    """The sizes of a backbone, by stage."""

    depths: tuple[int, int, int, int]
    """Blocks."""
    widths: tuple[int, int, int, int] = (64, 128, 320, 512)
    """Channels."""
    heads: tuple[int, int, int, int] = (1, 2, 5, 8)
    """Attention heads: 64 channels each in the published ones."""
    ratios: tuple[int, int, int, int] = (8, 8, 4, 4)
    """Hidden channels of the MLP per channel."""


VARIANTS = {
    "nano": Variant((1, 1, 1, 1), (32, 64, 128, 192), (1, 2, 4, 6), (4, 4, 4, 4)),
    "tiny": Variant((2, 2, 2, 2)),
    "small": Variant((3, 4, 6, 3)),
    "medium": Variant((3, 4, 18, 3)),
    "large": Variant((3, 8, 27, 3)),
}


@dataclass(frozen=True)
class DGMN2(ModelConfig):
    """Dynamic graph message passing transformer."""

    backbone: Literal["nano", "tiny", "small", "medium", "large"] = setting("tiny", stated=True, commands=BUILD)
    """`nano` is not a published one: a narrow one for the demo."""
    head: Head = setting("fpn", stated=True, commands=BUILD)
    """Semantic FPN on maps at 1/4 to 1/32, or one of SETR's on maps at 1/4 and 1/8."""
    img_size: int | None = setting(769, least=1)
    """SETR heads answer square maps, as published: naive and MLA of this side, PUP of 16 times its features' width.
    None: maps of the images' shape."""
    dropout: float = setting(0.1, least=0, below=1, commands=())
    """Probability that a channel is dropped before the classifier; `fpn` only."""
    drop_path: float = setting(0.0, least=0, below=1, commands=())
    """Stochastic depth of the last block; the others' grow linearly up to it."""
    average: Literal["all", "valid"] = setting("all", commands=())
    """What the loss is divided by: the number of all pixels, ignored ones too, as published, or of the labeled."""

    def build(self) -> DGMN2Segmentor:
        """Return the model with random weights; downloads nothing."""
        from dgmn2_seg.model import DGMN2Segmentor

        return DGMN2Segmentor(self)


def experiments() -> dict[str, Callable[[], Experiment]]:
    """Return every configuration of this package by name."""
    from dgmn2_seg.configs import cityscapes, toy

    modules = (toy, cityscapes)
    prefixes = ("dgmn2_", "fpn_", "setr_")
    return {name: build for module in modules for name, build in vars(module).items() if name.startswith(prefixes)}
