"""The smallest models that satisfy the contract, for tests of code that takes a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from segcore.config.schema import LossConfig
from segcore.models.losses import head_losses
from segcore.models.noise import generators
from segcore.models.segmentor import Segmentor
from segcore.models.stepwise import Step, Steps, StepwiseSegmentor

Answer = Callable[[Tensor], Tensor]


class Tiny(Segmentor):
    """Two convolutions around a norm and dropout, or the function `answer` of the images; with seeded noise."""

    def __init__(
        self,
        num_classes: int = 3,
        answer: Answer | None = None,
        *,
        noise: float = 0.0,
        dropout: float = 0.0,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        in_channels: int = 3,
    ) -> None:
        """`noise` times standard normal numbers, drawn by seed, are added to the images; `answer` may be a module."""
        super().__init__()
        self.num_classes, self.answer, self.noise = num_classes, answer, noise
        self.conv, self.norm = nn.Conv2d(in_channels, 8, 3, padding=1), norm(8)
        self.dropout, self.head = nn.Dropout(dropout), nn.Conv2d(8, num_classes, 1)
        self.calls: list[tuple[Tensor, list[int] | None]] = []
        """The images and seeds of every run."""

    def network(self, images: Tensor, seeds: Sequence[int] | None, draws: Tensor | None = None) -> Tensor:
        """Return logits (N, K, h, w) of images with noise; `draws` (N, C, H, W) are standard normal."""
        images = images.to(self.conv.weight.dtype)
        if self.noise:
            draws = draw(images, seeds) if draws is None else draws
            images = images + self.noise * draws.to(images)
        if self.answer is not None:
            return self.answer(images)
        return self.head(self.dropout(self.norm(self.conv(images)).relu()))

    def logits(self, images: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """Return logits (N, K, h, w)."""
        self.calls.append((images, None if seeds is None else list(seeds)))
        return self.network(images, seeds)

    def losses(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        seeds: Sequence[int] | None = None,
        draws: Mapping[str, Tensor] | None = None,
        loss: LossConfig = LossConfig(),  # noqa: B008  (frozen)
    ) -> dict[str, Tensor]:
        """Return the configured loss; draws: "noise" (N, C, H, W)."""
        logits = self.network(images, seeds, draws["noise"] if draws else None)
        return head_losses({"decode": (logits, 1.0)}, labels, loss, ignore_index=self.ignore_index)


class TinyStepwise(Tiny, StepwiseSegmentor):
    """The stepwise version: the logits of step k are k times the output for the images with k times the noise."""

    step_unit = "steps"
    run_per_entry = True
    num_inference_steps = 3

    def encode(self, images: Tensor) -> Tensor:
        """Return the images."""
        return images

    @property
    def step_keys(self) -> Sequence[int]:
        """The numbers of steps taken in the configured run."""
        return range(1, self.num_inference_steps + 1)

    def draw(
        self, features: Tensor, seeds: Sequence[int] | None, *, steps: int | None = None, run: int = 0
    ) -> tuple[Tensor, list[Tensor]]:
        """Return standard normal numbers (N, C, H, W); later steps draw nothing."""
        self.calls.append((features, None if seeds is None else list(seeds)))
        return draw(features, seeds, run), []

    def denoising_steps(
        self, features: Tensor, start: Tensor, noise: Iterable[Tensor] | None = None, *, steps: int | None = None
    ) -> Steps:
        """Yield the steps."""
        for k in range(1, (steps or self.num_inference_steps) + 1):
            going = yield Step(str(k), k * self.network(features, None, k * start), start)
            if going is not None:
                features, start = features[going], start[going]

    logits = StepwiseSegmentor.logits


def draw(images: Tensor, seeds: Sequence[int] | None, run: int = 0) -> Tensor:
    """Return standard normal numbers of the images' shape (N, C, H, W); each image draws from its own seed."""
    drawn = [torch.randn(images.shape[1:], generator=g.host) for g in generators(seeds, len(images), run)]
    return torch.stack(drawn).to(images)
