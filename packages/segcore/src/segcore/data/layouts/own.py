"""A data set that a function of the user opens: `data.dataset file.py:open_split`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from segcore.config.schema import DataConfig
from segcore.config.user_code import load_function
from segcore.data.dataset import Dataset
from segcore.data.labels import distinct_colors
from segcore.data.layouts.folder import MAX_CLASSES
from segcore.data.pairs import PairDataset, from_pairs, named
from segcore.errors import UserError


def open_split(data: DataConfig, split: str) -> Dataset:
    """Return what the user's function returns for `data` and `split`, pairs as a data set of the classes of `data`.

    Raises UserError when the function fails or returns anything else, no sample, or classes without a color each.
    """
    found = load_function("data.dataset", data.dataset)(data, split)
    if not isinstance(found, Dataset):
        if not (hasattr(found, "__getitem__") and hasattr(found, "__len__")):
            raise UserError(
                f"data.dataset {data.dataset}: returned {type(found).__name__}; return pairs (image, mask), as a list "
                "or a torch Dataset, or a segcore Dataset"
            )
        if not data.classes:
            raise UserError(
                f"data.dataset {data.dataset}: returned {type(found).__name__}, which names no classes; set "
                "data.classes, or return segcore.data.pairs.from_pairs(…, classes)"
            )
        found = from_pairs(found, data.classes)
    if isinstance(found, PairDataset):
        found = named(found, Path(data.dataset) / split)
    count = len(found.classes)
    if not 1 <= count <= MAX_CLASSES or np.shape(found.palette) != (count, 3):
        raise UserError(
            f"data.dataset {data.dataset}: has {count} classes and {len(found.palette)} colors; give 1 to "
            f"{MAX_CLASSES} classes and a color (red, green, blue) of each"
        )
    if not len(found):
        raise UserError(f"data.dataset {data.dataset}: the split {split!r} has no sample")
    return found


def classes(data: DataConfig) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the class names and (K, 3) uint8 RGB colors; the function is called unless `data` states the names."""
    if data.classes:
        return data.classes, distinct_colors(len(data.classes))
    dataset = open_split(data, "val")
    return dataset.classes, dataset.palette
