"""DDP: a segmentation model that denoises a label map, conditioned on image features (arXiv 2303.17559).

The image is encoded once; every sampling step runs the light decoder on the features and the current noisy map.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddp_seg.configs import DDP
from ddp_seg.decoder import MapDecoder, TimeEmbedding, make_grid
from ddp_seg.diffusion import add_noise, ddim_step, ddpm_step, log_snr, noise_at, time_pairs
from ddp_seg.official import official_name
from segcore.errors import UserError
from segcore.models.backbones import build_backbone
from segcore.models.heads import FPN, FCNHead
from segcore.models.layers import ConvNorm, pass_without_grad, resize, to_device
from segcore.models.losses import cross_entropy
from segcore.models.segmentor import LoadReport, Segmentor

AUXILIARY_WEIGHT = 0.4


@dataclass(frozen=True)
class Step:
    """One sampling step at time `now`: the noisy map (N*R, C, h, w) it starts from and its logits (N*R, K, h, w)."""

    now: float
    noisy: Tensor
    logits: Tensor


class DDPSegmentor(Segmentor):
    """DDP and self-aligned DDP. Built by `DDP.build`; strides, shapes and names as in the paper's section 3."""

    step_unit = "steps"
    diffusion = True

    def __init__(self, config: DDP) -> None:
        super().__init__()
        self.config = config
        self.num_classes = config.num_classes
        width = config.width
        self.backbone = build_backbone(
            config.backbone, in_channels=config.in_channels, drop_path=config.drop_path, window=config.window
        )
        self.min_size = self.backbone.min_size
        self.fpn = FPN(self.backbone.channels, width)
        self.merge = ConvNorm(4 * width, width, 1, partial(nn.GroupNorm, 32))
        self.transform = nn.Conv2d(2 * width, width, 1)
        self.label_codes = nn.Embedding(config.num_classes + 1, width)  # the last row stands for ignored pixels
        self.time_embedding = TimeEmbedding(4 * width)
        self.decoder = MapDecoder(
            width, config.num_classes, config.decoder_layers, config.heads, config.points, time_dim=4 * width
        )
        self.auxiliary_head = FCNHead(width, width, config.num_classes) if config.auxiliary else None
        for conv in (self.merge.conv, self.transform):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        assert self.transform.bias is not None
        nn.init.zeros_(self.transform.bias)

    # Inference

    def encode(self, images: Tensor) -> Tensor:
        """Return image features (N, width, H/4, W/4) for normalized images (N, C, H, W); run once per image."""
        self.check_size(images)
        maps = self.fpn(self.backbone(images))
        # `merge` is a 1x1 convolution of the maps resized and concatenated. It is linear, and so is resizing: each map
        # is projected at its own size and resized afterwards.
        first, *others = self.merge.conv.weight.split(self.config.width, 1)
        merged = F.conv2d(maps[0], first)
        for x, weight in zip(maps[1:], others, strict=True):
            merged = merged + resize(F.conv2d(x, weight), merged.shape[-2:])
        return self.merge.norm(merged)

    def codes(self, labels: Tensor) -> Tensor:
        """Return codes (N, width, h, w) in [-bit_scale, bit_scale] of labels (N, h, w) in 0..K; K: ignored."""
        table = (torch.sigmoid(self.label_codes.weight) * 2 - 1) * self.config.bit_scale
        return F.embedding(labels, table).permute(0, 3, 1, 2)

    def decode(self, features: Tensor, noisy: Tensor, log_snr: Tensor) -> Tensor:
        """Return logits (N, K, h, w) from features and a noisy map (N, width, h, w) at log-SNRs (N,) or (1,)."""
        return self.decoder(self.transform(torch.cat([features, noisy], 1)), self.time_embedding(log_snr))

    def trace(
        self,
        features: Tensor,
        noise: Tensor,
        *,
        steps: int | None = None,
        sampler: str | None = None,
        time_difference: int | None = None,
        step_noise: Tensor | None = None,
    ) -> Generator[Step, Tensor | None, None]:
        """Yield every sampling step of a run; arguments as for `denoise`.

        `send` may answer a step with a bool mask (N*R,) of the maps that the run goes on with; the others leave it.
        """
        config = self.config
        if noise.shape[0] % features.shape[0] or noise.shape[1:] != features.shape[1:]:
            raise ValueError(
                f"noise of shape {tuple(noise.shape)} does not fit features {tuple(features.shape)}: "
                "it must be (N*R, C, h, w)"
            )
        starts = noise.shape[0] // features.shape[0]
        width = config.width
        # A 1x1 convolution is linear: the image's half of `transform` is the same in every step.
        weight = self.transform.weight
        image_part = F.conv2d(features, weight[:, :width], self.transform.bias).repeat_interleave(starts, 0)
        image_part = image_part.contiguous(memory_format=torch.channels_last)  # the layout of the decoder's tokens
        difference = config.time_difference if time_difference is None else time_difference
        pairs = time_pairs(config.num_inference_steps if steps is None else steps, difference, config.sample_range[0])
        nows, nexts = (noise_at(times, config.noise_schedule, noise) for times in zip(*pairs, strict=True))
        grid, noisy = make_grid(noise), noise.contiguous(memory_format=torch.channels_last)
        for k, ((time, next_time), now, after) in enumerate(zip(pairs, nows, nexts, strict=True)):
            mixed = image_part + F.conv2d(noisy, weight[:, width:])
            logits = self.decoder(mixed, self.time_embedding(now.log_snr[None]), grid)
            keep = yield Step(time, noisy, logits)
            if k + 1 == len(pairs):
                return
            if keep is not None:
                image_part, noisy, logits = image_part[keep], noisy[keep], logits[keep]
                step_noise = None if step_noise is None else step_noise[:, keep]
            codes = self.codes(logits.argmax(1)).to(noisy.dtype)
            if (sampler or config.sampler) == "ddim":
                noisy = ddim_step(noisy, codes, now, after)
            elif next_time > 0:
                z = torch.randn_like(noisy) if step_noise is None else step_noise[k]
                noisy = ddpm_step(noisy, codes, now, after, z)
            else:
                noisy = ddpm_step(noisy, codes, now, after, None)

    def denoise(
        self,
        features: Tensor,
        noise: Tensor,
        *,
        steps: int | None = None,
        sampler: str | None = None,
        accumulate: bool | None = None,
        time_difference: int | None = None,
        step_noise: Tensor | None = None,
    ) -> Tensor:
        """Return the answer (N, K, h, w) of one sampling run at the features' resolution.

        Args:
            features: (N, width, h, w) from `encode`.
            noise: (N*R, width, h, w) standard normal start, image-major; the answer is the mean over the R starts.
            steps: sampling steps; this and the following default to the configuration.
            sampler: "ddim" or "ddpm".
            accumulate: True returns the mean probability over all steps and starts, False the last step's mean logits.
            time_difference: see `ddp_seg.diffusion.time_pairs`.
            step_noise: (steps, N*R, width, h, w), the standard normal draws of "ddpm"; None draws them from torch's
            generator.
        """
        accumulate = self.config.accumulation if accumulate is None else accumulate
        total, last, count = None, None, 0
        for step in self.trace(
            features, noise, steps=steps, sampler=sampler, time_difference=time_difference, step_noise=step_noise
        ):
            last, count = step.logits, count + 1
            if accumulate:
                probabilities = step.logits.to(noise.dtype).softmax(1)
                total = probabilities if total is None else total + probabilities
        answer = last if total is None else total / count
        assert answer is not None
        return answer.unflatten(0, (features.shape[0], -1)).mean(1)

    def denoise_until(
        self, features: Tensor, noise: Tensor, percent: float, *, step_noise: Tensor | None = None
    ) -> tuple[Tensor, list[int]]:
        """Return the answers (N, K, h, w) of the configured run and how many steps each image took for its own.

        An image leaves the batch with the answer of the first step that changed the classes of fewer than `percent` %
        of its h * w pixels, at the last step otherwise. Times are those of a run of all the configured steps; the other
        arguments as for `denoise`.
        """
        starts, last = len(noise) // len(features), self.config.num_inference_steps
        results: dict[int, tuple[Tensor, int]] = {}
        left = list(range(len(features)))  # the images that are still in the batch
        before, total = None, torch.zeros((), device=noise.device)
        run = self.trace(features, noise, step_noise=step_noise)
        step = next(run)
        for count in range(1, last + 1):
            answer = step.logits
            if self.config.accumulation:
                total = total + answer.to(noise.dtype).softmax(1)
                answer = total / count
            answer = answer.unflatten(0, (len(left), starts)).mean(1)
            classes = answer.argmax(1).flatten(1)
            if before is None:
                done = torch.full((len(left),), count == last)
            else:
                done = ((classes != before).sum(1) < percent / 100 * classes.shape[1]).cpu() | (count == last)
            results |= {image: (answer[row], count) for row, image in enumerate(left) if done[row]}
            left = [image for row, image in enumerate(left) if not done[row]]
            if not left:
                break
            going = ~done.to(noise.device)
            maps, before = going.repeat_interleave(starts), classes[going]
            total = total[maps] if self.config.accumulation else total
            step = run.send(maps)
        ordered = [results[image] for image in range(len(features))]
        return torch.stack([answer for answer, _ in ordered]), [count for _, count in ordered]

    def draw_noise(
        self, features: Tensor, seeds: Sequence[int] | None, steps: int, starts: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the start noise (N*R, C, h, w) and, for the DDPM sampler, the step noise (steps, N*R, C, h, w).

        R is `starts`, by default as configured. Always float32 or wider, also where autocast made the features
        narrower: noise levels must not be rounded.
        """
        starts, shape = starts or self.config.randsteps, features.shape[1:]
        dtype = torch.promote_types(features.dtype, torch.float32)
        noise, step_noise = [], []
        for generator in _generators(seeds, len(features)):
            noise.append(torch.randn(starts, *shape, generator=generator))
            if self.config.sampler == "ddpm":
                step_noise.append(torch.randn(steps, starts, *shape, generator=generator))
        start = torch.cat(noise).to(features.device, dtype)
        return start, torch.cat(step_noise, 1).to(start) if step_noise else None

    def check_steps(self, steps: Sequence[int]) -> None:
        """Raise UserError about a number of sampling steps below 1."""
        if steps and min(steps) < 1:
            raise UserError(f"evaluate.steps has {min(steps)}; DDP takes at least 1 step")

    def predict_steps(
        self, images: Tensor, steps: Sequence[int] | None = None, seeds: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Return one entry per number of sampling steps, each a run of its own from the same noise; see `Segmentor`.

        With `accumulation` the entries are probability maps instead of logits, as published.
        """
        counts = steps or (self.config.num_inference_steps,)
        self.check_steps(counts)
        features = self.encode(images)
        noise, step_noise = self.draw_noise(features, seeds, max(counts))
        answers = (self.denoise(features, noise, steps=count, step_noise=step_noise) for count in counts)
        return {str(count): resize(answer, images.shape[-2:]) for count, answer in zip(counts, answers, strict=True)}

    def exportable(self, images: Tensor, *, dynamic: bool) -> nn.Module:
        """Return the configured run with the noise of seed 0 as a constant; see `Segmentor`."""
        if dynamic:
            raise UserError(
                "DDP's noise has the size of the image, so it is exported for one size; leave out --dynamic"
            )
        return _FixedNoise(self, images)

    @property
    def default_step(self) -> str:
        """The entry of `predict_steps` for the configured number of steps."""
        return str(self.config.num_inference_steps)

    def denoising_trajectory(self, images: Tensor, seeds: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Return the logits after every step of the configured run, of the first random start; see `Segmentor`."""
        features = self.encode(images)
        noise, step_noise = self.draw_noise(features, seeds, self.config.num_inference_steps)
        steps = self.trace(features, noise, step_noise=step_noise)
        maps = (step.logits.unflatten(0, (len(images), -1))[:, 0] for step in steps)
        return {f"step {k}": resize(x, images.shape[-2:]) for k, x in enumerate(maps, 1)}

    def log_mean_probs(self, images: Tensor, seeds: Sequence[int] | None = None, starts: int = 4) -> Tensor:
        """Return the log of the mean class probability over `starts` configured runs and their steps; see `Segmentor`.

        Of several steps the first is left out: it sees nothing but noise in place of a map. The runs follow each other,
        so memory does not grow with their number.
        """
        features, steps = self.encode(images), self.config.num_inference_steps
        noise, step_noise = self.draw_noise(features, seeds, steps, starts)
        total, count = torch.zeros((), device=noise.device), 0
        for r in range(starts):  # the noise is image-major
            z = None if step_noise is None else step_noise[:, r::starts]
            for step in islice(self.trace(features, noise[r::starts], step_noise=z), min(1, steps - 1), None):
                total, count = total + step.logits.to(noise.dtype).softmax(1), count + 1
        return resize((total / count).clamp(min=1e-8).log(), images.shape[-2:])

    def early_exit(
        self, images: Tensor, percent: float, seeds: Sequence[int] | None = None
    ) -> tuple[Tensor, list[int]]:
        """Return the answers of runs that end early, and their lengths; see `Segmentor` and `denoise_until`."""
        features = self.encode(images)
        noise, step_noise = self.draw_noise(features, seeds, self.config.num_inference_steps)
        answer, taken = self.denoise_until(features, noise, percent, step_noise=step_noise)
        return resize(answer, images.shape[-2:]), taken

    # Training

    def losses(
        self,
        images: Tensor,
        labels: Tensor,
        seeds: Sequence[int] | None = None,
        draws: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return the losses of one training step; see `Segmentor`.

        draws: "times" (N,) in the sample range and "noise" (N, width, h, w). Ignored pixels count in the mean, as
        published.
        """
        features = self.encode(images)
        times, noise = (draws["times"], draws["noise"]) if draws else self._draw(features, seeds)
        noise = to_device(noise, features.device)
        if self.config.self_aligned:
            with pass_without_grad():  # the model's own answer from pure noise takes the place of the labels
                first = to_device(log_snr(torch.ones(1), self.config.noise_schedule), noise.device)
                targets = self.decode(features, noise, first).argmax(1)
        else:
            targets = F.interpolate(labels[:, None].float(), features.shape[-2:], mode="nearest")[:, 0].long()
            targets = torch.where(targets == self.ignore_index, self.num_classes, targets)
        level = to_device(log_snr(times, self.config.noise_schedule), noise.device)
        logits = self.decode(features, add_noise(self.codes(targets), noise, level), level)
        entropy = partial(cross_entropy, ignore_index=self.ignore_index, class_weight=self.class_weight)
        loss, accuracy = entropy(logits, labels)
        losses = {"loss": loss, "decode.loss_ce": loss, "decode.acc_seg": accuracy}
        if self.auxiliary_head is not None:
            loss, accuracy = entropy(self.auxiliary_head(features), labels)
            losses |= {"aux.loss_ce": AUXILIARY_WEIGHT * loss, "aux.acc_seg": accuracy}
            losses["loss"] = losses["decode.loss_ce"] + losses["aux.loss_ce"]
        return losses

    def _draw(self, features: Tensor, seeds: Sequence[int] | None) -> tuple[Tensor, Tensor]:
        low, high = self.config.sample_range
        times, noise = [], []
        for generator in _generators(seeds, len(features)):
            times.append(torch.rand(1, generator=generator) * (high - low) + low)
            noise.append(torch.randn(1, *features.shape[1:], generator=generator))
        return torch.cat(times), torch.cat(noise)

    # Weights

    def key_map(self) -> dict[str, str]:
        backbone = {f"backbone.{name}": f"backbone.{value}" for name, value in self.backbone.key_map().items()}
        return {name: backbone.get(name) or official_name(name) for name in self.state_dict()}

    def convert(self, name: str, tensor: Tensor) -> Tensor:
        if name.startswith("backbone."):
            return self.backbone.convert(name.removeprefix("backbone."), tensor)
        return tensor

    def load_backbone(self, state: Mapping[str, Tensor]) -> LoadReport:
        """Load ImageNet weights under timm's or the published names; see `Backbone.load_pretrained`."""
        return self.backbone.load_pretrained(state)


class _FixedNoise(nn.Module):
    """A model whose noise is a constant, for images of the shape of `images`."""

    noise: Tensor
    step_noise: Tensor | None

    def __init__(self, model: DDPSegmentor, images: Tensor) -> None:
        super().__init__()
        self.model = model
        with torch.no_grad():
            noise, step_noise = model.draw_noise(model.encode(images), None, model.config.num_inference_steps)
        self.register_buffer("noise", noise)
        self.register_buffer("step_noise", step_noise)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, K, H, W) for images (N, C, H, W)."""
        answer = self.model.denoise(self.model.encode(images), self.noise, step_noise=self.step_noise)
        return resize(answer, images.shape[-2:])


def _generators(seeds: Sequence[int] | None, images: int) -> Iterator[torch.Generator]:
    """Yield a CPU generator per image."""
    if seeds is not None and len(seeds) != images:
        raise ValueError(f"{len(seeds)} seeds for {images} images; give one seed per image")
    for seed in seeds or [0] * images:
        yield torch.Generator().manual_seed(seed)
