"""DDPS: a mask prior that denoises a label map, given the features of a trained base model (arXiv 2306.01721).

The image is encoded once; every step embeds the current noisy label map, runs the UNet on both, and outputs the logits
of the clean map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddps_seg import unet
from ddps_seg.base import EncoderSegmentor
from ddps_seg.diffusion import Mode, NoiseSchedule, Schedule, log_q_posterior, make_schedule, q_pred, sample, step_list
from segcore.config.schema import LossConfig
from segcore.errors import UserError
from segcore.models.key_map import rename
from segcore.models.layers import pass_without_grad, to_device, use_fast_products, widened
from segcore.models.losses import head_losses
from segcore.models.noise import draw, draw_steps
from segcore.models.segmentor import LoadReport
from segcore.models.stepwise import Step, Steps, StepwiseSegmentor

BACKGROUND = 0
DRAWS_LIMIT = 1_500_000_000
"""Maximum bytes of random draws in an export; an ONNX file is limited to 2 GB."""
BASE_CLASSIFIERS = ("classifier.", "auxiliary_head.", "decode_head.conv_seg.")


class DDPS(EncoderSegmentor, StepwiseSegmentor):
    """DDPS, multi-step or single-step; the arguments are the fields of `ddps_seg.configs.DDPSConfig`.

    Evaluated timesteps are the step entries: "0" is the first output, from a random label map; str(T - 1) is the last
    and the configured one. The single-step variant has timestep 0 only.
    """

    ignore_index = BACKGROUND
    step_unit = "timestep"
    pad_to = 16  # or more for a deeper UNet, which halves a map at 1/4 of the image size once per level but the last

    def __init__(
        self,
        *,
        num_classes: int = 151,
        in_channels: int = 3,
        backbone: str = "mit_b2",
        drop_path: float = 0.1,
        condition_width: int | None = None,
        dropout: float = 0.1,
        single_step: bool = False,
        width: int = 256,
        multipliers: tuple[int, ...] = (1, 1, 1),
        output_width: int = 256,
        embedding_width: int = 16,
        train_labels: bool = False,
        num_train_timesteps: int = 100,
        noise_schedule: Schedule = "linear",
        ignore_schedule_mismatch: bool = False,
        freeze: str = "published",
        condition_dropout: float = 0.0,
        num_inference_steps: int | None = None,
        mode: Mode = "q_pred",
        guidance_scale: float = 1.0,
        suppress_background: bool = False,
    ) -> None:
        super().__init__(num_classes, in_channels, backbone, drop_path, condition_width)
        self.single_step, self.freeze, self.condition_dropout = single_step, freeze, condition_dropout
        self.num_train_timesteps, self.num_inference_steps = num_train_timesteps, num_inference_steps
        self.mode, self.guidance_scale, self.suppress_background = mode, guidance_scale, suppress_background
        self.ignore_schedule_mismatch = ignore_schedule_mismatch and not single_step
        self.label_embedding = nn.Embedding(num_classes, embedding_width)
        self.unet = unet.UNet(self.head.width + embedding_width, width, output_width, multipliers)
        self.pad_to = max(self.pad_to, 4 << (len(multipliers) - 1))
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(output_width, num_classes, 1)
        if not single_step:
            schedule = make_schedule(num_train_timesteps, num_classes, noise_schedule)
            for name, table in zip(NoiseSchedule._fields, schedule, strict=True):
                self.register_buffer(name, table)
        trains = {"published": False, "eval": False, "none": True}[freeze]
        for part in (self.backbone, self.head):
            part.requires_grad_(trains)
        self.label_embedding.requires_grad_(train_labels)
        use_fast_products(self)

    def train(self, mode: bool = True) -> DDPS:
        """Set the mode; with `freeze` eval, backbone and head stay in evaluation mode."""
        super().train(mode)
        if self.freeze == "eval":
            self.backbone.eval()
            self.head.eval()
        return self

    @property
    def schedule(self) -> NoiseSchedule:
        """The tables of the noise schedule."""
        return NoiseSchedule(*(getattr(self, name) for name in NoiseSchedule._fields))

    # Inference

    def denoise(self, condition: Tensor, mask: Tensor, timesteps: Tensor) -> Tensor:
        """Return logits (N, K, h, w) from a condition (N, C, h, w) and label maps (N, h, w) at timesteps (N,)."""
        embedded = self.label_embedding(mask).permute(0, 3, 1, 2)
        return self.classifier(self.dropout(self.unet(torch.cat([condition, embedded], 1), timesteps)))

    @property
    def step_keys(self) -> Sequence[int]:
        """The timesteps of the configured run."""
        return self._timesteps(self.num_inference_steps)

    def _timesteps(self, wanted: int | None) -> list[int]:
        """Return the timesteps that a run evaluates; `wanted` as for `step_list`."""
        return [0] if self.single_step else step_list(self.num_train_timesteps, wanted)

    def draw(
        self, features: Tensor, seeds: Sequence[int] | None, *, steps: int | None = None, run: int = 0
    ) -> tuple[Tensor, Iterator[Tensor]]:
        """Return a random label map (N, h, w) and the uniform draws (N, K, h, w) of each further step.

        They are drawn one step at a time: a map's draws are larger than its logits.
        """
        drawing, device = self.generators_for(features, seeds, run), features.device
        start = draw(self._labels(features), drawing, device)
        count = len(self._timesteps(steps or self.num_inference_steps)) - 1
        return start, draw_steps(self._uniforms(features), drawing, device, count)

    def _labels(self, features: Tensor) -> Callable[[torch.Generator], Tensor]:
        """Return a function that draws a random label map (h, w)."""
        size = features.shape[-2:]
        return lambda g: torch.randint(self.num_classes, size, generator=g, device=g.device)

    def _uniforms(self, features: Tensor) -> Callable[[torch.Generator], Tensor]:
        """Return a function that draws uniform numbers (K, h, w)."""
        shape = (self.num_classes, *features.shape[-2:])
        return lambda g: torch.rand(shape, generator=g, device=g.device)

    def denoising_steps(
        self,
        features: Tensor,
        start: Tensor,
        noise: Iterable[Tensor] | None = None,
        *,
        steps: int | None = None,
        mode: Mode | None = None,
        guidance_scale: float | None = None,
    ) -> Steps:
        """Yield the steps of a run from the label maps `start` (N, h, w), see `StepwiseSegmentor`.

        `features` are the condition; the other arguments default to the configuration, see `denoise_steps`.
        """
        mode = self.mode if mode is None else mode
        guidance = self.guidance_scale if guidance_scale is None else guidance_scale
        if start.shape != (len(features), *features.shape[-2:]):
            raise ValueError(f"mask of shape {tuple(start.shape)} does not fit the condition {tuple(features.shape)}")
        if mode not in get_args(Mode):
            raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(get_args(Mode))}")
        timesteps = self._timesteps(steps or self.num_inference_steps)
        draws = None if noise is None else iter(noise)
        # Filled in one by one: a copy would wait for the GPU, and cannot be recorded in a CUDA graph.
        filled = [torch.full((), timestep, device=features.device) for timestep in timesteps]
        times = self.unet.embed_time(torch.stack(filled)).split(1)
        stem, channels = self.unet.stem, features.shape[1]
        # The stem is linear: its output for the condition is the same in every step.
        image_part = F.conv2d(features, stem.weight[:, :channels], stem.bias, padding=3)
        label_weight = stem.weight[:, channels:]
        mask, rows = start, torch.arange(len(features), device=start.device)  # the images still in the run
        for k, (timestep, time) in enumerate(zip(timesteps, times, strict=True), 1):
            label_part = F.conv2d(self.label_embedding(mask).permute(0, 3, 1, 2), label_weight, padding=3)
            logits = self.classifier(self.unet.body(image_part + label_part, time))
            if mode == "q_pred" and guidance != 1:
                assert stem.bias is not None
                free = self.classifier(self.unet.body(stem.bias[:, None, None] + label_part, time))
                logits = (1 + guidance) * logits - guidance * free
            going = yield Step(str(timestep), logits, mask)
            if k == len(timesteps):
                return
            if draws is None:
                uniform = torch.rand(len(features), *logits.shape[1:], device=logits.device)
            else:
                uniform = to_device(next(draws), logits.device)
            if going is not None:
                image_part, mask, logits, rows = image_part[going], mask[going], logits[going], rows[going]
            mask = self._next_map(logits.argmax(1), mask, timesteps[k], uniform[rows], mode)

    def _next_map(self, clean: Tensor, noisy: Tensor, timestep: int, uniform: Tensor, mode: Mode) -> Tensor:
        """Return the label map (N, h, w) that `timestep` starts from, given the predicted clean map."""
        index = self.num_train_timesteps - 1 - timestep
        if mode == "q_pred":
            return q_pred(clean, index, self.schedule, uniform)
        exact = {"q_posterior": False, "bayes": True}[mode]
        return sample(log_q_posterior(clean, noisy, index, self.schedule, self.num_classes, exact=exact), uniform)

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
            mode, guidance_scale: see `ddps_seg.configs.DDPSConfig`.

        Raises ValueError for an unknown mode, a wrong number of timesteps, and too few or too many draws.
        """
        wanted = len(self._timesteps(inference_timesteps)) - 1
        if isinstance(uniforms, Sized) and len(uniforms) != wanted:
            raise ValueError(f"{len(uniforms)} draws for a run of {wanted + 1} evaluations; it takes {wanted}")
        steps = self.num_train_timesteps if inference_timesteps is None else inference_timesteps
        run = self.denoising_steps(condition, mask, uniforms, steps=steps, mode=mode, guidance_scale=guidance_scale)
        return {step.key: step.logits for step in run}

    def start_from(self, masks: Tensor, images: Tensor) -> Tensor:
        """Return the label maps (N, h, w) at the condition's size, resized (nearest neighbor) if necessary.

        Raises UserError for labels other than 0 .. K - 1.
        """
        if masks.numel() and not 0 <= masks.min() <= masks.max() < self.num_classes:
            raise UserError(
                f"the start map has labels {masks.min()} to {masks.max()}; give 0 to {self.num_classes - 1}"
            )
        full = F.interpolate(masks[:, None].float(), images.shape[-2:], mode="nearest")
        return self.pad(full)[:, 0, ::4, ::4].long().to(images.device)

    def exportable(self, images: Tensor, *, dynamic: bool) -> nn.Module:
        """Return the configured run with the draws of seed 0 as constants; see `StepwiseSegmentor`.

        Raises UserError if the draws exceed the size limit of a file.
        """
        size = (len(self.step_keys) - 1) * self.num_classes * math.prod(images.shape[-2:]) // 16 * 4
        if size > DRAWS_LIMIT and not dynamic:
            raise UserError(
                f"the exported run would hold {size / 1e9:.1f} GB of random draws; give a smaller --size or "
                "--model.num-inference-steps"
            )
        return super().exportable(images, dynamic=dynamic)

    def shown(self, logits: Tensor) -> Tensor:
        """Return the logits that are resized to the image: at inference without background if configured."""
        if self.suppress_background and not self.training:
            return torch.cat([torch.full_like(logits[:, :1], -1e4), logits[:, 1:]], 1)
        return logits

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
        """Return the losses of one training step: diffusion on the first prediction (section 3.3); see `Segmentor`.

        The network denoises noised versions of its own first prediction; the labels are the target. draws: "timesteps"
        (N,), "masks" (N, h, w) random labels, "uniforms" (N, K, h, w) in [0, 1), and "condition" (N,) in [0, 1): images
        below `condition_dropout` lose their condition. The single-step variant needs the masks only.
        """
        if loss.terms != (("cross_entropy", 1.0),) or loss.label_smoothing:
            raise UserError(
                f"loss.kind is {' '.join(loss.kinds)}, but DDPS trains with cross_entropy alone; "
                "set loss.kind to that, loss.weights to none and loss.label_smoothing to 0"
            )
        self.check_batch(images)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.freeze == "none"):
            condition = self._features(images)
        draws = self.draw_training(condition, seeds) if draws is None else draws
        drawn, draws = draws, {name: to_device(value, condition.device) for name, value in draws.items()}
        if self.condition_dropout:
            kept = draws["condition"] >= self.condition_dropout
            condition = condition * kept[:, None, None, None]
        if self.single_step:
            mask, timesteps = draws["masks"], torch.zeros(len(images), dtype=torch.long, device=condition.device)
        else:
            timesteps = draws["timesteps"]
            first = self._first_prediction(condition, labels, drawn["timesteps"], draws["masks"])
            mask = q_pred(first, self.num_train_timesteps - 1 - timesteps, self.schedule, draws["uniforms"])
        logits = self.resize_to_input(widened(self.denoise(condition, mask, timesteps)), images.shape[-2:])
        return head_losses({"decode": (logits, 1.0)}, labels, loss, ignore_index=self.ignore_index)

    @pass_without_grad()
    def _first_prediction(self, condition: Tensor, labels: Tensor, timesteps: Tensor, masks: Tensor) -> Tensor:
        """Return the clean maps (N, h, w): the labels at timestep 0, else the prediction from a random map.

        `timesteps` (N,) are on the CPU, so that the host knows which images need a prediction without synchronizing.
        """
        size = [4 * side for side in condition.shape[-2:]]
        full = F.pad(labels, (0, size[1] - labels.shape[2], 0, size[0] - labels.shape[1]), value=self.ignore_index)
        first = F.interpolate(full[:, None].float(), condition.shape[-2:], mode="nearest")[:, 0].long()
        if images := [i for i, timestep in enumerate(timesteps.tolist()) if timestep]:
            later = to_device(torch.tensor(images), condition.device)
            start = torch.zeros_like(later)
            first[later] = self.denoise(condition[later], masks[later], start).argmax(1)
        return first

    def draw_training(self, condition: Tensor, seeds: Sequence[int] | None) -> dict[str, Tensor]:
        """Return the random draws of `losses`; each image draws from its own seed."""
        drawing, device = self.generators_for(condition, seeds), condition.device
        hosts = [each.host for each in drawing]  # the host reads the timesteps
        drawn = {
            "condition": torch.stack([torch.rand((), generator=g) for g in hosts]),
            "timesteps": torch.stack([torch.randint(self.num_train_timesteps, (), generator=g) for g in hosts]),
            "masks": draw(self._labels(condition), drawing, device),
        }
        return drawn if self.single_step else drawn | {"uniforms": draw(self._uniforms(condition), drawing, device)}

    def recomputed_blocks(self) -> list[nn.Module]:
        return [*super().recomputed_blocks(), *(part for part in self.unet.modules() if isinstance(part, unet.BLOCKS))]

    # Weights

    def published_name(self, name: str) -> str:
        part, _, rest = name.partition(".")
        if part == "head":
            return super().published_name(name)
        if part == "unet":
            return f"decode_head.unet.{rename(rest, unet.RULES)}"
        return f"decode_head.{rename(name, RULES)}"

    def is_full_checkpoint(self, state: Mapping[str, Tensor]) -> bool:
        """Return whether the initial weights `state` cover a whole model of this kind, multi-step or single-step."""
        prior = any(name.startswith(("unet.", "decode_head.unet.")) for name in state)
        return prior and (self.single_step or any(name.endswith(NoiseSchedule._fields) for name in state))

    def load_pretrained(self, state: Mapping[str, Tensor]) -> tuple[str, LoadReport]:
        """Load a base model's backbone and head, or the single-step variant; otherwise as `Segmentor` does."""
        names, own = self.key_map(), self.state_dict()
        ours = not any(name.startswith("decode_head.") for name in state)
        names = {name: name if ours else names[name] for name in names}
        convert = (lambda _, tensor: tensor) if ours else self.convert
        if any(name.startswith(("unet.", "decode_head.unet.")) for name in state):
            noise = {names[name]: own[name] for name in NoiseSchedule._fields}
            return "single-step variant", self._load({**state, **noise}, names, convert)
        encoder = [name for name in own if name.startswith(("backbone.", "head."))]
        if not any(names[name] in state for name in encoder if name.startswith("head.")):
            return super().load_pretrained(state)
        rest = tuple(name for name in state if name.startswith(BASE_CLASSIFIERS))
        given = {name: tensor for name, tensor in state.items() if name not in rest}
        kept = {names[name]: tensor for name, tensor in own.items() if name not in encoder}
        report = self._load({**kept, **given}, names, convert)
        return "base model", replace(report, loaded=len(given), dropped=rest)

    def _load(
        self, state: Mapping[str, Tensor], names: Mapping[str, str], convert: Callable[[str, Tensor], Tensor]
    ) -> LoadReport:
        if self.ignore_schedule_mismatch:
            state = {**state, **{names[name]: getattr(self, name) for name in NoiseSchedule._fields}}
        table = state.get(names.get("log_at", ""))  # a single-step model has none
        if table is not None and table.ndim == 1 and len(table) != self.num_train_timesteps:
            raise UserError(
                f"trained with {len(table)} timesteps, but the model has {self.num_train_timesteps}; set "
                f"model.num_train_timesteps {len(table)}, or model.ignore_schedule_mismatch to keep this schedule"
            )
        if table is not None and not _equal(table, self.schedule.log_at):
            raise UserError(
                "trained with another noise schedule; set model.noise_schedule to its own, or "
                "model.ignore_schedule_mismatch to keep this one"
            )
        return super()._load(state, names, convert)


def _equal(table: Tensor, own: Tensor) -> bool:
    """Return whether a stored table is this one, as far as both have numbers; another shape is refused elsewhere."""
    return own.is_meta or table.shape != own.shape or torch.allclose(table.to(own), own, rtol=1e-3)


RULES = ((r"^label_embedding\.", "embed."), (r"^classifier\.", "conv_seg_new."))
