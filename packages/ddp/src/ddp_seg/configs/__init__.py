"""DDP's model dataclass and its configurations. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from segcore.config.fields import BUILD, setting
from segcore.config.schema import Experiment, ModelConfig
from segcore.errors import UserError

if TYPE_CHECKING:
    from ddp_seg.model import DDP


@dataclass(frozen=True)
class DDPConfig(ModelConfig):
    """Diffusion for dense prediction. The defaults are the published model on Cityscapes with ConvNeXt-T."""

    stepwise: ClassVar[bool] = True
    backbone: str = setting("convnext_t", stated=True, commands=BUILD)
    """Image encoder: convnext_{t,s,b,l} or swin_{t,s,b,l} as published, or any model of timm with maps at strides 4, 8,
    16 and 32, such as resnet18 or regnety_004."""
    drop_path: float = setting(0.4, least=0, below=1, commands=())
    """Maximum stochastic-depth rate of ConvNeXt and Swin; other backbones ignore it."""
    window: int = setting(7, least=1, commands=BUILD)
    """Swin's window size."""
    width: int = setting(256, least=32, commands=BUILD)
    """Channels of the features, label embeddings and decoder; a multiple of 32 and of the number of heads."""
    decoder_layers: int = setting(6, least=1, commands=BUILD)
    """Layers of the denoising decoder."""
    heads: int = setting(8, least=1, commands=BUILD)
    """Heads of the deformable attention."""
    points: int = setting(4, least=1, commands=BUILD)
    """Sampling points per head."""
    bit_scale: float = setting(0.01, above=0, commands=BUILD)
    """Label embeddings lie in [-bit_scale, bit_scale]; the noise has unit variance."""
    num_inference_steps: int = setting(3, least=1, stated=True)
    """Denoising steps at inference. If set, `evaluate.steps` overrides it with one run per number of steps."""
    randsteps: int = setting(1, least=1)
    """Noise starts per image, whose outputs are averaged."""
    time_difference: int = setting(1, least=0)
    """Asymmetric time intervals: the map advances this many steps beyond the time given to the next step."""
    sample_range: tuple[float, float] = setting((0.0, 0.999), least=0, most=1, commands=BUILD)
    """Training draws times from this range; inference runs from 1 down to its lower end."""
    noise_schedule: Literal["cosine", "linear"] = setting("cosine", commands=BUILD)
    """Noise schedule over time."""
    sampler: Literal["ddim", "ddpm"] = "ddim"
    """Deterministic steps (DDIM), or steps that add noise again (DDPM)."""
    accumulation: bool = False
    """Output the mean probability over all steps instead of the last step's logits."""
    self_aligned: bool = setting(False, commands=())
    """Self-aligned denoising: train on the model's own predictions instead of the labels (fine-tuning)."""
    auxiliary: bool = setting(True, commands=())
    """Build the auxiliary head, which only training uses."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % 32 or self.width % self.heads:
            raise UserError(f"model.width is {self.width}; it must be a multiple of 32 and of model.heads {self.heads}")
        if self.sample_range[0] >= self.sample_range[1]:
            raise UserError(f"model.sample_range is {self.sample_range}; give the smaller time first")

    def build(self) -> DDP:
        """Return the model with random weights; downloads nothing."""
        from ddp_seg.model import DDP

        return DDP(**self.arguments())


def experiments() -> dict[str, Callable[[], Experiment]]:
    """Return every configuration of this package by name."""
    from ddp_seg.configs import ade20k, camvid, cityscapes, own_data, toy

    modules = (toy, own_data, camvid, cityscapes, ade20k)
    return {name: build for module in modules for name, build in vars(module).items() if name.startswith("ddp_")}
