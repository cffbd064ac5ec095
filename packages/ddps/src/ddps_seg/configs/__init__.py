"""The model dataclasses of DDPS and its base models, and their configurations. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from segcore.config.schema import Experiment, ModelConfig
from segcore.errors import UserError

if TYPE_CHECKING:
    from ddps_seg.base import BaseSegmentor
    from ddps_seg.model import DDPSSegmentor

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
"""`resnet18` is no published one: small and plain, for tests and trials."""


@dataclass(frozen=True)
class Encoder(ModelConfig):
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


@dataclass(frozen=True)
class DDPS(Encoder):
    """The mask prior on a base model's features. Class 0 is background: `data.add_background_class` puts it there."""

    num_classes: int = 151
    """Classes including background, which is ignored in training but is a state of the diffusion like any other."""
    single_step: bool = False
    """The single-step variant, which the multi-step training starts from: one pass on a random label map."""
    width: int = 256
    """Channels of the UNet, a multiple of 8."""
    multipliers: tuple[int, ...] = (1, 1, 1)
    """Width of each of the UNet's levels, in multiples of `width`."""
    output_width: int = 256
    """Channels that the classifier sees."""
    embedding_width: int = 16
    """Channels of the label embedding."""
    train_labels: bool = False
    """Train the label embedding, which the published models leave at its random start values."""
    num_train_timesteps: int = 100
    """Diffusion timesteps T, those of the checkpoint."""
    noise_schedule: Literal["linear", "cosine"] = "linear"
    ignore_schedule_mismatch: bool = False
    """Accept weights trained with another number of timesteps and keep this schedule, as the official loader does."""
    freeze: Literal["published", "eval", "none"] = "published"
    """The base model's part in training. published: no gradients, but in training mode: batch statistics, which are
    also averaged, and stochastic depth; eval: as in testing; none: it trains along."""
    condition_dropout: float = 0.0
    """Share of the training images whose condition is zero; guidance needs it."""
    num_inference_steps: int | None = None
    """Timesteps to run: every (T // this)-th, and the last one. None: all."""
    mode: Literal["q_pred", "q_posterior", "bayes"] = "q_pred"
    """Next map: q_pred, the answer with fresh noise; q_posterior, as published (not Bayes' rule, see the README);
    bayes, the exact posterior."""
    guidance_scale: float = 1.0
    """g in (1 + g) * logits - g * logits without condition, in mode q_pred; 1 means off."""
    suppress_background: bool = False
    """Never answer background."""

    def __post_init__(self) -> None:
        if self.width % 8:
            raise UserError(f"model.width is {self.width}; it must be a multiple of 8")
        if self.num_train_timesteps < 2:
            raise UserError(f"model.num_train_timesteps is {self.num_train_timesteps}; it must be at least 2")
        if self.num_inference_steps is not None and self.num_inference_steps < 1:
            raise UserError(f"model.num_inference_steps is {self.num_inference_steps}; it must be at least 1")
        if not 0 <= self.condition_dropout < 1:
            raise UserError(f"model.condition_dropout is {self.condition_dropout}; it must be at least 0 and below 1")
        if not self.multipliers or min(self.multipliers) < 1:
            raise UserError(f"model.multipliers are {self.multipliers}; give one or more whole numbers above 0")
        if self.guidance_scale != 1 and self.mode != "q_pred":
            raise UserError(f"model.guidance_scale works in model.mode q_pred, not {self.mode}; set it to 1")

    def build(self) -> DDPSSegmentor:
        """Return the model with random weights; downloads nothing."""
        from ddps_seg.model import DDPSSegmentor

        return DDPSSegmentor(self)


def experiments() -> dict[str, Callable[[], Experiment]]:
    """Return every configuration of this package by name."""
    from ddps_seg.configs import base_models, published, toy

    own = (toy.ddps_segformer_b0_toy, toy.ddps_segformer_b0_base_toy)
    return {**{build.__name__: build for build in own}, **published.rows(), **base_models.rows()}
