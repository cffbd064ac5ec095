"""The model dataclasses of DDPS and its base models, and their configurations. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from segcore.experiment import Experiment, Model

if TYPE_CHECKING:
    from ddps_seg.base import BaseSegmentor

Backbone = Literal[
    "mit_b0",
    "mit_b1",
    "mit_b2",
    "mit_b3",
    "mit_b4",
    "mit_b5",
    "mobilenet_v2",
    "resnet50",
    "resnet101",
    "resnet18",
]
"""`resnet18` with SegFormer's head is no published model: it learns from scratch in minutes, for the demo and tests."""


@dataclass(frozen=True)
class Encoder(Model):
    """What maps images to the condition: a backbone and a head without classifier, SegFormer's or DeepLabV3+'s."""

    backbone: Backbone = "mit_b2"
    """MiT and resnet18 get SegFormer's head, the others are dilated and get DeepLabV3+'s."""
    drop_path: float = 0.1
    """MiT's largest stochastic-depth rate."""
    condition_width: int | None = None
    """Channels of the condition; None: 256 for SegFormer's head, 512 for DeepLabV3+'s."""
    dropout: float = 0.1
    """Channels dropped before the classifier, in training."""


@dataclass(frozen=True)
class Base(Encoder):
    """A base model, the first stage: SegFormer or DeepLabV3+ on its own."""

    num_classes: int = 150
    auxiliary: bool = False
    """Build the auxiliary FCN head on the third map, which only training uses (DeepLabV3+'s recipes do)."""

    def build(self) -> BaseSegmentor:
        """Return the model with random weights; downloads nothing."""
        from ddps_seg.base import BaseSegmentor

        return BaseSegmentor(self)


def experiments() -> dict[str, Callable[[], Experiment]]:
    """Return every configuration of this package by name."""
    from ddps_seg.configs import stock

    return {**stock.rows()}
