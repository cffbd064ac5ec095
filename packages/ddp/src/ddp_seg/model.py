"""DDP: a segmentation model that denoises a label map, conditioned on image features (arXiv 2303.17559).

The image is encoded once; every sampling step runs the light decoder on the features and the current noisy map.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddp_seg.decoder import MapDecoder, TimeEmbedding, make_grid
from ddp_seg.diffusion import Schedule, add_noise, ddim_step, ddpm_step, log_snr, noise_at, time_pairs
from ddp_seg.official import RULES
from segcore.config.schema import LossConfig
from segcore.models.backbones import BackboneSegmentor, build_backbone
from segcore.models.heads import FPN, FCNHead
from segcore.models.key_map import rename
from segcore.models.layers import ConvNorm, pass_without_grad, resize, to_device, use_fast_products
from segcore.models.losses import head_losses
from segcore.models.noise import draw
from segcore.models.stepwise import Step, Steps, StepwiseSegmentor, last

AUXILIARY_WEIGHT = 0.4
Sampler = Literal["ddim", "ddpm"]


class DDP(BackboneSegmentor, StepwiseSegmentor):
    """DDP and self-aligned DDP; strides, shapes and names as in the paper's section 3.

    The arguments are the fields of `ddp_seg.configs.DDPConfig`, which documents them.
    """

    step_unit = "steps"
    run_per_entry = True

    def __init__(
        self,
        *,
        num_classes: int = 19,
        in_channels: int = 3,
        backbone: str = "convnext_t",
        drop_path: float = 0.4,
        window: int = 7,
        width: int = 256,
        decoder_layers: int = 6,
        heads: int = 8,
        points: int = 4,
        bit_scale: float = 0.01,
        num_inference_steps: int = 3,
        randsteps: int = 1,
        time_difference: int = 1,
        sample_range: tuple[float, float] = (0.0, 0.999),
        noise_schedule: Schedule = "cosine",
        sampler: Sampler = "ddim",
        accumulation: bool = False,
        self_aligned: bool = False,
        auxiliary: bool = True,
    ) -> None:
        super().__init__()
        self.num_classes, self.width, self.bit_scale = num_classes, width, bit_scale
        self.num_inference_steps, self.randsteps, self.time_difference = num_inference_steps, randsteps, time_difference
        self.sample_range, self.noise_schedule = sample_range, noise_schedule
        self.sampler, self.accumulation, self.self_aligned = sampler, accumulation, self_aligned
        self.backbone = build_backbone(backbone, in_channels=in_channels, drop_path=drop_path, window=window)
        self.min_size = self.backbone.min_size
        self.fpn = FPN(self.backbone.channels, width)
        self.fuse_conv = ConvNorm(4 * width, width, 1, partial(nn.GroupNorm, 32))
        self.transform = nn.Conv2d(2 * width, width, 1)
        self.label_embedding = nn.Embedding(num_classes + 1, width)  # the last row is for ignored pixels
        self.time_embedding = TimeEmbedding(4 * width)
        self.decoder = MapDecoder(width, num_classes, decoder_layers, heads, points, time_dim=4 * width)
        self.auxiliary_head = FCNHead(width, width, num_classes) if auxiliary else None
        for conv in (self.fuse_conv.conv, self.transform):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        assert self.transform.bias is not None
        nn.init.zeros_(self.transform.bias)
        use_fast_products(self)

    # Inference

    def encode(self, images: Tensor) -> Tensor:
        """Return image features (N, width, H/4, W/4) for normalized images (N, C, H, W); run once per image."""
        self.check_size(images)
        maps = self.fpn(self.backbone(images))
        # `fuse_conv` is a 1x1 convolution of the resized, concatenated maps. Both it and resizing are linear, so each
        # map is projected at its own size and resized afterwards.
        first, *others = self.fuse_conv.conv.weight.split(self.width, 1)
        fused = F.conv2d(maps[0], first)
        for x, weight in zip(maps[1:], others, strict=True):
            fused = fused + resize(F.conv2d(x, weight), fused.shape[-2:])
        return self.fuse_conv.norm(fused)

    def embed_labels(self, labels: Tensor) -> Tensor:
        """Return maps (N, width, h, w) in [-bit_scale, bit_scale] for labels (N, h, w) in 0..K; K means ignored."""
        table = (torch.sigmoid(self.label_embedding.weight) * 2 - 1) * self.bit_scale
        return F.embedding(labels, table).permute(0, 3, 1, 2)

    def decode(self, features: Tensor, noisy: Tensor, log_snr: Tensor) -> Tensor:
        """Return logits (N, K, h, w) from features and a noisy map (N, width, h, w) at log-SNRs (N,) or (1,)."""
        return self.decoder(self.transform(torch.cat([features, noisy], 1)), self.time_embedding(log_snr))

    @property
    def step_keys(self) -> Sequence[int]:
        """The numbers of steps taken in the configured run."""
        return range(1, self.num_inference_steps + 1)

    def draw(
        self, features: Tensor, seeds: Sequence[int] | None, *, steps: int | None = None, run: int = 0
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the start noise (N*R, width, h, w) and, for the DDPM sampler, the noise of each further step.

        R is `randsteps`. Always float32 or wider, even if autocast made the features narrower: noise levels must not be
        rounded.
        """
        count = {"ddim": 1, "ddpm": steps or self.num_inference_steps}[self.sampler]
        shape, dtype = (self.randsteps, *features.shape[1:]), torch.promote_types(features.dtype, torch.float32)
        drawing = self.generators_for(features, seeds, run)

        def normal(generator: torch.Generator) -> Tensor:
            maps = [torch.randn(shape, generator=generator, device=generator.device) for _ in range(count)]
            return torch.stack(maps).to(dtype)

        start, *noise = draw(normal, drawing, features.device).transpose(0, 1).flatten(1, 2)
        return start, noise

    def denoising_steps(
        self,
        features: Tensor,
        start: Tensor,
        noise: Iterable[Tensor] | None = None,
        *,
        steps: int | None = None,
        sampler: Sampler | None = None,
        time_difference: int | None = None,
    ) -> Steps:
        """Yield the steps of a run from the noise `start` (N*R, width, h, w); see `StepwiseSegmentor`.

        Sampler and time difference default to the configuration, see `denoise`.
        """
        if start.shape[0] % features.shape[0] or start.shape[1:] != features.shape[1:]:
            raise ValueError(
                f"noise of shape {tuple(start.shape)} does not fit features {tuple(features.shape)}: "
                "it must be (N*R, C, h, w)"
            )
        starts = start.shape[0] // features.shape[0]
        # A 1x1 convolution is linear: the image half of `transform` is the same in every step.
        weight = self.transform.weight
        image_part = F.conv2d(features, weight[:, : self.width], self.transform.bias).repeat_interleave(starts, 0)
        image_part = image_part.contiguous(memory_format=torch.channels_last)  # the layout of the decoder's tokens
        difference = self.time_difference if time_difference is None else time_difference
        count = self.num_inference_steps if steps is None else steps
        pairs = time_pairs(count, difference, self.sample_range[0])
        nows, nexts = (noise_at(times, self.noise_schedule, start) for times in zip(*pairs, strict=True))
        grid, noisy = make_grid(start), start.contiguous(memory_format=torch.channels_last)
        draws = None if noise is None else iter(noise)
        rows = torch.arange(len(start), device=start.device)  # the maps still in the run
        for k, ((_, next_time), now, after) in enumerate(zip(pairs, nows, nexts, strict=True), 1):
            mixed = image_part + F.conv2d(noisy, weight[:, self.width :])
            logits = self.decoder(mixed, self.time_embedding(now.log_snr[None]), grid)
            going = yield Step(str(k), logits, noisy)
            if k == len(pairs):
                return
            if going is not None:
                kept = going.repeat_interleave(starts)
                image_part, noisy, logits, rows = image_part[kept], noisy[kept], logits[kept], rows[kept]
            clean = self.embed_labels(logits.argmax(1)).to(noisy.dtype)
            match sampler or self.sampler:
                case "ddim":
                    noisy = ddim_step(noisy, clean, now, after)
                case "ddpm":
                    z = None if next_time == 0 else torch.randn_like(noisy) if draws is None else next(draws)[rows]
                    noisy = ddpm_step(noisy, clean, now, after, z)
                case other:
                    raise ValueError(f"sampler is {other!r}; it must be ddim or ddpm")

    def denoise(
        self,
        features: Tensor,
        noise: Tensor,
        *,
        steps: int | None = None,
        sampler: Sampler | None = None,
        accumulate: bool | None = None,
        time_difference: int | None = None,
        step_noise: Tensor | None = None,
    ) -> Tensor:
        """Return the output (N, K, h, w) of one sampling run at the features' resolution.

        Args:
            features: (N, width, h, w) from `encode`.
            noise: (N*R, width, h, w) standard normal start, image-major; the output is the mean over the R starts.
            steps: sampling steps; this and the following default to the configuration.
            sampler: "ddim" or "ddpm".
            accumulate: True returns the mean probability over all steps and starts, False the last step's mean logits.
            time_difference: see `ddp_seg.diffusion.time_pairs`.
            step_noise: (steps - 1, N*R, width, h, w) or more, the standard normal draws of "ddpm"; None draws them from
            torch's generator.

        Raises ValueError for shapes that do not fit, an unknown sampler, and too few draws.
        """
        if sampler is not None and sampler not in get_args(Sampler):
            raise ValueError(f"sampler is {sampler!r}; it must be {' or '.join(get_args(Sampler))}")
        count = self.num_inference_steps if steps is None else steps
        if step_noise is not None and len(step_noise) < count - 1:
            raise ValueError(f"{len(step_noise)} draws for a run of {count} steps; it takes {count - 1}")
        run = self.denoising_steps(
            features, noise, step_noise, steps=steps, sampler=sampler, time_difference=time_difference
        )
        return last(self.answers(run, len(features), accumulate))

    # Training

    def losses(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        seeds: Sequence[int] | None = None,
        draws: Mapping[str, Tensor] | None = None,
        loss: LossConfig = LossConfig(),  # noqa: B008  (frozen)
    ) -> dict[str, Tensor]:
        """Return the losses of one training step; see `Segmentor`.

        draws: "times" (N,) in the sample range and "noise" (N, width, h, w). Ignored pixels count in the mean, as
        published.
        """
        features = self.encode(images)
        times, noise = (draws["times"], draws["noise"]) if draws else self._draw_training(features, seeds)
        noise = to_device(noise, features.device)
        if self.self_aligned:
            with pass_without_grad():  # the model's own prediction from pure noise replaces the labels
                first = to_device(log_snr(torch.ones(1), self.noise_schedule), noise.device)
                targets = self.decode(features, noise, first).argmax(1)
        else:
            targets = F.interpolate(labels[:, None].float(), features.shape[-2:], mode="nearest")[:, 0].long()
            targets = torch.where(targets == self.ignore_index, self.num_classes, targets)
        level = to_device(log_snr(times, self.noise_schedule), noise.device)
        logits = self.decode(features, add_noise(self.embed_labels(targets), noise, level), level)
        heads = {"decode": (logits, 1.0)}
        if self.auxiliary_head is not None:
            heads["aux"] = self.auxiliary_head(features), AUXILIARY_WEIGHT
        return head_losses(heads, labels, loss, ignore_index=self.ignore_index)

    def _draw_training(self, features: Tensor, seeds: Sequence[int] | None) -> tuple[Tensor, Tensor]:
        low, high = self.sample_range
        drawing = self.generators_for(features, seeds)
        times = [torch.rand(1, generator=each.host) * (high - low) + low for each in drawing]

        def normal(generator: torch.Generator) -> Tensor:
            return torch.randn(features.shape[1:], generator=generator, device=generator.device)

        return torch.cat(times), draw(normal, drawing, features.device)

    def recomputed_blocks(self) -> list[nn.Module]:
        heads = [] if self.auxiliary_head is None else [self.auxiliary_head]
        return [*self.backbone.recomputed_blocks(), *self.decoder.layers, *heads]

    # Weights

    def published_name(self, name: str) -> str:
        return rename(name, RULES)
