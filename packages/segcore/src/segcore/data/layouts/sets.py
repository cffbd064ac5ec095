"""The data sets of the table `config.data_sets`, opened by the code of `folder`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from segcore.config.data_sets import CLASS_FILES, DataSet
from segcore.config.schema import DataConfig
from segcore.data.dataset import Dataset
from segcore.data.labels import read_classes
from segcore.data.layouts import folder
from segcore.errors import UserError


def open_split(row: DataSet, data: DataConfig, split: str) -> Dataset:
    """Return the split `train` or `val` of a row; patterns, lists and labels that `data` states replace the row's.

    `test`, where the row has one, has no labels and always the row's images.

    Raises UserError when the data set has no such split, and as `folder.open_split` does.
    """
    settings: dict[str, Any] = dict(row.patterns)
    settings |= {name: data.root / path for name, path in settings.items() if name.endswith("_list")}
    settings = {name: value for name, value in settings.items() if getattr(data, name) == getattr(DataConfig, name)}
    names, palette = classes(row, data)
    if not data.labels:
        settings["labels"] = row.labels(names)
    filled = replace(data, classes=names, **settings)
    if split == "test":
        images, listed = row.test
        filled = replace(filled, val_images=images, val_masks="", val_list=data.root / listed if listed else None)
        return replace(folder.open_split(replace(filled, val_share=0.0), "val"), palette=palette)
    if filled.train_images == DataConfig.train_images and (split == "train" or data.val_share):
        raise UserError(f"data.dataset {data.dataset}: {row.title} has no training labels; take another data set")
    return replace(folder.open_split(filled, split), palette=palette)


def classes(row: DataSet, data: DataConfig) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the class names and (K, 3) uint8 RGB colors of a row, or of the classes and labels that `data` states."""
    stated = data.classes or data.labels
    return folder.classes(data) if stated else read_classes(CLASS_FILES / f"{row.classes}.txt")
