"""DDPS: a mask prior that denoises a label map, given the features of a trained base model (arXiv 2306.01721).

The image is encoded once; every step embeds the current noisy label map, runs the UNet on both, and answers with the
logits of the clean map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddps_seg import unet
from ddps_seg.base import EncoderSegmentor, padded
from ddps_seg.configs import DDPS
from ddps_seg.diffusion import Mode, Tables, log_q_posterior, q_pred, sample, step_list, tables
from segcore.errors import UserError
from segcore.models.layers import pass_without_grad, resize, to_device
from segcore.models.losses import cross_entropy
from segcore.models.segmentor import LoadReport
from segcore.seeds import start_seed

BACKGROUND = 0
SHOWN = 20
"""Timesteps of a run that `predict` shows: every one is held for all classes, at the size of the image."""
DRAWS_LIMIT = 1_500_000_000
"""Bytes of random draws that an export may hold; an ONNX file ends at 2 GB."""
BASE_CLASSIFIERS = ("classifier.", "auxiliary_head.", "decode_head.conv_seg.")


@dataclass(frozen=True)
class Step:
    """One evaluation at a timestep: the label map (N, h, w) that it starts from and its logits (N, K, h, w)."""

    timestep: int
    noisy: Tensor
    logits: Tensor


class DDPSSegmentor(EncoderSegmentor):
    """DDPS, multi-step or single-step. Built by `DDPS.build`. Images of any size are padded to a multiple of 16.

    Evaluated timesteps are the step entries: "0" is the first answer, from a random label map, and str(T - 1) the last
    and the configured one. The single-step variant has the one entry "final".
    """

    ignore_index = BACKGROUND
    step_unit = "timestep"
    diffusion = True

    def __init__(self, config: DDPS) -> None:
        super().__init__(config)
        self.config = config
        self.diffusion = not config.single_step
        condition = self.head.width
        self.labels = nn.Embedding(config.num_classes, config.embedding_width)
        self.unet = unet.UNet(condition + config.embedding_width, config.width, config.output_width, config.multipliers)
        self.dropout = nn.Dropout2d(config.dropout)
        self.classifier = nn.Conv2d(config.output_width, config.num_classes, 1)
        if not config.single_step:
            noise = tables(config.num_train_timesteps, config.num_classes, config.noise_schedule)
            for name, table in zip(Tables._fields, noise, strict=True):
                self.register_buffer(name, table)
        if config.freeze != "none":
            for part in (self.backbone, self.head):
                part.requires_grad_(False)
        self.labels.requires_grad_(config.train_labels)

    def train(self, mode: bool = True) -> DDPSSegmentor:
        """Set the mode; of the frozen parts only where `freeze` says so."""
        super().train(mode)
        if self.config.freeze == "eval":
            self.backbone.eval()
            self.head.eval()
        return self

    @property
    def noise(self) -> Tables:
        """The noise schedule's tables."""
        return Tables(*(getattr(self, name) for name in Tables._fields))

    # Inference

    def condition(self, images: Tensor) -> Tensor:
        """Return the condition (N, C, h, w) of images of any size, padded; see `encode`."""
        self.check_size(images)
        return self.encode(padded(images))

    def denoise(self, condition: Tensor, mask: Tensor, timesteps: Tensor) -> Tensor:
        """Return logits (N, K, h, w) from a condition (N, C, h, w) and label maps (N, h, w) at timesteps (N,)."""
        embedded = self.labels(mask).permute(0, 3, 1, 2)
        return self.classifier(self.dropout(self.unet(torch.cat([condition, embedded], 1), timesteps)))

    def trace(
        self,
        condition: Tensor,
        mask: Tensor,
        *,
        uniforms: Iterable[Tensor] | None = None,
        inference_timesteps: int | None = None,
        mode: Mode = "q_pred",
        guidance_scale: float = 1.0,
    ) -> Generator[Step, Tensor | None, None]:
        """Yield every step of a run; arguments as for `denoise_steps`.

        `send` may answer a step with a bool mask (N,) of the images that the run goes on with; the others leave it.
        """
        if mask.shape != (len(condition), *condition.shape[-2:]):
            raise ValueError(f"mask of shape {tuple(mask.shape)} does not fit the condition {tuple(condition.shape)}")
        if mode not in get_args(Mode):
            raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(get_args(Mode))}")
        total, classes = self.config.num_train_timesteps, self.num_classes
        steps = self._timesteps(inference_timesteps)
        draws = iter(uniforms) if uniforms is not None else None
        times = self.unet.embed_time(torch.tensor(steps, device=condition.device)).split(1)
        stem = self.unet.stem
        channels = condition.shape[1]
        # The stem is linear: the condition's part of it is the same in every step.
        image_part = F.conv2d(condition, stem.weight[:, :channels], stem.bias, padding=3)
        label_weight = stem.weight[:, channels:]
        rows = torch.arange(len(condition))  # the images that are still in the run
        for k, (step, time) in enumerate(zip(steps, times, strict=True)):
            label_part = F.conv2d(self.labels(mask).permute(0, 3, 1, 2), label_weight, padding=3)
            logits = self.classifier(self.unet.body(image_part + label_part, time))
            if mode == "q_pred" and guidance_scale != 1:
                assert stem.bias is not None
                free = self.classifier(self.unet.body(stem.bias[:, None, None] + label_part, time))
                logits = (1 + guidance_scale) * logits - guidance_scale * free
            keep = yield Step(step, mask, logits)
            if k + 1 == len(steps):
                return
            uniform = torch.rand(len(condition), *logits.shape[1:]) if draws is None else next(draws)
            if keep is not None:
                image_part, mask, logits, rows = image_part[keep], mask[keep], logits[keep], rows[keep.cpu()]
            clean, index = logits.argmax(1), total - 1 - steps[k + 1]
            uniform = uniform[rows].to(clean.device)
            if mode == "q_pred":
                mask = q_pred(clean, index, self.noise, uniform)
            else:
                log_p = log_q_posterior(clean, mask, index, self.noise, classes, exact=mode == "bayes")
                mask = sample(log_p, uniform)

    def denoise_steps(
        self,
        condition: Tensor,
        mask: Tensor,
        *,
        uniforms: Iterable[Tensor] | None = None,
        inference_timesteps: int | None = None,
        mode: Mode = "q_pred",
        guidance_scale: float = 1.0,
    ) -> dict[str, Tensor]:
        """Return logits (N, K, h, w) by timestep, in the order of the run.

        Args:
            condition: (N, C, h, w) from `encode`.
            mask: (N, h, w) int64, the initial label map; uniformly random in the published system.
            uniforms: (steps - 1, N, K, h, w), or as many tensors (N, K, h, w) one after the other: the uniform draws in
                [0, 1) behind the Gumbel samples; None draws them from torch's generator.
            inference_timesteps: see `ddps_seg.diffusion.step_list`.
            mode, guidance_scale: see `DDPS`.

        Raises ValueError about a mode or number of timesteps that there is not, and too few or too many draws.
        """
        wanted = len(self._timesteps(inference_timesteps)) - 1
        if isinstance(uniforms, Sized) and len(uniforms) != wanted:
            raise ValueError(f"{len(uniforms)} draws for a run of {wanted + 1} evaluations; it takes {wanted}")
        run = self.trace(
            condition, mask, uniforms=uniforms, inference_timesteps=inference_timesteps,
            mode=mode, guidance_scale=guidance_scale,
        )  # fmt: skip
        return {str(step.timestep): step.logits for step in run}

    def run(
        self, condition: Tensor, seeds: Sequence[int] | None, mask: Tensor | None = None, start: int = 0
    ) -> Generator[Step, Tensor | None, None]:
        """Return the configured run from `mask`, by default random; `start` counts the runs of one seed."""
        config, shape = self.config, (self.num_classes, *condition.shape[-2:])
        generators = list(_generators(seeds, len(condition), start))
        own = torch.stack([torch.randint(shape[0], shape[1:], generator=g) for g in generators])
        mask = own.to(condition.device) if mask is None else mask
        # One after the other: a map's draws are larger than its logits.
        uniforms = (
            torch.stack([torch.rand(shape, generator=g) for g in generators]) for _ in range(config.num_train_timesteps)
        )
        return self.trace(
            condition, mask, uniforms=uniforms, inference_timesteps=config.num_inference_steps, mode=config.mode,
            guidance_scale=config.guidance_scale,
        )  # fmt: skip

    def predict_steps(
        self, images: Tensor, steps: Sequence[int] | None = None, seeds: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Return the logits of the timesteps `steps` of one run, and of the last one; see `Segmentor`.

        Raises UserError when the configured run does not come to one of them.
        """
        names = self.collected(steps)
        run = self.run(self.condition(images), seeds)
        found = {n: s.logits for s in run if (n := self._entry(s)) in names}
        return {name: self._full_size(found[name], images) for name in names}

    def refine_mask(self, images: Tensor, masks: Tensor, seeds: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Return the logits (N, K, H, W) after the timesteps of a run that starts from label maps (N, H', W').

        They may have any size; nearest neighbors bring them to the images' and the condition's. Raises UserError about
        other labels than 0 .. K - 1.
        """
        if masks.numel() and not 0 <= masks.min() <= masks.max() < self.num_classes:
            raise UserError(
                f"the start map has labels {masks.min()} to {masks.max()}; give 0 to {self.num_classes - 1}"
            )
        start = padded(F.interpolate(masks[:, None].float(), images.shape[-2:], mode="nearest"))[:, 0, ::4, ::4]
        return self._shown(self.run(self.condition(images), seeds, mask=start.long().to(images.device)), images)

    def check_steps(self, steps: Sequence[int]) -> None:
        """Raise UserError when the configured run does not come to one of the timesteps."""
        self.collected(steps)

    def collected(self, steps: Collection[int] | None) -> list[str]:
        """Return the step entries for `steps`, in the order of the run."""
        if self.config.single_step or not steps:
            return [self.default_step]
        known = self._timesteps(self.config.num_inference_steps)
        if wrong := [step for step in steps if step not in known]:
            text = ", ".join(map(str, known))
            raise UserError(
                f"evaluate.steps has {wrong[0]}, but the run evaluates the timesteps {text}; name some of these"
            )
        return [str(step) for step in sorted({*steps, known[-1]})]

    @property
    def default_step(self) -> str:
        """The entry of the last timestep."""
        return "final" if self.config.single_step else str(self.config.num_train_timesteps - 1)

    def denoising_trajectory(self, images: Tensor, seeds: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Return the logits after every timestep of the configured run, of long ones after some; see `Segmentor`."""
        if self.config.single_step:
            return {}
        return self._shown(self.run(self.condition(images), seeds), images)

    def log_mean_probs(self, images: Tensor, seeds: Sequence[int] | None = None, starts: int = 4) -> Tensor:
        """Return the log of the mean class probability over `starts` runs and their steps; see `Segmentor`.

        The first step is left out, as it sees nothing but a random map.
        """
        if self.config.single_step:
            raise self.no_diffusion()
        condition = self.condition(images)
        total, count = torch.zeros((), device=condition.device), 0
        for start in range(starts):
            for step in self.run(condition, seeds, start=start):
                if step.timestep:
                    total, count = total + step.logits.float().softmax(1), count + 1
        return self._full_size((total / count).clamp(min=1e-8).log(), images)

    def early_exit(
        self, images: Tensor, percent: float, seeds: Sequence[int] | None = None
    ) -> tuple[Tensor, list[int]]:
        """Return the answers of runs that end early, and their numbers of steps; see `Segmentor`.

        Changes are counted on the label maps at 1/4 of the image's size. Images that are done leave the batch.
        """
        if self.config.single_step:
            raise self.no_diffusion()
        run = self.run(self.condition(images), seeds)
        left, last = list(range(len(images))), self.config.num_train_timesteps - 1
        answers: dict[int, tuple[Tensor, int]] = {}
        before: Tensor | None = None
        step, count = next(run), 1
        while True:
            classes = step.logits.argmax(1).flatten(1)
            changed = None if before is None else (classes != before).sum(1)
            quiet = changed is not None and changed < percent / 100 * classes.shape[1]
            done = torch.as_tensor(quiet).cpu().expand(len(left)) | (step.timestep == last)
            answers |= {image: (step.logits[row], count) for row, image in enumerate(left) if done[row]}
            left = [image for row, image in enumerate(left) if not done[row]]
            if not left:
                break
            going = ~done.to(classes.device)
            before, count = classes[going], count + 1
            step = run.send(going)
        logits, counts = zip(*(answers[image] for image in range(len(images))), strict=True)
        return self._full_size(torch.stack(logits), images), list(counts)

    def exportable(self, images: Tensor, *, dynamic: bool) -> nn.Module:
        """Return the configured run with the draws of seed 0 as constants; see `Segmentor`."""
        if dynamic:
            raise UserError("DDPS's draws have the size of the image, so it is exported for one; leave out --dynamic")
        count = len(self._timesteps(self.config.num_inference_steps)) - 1
        size = count * self.num_classes * math.prod(images.shape[-2:]) // 16 * 4
        if size > DRAWS_LIMIT:
            raise UserError(
                f"the exported run would hold {size / 1e9:.1f} GB of random draws; give a smaller --size or "
                "--model.num-inference-steps"
            )
        return _FixedDraws(self, images)

    def _shown(self, run: Iterable[Step], images: Tensor) -> dict[str, Tensor]:
        """Return the logits at the images' size by timestep, of more than `SHOWN` only so many, evenly spread."""
        known = self._timesteps(self.config.num_inference_steps)
        if len(known) > SHOWN:
            known = [known[round(i * (len(known) - 1) / (SHOWN - 1))] for i in range(SHOWN)]
        return {f"timestep {s.timestep}": self._full_size(s.logits, images) for s in run if s.timestep in known}

    def _timesteps(self, wanted: int | None) -> list[int]:
        """Return the timesteps that a run evaluates; `wanted` as for `step_list`."""
        return [0] if self.config.single_step else step_list(self.config.num_train_timesteps, wanted)

    def _entry(self, step: Step) -> str:
        return "final" if self.config.single_step else str(step.timestep)

    def _full_size(self, logits: Tensor, images: Tensor) -> Tensor:
        """Return logits (N, K, H, W) at the images' size."""
        height, width = images.shape[-2:]
        full = resize(logits, padded(images[:1]).shape[-2:])[..., :height, :width]
        if self.config.suppress_background and not self.training:
            return torch.cat([torch.full_like(full[:, :1], -1e4), full[:, 1:]], 1)
        return full

    # Training

    def losses(
        self,
        images: Tensor,
        labels: Tensor,
        seeds: Sequence[int] | None = None,
        draws: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return the losses of one training step: diffusion on the first prediction (section 3.3); see `Segmentor`.

        The network cleans noised versions of its own first answer, held against the labels. draws: "timesteps" (N,),
        "masks" (N, h, w) random labels, "uniforms" (N, K, h, w) in [0, 1), and "condition" (N,) in [0, 1), of which
        those below `condition_dropout` lose their condition. The single-step variant needs the masks only.
        """
        self.check_batch(images)
        frozen = self.config.freeze != "none"
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            condition = self.condition(images)
        draws = self.draw(condition, seeds) if draws is None else draws
        drawn, draws = draws, {name: to_device(value, condition.device) for name, value in draws.items()}
        if self.config.condition_dropout:
            kept = draws["condition"] >= self.config.condition_dropout
            condition = condition * kept[:, None, None, None]
        if self.config.single_step:
            mask, timesteps = draws["masks"], torch.zeros(len(images), dtype=torch.long, device=condition.device)
        else:
            timesteps = draws["timesteps"]
            first = self._first_prediction(condition, labels, drawn["timesteps"], draws["masks"])
            mask = q_pred(first, self.config.num_train_timesteps - 1 - timesteps, self.noise, draws["uniforms"])
        logits = self._full_size(self.denoise(condition, mask, timesteps), images)
        loss, accuracy = cross_entropy(logits, labels, ignore_index=self.ignore_index, class_weight=self.class_weight)
        return {"loss": loss, "decode.loss_ce": loss, "decode.acc_seg": accuracy}

    @pass_without_grad()
    def _first_prediction(self, condition: Tensor, labels: Tensor, timesteps: Tensor, masks: Tensor) -> Tensor:
        """Return the clean maps (N, h, w): the labels at timestep 0, else the answer from a random map.

        `timesteps` (N,) are on the CPU, so that the host knows without asking the device which images need the answer.
        """
        size = [4 * side for side in condition.shape[-2:]]
        full = F.pad(labels, (0, size[1] - labels.shape[2], 0, size[0] - labels.shape[1]), value=self.ignore_index)
        first = F.interpolate(full[:, None].float(), condition.shape[-2:], mode="nearest")[:, 0].long()
        if images := [i for i, timestep in enumerate(timesteps.tolist()) if timestep]:
            later = to_device(torch.tensor(images), condition.device)
            start = torch.zeros_like(later)
            first[later] = self.denoise(condition[later], masks[later], start).argmax(1)
        return first

    def draw(self, condition: Tensor, seeds: Sequence[int] | None) -> dict[str, Tensor]:
        """Return what `losses` draws, image by image from its seed."""
        shape = (self.num_classes, *condition.shape[-2:])
        drawn: dict[str, list[Tensor]] = {name: [] for name in ("condition", "timesteps", "masks", "uniforms")}
        for g in _generators(seeds, len(condition)):
            drawn["condition"].append(torch.rand((), generator=g))
            drawn["timesteps"].append(torch.randint(self.config.num_train_timesteps, (), generator=g))
            drawn["masks"].append(torch.randint(shape[0], shape[1:], generator=g))
            if not self.config.single_step:
                drawn["uniforms"].append(torch.rand(shape, generator=g))
        return {name: torch.stack(values) for name, values in drawn.items() if values}

    # Weights

    def _official_name(self, name: str) -> str:
        part, _, rest = name.partition(".")
        if part == "unet":
            return f"decode_head.unet.{unet.official_name(rest)}"
        renamed = {"labels": "embed.", "classifier": "conv_seg_new."}.get(part)
        if part == "head":
            return super()._official_name(name)
        return f"decode_head.{renamed}{rest}" if renamed else f"decode_head.{name}"

    def is_full_checkpoint(self, state: Mapping[str, Tensor]) -> bool:
        """Return whether start weights `state` are those of a whole model of this kind, multi-step or single-step."""
        prior = any(name.startswith(("unet.", "decode_head.unet.")) for name in state)
        return prior and (self.config.single_step or any(name.endswith(Tables._fields) for name in state))

    def load_pretrained(self, state: Mapping[str, Tensor]) -> tuple[str, LoadReport]:
        """Load a base model's backbone and head, or the single-step variant; else as `Segmentor` does."""
        names, own = self.key_map(), self.state_dict()
        ours = not any(name.startswith("decode_head.") for name in state)
        names = {name: name if ours else names[name] for name in names}
        if any(name.startswith(("unet.", "decode_head.unet.")) for name in state):
            noise = {names[name]: own[name] for name in Tables._fields}
            return "single-step variant", self._load({**state, **noise}, names, self.convert)
        encoder = [name for name in own if name.startswith(("backbone.", "head."))]
        if not any(names[name] in state for name in encoder if name.startswith("head.")):
            return super().load_pretrained(state)
        rest = tuple(name for name in state if name.startswith(BASE_CLASSIFIERS))
        given = {name: tensor for name, tensor in state.items() if name not in rest}
        kept = {names[name]: tensor for name, tensor in own.items() if name not in encoder}
        report = self._load({**kept, **given}, names, self.convert)
        return "base model", replace(report, loaded=len(given), dropped=rest)

    def _load(
        self, state: Mapping[str, Tensor], names: Mapping[str, str], convert: Callable[[str, Tensor], Tensor]
    ) -> LoadReport:
        if self.config.ignore_schedule_mismatch and not self.config.single_step:
            state = {**state, **{names[name]: getattr(self, name) for name in Tables._fields}}
        return super()._load(state, names, convert)


class _FixedDraws(nn.Module):
    """A model whose random draws are constants, for images of the shape of `images`."""

    mask: Tensor
    uniforms: Tensor

    def __init__(self, model: DDPSSegmentor, images: Tensor) -> None:
        super().__init__()
        self.model = model
        config, classes = model.config, model.num_classes
        with torch.no_grad():
            size = [side // 4 for side in padded(images[:1]).shape[-2:]]
        steps = len(model._timesteps(config.num_inference_steps))
        [generator] = _generators(None, 1)
        mask = torch.randint(classes, size, generator=generator)
        uniforms = [torch.rand(classes, *size, generator=generator) for _ in range(steps - 1)]
        self.register_buffer("mask", mask.expand(len(images), -1, -1).clone())
        self.register_buffer("uniforms", torch.stack(uniforms) if uniforms else torch.empty(0))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, K, H, W) for images (N, C, H, W)."""
        config = self.model.config
        draws: Iterator[Tensor] = (u.expand(len(images), -1, -1, -1) for u in self.uniforms.unbind())
        steps = self.model.trace(
            self.model.condition(images), self.mask, uniforms=draws, mode=config.mode,
            inference_timesteps=config.num_inference_steps, guidance_scale=config.guidance_scale,
        )  # fmt: skip
        *_, last = steps
        return self.model._full_size(last.logits, images)


def _generators(seeds: Sequence[int] | None, images: int, start: int = 0) -> Iterator[torch.Generator]:
    """Yield a CPU generator per image."""
    if seeds is not None and len(seeds) != images:
        raise ValueError(f"{len(seeds)} seeds for {images} images; give one seed per image")
    for seed in seeds or [0] * images:
        yield torch.Generator().manual_seed(start_seed(seed, start))
