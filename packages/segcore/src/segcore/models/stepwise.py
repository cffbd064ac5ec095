"""Segmentation models that denoise in steps: everything derived from a method's single generator of steps.

A method implements `encode`, `draw`, `denoising_steps` and `step_keys`. This module derives selected steps, the
trajectory, mean probabilities over several starts, early exit, refinement of a given mask and export with fixed noise.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from segcore.config.schema import NoiseDevice
from segcore.errors import UserError
from segcore.models.layers import widened
from segcore.models.noise import Generators, generators
from segcore.models.segmentor import Segmentor

SHOWN = 20
"""Maximum number of steps in a trajectory: each is kept for all classes at the image's size."""


class Step(NamedTuple):
    """One denoising step of N images with R noise starts each, image-major."""

    key: str
    """The number of steps taken so far, or the timestep; see `StepwiseSegmentor.step_unit`."""
    logits: Tensor
    """(N*R, K, h, w) at the network's own resolution."""
    noisy: Tensor
    """The noisy map that the step started from, (N*R, …)."""


Steps = Generator[Step, Tensor | None, None]
"""The steps of a run. `send` may pass a bool mask (N,) of the images that continue; the others leave the run."""
Answers = Generator[tuple[str, Tensor], Tensor | None, None]
"""Likewise, the outputs (N, K, h, w) by key."""


