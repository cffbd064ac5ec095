"""From images to class probabilities: whole or sliding-window inference, several scales, horizontal flip.

Follows MMSegmentation 0.x: logits are summed over sliding windows, softmax follows the resize to the image's own size,
and views are averaged as probabilities. Step entries come one at a time, and each is reduced before the next.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, starmap
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from segcore.config.schema import DataConfig, EvalConfig, Experiment, Precision
from segcore.data.transforms import normalize, rescale_size, resize_image
from segcore.environment import computed_precision
from segcore.errors import UserError
from segcore.evaluation.scores import Scores, averaged
from segcore.models.segmentor import Segmentor
from segcore.models.stepwise import StepwiseSegmentor, answers_of, set_noise_device
from segcore.seeds import window_seed

T = TypeVar("T")
Answered = Iterator[tuple[str, Tensor]]
"""Logits (N, K, h, w) with the name of their entry, one entry after the other."""
Network = Callable[[Tensor, list[int]], Iterable[tuple[str, Tensor]]]
"""Normalized images (N, C, H, W) and a seed for each -> the entries, at the network's own resolution."""


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return the context that runs a forward pass in the configured precision."""
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[computed_precision(precision, device)]
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def view_sizes(height: int, width: int, evaluate: EvalConfig) -> list[tuple[int, int, bool]]:
    """Return (height, width, flip) of every view of an image, scales outermost, the plain view before its mirror image.

    Each view keeps the aspect ratio and fits `ratio * evaluate.img_scale`; without it, `ratio` times the image's size.
    """
    base = evaluate.img_scale or (width, height)
    sizes = [rescale_size(height, width, (int(base[0] * ratio), int(base[1] * ratio))) for ratio in evaluate.img_ratios]
    return [(h, w, flip) for h, w in sizes for flip in ((False, True) if evaluate.flip else (False,))]


def window_boxes(
    height: int, width: int, crop: tuple[int, int], stride: tuple[int, int]
) -> list[tuple[int, int, int, int]]:
    """Return half-open windows (y1, x1, y2, x2), row by row, that cover an image of height x width.

    The last window of a row or column is shifted inwards; an image smaller than `crop` gives smaller windows. Raises
    UserError when the stride exceeds the crop, because pixels between the windows would be skipped.
    """
    if stride[0] > crop[0] or stride[1] > crop[1]:
        raise UserError(f"evaluate.stride {stride} exceeds evaluate.crop {crop} and would leave gaps; lower the stride")

    def spans(size: int, crop: int, stride: int) -> list[tuple[int, int]]:
        count = max(size - crop + stride - 1, 0) // stride + 1
        ends = [min(i * stride + crop, size) for i in range(count)]
        return [(max(end - crop, 0), end) for end in ends]

    columns = spans(width, crop[1], stride[1])
    return [(y1, x1, y2, x2) for y1, y2 in spans(height, crop[0], stride[0]) for x1, x2 in columns]


def early_exit_entry(
    model: StepwiseSegmentor, percent: float, steps_used: list[int], images: Tensor, seeds: list[int]
) -> list[tuple[str, Tensor]]:
    """Return the entry `until P%`: denoising with early exit, see `StepwiseSegmentor.early_exit`.

    The number of steps of each image is appended to `steps_used`. With the first three arguments bound it is a
    `Network`.
    """
    logits, counts = model.early_exit(images, percent, seeds, resize=False)
    steps_used.extend(counts)
    return [(f"until {percent:g}%", logits)]


def check_ensemble(model: Segmentor, ensemble: Sequence[Segmentor]) -> None:
    """Raise UserError when the probabilities of `ensemble` cannot be averaged with those of `model`.

    Its models have the same classes as `model`, or lack its background class, which is class 0 and ignored; the
    probability of that class then counts as 0, as published for DDPS and its base model.
    """
    expected = {model.num_classes, model.num_classes - (model.ignore_index == 0)}
    for other in ensemble:
        if other.num_classes not in expected or 1 in (other.num_classes, model.num_classes):
            raise UserError(
                f"the model has {model.num_classes} classes but the one of --ensemble {other.num_classes}; "
                "name models of the same classes"
            )


@dataclass(frozen=True)
class Predictor:
    """A model and every setting that its prediction for an image depends on, except the seed.

    Images are (H, W, C) uint8, uint16 or float32. All models are in evaluation mode and on the device of the first
    one's parameters. Raises UserError for models that cannot be averaged, see `check_ensemble`.
    """

    model: Segmentor
    evaluate: EvalConfig
    """Views, windows, steps, precision (None: fp32), memory layout (None: contiguous) and where noise is drawn."""
    data: DataConfig
    """Mean and standard deviation of the normalization."""
    ensemble: tuple[Segmentor, ...] = ()
    """Models whose configured outputs are averaged into every entry with equal weight."""

    def __post_init__(self) -> None:
        check_ensemble(self.model, self.ensemble)

    @classmethod
    def of(cls, model: Segmentor, exp: Experiment, ensemble: Sequence[Segmentor] = ()) -> Predictor:
        """Return the predictor of an experiment; precision and memory layout default to those of the training."""
        precision, channels_last = exp.evaluate.precision, exp.evaluate.channels_last
        evaluate = replace(
            exp.evaluate,
            precision=exp.train.precision if precision is None else precision,
            channels_last=exp.train.channels_last if channels_last is None else channels_last,
        )
        return cls(model, evaluate, exp.data, tuple(ensemble))

    def using(self, **settings: Any) -> Predictor:
        """Return a predictor with other settings of `evaluate`, such as `steps=()`."""
        return replace(self, evaluate=replace(self.evaluate, **settings))

    @property
    def device(self) -> torch.device:
        """The model's device."""
        tensor = next(self.model.parameters(), None)
        return torch.device("cpu") if tensor is None else tensor.device

    def classes(
        self, images: Sequence[np.ndarray], seeds: Sequence[int], *, network: Network | None = None
    ) -> list[dict[str, Tensor]]:
        """Return, per image and step entry, the classes (H, W) int64 of highest probability at the image's own size.

        A model with one class predicts 1 where its probability exceeds 0.5, else 0. Arguments as for `probabilities`.
        """
        return self.reduced(images, seeds, lambda scores: scores.classes().long(), network=network)

    def classes_and_confidence(
        self, images: Sequence[np.ndarray], seeds: Sequence[int], *, network: Network | None = None
    ) -> list[dict[str, tuple[Tensor, Tensor]]]:
        """Return, per image and step entry, the classes as `classes` does and their probabilities (H, W) float32."""

        def both(scores: Scores) -> Iterable[tuple[Tensor, Tensor]]:
            classes, confidence = scores.classes_and_confidence()
            return zip(classes.long(), confidence, strict=True)

        return self.reduced(images, seeds, both, network=network)

    def probabilities(
        self, images: Sequence[np.ndarray], seeds: Sequence[int], *, network: Network | None = None
    ) -> list[dict[str, Tensor]]:
        """Return, per image and step entry, probabilities (K, H, W) float32 in 0..1 at the image's own size.

        Images of one size go through the network together. `seeds` holds one integer per image; each view and window
        draws from its own seed, derived from it, so the result does not depend on the other images. Only the network
        runs in the configured precision (autocast); everything after it is float32.

        `network` computes the logits of every view and window; None runs the model with the steps of `evaluate.steps`.
        """
        return self.reduced(images, seeds, Scores.probabilities, network=network)

    @torch.no_grad()  # not inference_mode: tables that a model caches here must stay usable in training
    def reduced(
        self,
        images: Sequence[np.ndarray],
        seeds: Sequence[int],
        reduce: Callable[[Scores], Iterable[T]],
        *,
        network: Network | None = None,
    ) -> list[dict[str, T]]:
        """Return, per image and step entry, what `reduce` makes of the scores of N images, a value for each.

        Every entry is reduced before the next one is computed, so memory does not grow with their number by more than
        what is returned. Other arguments as for `probabilities`.
        """
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, image in enumerate(images):
            groups[image.shape].append(i)
        results: list[dict[str, T]] = [{} for _ in images]
        for members in groups.values():
            for entry, scores in self._entries([images[i] for i in members], [seeds[i] for i in members], network):
                for i, value in zip(members, reduce(scores), strict=True):
                    results[i][entry] = value
                del scores
        return results

    def networks(self, network: Network | None = None) -> list[tuple[Network, Segmentor]]:
        """Return the models, each with what computes its logits in the configured precision and memory layout.

        The model's is by default the run with the steps of `evaluate.steps`; those of the ensemble have one entry.
        """
        for each in (self.model, *self.ensemble):  # which may belong to other predictors, too
            set_noise_device(each, self.evaluate.noise_device)
        own = network or partial(answers_of, self.model, self.evaluate.steps)
        nets = (own, *(partial(_final, other) for other in self.ensemble))
        return [(partial(self._run, net), x) for net, x in zip(nets, (self.model, *self.ensemble), strict=True)]

    def _run(self, network: Network, batch: Tensor, seeds: list[int]) -> Answered:
        layout = torch.channels_last if self.evaluate.channels_last else torch.contiguous_format
        answers: Answered | None = None
        while True:
            with autocast(self.device, self.evaluate.precision or "fp32"):  # what reads the answers is outside
                if answers is None:
                    answers = iter(network(batch.to(self.device).contiguous(memory_format=layout), seeds))
                answer = next(answers, None)
            if answer is None:
                return
            yield answer
            del answer

    def _entries(
        self, images: Sequence[np.ndarray], seeds: Sequence[int], network: Network | None
    ) -> Iterator[tuple[str, Scores]]:
        """Yield the step entries of N images of one size."""
        (own, model), *others = self.networks(network)
        entries = self._over_views(own, model, images, seeds)
        if others:
            entries = self._with_ensemble(entries, [self._over_views(*other, images, seeds) for other in others])
        return _running_means(entries) if self.evaluate.ensemble_steps else entries

    def _with_ensemble(
        self, entries: Iterator[tuple[str, Scores]], others: Sequence[Iterator[tuple[str, Scores]]]
    ) -> Iterator[tuple[str, Scores]]:
        """Yield the entries with the probabilities of the ensemble's models averaged in."""
        theirs: Tensor | None = None
        for other in others:
            for _, scores in other:
                if theirs is None:  # with the model's classes: one of the ensemble may lack the background
                    shape = len(scores.values), self.model.num_classes, *scores.size
                    theirs = scores.values.new_zeros(shape)
                scores.added_to(theirs)
        assert theirs is not None
        for entry, scores in entries:
            mean = scores.probabilities().add_(theirs).div_(1 + len(others))
            del scores
            yield entry, averaged(mean)
            del mean

    def _over_views(
        self, network: Network, model: Segmentor, images: Sequence[np.ndarray], seeds: Sequence[int]
    ) -> Iterator[tuple[str, Scores]]:
        """Yield the step entries of N images of one size: the only view's, or the mean of the probabilities."""
        size = (images[0].shape[0], images[0].shape[1])
        runs = []
        for view, (h, w, flip) in enumerate(view_sizes(*size, self.evaluate)):
            if not flip:  # its mirror image comes next and starts from the same pixels
                arrays = [normalize(resize_image(x, (h, w)), self.data.mean, self.data.std) for x in images]
                batch = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).to(self.device)  # once for all windows
            runs.append(self._view(network, model, batch.flip(-1) if flip else batch, seeds, view, size, flip))
        if len(runs) == 1:
            yield from runs[0]
            return
        for entry, views in in_step(runs):
            first = next(views)
            whole = len(images) * first.values.shape[1] * size[0] * size[1]
            if len(self.evaluate.img_ratios) == 1 and len(runs) * first.values.numel() <= whole:
                yield entry, replace(first, others=tuple(views))  # which hold less than the mean as a whole
                del first
                continue
            total = first.probabilities()
            del first
            for scores in views:
                total = scores.added_to(total)
                del scores
            yield entry, averaged(total.div_(len(runs)))
            del total

    def _view(
        self,
        network: Network,
        model: Segmentor,
        batch: Tensor,
        seeds: Sequence[int],
        view: int,
        size: tuple[int, int],
        flip: bool,
    ) -> Iterator[tuple[str, Scores]]:
        """Return the step entries of one view of images of this size; nothing here keeps them."""
        match self.evaluate.mode:
            case "whole":
                answers = network(batch, [window_seed(seed, view, 0) for seed in seeds])
                shape = (batch.shape[2], batch.shape[3])
                return starmap(lambda entry, x: (entry, Scores.of_view(model, x, shape, size, flip)), answers)
            case "slide":
                answers = mean_over_windows(at_input(model, network), batch, self.evaluate, seeds, view)
                return starmap(lambda entry, x: (entry, Scores(x, size, size, model.align_corners, flip)), answers)


