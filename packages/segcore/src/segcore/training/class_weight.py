"""What follows from the frequency of each class in the training labels: class weights, rare-class sampling."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from segcore.config.registry import experiments
from segcore.config.schema import Experiment, LossConfig
from segcore.data.check import label_pixels
from segcore.data.dataset import Dataset
from segcore.data.layouts.also import JoinedDataset
from segcore.data.loader import RareClasses, rare_class_probabilities
from segcore.errors import UserError
from segcore.files import MAX_RECORD, read_json, write

HISTOGRAM = "label_histogram.json"


def resolve_loss(exp: Experiment, dataset: Dataset, work_dir: Path) -> LossConfig:
    """Return `exp.loss` with a number per class if its `class_weight` is "auto" or "auto_sqrt".

    These read all training labels once and keep their histogram in `<work_dir>/label_histogram.json`, so that a
    resumed run gets the same weights without reading them again. The weights of a published row are left out for other
    classes than the row's, see `weights_are_of_row`. Raises UserError about a label that cannot be used and another
    number of weights than classes.
    """
    weights, classes = exp.loss.class_weight, len(dataset.classes)
    if weights_are_of_row(exp):
        return replace(exp.loss, class_weight=None)
    if isinstance(weights, tuple) and len(weights) != classes:
        raise UserError(
            f"loss.class_weight has {len(weights)} values for {classes} classes; give one per class, auto, "
            "auto_sqrt or None"
        )
    if not isinstance(weights, str):
        return exp.loss
    pixels, _ = _histogram(exp, dataset, work_dir)
    found = balanced(pixels, power=0.5 if weights == "auto_sqrt" else 1.0)
    return replace(exp.loss, class_weight=tuple(found.tolist()))


def rare_classes(exp: Experiment, dataset: Dataset, work_dir: Path) -> RareClasses | None:
    """Return how `data.rare_class_sampling` draws samples, None without it; reads and keeps labels as `resolve_loss`.

    An unreadable label is an error, or with `data.on_error` skip its sample is never drawn. None also if no label can
    be read, which training reports.
    """
    if exp.data.rare_class_sampling is None:
        return None
    pixels, images = _histogram(exp, dataset, work_dir)
    probabilities = rare_class_probabilities(pixels, exp.data.rare_class_sampling)
    drawn = np.flatnonzero(probabilities)
    if not drawn.size:
        return None
    return RareClasses(probabilities[drawn], tuple(np.array(images[index]) for index in drawn))


def weights_are_of_row(exp: Experiment) -> bool:
    """Return whether the class weights are those that a published row states for another number of classes."""
    weights, build = exp.loss.class_weight, experiments().get(exp.name.replace("-", "_"))
    if not isinstance(weights, tuple) or len(weights) == exp.model.num_classes or build is None:
        return False
    return weights == build().loss.class_weight


def balanced(pixels: np.ndarray, power: float = 1.0) -> np.ndarray:
    """Return the weights (K,) float64 of classes from their pixel counts (K,): 1 / ln(1.02 + share) ^ power, rescaled.

    With power 1 the formula is ENet's (arXiv 1606.02147, section 5.2). It is bounded, between 1.4 and 51, also for
    classes without a pixel. The weights are then divided by their mean over the pixels, so that the scale of the loss,
    and hence the learning rate's effect, does not change.
    """
    share = pixels / max(pixels.sum(), 1)
    weights = np.log(1.02 + share) ** -power
    return weights / ((weights * share).sum() or 1)


def _histogram(exp: Experiment, dataset: Dataset, work_dir: Path) -> tuple[np.ndarray, list[list[int]]]:
    """Return the pixels (K,) int64 of each class and the indices of the samples with it, from `work_dir` if there."""
    path, key = work_dir / HISTOGRAM, _key(dataset)
    if (stored := _read(path, key, len(dataset.classes), len(dataset))) is not None:
        return stored
    images: list[list[int]] = [[] for _ in dataset.classes]
    found, problems = label_pixels(dataset, images=images)
    if problems and exp.data.on_error == "stop":
        more = f" (and {len(problems) - 1} more; `check` lists them)" if len(problems) > 1 else ""
        raise UserError(problems[0] + more)
    found[dataset.ignore_index] = 0
    pixels = found[: len(dataset.classes)]
    record = {"dataset": key, "classes": dataset.classes, "pixels": pixels.tolist(), "images": images}
    write(path, json.dumps(record) + "\n")
    return pixels, images


def _key(dataset: Dataset) -> str:
    """Return a digest of the samples' names and what their label files mean: it identifies a data set in any folder."""
    names = "\n".join(dataset.name(index) for index in range(len(dataset)))
    digest = hashlib.sha256(os.fsencode(names))
    for part in dataset.parts if isinstance(dataset, JoinedDataset) else (dataset,):
        digest.update(part.table.tobytes() + (b"" if part.colors is None else part.colors.tobytes()))
    return digest.hexdigest()


def _read(path: Path, key: str, classes: int, samples: int) -> tuple[np.ndarray, list[list[int]]] | None:
    """Return pixels and images per class from a histogram of the same data set, or None."""
    try:
        content = read_json(path, MAX_RECORD)
        pixels, images = content["pixels"], content["images"]
        usable = content["dataset"] == key and len(pixels) == len(images) == classes
        usable &= all(type(count) is int and 0 <= count < 1 << 48 for count in pixels)
        usable &= all(type(index) is int and 0 <= index < samples for indices in images for index in indices)
        usable &= all(images[index] for index, count in enumerate(pixels) if count)
        return (np.array(pixels), images) if usable else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
