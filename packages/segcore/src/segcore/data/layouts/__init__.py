"""Data set layouts, one module each; `open_dataset` picks one from the table."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from segcore.config.data_sets import DATA_SETS, TEST_SPLITS
from segcore.config.schema import DataConfig
from segcore.config.user_code import is_reference
from segcore.data.dataset import Dataset, Sample, check_sizes
from segcore.data.images import read_size
from segcore.data.labels import FORBIDDEN, add_background
from segcore.data.layouts import ade20k, cityscapes, folder, own, sets, toy
from segcore.data.layouts.also import join
from segcore.data.pairs import PairDataset
from segcore.data.rasters import is_tiff, tiff_size, tile_boxes
from segcore.errors import UserError
from segcore.files import expanded

Split = Literal["train", "val", "test"]


class Layout(NamedTuple):
    """The arrangement of a data set's files below `data.root`."""

    open_split: Callable[[DataConfig, Split], Dataset]
    """Return a split from the files; raises UserError without a folder or without images."""
    classes: Callable[[DataConfig], tuple[tuple[str, ...], np.ndarray]]
    """Return the K class names and (K, 3) uint8 RGB colors; needs no files."""


LAYOUTS = {
    "cityscapes": Layout(cityscapes.open_split, lambda data: (cityscapes.CLASSES, cityscapes.PALETTE)),
    "ade20k": Layout(ade20k.open_split, lambda data: (ade20k.CLASSES, ade20k.PALETTE)),
    "folder": Layout(folder.open_split, folder.classes),
    "toy": Layout(toy.open_split, lambda data: (cityscapes.CLASSES, cityscapes.PALETTE)),
    **{name: Layout(partial(sets.open_split, row), partial(sets.classes, row)) for name, row in DATA_SETS.items()},
}
"""Layouts by name. To add a data set, add its row and its name to `config.data_sets`."""
OWN = Layout(own.open_split, own.classes)
"""The layout of every `file.py:function`."""


def layout_of(data: DataConfig) -> Layout:
    """Return the layout of a data set."""
    return OWN if is_reference(data.dataset) else LAYOUTS[data.dataset]


def source_of(data: DataConfig) -> str:
    """Return the folder of a data set, or the user's function that opens it, to begin messages with."""
    return f"data.dataset {data.dataset}" if is_reference(data.dataset) else str(data.root)


def open_dataset(data: DataConfig, split: Split, cache: Path | None = None) -> Dataset:
    """Return a split of `data`, which also sets the layout, the channels and the classes; `test` has no labels.

    `cache` is a folder for decoded images and labels, as `data.cache` is in training.
    Raises UserError when the folder is missing, a split is empty or not known, or an image has no label. Generates
    nothing.
    """
    dataset = find_files(data, split, cache)
    if dataset.missing:
        more = f" (and {len(dataset.missing) - 1} more; `check` lists them)" if len(dataset.missing) > 1 else ""
        raise UserError(dataset.missing[0] + more)
    return dataset


def find_files(data: DataConfig, split: Split, cache: Path | None = None) -> Dataset:
    """Return the split as `open_dataset` does, but leave out images without a label, which `missing` then lists."""
    layout = layout_of(data)
    if split == "test" and data.dataset not in TEST_SPLITS:
        raise UserError(
            f"data.dataset {data.dataset} has no test split known here; run `predict` on the folder of its images "
            f"(sets with one: {', '.join(TEST_SPLITS)})"
        )
    if layout is not OWN and not data.root.is_dir():
        raise UserError(
            f"{data.root}: no such folder; set data.root to the folder of the {data.dataset} dataset"
            + (", or let `train` generate it there" if data.dataset == "toy" else "")
            + (f" ({DATA_SETS[data.dataset].where})" if data.dataset in DATA_SETS else "")
        )
    dataset = layout.open_split(data, split)
    dataset = replace(
        dataset,
        palette=_colors(data, dataset.palette),
        channels=data.channels,
        bit_depth=data.bit_depth,
        max_pixels=data.max_pixels,
        cache=cache,
        opened_by=partial(find_files, data, split, cache) if layout is OWN else None,
    )
    dataset = with_background(dataset) if data.add_background_class else dataset
    if data.tile and isinstance(dataset, PairDataset):
        raise UserError(f"data.tile {data.tile}: {data.dataset} gives images, not files; cut them in your function")
    dataset = replace(dataset, samples=tuple(tiles(dataset.samples, data.tile))) if data.tile else dataset
    if split != "train" or not data.also:
        return dataset
    others = [entry.partition("=") for entry in data.also]
    return join(dataset, [find_files(_plain(data, name, folder), split, cache) for name, _, folder in others])


def _plain(data: DataConfig, name: str, folder: str) -> DataConfig:
    """Return the settings that open the whole set `name` in a folder, with images as those of `data`."""
    kept = ("channels", "bit_depth", "mean", "std", "max_pixels", "tile", "photometric")
    return DataConfig(name, expanded(folder), **{key: getattr(data, key) for key in kept})


def tiles(samples: Iterable[Sample], side: int) -> Iterator[Sample]:
    """Yield the tiles of TIFFs that are longer or wider than `side` pixels, see `tile_boxes`, and the other samples.

    Raises UserError when the size of a TIFF's label differs from its own.
    """
    for sample in samples:
        size = tiff_size(sample.image) if is_tiff(sample.image) else (0, 0)
        if max(size) <= side:
            yield sample
            continue
        if sample.label:
            check_sizes(sample, size, tiff_size(sample.label) if is_tiff(sample.label) else read_size(sample.label))
        yield from (replace(sample, box=box) for box in tile_boxes(*size, side))


def palette_of(data: DataConfig) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the class names and (K, 3) uint8 RGB colors of what `open_dataset` returns; needs no files."""
    classes, palette = layout_of(data).classes(data)
    palette = _colors(data, palette)
    return add_background(classes, palette) if data.add_background_class else (classes, palette)


def state_classes(data: DataConfig) -> DataConfig:
    """Return `data` with its classes and colors written out, so that no file of a user is needed to know them."""
    names, colors = palette_of(replace(data, add_background_class=False))
    return replace(data, classes=names, labels=(), palette=tuple(bytes(color).hex() for color in colors))


def _colors(data: DataConfig, palette: np.ndarray) -> np.ndarray:
    """Return the colors that `data.palette` states instead of those of the data set, if it states any."""
    if not data.palette:
        return palette
    wrong = [text for text in data.palette if not re.fullmatch(r"[0-9a-fA-F]{6}", text)]
    if wrong or len(data.palette) != len(palette):
        raise UserError(
            f"data.palette has {len(data.palette)} colors{f', such as {wrong[0]!r}' if wrong else ''}, for "
            f"{len(palette)} classes; write one per class as rrggbb, such as 804080"
        )
    return np.array([list(bytes.fromhex(text)) for text in data.palette], np.uint8)


def with_background(dataset: Dataset) -> Dataset:
    """Return the dataset with a class `background` in front: train ids increase by one, and ignored pixels become 0.

    Background is then the ignored class. DDPS does this to ADE20K (raw values 0 .. 150), Cityscapes (train ids + 1).
    """
    classes, palette = add_background(dataset.classes, dataset.palette)
    table = np.where(dataset.table == FORBIDDEN, FORBIDDEN, dataset.table + 1).astype(np.uint16)
    table[dataset.table == dataset.ignore_index] = 0
    return replace(dataset, classes=classes, palette=palette, ignore_index=0, table=table)