def at_input(model: Segmentor, network: Network) -> Network:
    """Return a network whose logits are resized to its input's size, float32."""

    def resized(batch: Tensor, seeds: list[int]) -> Answered:
        for entry, logits in network(batch, seeds):
            yield entry, model.resize_to_input(logits.float(), batch.shape[-2:])
            del logits

    return resized


def in_step(runs: Sequence[Iterator[tuple[str, T]]]) -> Iterator[tuple[str, Iterator[T]]]:
    """Yield, entry by entry, what the runs say; all have the same entries.

    Each run is kept until its last entry, and each answer only until the next is asked for.
    """
    first, *others = runs
    for entry, answer in first:
        answers = chain([answer], (next(run)[1] for run in others))
        del answer
        yield entry, answers


def _running_means(entries: Iterator[tuple[str, Scores]]) -> Iterator[tuple[str, Scores]]:
    """Yield every entry as the mean of its probabilities with those of all previous ones."""
    total: Tensor | None = None
    names = list[str]()  # `enumerate` would keep an entry while the next one is computed
    for entry, scores in entries:
        names.append(entry)
        total = scores.added_to(total)
        del scores
        yield entry, averaged(total / len(names))


def _final(model: Segmentor, batch: Tensor, seeds: list[int]) -> Answered:
    yield "final", model(batch, seeds, resize=False)


def mean_over_windows(
    network: Network, batch: Tensor, evaluate: EvalConfig, seeds: Sequence[int], view: int
) -> Answered:
    """Yield, per step entry, the mean (N, K, h, w) of the logits of a view's windows, which `network` gives at their
    size."""
    height, width = batch.shape[-2:]
    boxes = window_boxes(height, width, evaluate.crop, evaluate.stride)
    count = torch.zeros(height, width)
    for y1, x1, y2, x2 in boxes:
        count[y1:y2, x1:x2] += 1

    def window(number: int) -> Answered:
        y1, x1, y2, x2 = boxes[number]
        return iter(network(batch[..., y1:y2, x1:x2], [window_seed(seed, view, number) for seed in seeds]))

    def mean(parts: Iterator[Tensor]) -> Tensor:
        total: Tensor | None = None
        for (y1, x1, y2, x2), logits in zip(boxes, parts, strict=True):
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], height, width, dtype=torch.float32)
            total[..., y1:y2, x1:x2] += logits
        assert total is not None
        return total.div_(count.to(total.device))

    for entry, parts in in_step([window(number) for number in range(len(boxes))]):
        yield entry, mean(parts)
