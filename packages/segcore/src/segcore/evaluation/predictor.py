"""From images to class probabilities: whole or sliding-window inference, several scales, horizontal flip.

Follows MMSegmentation 0.x: logits are summed over sliding windows, softmax follows the resize to the image's own size,
and views are averaged as probabilities.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from segcore.config.schema import DataConfig, EvalConfig, Experiment, Precision
from segcore.data.transforms import normalize, rescale_size, resize_image
from segcore.errors import UserError
from segcore.models.layers import resize
from segcore.models.segmentor import Segmentor
from segcore.models.stepwise import StepwiseSegmentor, average_entries, predict_entries, set_noise_device
from segcore.seeds import window_seed

Network = Callable[[Tensor, list[int]], dict[str, Tensor]]
"""Normalized images (N, C, h, w) and a seed for each -> logits (N, K, h, w) by entry."""


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return the context that runs a forward pass in the configured precision."""
    half = {"fp32": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]  # fp32: autocast is off
    return torch.autocast(device.type, half, enabled=precision != "fp32")


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
) -> dict[str, Tensor]:
    """Return the entry `until P%`: denoising with early exit, see `StepwiseSegmentor.early_exit`.

    The number of steps of each image is appended to `steps_used`. With the first three arguments bound it is a
    `Network`.
    """
    logits, counts = model.early_exit(images, percent, seeds)
    steps_used.extend(counts)
    return {f"until {percent:g}%": logits}


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

    Images are (H, W, C) uint8 or uint16, RGB. All models are in evaluation mode and on the device of the first one's
    parameters. Raises UserError for models that cannot be averaged, see `check_ensemble`.
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
        for model in (self.model, *self.ensemble):
            set_noise_device(model, self.evaluate.noise_device)

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
        found = self.probabilities(images, seeds, network=network)
        return [{entry: most_probable(p) for entry, p in by_entry.items()} for by_entry in found]

    def classes_and_confidence(
        self, images: Sequence[np.ndarray], seeds: Sequence[int], *, network: Network | None = None
    ) -> list[dict[str, tuple[Tensor, Tensor]]]:
        """Return, per image and step entry, the classes as `classes` does and their probabilities (H, W) float32."""
        found = self.probabilities(images, seeds, network=network)
        return [{entry: most_confident(p) for entry, p in by_entry.items()} for by_entry in found]

    @torch.no_grad()  # not inference_mode: tables that a model caches here must stay usable in training
    def probabilities(
        self, images: Sequence[np.ndarray], seeds: Sequence[int], *, network: Network | None = None
    ) -> list[dict[str, Tensor]]:
        """Return, per image and step entry, probabilities (K, H, W) float32 in 0..1 at the image's own size.

        Images of one size go through the network together. `seeds` holds one integer per image; each view and window
        draws from its own seed, derived from it, so the result does not depend on the other images. Only the network
        runs in the configured precision (autocast); everything after it is float32.

        `network` computes the logits of every view and window; None runs the model with the steps of `evaluate.steps`.
        """
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, image in enumerate(images):
            groups[image.shape].append(i)
        results: list[dict[str, Tensor]] = [{} for _ in images]
        for members in groups.values():
            mean = self._ensemble_mean([images[i] for i in members], [seeds[i] for i in members], network)
            for row, i in enumerate(members):
                results[i] = {entry: probabilities[row] for entry, probabilities in mean.items()}
        return results

    def _ensemble_mean(
        self, images: Sequence[np.ndarray], seeds: Sequence[int], network: Network | None
    ) -> dict[str, Tensor]:
        """Return, per step entry, the probabilities (N, K, H, W) of N images of one size, averaged over the models."""
        models = zip(self.networks(network), (self.model, *self.ensemble), strict=True)
        return self.mean_over_models(self._mean_over_views(net, images, seeds, x.align_corners) for net, x in models)

    def networks(self, network: Network | None = None) -> list[Network]:
        """Return what computes the logits of the model, by default with the steps of `evaluate.steps`, and of the
        ensemble's, in the configured precision and memory layout."""
        own = network or partial(_answers, self.model, self.evaluate.steps)
        return [partial(self._run, net) for net in (own, *(partial(_final, other) for other in self.ensemble))]

    def _run(self, network: Network, batch: Tensor, seeds: list[int]) -> dict[str, Tensor]:
        layout = torch.channels_last if self.evaluate.channels_last else torch.contiguous_format
        with autocast(self.device, self.evaluate.precision or "fp32"):
            return network(batch.to(self.device).contiguous(memory_format=layout), seeds)

    def mean_over_models(self, found: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return, per step entry, the mean of the probabilities (N, K, …) of the model and those of the ensemble's.

        Changes the first ones in place.
        """
        rest = iter(found)
        mean = next(rest)
        for other in rest:
            theirs = other["final"]
            if theirs.shape[1] < self.model.num_classes:  # it has no background class
                theirs = torch.cat([torch.zeros_like(theirs[:, :1]), theirs], 1)
            for probabilities in mean.values():
                probabilities.add_(theirs)
        if self.evaluate.ensemble_steps:
            average_entries(mean)
        for probabilities in mean.values():
            probabilities.div_(1 + len(self.ensemble))
        return mean

    def _mean_over_views(
        self, network: Network, images: Sequence[np.ndarray], seeds: Sequence[int], align_corners: bool
    ) -> dict[str, Tensor]:
        """Return, per step entry, the mean of the views' probabilities (N, K, H, W) for N images of one size."""
        height, width = images[0].shape[:2]
        views = view_sizes(height, width, self.evaluate)
        total: dict[str, Tensor] = {}
        for view, (h, w, flip) in enumerate(views):
            if not flip:  # its mirror image comes next and starts from the same pixels
                arrays = [normalize(resize_image(x, (h, w)), self.data.mean, self.data.std) for x in images]
                batch = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
            logits = window_logits(network, batch.flip(-1) if flip else batch, self.evaluate, seeds, view)
            for entry, x in logits.items():
                p = to_probabilities(x, (height, width), align_corners)
                p = p.flip(-1) if flip else p
                total[entry] = total[entry].add_(p) if entry in total else p
        return {entry: p.div_(len(views)) for entry, p in total.items()}


def _answers(model: Segmentor, steps: Sequence[int], batch: Tensor, seeds: list[int]) -> dict[str, Tensor]:
    return predict_entries(model, batch, steps, seeds)


def _final(model: Segmentor, batch: Tensor, seeds: list[int]) -> dict[str, Tensor]:
    return {"final": model(batch, seeds)}


def window_logits(
    network: Network, batch: Tensor, evaluate: EvalConfig, seeds: Sequence[int], view: int
) -> dict[str, Tensor]:
    """Return, per step entry, the logits (N, K, h, w) of one view: of the whole batch, or the mean over its windows."""
    match evaluate.mode:
        case "whole":
            return network(batch, [window_seed(seed, view, 0) for seed in seeds])
        case "slide":
            return _mean_over_windows(network, batch, evaluate, seeds, view)


def _mean_over_windows(
    network: Network, batch: Tensor, evaluate: EvalConfig, seeds: Sequence[int], view: int
) -> dict[str, Tensor]:
    height, width = batch.shape[-2:]
    total: dict[str, Tensor] = {}
    count = torch.zeros(height, width)
    for window, (y1, x1, y2, x2) in enumerate(window_boxes(height, width, evaluate.crop, evaluate.stride)):
        count[y1:y2, x1:x2] += 1
        part = network(batch[..., y1:y2, x1:x2], [window_seed(seed, view, window) for seed in seeds])
        for entry, logits in part.items():
            if entry not in total:
                total[entry] = logits.new_zeros(*logits.shape[:2], height, width, dtype=torch.float32)
            total[entry][..., y1:y2, x1:x2] += logits
    return {entry: logits.div_(count.to(logits.device)) for entry, logits in total.items()}


def to_probabilities(logits: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Return class probabilities float32 at `size`; the softmax comes after the resize, as published."""
    logits = resize(logits.float(), size, align_corners=align_corners)
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


def most_probable(probabilities: Tensor) -> Tensor:
    """Return the classes (H, W) int64 of probabilities (K, H, W)."""
    if len(probabilities) == 1:
        return (probabilities[0] > 0.5).long()
    return probabilities.max(0).indices  # ties give the first, like argmax, but 2.5 times as fast on a CPU


def most_confident(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Return the classes (H, W) int64 of probabilities (K, H, W), and the probability (H, W) of each."""
    if len(probabilities) == 1:
        p = probabilities[0]
        return (p > 0.5).long(), torch.maximum(p, 1 - p)
    values, classes = probabilities.max(0)
    return classes, values