class StepwiseSegmentor(Segmentor):
    """A segmentation model that denoises a map in steps, given features of the image.

    Attributes:
        step_unit: the unit of the step keys: "steps", the number taken so far, or "timestep".
        run_per_entry: whether an entry of `predict_steps` is a separate run with that number of steps, from the same
            noise; otherwise the entries are collected from the configured run.
        noise_device: where noise is drawn, see `evaluate.noise_device`; `set_noise_device` sets it.
        accumulation: whether an output is the mean probability over the steps so far instead of a step's logits.
    """

    step_unit: str
    run_per_entry: bool = False
    accumulation: bool = False
    noise_device: NoiseDevice = "model"

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Return the input that all steps share for normalized images (N, C, H, W): features (N, D, h, w); run once."""

    @abstractmethod
    def draw(
        self, features: Tensor, seeds: Sequence[int] | None, *, steps: int | None = None, run: int = 0
    ) -> tuple[Tensor, Iterable[Tensor]]:
        """Return the random draws of a run: the initial map (N*R, …) and the draws of each further step.

        Each image draws from its own seed, see `generators_for`; `run` counts the runs of one seed. `steps` is their
        number, as configured by default.
        """

    def generators_for(self, features: Tensor, seeds: Sequence[int] | None, run: int = 0) -> list[Generators]:
        """Return the random generators of each image; `run` counts the runs of one seed."""
        return generators(seeds, len(features), run, device=features.device, noise_device=self.noise_device)

    @abstractmethod
    def denoising_steps(
        self, features: Tensor, start: Tensor, noise: Iterable[Tensor] | None = None, *, steps: int | None = None
    ) -> Steps:
        """Yield the steps of a run from the map `start`; `noise` holds the draws of each step after the first.

        Without `noise` the draws come from torch's generator. `steps` is the number of steps, as configured by default.
        """

    @property
    @abstractmethod
    def step_keys(self) -> Sequence[int]:
        """The keys of the configured run, in order."""

    @property
    def default_step(self) -> str:
        """The key of the configured output."""
        return str(self.step_keys[-1])

    def check_steps(self, steps: Sequence[int]) -> None:
        """Raise UserError unless the model supports the steps of `evaluate.steps`; empty means as configured."""
        if self.run_per_entry:
            if steps and min(steps) < 1:
                raise UserError(f"evaluate.steps has {min(steps)}; {type(self).__name__} takes at least 1 step")
        elif wrong := [step for step in steps if step not in self.step_keys]:
            known = f"{self.step_unit}s {', '.join(map(str, self.step_keys))}"
            raise UserError(f"evaluate.steps has {wrong[0]}, but the run evaluates the {known}; name some of these")

    # Inference

    def logits(self, images: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """Return the configured output (N, K, h, w); with `accumulation` it is a probability map, as published."""
        return last(self.answers(*self._run(images, seeds)))

    def predict_steps(
        self, images: Tensor, steps: Sequence[int] | None = None, seeds: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Return the outputs (N, K, H, W) by key: those of `steps` and, if they are collected from one run, the last.

        The last entry is the configured output when `steps` is None. Raises UserError for steps that no run has.
        """
        return self._at_input(images, self.step_answers(images, steps, seeds))

    def step_answers(
        self, images: Tensor, steps: Sequence[int] | None = None, seeds: Sequence[int] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the outputs of `predict_steps` one by one, (N, K, h, w) at the network's own resolution."""
        self.check_steps(steps or ())
        if self.run_per_entry:
            counts = steps or (len(self.step_keys),)
            features = self._features(images)
            start, noise = self.draw(features, seeds, steps=max(counts))
            for count in counts:
                yield (
                    str(count),
                    last(self.answers(self.denoising_steps(features, start, noise, steps=count), len(images))),
                )
        else:
            wanted = {self.default_step, *map(str, steps or ())}
            yield from (pair for pair in self.answers(*self._run(images, seeds)) if pair[0] in wanted)

    def denoising_trajectory(self, images: Tensor, seeds: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Return the outputs (N, K, H, W) after the steps of the configured run, at most 20, evenly spaced."""
        return self._at_input(images, self.trajectory_answers(images, seeds))

    def trajectory_answers(self, images: Tensor, seeds: Sequence[int] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield the outputs of `denoising_trajectory` one by one at the network's own resolution."""
        yield from self._evenly_spaced(*self._run(images, seeds))

    def refine_mask(self, images: Tensor, masks: Tensor, seeds: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Return the outputs (N, K, H, W) after every step of a run that starts from label maps (N, H', W') int64.

        Raises UserError if the method cannot start a run from label maps, or from these labels.
        """
        return self._at_input(images, self.refined_answers(images, masks, seeds))

    def refined_answers(
        self, images: Tensor, masks: Tensor, seeds: Sequence[int] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the outputs of `refine_mask` one by one at the network's own resolution."""
        start, features = self.start_from(masks, images), self._features(images)
        _, noise = self.draw(features, seeds)
        yield from self._evenly_spaced(self.denoising_steps(features, start, noise), len(images))

    def start_from(self, masks: Tensor, images: Tensor) -> Tensor:
        """Return the initial map of a run that starts from label maps (N, H', W') of these images."""
        raise UserError(f"{type(self).__name__} starts from noise, not from a mask; leave out --start-mask")

    def log_mean_probs(
        self, images: Tensor, seeds: Sequence[int] | None = None, starts: int = 4, *, resize: bool = True
    ) -> Tensor:
        """Return log class probabilities (N, K, H, W), averaged over `starts` configured runs and their steps.

        If there are several steps, the first is left out because its input is pure noise. The runs are sequential, so
        memory does not grow with their number. `resize` as for `forward`.
        """
        features = self._features(images)
        total, count = torch.zeros((), device=features.device), 0
        for run in range(starts):
            steps = self.denoising_steps(features, *self.draw(features, seeds, run=run))
            for number, step in enumerate(steps):
                if number or len(self.step_keys) == 1:
                    total, count = total + _mean_over_starts(_probabilities(step.logits), len(images)), count + 1
        found = (total / count).clamp(min=1e-8).log()
        return self.resize_to_input(found, images.shape[-2:]) if resize else found

    def early_exit(
        self, images: Tensor, percent: float, seeds: Sequence[int] | None = None, *, resize: bool = True
    ) -> tuple[Tensor, list[int]]:
        """Return outputs (N, K, H, W) of the configured run and the number of steps used per image.

        An image leaves the run at the first step that changes the classes of fewer than `percent` % of its h * w pixels
        at the network's resolution, at the last step otherwise; its output is that step's. `resize` as for `forward`.
        """
        answers, length = self.answers(*self._run(images, seeds)), len(self.step_keys)
        left = list(range(len(images)))  # the images that are still in the run
        found: dict[int, tuple[Tensor, int]] = {}
        before: Tensor | None = None
        _, answer = next(answers)
        for count in range(1, length + 1):
            classes = answer.argmax(1).flatten(1)
            done = torch.full((len(left),), count == length)
            if before is not None:
                done |= ((classes != before).sum(1) < percent / 100 * classes.shape[1]).cpu()
            found |= {image: (answer[row], count) for row, image in enumerate(left) if done[row]}
            left = [image for row, image in enumerate(left) if not done[row]]
            if not left:
                break
            going = ~done.to(classes.device)
            before = classes[going]
            _, answer = answers.send(going)
        logits, counts = zip(*(found[image] for image in range(len(images))), strict=True)
        answer = torch.stack(logits)
        return self.resize_to_input(answer, images.shape[-2:]) if resize else answer, list(counts)

    def exportable(self, images: Tensor, *, dynamic: bool) -> nn.Module:
        """Return the configured run with the noise of seed 0 as a constant; see `Segmentor`.

        Raises UserError for a dynamic export.
        """
        if dynamic:
            name = type(self).__name__
            raise UserError(f"{name}'s noise has the size of the image, so it is exported for one; leave out --dynamic")
        return FixedNoise(self, images)

    def answers(self, steps: Steps, images: int, accumulate: bool | None = None) -> Answers:
        """Yield the outputs of a run of `images` images: a step's logits, averaged over the noise starts.

        With `accumulate` (as configured by default), the mean probability over the steps so far instead.
        """
        accumulate = self.accumulation if accumulate is None else accumulate
        total, count, step = torch.zeros(()), 1, next(steps, None)
        while step is not None:
            answer = step.logits
            if accumulate:
                total = total + _probabilities(answer)
                answer = total / count
            going = yield step.key, _mean_over_starts(answer, images)
            if going is None:
                step = next(steps, None)
            else:
                if accumulate:
                    total = total[going.repeat_interleave(len(total) // images)]
                images = int(going.sum())
                step = _send(steps, going)
            count += 1

    def _features(self, images: Tensor) -> Tensor:
        self.check_size(images)
        return self.encode(self.pad(images))

    def _run(self, images: Tensor, seeds: Sequence[int] | None) -> tuple[Steps, int]:
        """Return the configured run and its number of images."""
        features = self._features(images)
        return self.denoising_steps(features, *self.draw(features, seeds)), len(images)

    def _at_input(self, images: Tensor, answers: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        return {key: self.resize_to_input(answer, images.shape[-2:]) for key, answer in answers}

    def _evenly_spaced(self, steps: Steps, count: int) -> Iterator[tuple[str, Tensor]]:
        """Yield the outputs by step; if there are more than `SHOWN`, evenly spaced ones."""
        keys, unit = self.step_keys, self.step_unit.removesuffix("s")
        if len(keys) > SHOWN:
            keys = [keys[round(i * (len(keys) - 1) / (SHOWN - 1))] for i in range(SHOWN)]
        wanted = set(map(str, keys))
        yield from ((f"{unit} {key}", answer) for key, answer in self.answers(steps, count) if key in wanted)


class FixedNoise(nn.Module):
    """A stepwise model whose random draws are constants, those of seed 0, for images with the shape of `images`."""

    start: Tensor
    noise: Tensor

    def __init__(self, model: StepwiseSegmentor, images: Tensor) -> None:
        super().__init__()
        self.model = model
        with torch.no_grad():
            start, noise = model.draw(model.encode(model.pad(images[:1])), None)
        further = list(noise)
        self.register_buffer("start", start)
        self.register_buffer("noise", torch.stack(further) if further else torch.empty(0))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, K, H, W) for images (N, C, H, W)."""
        model, count = self.model, len(images)
        draws = (self.start, *(self.noise[i] for i in range(len(self.noise))))  # torch cannot store `unbind` of none
        start, *noise = (x.repeat(count, *[1] * (x.ndim - 1)) for x in draws)
        steps = model.denoising_steps(model.encode(model.pad(images)), start, noise)
        return model.resize_to_input(last(model.answers(steps, count)), images.shape[-2:])


def predict_entries(
    model: Segmentor, images: Tensor, steps: Sequence[int] = (), seeds: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Return the logits (N, K, H, W) of any model by entry: the steps of a stepwise model, "final" otherwise."""
    if isinstance(model, StepwiseSegmentor):
        return model.predict_steps(images, steps or None, seeds)
    return {"final": model(images, seeds)}


def set_noise_device(model: Segmentor, device: NoiseDevice) -> None:
    """Set where a stepwise model draws its noise; nothing for other models."""
    if isinstance(model, StepwiseSegmentor):
        model.noise_device = device


def answers_of(
    model: Segmentor, steps: Sequence[int], images: Tensor, seeds: Sequence[int] | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield what `predict_entries` returns one by one, at the network's own resolution."""
    if isinstance(model, StepwiseSegmentor):
        yield from model.step_answers(images, steps or None, seeds)
    else:
        yield "final", model(images, seeds, resize=False)


def require_stepwise(model: Segmentor, options: str) -> StepwiseSegmentor:
    """Return `model` if it denoises in steps; otherwise raise UserError that names the options to leave out."""
    if isinstance(model, StepwiseSegmentor):
        return model
    raise UserError(f"{type(model).__name__} does not denoise in steps; leave out {options}")


def average_entries(entries: Mapping[str, Tensor]) -> None:
    """Replace the probabilities of every entry, in place, by their mean with those of all previous entries."""
    for number, (before, entry) in enumerate(pairwise(entries), 1):
        entries[entry].add_(entries[before], alpha=number).div_(number + 1)


def last(answers: Answers) -> Tensor:
    """Return the last output of a run without keeping the others."""
    [(_, answer)] = deque(answers, maxlen=1)
    return answer


def _probabilities(logits: Tensor) -> Tensor:
    """Return the softmax in float32 or wider."""
    return widened(logits).softmax(1)


def _mean_over_starts(maps: Tensor, images: int) -> Tensor:
    """Return maps (N*R, …) of N images averaged over their noise starts, (N, …)."""
    return maps if len(maps) == images else maps.unflatten(0, (images, -1)).mean(1)


def _send(steps: Steps, going: Tensor) -> Step | None:
    try:
        return steps.send(going)
    except StopIteration:
        return None
