"""DGMN2's model dataclass and its configurations. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from segcore.config.fields import BUILD, setting
from segcore.config.schema import Experiment, ModelConfig

if TYPE_CHECKING:
    from dgmn2_seg.model import DGMN2

Size = Literal["tiny", "small", "medium", "large"]
Head = Literal["fpn", "setr_naive", "setr_pup", "setr_mla"]


@dataclass(frozen=True)
class DGMN2Config(ModelConfig):
    """Dynamic graph message passing transformer."""

    backbone: Literal["nano", "tiny", "small", "medium", "large"] = setting("tiny", stated=True, commands=BUILD)
    """Image encoder. `nano` is not a published variant: it is a narrow one for the demo."""
    head: Head = setting("fpn", stated=True, commands=BUILD)
    """Semantic FPN on maps at 1/4 to 1/32, or one of SETR's heads on maps at 1/4 and 1/8."""
    img_size: int | None = setting(769, least=1)
    """SETR heads output square maps, as published: naive and MLA of this side, PUP of 16 times its features' width.
    None: maps with the images' shape."""
    dropout: float = setting(0.1, least=0, below=1, commands=())
    """Probability that a channel is dropped before the classifier; `fpn` only."""
    drop_path: float = setting(0.0, least=0, below=1, commands=())
    """Stochastic-depth rate of the last block; the rates grow linearly up to it."""

    def build(self) -> DGMN2:
        """Return the model with random weights; downloads nothing."""
        from dgmn2_seg.model import DGMN2

        return DGMN2(**self.arguments())


def experiments() -> dict[str, Callable[[], Experiment]]:
    """Return every configuration of this package by name."""
    from dgmn2_seg.configs import camvid, cityscapes, own_data, toy

    modules = (toy, own_data, camvid, cityscapes)
    prefixes = ("dgmn2_", "fpn_", "setr_")
    return {name: build for module in modules for name, build in vars(module).items() if name.startswith(prefixes)}
