"""Training crops as training sees them: augmented, beside their labels painted over them, with a legend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.random import RandomState
from torch import Tensor

from segcore.config.schema import DataConfig
from segcore.data.batch import Batch
from segcore.data.check import label_pixels
from segcore.data.dataset import Dataset
from segcore.data.transforms import TrainTransform
from segcore.errors import UserError
from segcore.reporting.figures import hstack_panels, legend, overlay, to_uint8_rgb, vstack, write_image
from segcore.seeds import augmentation_seed

HEIGHT = 256
"""Height of a crop in pixels; larger ones are subsampled."""
COLUMNS, ROWS = 3, 6
"""Crops of a class, and classes on a page."""
TRIES = 20
"""Draws of a crop until it holds the class."""


def crop_panels(image: Tensor, label: Tensor, dataset: Dataset, data: DataConfig) -> list[np.ndarray]:
    """Return a normalized image (C, H, W) as RGB, and the same with its label (H, W) over it; padding is gray."""
    every = -(-image.shape[1] // HEIGHT)
    channels = image[:, ::every, ::every].numpy().transpose(1, 2, 0)
    numbers = channels * np.array(data.std, np.float32) + np.array(data.mean, np.float32)
    if data.bit_depth == 8:
        numbers = numbers.round().clip(0, 255).astype(np.uint8)
    shown = to_uint8_rgb(numbers)
    classes = label[::every, ::every].numpy()
    return [shown, overlay(shown, classes, dataset.palette, ignore_index=dataset.ignore_index)]


def batch_picture(batch: Batch, dataset: Dataset, data: DataConfig) -> np.ndarray:
    """Return the first 8 crops of a batch with their labels, two in a row, and the legend."""
    images, labels = batch.on("cpu", data.mean, data.std)
    found = [crop_panels(image, label, dataset, data) for image, label in zip(images[:8], labels, strict=False)]
    rows = [[panel for pair in found[i : i + 2] for panel in pair] for i in range(0, len(found), 2)]
    return vstack([*(hstack_panels(row, ["crop", "label"] * (len(row) // 2)) for row in rows), _legend(dataset)])


def write_crop_pages(folder: Path, dataset: Dataset, data: DataConfig, seed: int) -> list[Path]:
    """Write pages of augmented crops to `train_01.jpg` …, a class in a row, the rarest first; return their paths.

    The crops follow from the seed. Samples that cannot be read and classes without a pixel are left out.
    """
    rows, paths = list(_class_rows(dataset, data, seed)), list[Path]()
    for first in range(0, len(rows), ROWS):
        paths.append(folder / f"train_{first // ROWS + 1:02}.jpg")
        write_image(paths[-1], vstack([*rows[first : first + ROWS], _legend(dataset)]))
    return paths


def _class_rows(dataset: Dataset, data: DataConfig, seed: int) -> Iterator[np.ndarray]:
    """Yield a row of crops per class, the rarest class first."""
    transform = TrainTransform(data, dataset.ignore_index, len(dataset.classes))
    images: list[list[int]] = [[] for _ in dataset.classes]
    pixels, _ = label_pixels(dataset, images=images)
    known = [k for k in range(len(dataset.classes)) if images[k] and k != dataset.ignore_index]
    for k in sorted(known, key=lambda k: pixels[k]):
        panels, captions = list[np.ndarray](), list[str]()
        share = f"{100 * pixels[k] / pixels.sum():.3g} % of the pixels"
        about = f"{dataset.classes[k]}: {share}, in {len(images[k])} of {len(dataset)} images"
        drawn = RandomState(augmentation_seed(seed, 0, COLUMNS * k)).permutation(images[k])[:COLUMNS]
        for column, index in enumerate(drawn.tolist()):
            seeds = [augmentation_seed(seed, trial, COLUMNS * k + column) for trial in range(TRIES)]
            if (crop := _crop_with(dataset, index, k, transform, seeds)) is not None:
                panels += crop_panels(*crop, dataset, data)
                captions += ["" if captions else about, dataset.name(index)[-24:]]
        if panels:
            yield hstack_panels(panels, captions)


def _crop_with(
    dataset: Dataset, index: int, k: int, transform: TrainTransform, seeds: Sequence[int]
) -> tuple[Tensor, Tensor] | None:
    """Return the first crop of a sample that holds class `k`, otherwise the last one; None if it cannot be read."""
    try:
        image, label = dataset.pair(index)
    except UserError:
        return None
    assert label is not None
    for seed in seeds:
        crop, classes = transform(image, label, RandomState(seed))
        if (classes == k).any():
            break
    return crop, classes


def _legend(dataset: Dataset) -> np.ndarray:
    return legend(dataset.classes, dataset.palette)
