"""Run a model over a labeled data set and compute its metrics."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from segcore import distributed
from segcore.data.dataset import Dataset
from segcore.data.loader import Loaded, equal_sized, eval_samples
from segcore.errors import Stopped, UserError
from segcore.evaluation.calibration import Calibration, CalibrationError
from segcore.evaluation.metrics import BoundaryIoU, ConfusionMatrix
from segcore.evaluation.predictor import Answered, Network, Predictor, early_exit_entry
from segcore.evaluation.scores import Scores
from segcore.models.segmentor import Segmentor
from segcore.models.stepwise import StepwiseSegmentor, answers_of, require_stepwise
from segcore.seeds import evaluation_seed

Sample = tuple[int, np.ndarray, np.ndarray | None]
OnPrediction = Callable[[int, np.ndarray, np.ndarray, Mapping[str, Tensor]], None]


@dataclass(frozen=True, eq=False, slots=True)
class ImageFigures:
    """Figures of one image, of the configured output; fractions 0..1."""

    index: int
    """Its place in the data set."""
    name: str
    """`Dataset.name`: the path below the image folder, with `/` and without suffix."""
    width: int
    height: int
    pixels: int
    """Number of labeled pixels."""
    miou: float
    """Mean IoU of the classes that its label or its prediction has; NaN without a labeled pixel."""
    aacc: float
    """Share of the labeled pixels that are right; NaN without any."""
    iou: np.ndarray
    """IoU of each class, (K,) float32; NaN for a class in neither label nor prediction."""
    steps_used: float | None = None
    """Mean number of denoising steps of the early-exit entry over the image's views and windows, else None."""


@dataclass(frozen=True, eq=False, slots=True)
class Prediction:
    """What a model says about one image, by step entry."""

    index: int
    image: np.ndarray
    label: np.ndarray | None
    classes: dict[str, Tensor]
    """Class indices (H, W), uint8 up to 256 classes and int32 above."""
    confidence: dict[str, Tensor]
    """Probability (H, W) float32 of each of them; empty unless asked for."""
    steps_used: float | None
    """See `ImageFigures.steps_used`."""


@dataclass(frozen=True)
class Results:
    """Results of an evaluation."""

    classes: tuple[str, ...]
    """Class names, in the order of the per-class values."""
    entries: dict[str, dict[str, Any]]
    """Step entry -> the metrics of `ConfusionMatrix.compute` and, if requested, `BoundaryIoU.compute`; 0..1."""
    images: int
    """Number of images."""
    confusion: dict[str, Tensor] = field(default_factory=dict)
    """Step entry -> the counts behind its metrics, `ConfusionMatrix.matrix` on the CPU."""
    skipped: tuple[str, ...] = ()
    """The error for each image that could not be read."""
    configured: str = ""
    """The entry of the model's configured number of steps; if it is not among the entries, the last one is used."""
    by: str = ""
    """The unit of the entry names, `StepwiseSegmentor.step_unit`; "" without steps."""
    steps_taken: float | None = None
    """Mean number of denoising steps of the early-exit entry `until …`, else None. It is never the main entry."""
    per_image: tuple[ImageFigures, ...] = ()
    """The figures of every image, in the order of the data set."""
    calibration: Calibration | None = None
    """Calibration of the configured output, if asked for."""

    @property
    def final_step(self) -> str:
        """The name of the main entry, the configured output."""
        return main_entry(self.entries, self.configured, early_exit=bool(self.steps_taken))

    @property
    def final(self) -> dict[str, Any]:
        """The metrics of the configured output."""
        return self.entries[self.final_step]

    def to_json(self) -> dict[str, Any]:
        """Return plain data at full precision: NaN is None, per-class values are lists in the order of `classes`."""

        def plain(value: float | Tensor) -> Any:
            if isinstance(value, Tensor):
                return [plain(x) for x in value.tolist()]
            return None if math.isnan(value) else value

        entries = {name: {key: plain(x) for key, x in metrics.items()} for name, metrics in self.entries.items()}
        early = {"steps_taken": self.steps_taken} if self.steps_taken else {}
        found = {"images": self.images, "skipped": list(self.skipped), "classes": list(self.classes)}
        return {**found, "entries": entries, **early}


def main_entry(entries: Iterable[str], configured: str, *, early_exit: bool) -> str:
    """Return the entry that counts: the configured one if it is there, else the last one that ran all its steps.

    With `early_exit` the last of `entries` is the early-exit entry.
    """
    fixed = list(entries)[: -1 if early_exit else None]
    return configured if configured in fixed else fixed[-1]


def configured_entry(predictor: Predictor, entries: Iterable[str]) -> str:
    """Return which of the step entries of a prediction is the configured output, see `main_entry`."""
    configured = predictor.model.default_step if isinstance(predictor.model, StepwiseSegmentor) else "final"
    return main_entry(entries, configured, early_exit=predictor.evaluate.early_exit_threshold is not None)


