"""Where the files of a dataset lie: each layout in a module of its own; `open_dataset` picks one."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from segcore.config.schema import DataConfig
from segcore.data.dataset import Dataset
from segcore.data.labels import FORBIDDEN, behind_background
from segcore.errors import UserError


def open_dataset(data: DataConfig, split: Literal["train", "val"]) -> Dataset:
    """Return the training or validation split of `data`, which also says the layout, the channels and the classes.

    Raises UserError when the folder is missing, a split is empty, or an image has no label.
    """
    dataset = find_files(data, split)
    if dataset.unpaired:
        more = f" (and {len(dataset.unpaired) - 1} more; `check` lists them)" if len(dataset.unpaired) > 1 else ""
        raise UserError(dataset.unpaired[0] + more)
    return dataset


def find_files(data: DataConfig, split: Literal["train", "val"]) -> Dataset:
    """Return the split as `open_dataset` does, but leave out images without a label, which `unpaired` then lists.

    Nothing is generated; of a toy set `unpaired` lists every file that it has lost.
    """
    from segcore.data.layouts import ade20k, cityscapes, folder

    if not data.root.is_dir():
        raise UserError(
            f"{data.root}: no such folder; set data.root to the folder of the {data.dataset} dataset"
            + (", or let `train` generate it there" if data.dataset == "toy" else "")
        )
    match data.dataset:
        case "folder":
            dataset = folder.open_split(data, split)
        case "ade20k":
            dataset = ade20k.open_split(data.root, split)
        case "cityscapes" | "toy":
            dataset = cityscapes.open_split(data.root, split)
    if data.dataset == "toy":
        from segcore.data.layouts import toy

        gone = tuple(f"{file}: missing; `train` generates it again" for file in toy.lost(data.root, [split]))
        dataset = replace(dataset, unpaired=gone)
    dataset = replace(dataset, channels=data.channels, bit_depth=data.bit_depth)
    return with_background(dataset) if data.add_background_class else dataset


def palette_of(data: DataConfig) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the class names and (K, 3) uint8 RGB colors that `open_dataset` would give, without needing the files."""
    from segcore.data.layouts import ade20k, cityscapes, folder

    match data.dataset:
        case "folder":
            classes, palette = data.classes, folder.distinct_colors(len(data.classes))
        case "ade20k":
            classes, palette = ade20k.CLASSES, ade20k.PALETTE
        case "cityscapes" | "toy":
            classes, palette = cityscapes.CLASSES, cityscapes.PALETTE
    return behind_background(classes, palette) if data.add_background_class else (classes, palette)


def with_background(dataset: Dataset) -> Dataset:
    """Return the dataset with a class `background` in front: train ids move up by one, and what was ignored becomes 0.

    Background is then the ignored class. This is how DDPS sees ADE20K (raw values 0 .. 150) and Cityscapes (train ids
    + 1).
    """
    classes, palette = behind_background(dataset.classes, dataset.palette)
    table = np.where(dataset.table == FORBIDDEN, FORBIDDEN, dataset.table + 1).astype(np.uint8)
    table[dataset.table == dataset.ignore_index] = 0
    return replace(dataset, classes=classes, palette=palette, ignore_index=0, table=table)
