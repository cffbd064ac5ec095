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
from segcore.evaluation.metrics import BoundaryIoU, ConfusionMatrix
from segcore.evaluation.predictor import Network, Predictor, early_exit_entry
from segcore.models.segmentor import Segmentor
from segcore.models.stepwise import StepwiseSegmentor, predict_entries, require_stepwise
from segcore.seeds import evaluation_seed

Sample = tuple[int, np.ndarray, np.ndarray]
OnPrediction = Callable[[int, np.ndarray, np.ndarray, Mapping[str, Tensor]], None]


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

    @property
    def final_step(self) -> str:
        """The name of the main entry, the configured output."""
        fixed = list(self.entries)[: -1 if self.steps_taken else None]
        return self.configured if self.configured in fixed else fixed[-1]

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
    on_progress: Callable[[int, int], None] | None = None,
    on_prediction: OnPrediction | None = None,
) -> Results:
    """Predict the first `limit` images of `dataset` (None: all) and return the metrics of every step entry.

    The model is in evaluation mode during the call. The noise of an image depends only on (seed, its index), so
    `evaluate.batch_size`, `workers` and the number of processes do not change the results: each of several processes
    takes every n-th image, and all return the same result. Predictions are not kept.

    `on_progress(done, total)` is called after every batch, and every second without data (it may raise Stopped, which
    ends all processes). It assumes that all processes are equally far. `on_prediction(index, image, label, entries)` is
    called for each image of this process with the classes (H, W) by entry.

    Raises UserError when model and data set do not fit together, an image has no label, or one cannot be read, unless
    `data.on_error` is "skip".
    """
    model, settings = predictor.model, predictor.evaluate
    check_fit(model, dataset)
    total = min(len(dataset), len(dataset) if limit is None else limit)
    if total < 1:
        raise UserError(f"there is nothing to evaluate: {len(dataset)} images with limit {limit}; give at least one")
    counts = _Counts(model, predictor.device, boundaries="mBIoU" in settings.metrics)
    done, skipped, steps_used = 0, list[tuple[int, str]](), list[int]()
    network, failed = _network(predictor, steps_used), None
    own = range(distributed.rank(), total, distributed.world_size())

    def progress() -> None:
        if on_progress:
            on_progress(min(distributed.world_size() * (done + len(skipped)), total), total)

    try:
        with evaluation_mode(model), closing(eval_samples(dataset, workers, own, on_wait=progress)) as loaded:
            samples = _readable(dataset, own, loaded, skipped if predictor.data.on_error == "skip" else None)
            for batch in equal_sized(samples, settings.batch_size):
                seeds = [evaluation_seed(seed, index) for index, *_ in batch]
                predictions = predictor.classes([image for _, image, _ in batch], seeds, network=network)
                for (index, image, label), entries in zip(batch, predictions, strict=True):
                    counts.add(entries, label)
                    if on_prediction:
                        on_prediction(index, image, label, entries)
                done += len(batch)
                progress()
    except (UserError, Stopped) as error:
        failed = error
    images, steps, runs = distributed.sync_status(failed, done, sum(steps_used), len(steps_used))
    missed = tuple(text for _, text in sorted(distributed.all_gather_object(skipped)))
    if not images:
        raise UserError(f"{missed[0]} (and none of the {total} images can be read)")
    counts.sum_over_processes()
    confusion = {entry: matrix.matrix.cpu() for entry, matrix in counts.matrices.items()}
    named = (model.default_step, model.step_unit) if isinstance(model, StepwiseSegmentor) else ("final", "")
    used = steps / runs if runs else None
    return Results(tuple(dataset.classes), counts.metrics(), images, confusion, missed, *named, used)


def _network(predictor: Predictor, steps_used: list[int]) -> Network:
    """Return the model's outputs by entry, including the early-exit entry if `evaluate.early_exit_threshold` is set."""
    model, settings = predictor.model, predictor.evaluate
    percent = settings.early_exit_threshold
    if isinstance(model, StepwiseSegmentor):
        model.check_steps(settings.steps)
    if percent is None:
        return lambda images, seeds: predict_entries(model, images, settings.steps, seeds)
    stepwise = require_stepwise(model, "early_exit_threshold")

    def network(images: Tensor, seeds: list[int]) -> dict[str, Tensor]:
        entries = predict_entries(model, images, settings.steps, seeds)
        return entries | early_exit_entry(stepwise, percent, steps_used, images, seeds)

    return network


class _Counts:
    """The counts behind the metrics of every step entry."""

    def __init__(self, model: Segmentor, device: torch.device, *, boundaries: bool) -> None:
        arguments = model.num_classes, model.ignore_index, device
        self.boundaries = boundaries
        self.matrices: dict[str, ConfusionMatrix] = defaultdict(partial(ConfusionMatrix, *arguments))
        self.bands: dict[str, BoundaryIoU] = defaultdict(partial(BoundaryIoU, *arguments))

    def add(self, entries: Mapping[str, Tensor], label: np.ndarray) -> None:
        """Count the classes (H, W) that each entry predicts for an image with this label (H, W)."""
        for entry, classes in entries.items():
            self.matrices[entry].update(classes, label)
            if self.boundaries:
                self.bands[entry].update(classes, label)

    def sum_over_processes(self) -> None:
        """Sum the counts over all processes; a process without images has no entries yet."""
        for entry in dict.fromkeys(distributed.all_gather_object(list(self.matrices))):
            distributed.all_reduce_sum(self.matrices[entry].matrix)
            if self.boundaries:
                distributed.all_reduce_sum(self.bands[entry].counts)

    def metrics(self) -> dict[str, dict[str, Any]]:
        """Return the metrics by entry."""
        bands = {entry: band.compute() for entry, band in self.bands.items()}
        return {entry: matrix.compute() | bands.get(entry, {}) for entry, matrix in self.matrices.items()}


def _readable(
    dataset: Dataset, indices: Sequence[int], loaded: Iterable[Loaded], skipped: list[tuple[int, str]] | None
) -> Iterator[Sample]:
    """Yield the readable samples; the others are recorded in `skipped`, or raise UserError if it is None."""
    for index, sample in zip(indices, loaded, strict=True):
        if not isinstance(sample, UserError):
            _, image, label = sample
            if label is None:
                raise UserError(f"{dataset.samples[index].image}: has no label file; evaluation needs one")
            yield index, image, label
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