def check_fit(model: Segmentor, dataset: Dataset) -> None:
    """Raise UserError when the model's classes or its ignored label differ from the data set's."""
    if model.num_classes != len(dataset.classes):
        raise UserError(
            f"the model has {model.num_classes} classes but the data set {len(dataset.classes)}; "
            "set model.num_classes or name the data set that it was trained on"
        )
    if model.ignore_index != dataset.ignore_index:
        raise UserError(
            f"the model ignores label {model.ignore_index} but the data set {dataset.ignore_index}; "
            "set data.add_background_class as the model expects it"
        )


def evaluate(
    predictor: Predictor,
    dataset: Dataset,
    *,
    seed: int = 0,
    workers: int = 0,
    limit: int | None = None,
    calibration: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    on_prediction: OnPrediction | None = None,
) -> Results:
    """Predict the first `limit` images of `dataset` (None: all) and return the metrics of every step entry.

    The model is in evaluation mode during the call. The noise of an image depends only on (seed, its index), so
    `evaluate.batch_size`, `workers` and the number of processes do not change the results: each of several processes
    takes every n-th image, and all return the same result. Predictions are not kept.

    `calibration` also computes `Results.calibration`. `on_progress(done, total)` is called after every batch, and every
    second without data (it may raise Stopped, which ends all processes). It assumes that all processes are equally far.
    `on_prediction(index, image, label, entries)` is called for each image of this process with the classes (H, W) int64
    by entry.

    Raises UserError when model and data set do not fit together, an image has no label, or one cannot be read, unless
    `data.on_error` is "skip".
    """
    counts = _Counts(predictor, dataset, calibration)

    def count(found: Prediction) -> None:
        if found.label is None:
            raise UserError(f"{dataset.samples[found.index].image}: has no label file; evaluation needs one")
        counts.add(found, found.label)
        if on_prediction:
            classes = {entry: x.long() for entry, x in found.classes.items()}
            on_prediction(found.index, found.image, found.label, classes)

    how: dict[str, Any] = {"seed": seed, "workers": workers, "limit": limit, "on_progress": on_progress}
    images, missed, used = predict_all(predictor, dataset, count, confidence=calibration, **how)
    counts.sum_over_processes()
    confusion = {entry: matrix.matrix.cpu() for entry, matrix in counts.matrices.items()}
    figures = tuple(sorted(distributed.all_gather_object(counts.per_image), key=lambda image: image.index))
    calibrated = counts.calibration.compute() if counts.calibration else None
    model = predictor.model
    named = (model.default_step, model.step_unit) if isinstance(model, StepwiseSegmentor) else ("final", "")
    metrics = counts.metrics()
    return Results(tuple(dataset.classes), metrics, images, confusion, missed, *named, used, figures, calibrated)


