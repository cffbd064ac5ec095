"""The model dataclasses of DDPS and its base models, and their configurations. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from segcore.config.fields import BUILD, INPUT, MOST_CHANNELS, setting
from segcore.config.schema import Experiment, ModelConfig
from segcore.errors import UserError

if TYPE_CHECKING:
    from ddps_seg.base import BaseModel
    from ddps_seg.model import DDPS


@dataclass(frozen=True)
class ConditionEncoderConfig(ModelConfig):
    """Maps images to the condition: a backbone and a head without classifier, SegFormer's or DeepLabV3+'s."""

    backbone: str = setting("mit_b2", stated=True, commands=BUILD)
    """Image encoder: mit_{b0..b5}, mobilenet_v2, resnet50 or resnet101 as published, or a model of timm. MiT, resnet18
    (small and plain, for trials), convnext_{t,s,b,l} and swin_{t,s,b,l} use SegFormer's head; all others are dilated to
    output stride 8, which not every model of timm can be, and use DeepLabV3+'s."""
    drop_path: float = setting(0.1, least=0, below=1, commands=())
    """MiT's maximum stochastic-depth rate."""
    condition_width: int | None = setting(None, least=1, commands=BUILD)
    """Channels of the condition; None: 256 for SegFormer's head, 512 for DeepLabV3+'s."""
    dropout: float = setting(0.1, least=0, below=1, commands=())
    """Dropout rate of the channels before the classifier, in training."""


@dataclass(frozen=True)
class BaseModelConfig(ConditionEncoderConfig):
    """A base model, the first stage: SegFormer or DeepLabV3+ without the prior."""

    num_classes: int = setting(150, least=1, most=MOST_CHANNELS, stated=True, commands=INPUT)
    auxiliary: bool = setting(False, commands=())
    """Build the auxiliary FCN head on the third map, which only training uses (part of DeepLabV3+'s recipes)."""

    def build(self) -> BaseModel:
        """Return the model with random weights; downloads nothing."""
        from ddps_seg.base import BaseModel

        return BaseModel(**self.arguments())


@dataclass(frozen=True)
class DDPSConfig(ConditionEncoderConfig):
    """The mask prior on a base model's features. Class 0 is background, added by `data.add_background_class`."""

    stepwise: ClassVar[bool] = True
    num_classes: int = setting(151, least=1, most=MOST_CHANNELS, stated=True, commands=INPUT)
    """Classes including background, which is ignored in training but is a state of the diffusion like any other."""
    single_step: bool = setting(False, commands=BUILD)
    """The single-step variant, which initializes the multi-step training: one pass on a random label map."""
    width: int = setting(256, least=8, commands=BUILD)
    """Channels of the UNet, a multiple of 8."""
    multipliers: tuple[int, ...] = setting((1, 1, 1), least=1, nonempty=True, commands=BUILD)
    """Width of each of the UNet's levels, in multiples of `width`."""
    output_width: int = setting(256, least=1, commands=BUILD)
    """Input channels of the classifier."""
    embedding_width: int = setting(16, least=1, commands=BUILD)
    """Channels of the label embedding."""
    train_labels: bool = setting(False, commands=())
    """Train the label embedding; the published models leave it at its random initial values."""
    num_train_timesteps: int = setting(100, least=2, stated=True)
    """Timesteps T of the diffusion in training, which must match the checkpoint; `num_inference_steps` sets how many of
    them are evaluated at inference."""
    noise_schedule: Literal["linear", "cosine"] = "linear"
    """Noise schedule over the timesteps."""
    ignore_schedule_mismatch: bool = False
    """Accept weights trained with another number of timesteps and keep this schedule, as the official loader does."""
    freeze: Literal["published", "eval", "none"] = setting("published", commands=())
    """Training of the base model. published: no gradients, but in training mode (batch statistics, which also update
    the running ones, and stochastic depth); eval: as in testing; none: it is trained as well."""
    condition_dropout: float = setting(0.0, least=0, below=1, commands=())
    """Share of the training images whose condition is set to zero; guidance needs it."""
    num_inference_steps: int | None = setting(None, least=1, stated=True)
    """Timesteps to evaluate at inference: every (T // this)-th, and the last one; None: all T. `evaluate.steps` selects
    the ones to report and does not override it."""
    mode: Literal["q_pred", "q_posterior", "bayes"] = "q_pred"
    """Next map: q_pred, the prediction with fresh noise; q_posterior, as published (not Bayes' rule, see the README);
    bayes, the exact posterior."""
    guidance_scale: float = setting(1.0, least=0)
    """g in (1 + g) * logits - g * logits without condition, in mode q_pred; 1 means off."""
    suppress_background: bool = False
    """Never predict background."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % 8:
            raise UserError(f"model.width is {self.width}; it must be a multiple of 8")
        if self.guidance_scale != 1 and self.mode != "q_pred":
            raise UserError(f"model.guidance_scale works in model.mode q_pred, not {self.mode}; set it to 1")

    def build(self) -> DDPS:
        """Return the model with random weights; downloads nothing."""
        from ddps_seg.model import DDPS

        return DDPS(**self.arguments())


def experiments() -> dict[str, Callable[[], Experiment]]:
    """Return every configuration of this package by name."""
    from ddps_seg.configs import base_models, camvid, own_data, published, toy

    own = (
        *(toy.ddps_segformer_b0_toy, toy.ddps_segformer_b0_base_toy),
        *(own_data.ddps_segformer_b0_from_scratch, own_data.ddps_segformer_b0_base_from_scratch),
        *(own_data.ddps_segformer_b0_fine_tuned, own_data.ddps_segformer_b0_base_fine_tuned),
        *(camvid.ddps_segformer_b0_camvid, camvid.ddps_segformer_b0_base_camvid),
    )
    return {**{build.__name__: build for build in own}, **published.rows(), **base_models.rows()}
