"""DDP's model dataclass and its configurations. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from segcore.config.schema import Experiment, ModelConfig
from segcore.errors import UserError

if TYPE_CHECKING:
    from ddp_seg.model import DDPSegmentor

Backbone = Literal[
    "convnext_t",
    "convnext_s",
    "convnext_b",
    "convnext_l",
    "swin_t",
    "swin_s",
    "swin_b",
    "swin_l",
    "resnet18",
    "resnet50",
]


@dataclass(frozen=True)
class DDP(ModelConfig):
    """Diffusion for dense prediction. The defaults are the published model on Cityscapes with ConvNeXt-T."""

    stepwise: ClassVar[bool] = True
    backbone: Backbone = "convnext_t"
    """Encoder of the image, from timm."""
    drop_path: float = 0.4
    """Largest stochastic-depth rate of the backbone."""
    window: int = 7
    """Swin's window size."""
    width: int = 256
    """Channels of features, label codes and decoder; a multiple of 32 and of the heads."""
    decoder_layers: int = 6
    """Layers of the decoder that denoises."""
    heads: int = 8
    """Heads of the deformable attention."""
    points: int = 4
    """Sampling points per head."""
    bit_scale: float = 0.01
    """Label codes lie in [-bit_scale, bit_scale]; the noise has unit variance."""
    num_inference_steps: int = 3
    """Denoising steps at inference."""
    randsteps: int = 1
    """Noise starts per image, averaged."""
    time_difference: int = 1
    """Asymmetric time intervals: the map goes this many steps further than the time it is labeled with."""
    sample_range: tuple[float, float] = (0.0, 0.999)
    """Training draws times from this range; inference runs from 1 down to its lower end."""
    noise_schedule: Literal["cosine", "linear"] = "cosine"
    """How the share of noise falls with time."""
    sampler: Literal["ddim", "ddpm"] = "ddim"
    """Deterministic steps (DDIM), or steps that add noise again (DDPM)."""
    accumulation: bool = False
    """Answer with the mean probability over all steps instead of the last step's logits."""
    self_aligned: bool = False
    """Self-aligned denoising: train on the model's own predictions instead of the labels (fine-tuning)."""
    auxiliary: bool = True
    """Build the auxiliary head, which only training uses."""

    def __post_init__(self) -> None:
        if self.width % 32 or self.width % self.heads or self.width % 4:
            raise UserError(f"model.width {self.width} must be a multiple of 32 and of model.heads {self.heads}")
        for name in ("num_inference_steps", "randsteps", "decoder_layers", "heads", "points", "window", "num_classes"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be at least 1")

    def build(self) -> DDPSegmentor:
        """Return the model with random weights; downloads nothing."""
        from ddp_seg.model import DDPSegmentor

        return DDPSegmentor(self)


def experiments() -> dict[str, Callable[[], Experiment]]:
    """Return every configuration of this package by name."""
    from ddp_seg.configs import ade20k, cityscapes, toy

    modules = (toy, cityscapes, ade20k)
    return {name: build for module in modules for name, build in vars(module).items() if name.startswith("ddp_")}