def predict_all(
    predictor: Predictor,
    dataset: Dataset,
    each: Callable[[Prediction], None],
    *,
    seed: int = 0,
    workers: int = 0,
    limit: int | None = None,
    confidence: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[int, tuple[str, ...], float | None]:
    """Predict the images of a data set, which need no labels, and call `each` with those of this process.

    Returns, over all processes, the number of images, the errors of those that could not be read and the mean number of
    denoising steps with `evaluate.early_exit_threshold`. The arguments and errors are those of `evaluate`; a UserError
    of `each` ends all processes.
    """
    model, settings = predictor.model, predictor.evaluate
    check_fit(model, dataset)
    total = min(len(dataset), len(dataset) if limit is None else limit)
    if total < 1:
        raise UserError(f"there is nothing to evaluate: {len(dataset)} images with limit {limit}; give at least one")
    done, skipped, steps_used = 0, list[tuple[int, str]](), list[int]()
    network, failed = _network(predictor, steps_used), None
    own = range(distributed.rank(), total, distributed.world_size())

    def progress() -> None:
        if on_progress:
            on_progress(min(distributed.world_size() * (done + len(skipped)), total), total)

    try:
        with evaluation_mode(model), closing(eval_samples(dataset, workers, own, on_wait=progress)) as loaded:
            samples = _readable(own, loaded, skipped if predictor.data.on_error == "skip" else None)
            for batch in equal_sized(samples, settings.batch_size):
                for found in _predict(predictor, batch, seed, network, confidence, steps_used):
                    each(found)
                done += len(batch)
                progress()
    except (UserError, Stopped) as error:
        failed = error
    except torch.OutOfMemoryError:
        what = f"lower evaluate.batch_size ({settings.batch_size}), or set evaluate.mode ({settings.mode}) to slide"
        failed = UserError(f"out of GPU memory in the evaluation: {what} with a smaller evaluate.crop")
    images, steps, runs = distributed.sync_status(failed, done, sum(steps_used), len(steps_used))
    missed = tuple(text for _, text in sorted(distributed.all_gather_object(skipped)))
    if not images:
        raise UserError(f"{missed[0]} (and none of the {total} images can be read)")
    return images, missed, steps / runs if runs else None


def _network(predictor: Predictor, steps_used: list[int]) -> Network:
    """Return the model's outputs by entry, including the early-exit entry if `evaluate.early_exit_threshold` is set."""
    model, settings = predictor.model, predictor.evaluate
    percent = settings.early_exit_threshold
    if isinstance(model, StepwiseSegmentor):
        model.check_steps(settings.steps)
    if percent is None:
        return partial(answers_of, model, settings.steps)
    stepwise = require_stepwise(model, "early_exit_threshold")

    def network(images: Tensor, seeds: list[int]) -> Answered:
        yield from answers_of(model, settings.steps, images, seeds)
        yield from early_exit_entry(stepwise, percent, steps_used, images, seeds)

    return network


def _predict(
    predictor: Predictor, batch: Sequence[Sample], seed: int, network: Network, confidence: bool, steps_used: list[int]
) -> Iterator[Prediction]:
    """Yield the predictions of images of one size. `network` appends their numbers of steps to `steps_used`."""
    images, seeds = [image for _, image, _ in batch], [evaluation_seed(seed, index) for index, *_ in batch]
    before = len(steps_used)
    if confidence:
        both = predictor.reduced(
            images, seeds, lambda scores: zip(*scores.classes_and_confidence(), strict=True), network=network
        )
        classes = [{entry: pair[0] for entry, pair in by_entry.items()} for by_entry in both]
        confidences = [{entry: pair[1] for entry, pair in by_entry.items()} for by_entry in both]
    else:
        classes, confidences = predictor.reduced(images, seeds, Scores.classes, network=network), [{}] * len(batch)
    for i, (index, image, label) in enumerate(batch):
        own = steps_used[before + i :: len(batch)]  # every view and window appends one number per image
        used = sum(own) / len(own) if own else None
        yield Prediction(index, image, label, classes[i], confidences[i], used)


class _Counts:
    """The counts behind the metrics of every step entry, and the figures of every image."""

    def __init__(self, predictor: Predictor, dataset: Dataset, calibration: bool) -> None:
        model, settings = predictor.model, predictor.evaluate
        arguments = model.num_classes, model.ignore_index, predictor.device
        self.predictor, self.dataset = predictor, dataset
        self.boundaries = "mBIoU" in settings.metrics
        self.new_matrix = partial(ConfusionMatrix, *arguments)
        self.matrices: dict[str, ConfusionMatrix] = defaultdict(self.new_matrix)
        self.bands: dict[str, BoundaryIoU] = defaultdict(partial(BoundaryIoU, *arguments))
        self.per_image: list[ImageFigures] = []
        self.calibration = CalibrationError(model.ignore_index, predictor.device) if calibration else None

    def add(self, found: Prediction, label: np.ndarray) -> None:
        """Count what each entry predicts for an image with this label (H, W)."""
        main = configured_entry(self.predictor, found.classes)
        for entry, classes in found.classes.items():
            if entry == main:
                of_image = self.new_matrix().update(classes, label)
                self.matrices[entry].merge(of_image)
                self.per_image.append(self.figures(found, of_image))
            else:  # no matrix of its own: with many classes it costs more than the counting
                self.matrices[entry].update(classes, label)
            if self.boundaries:
                self.bands[entry].update(classes, label)
        if self.calibration:
            self.calibration.update(found.confidence[main], found.classes[main], torch.from_numpy(label))

    def figures(self, found: Prediction, matrix: ConfusionMatrix) -> ImageFigures:
        """Return the figures of an image from its own confusion matrix."""
        metrics: dict[str, Any] = matrix.compute()
        height, width = found.image.shape[:2]
        return ImageFigures(
            found.index,
            self.dataset.name(found.index),
            width,
            height,
            pixels=int(matrix.matrix.sum()),
            miou=metrics["mIoU"],
            aacc=metrics["aAcc"],
            iou=metrics["IoU"].float().numpy(),
            steps_used=found.steps_used,
        )

    def sum_over_processes(self) -> None:
        """Sum the counts over all processes; a process without images has no entries yet."""
        for entry in dict.fromkeys(distributed.all_gather_object(list(self.matrices))):
            distributed.all_reduce_sum(self.matrices[entry].matrix)
            if self.boundaries:
                distributed.all_reduce_sum(self.bands[entry].counts)
        if self.calibration:
            distributed.all_reduce_sum(self.calibration.sums)

    def metrics(self) -> dict[str, dict[str, Any]]:
        """Return the metrics by entry."""
        bands = {entry: band.compute() for entry, band in self.bands.items()}
        return {entry: matrix.compute() | bands.get(entry, {}) for entry, matrix in self.matrices.items()}


def _readable(
    indices: Sequence[int], loaded: Iterable[Loaded], skipped: list[tuple[int, str]] | None
) -> Iterator[Sample]:
    """Yield the readable samples; the others are recorded in `skipped`, or raise UserError if it is None."""
    for index, sample in zip(indices, loaded, strict=True):
        if not isinstance(sample, UserError):
            yield index, *sample[1:]
        elif skipped is None:
            raise sample
        else:
            skipped.append((index, str(sample)))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode, and afterwards restore each module's own mode, including frozen modules."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
