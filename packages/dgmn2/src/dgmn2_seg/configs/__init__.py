"""DGMN2's model dataclass and its configurations. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from segcore.config.schema import Experiment, ModelConfig
from segcore.errors import UserError

if TYPE_CHECKING:
    from dgmn2_seg.model import DGMN2

Size = Literal["tiny", "small", "medium", "large"]
Head = Literal["fpn", "setr_naive", "setr_pup", "setr_mla"]


@dataclass(frozen=True)
class DGMN2Config(ModelConfig):
    """Dynamic graph message passing transformer."""

    backbone: Literal["nano", "tiny", "small", "medium", "large"] = "tiny"
    """`nano` is not a published one: a narrow one for the demo."""
    head: Head = "fpn"
    """Semantic FPN on maps at 1/4 to 1/32, or one of SETR's on maps at 1/4 and 1/8."""
    img_size: int | None = 769
    """SETR heads answer square maps, as published: naive and MLA of this side, PUP of 16 times its features' width.
    None: maps of the images' shape."""
    dropout: float = 0.1
    """Probability that a channel is dropped before the classifier; `fpn` only."""
    drop_path: float = 0.0
    """Stochastic depth of the last block; the others' grow linearly up to it."""

    def __post_init__(self) -> None:
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        if self.img_size is not None and self.img_size < 1:
            raise UserError(f"model.img_size is {self.img_size}; give at least 1, or None for the images' own size")

    def build(self) -> DGMN2:
        """Return the model with random weights; downloads nothing."""
        from dgmn2_seg.model import DGMN2

        return DGMN2(**self.arguments())


def experiments() -> dict[str, Callable[[], Experiment]]:
    """Return every configuration of this package by name."""
    from dgmn2_seg.configs import cityscapes, toy

    modules = (toy, cityscapes)
    prefixes = ("dgmn2_", "fpn_", "setr_")
    return {name: build for module in modules for name, build in vars(module).items() if name.startswith(prefixes)}
