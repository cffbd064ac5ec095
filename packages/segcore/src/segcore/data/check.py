"""Check a data set before a long training run: read every file and report every problem in one line.

Files are read in threads: decoding, nearly all of the work, releases the interpreter's lock in both OpenCV and Pillow.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from segcore.config.schema import DataConfig
from segcore.data.dataset import Dataset, check_sizes
from segcore.data.images import read_image, read_size
from segcore.data.labels import label_lut
from segcore.data.layouts import Split, find_files, source_of
from segcore.data.pairs import PairDataset
from segcore.errors import UserError
from segcore.files import writing
from segcore.progress import progress

T = TypeVar("T")


SHOWN = 50
"""Problems that a printed report lists: where each of 10,000 masks has the same one, the first suffice."""


@dataclass
class Report:
    """The content of a split and its problems.

    Attributes:
        split: train or val.
        samples, labels: number of usable images, and how many of them have a label file.
        sizes: (height, width) -> number of readable images.
        classes: K names.
        pixels: label pixels per class.
        present: number of images per class with at least one pixel of it.
        ignored: number of ignored label pixels.
        problems: one line per file that would stop training or evaluation, naming file, value and remedy.
        notes: remarks that do not stop a run.
    """

    split: str
    samples: int = 0
    labels: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    classes: tuple[str, ...] = ()
    pixels: list[int] = field(default_factory=list)
    present: list[int] = field(default_factory=list)
    ignored: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data; sizes are keyed `HEIGHTxWIDTH`."""
        return {**vars(self), "sizes": {_size(size): count for size, count in sorted(self.sizes.items())}}

    def __str__(self) -> str:
        lines = [f"{self.split}: {self.samples} images, {self.labels} labels"]
        if self.sizes:
            common = ", ".join(f"{_size(size)} ({count})" for size, count in self.sizes.most_common(3))
            heights, widths = zip(*self.sizes, strict=True)
            spread = f"; heights {min(heights)}-{max(heights)}, widths {min(widths)}-{max(widths)}"
            lines.append(f"sizes (height x width): {common}" + (spread if len(self.sizes) > 1 else ""))
        if self.labels:
            total = max(sum(self.pixels) + self.ignored, 1)
            width = max(map(len, (*self.classes, "ignored")))
            lines.append(f"{'class':{width}}  {'pixels':>14}  {'share %':>8}  {'images':>8}")
            for name, pixels, images in zip(self.classes, self.pixels, self.present, strict=True):
                lines.append(f"{name:{width}}  {pixels:14}  {100 * pixels / total:8.3f}  {images:8}")
            lines.append(f"{'ignored':{width}}  {self.ignored:14}  {100 * self.ignored / total:8.3f}")
        lines += [f"note: {note}" for note in self.notes]
        lines.append(f"problems: {len(self.problems) or 'none'}")
        lines += [f"  {problem}" for problem in self.problems[:SHOWN]]
        if len(self.problems) > SHOWN:
            lines.append(f"  and {len(self.problems) - SHOWN} more; --json FILE has all")
        return "\n".join(lines)


@dataclass(frozen=True)
class SampleCheck:
    """One sample: the image's (H, W) and the pixels per train id, each None if it cannot be read."""

    size: tuple[int, int] | None
    pixels: np.ndarray | None
    problems: tuple[str, ...]


def check(data: DataConfig, split: Split, num_classes: int | None = None) -> Report:
    """Read every file of a split and return its content and all its problems; shows a progress bar.

    `num_classes` is the model's number of classes, None to skip the comparison. Never raises because of a file.
    """
    try:
        dataset = find_files(data, split)
    except UserError as error:  # no folder or no images: nothing to read
        return Report(split, problems=[str(error)])
    source, count = source_of(data), len(dataset.classes)
    has_label = sum(sample.label is not None for sample in dataset.samples)
    report = Report(split, len(dataset), has_label, classes=dataset.classes, problems=list(dataset.missing))
    if num_classes not in (None, count):
        report.problems.append(f"{source}: has {count} classes but model.num_classes is {num_classes}; make them equal")
    pixels, present = np.zeros((2, dataset.label_values), np.int64)
    for sample in _each(lambda index: check_sample(dataset, index), len(dataset), f"reading {split}"):
        report.problems += sample.problems
        if sample.size:
            report.sizes[sample.size] += 1
        if sample.pixels is not None:
            pixels += sample.pixels
            present += sample.pixels > 0
    if has_label and (fault := useless(dataset, pixels, split)) and pixels.any():
        report.problems.append(f"{source}: {fault}")
    report.ignored, pixels[dataset.ignore_index] = int(pixels[dataset.ignore_index]), 0
    report.pixels, report.present = pixels[:count].tolist(), present[:count].tolist()
    if dataset.ignore_index < count:
        report.present[dataset.ignore_index] = 0
    if dataset.unmatched_labels:
        more = f" (and {len(dataset.unmatched_labels) - 1} more)" if len(dataset.unmatched_labels) > 1 else ""
        report.notes.append(f"{dataset.unmatched_labels[0]}: a label without an image{more}")
    if not has_label and not dataset.missing:
        report.notes.append(f"{source}: no labels, so this split cannot be evaluated")
    elif pixels.any():
        report.notes += [f"{source}: {note}" for note in doubtful(dataset, pixels, report.ignored)]
    if split == "val":
        with contextlib.suppress(UserError):  # no training images
            report.notes += [f"{source}: {note}" for note in seen_in_training(find_files(data, "train"), dataset)]
    return report


def seen_in_training(train: Dataset, val: Dataset) -> list[str]:
    """Return a remark on validation images that are training images, too."""
    paths = {sample.image for sample in train.samples}
    count = sum(sample.image in paths for sample in val.samples)
    note = f"{count} of {len(val)} validation images are training images, which makes figures on them too good"
    return [note] * bool(count)


def useless(dataset: Dataset, pixels: np.ndarray, split: str) -> str | None:
    """Return why a run on labels with these pixels per train id would mean nothing, and the remedy; None if it may."""
    known = np.delete(pixels, dataset.ignore_index)
    names = [name for i, name in enumerate(dataset.classes) if i != dataset.ignore_index]
    (labeled,) = known.nonzero()
    if split == "train" and len(names) == 1:
        return f"{names[0]!r} is the only class, so there is nothing to tell apart; name the background as a class too"
    if not len(labeled):
        return f"every label pixel of {split} is ignored; name the values of the masks in data.labels"
    if split == "val" or len(labeled) > 1:
        return None
    ignored = dataset.ignore_index
    values = np.array_equal(dataset.table, label_lut(len(names)))  # the masks hold what is counted
    if values and ignored >= len(names) and pixels[ignored] and not labeled[0]:
        return (
            f"the masks of {split} hold only 0 and {ignored}, which is ignored; if it is a class, say so: "
            f"--data.labels 0={names[0]} {ignored}={names[1]}"
        )
    return f"only {names[labeled[0]]!r} has pixels in {split}, so there is nothing to tell apart; correct the masks"


def doubtful(dataset: Dataset, pixels: np.ndarray, ignored: int) -> Iterator[str]:
    """Yield remarks on the label pixels per train id, which do not count the ignored ones, of a whole split."""
    absent = [name for i, name in enumerate(dataset.classes) if not pixels[i] and i != dataset.ignore_index]
    if absent:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        yield f"no pixel is labeled {', '.join(absent[:5])}{more}"
    if ignored > pixels.sum():
        yield f"{ignored / (ignored + pixels.sum()):.0%} of the label pixels are ignored"


def require_meaning(dataset: Dataset, split: str, source: object, most: int = 64) -> list[str]:
    """Check the label pixels of a split before training and return remarks, one per line, that begin with `source`.

    Reads `most` labels spread over the split, and all of them where those are suspicious. Raises UserError when
    training, or evaluation on `val`, would mean nothing.
    """
    every = range(len(dataset))
    part = every[:: -(-len(every) // most)]
    pixels, _ = label_pixels(dataset, part)
    if useless(dataset, pixels, split) and len(part) < len(every):
        part, (pixels, _) = every, label_pixels(dataset)
    if not pixels.any():
        return []  # none of them can be read, which is reported elsewhere
    if fault := useless(dataset, pixels, split):
        raise UserError(f"{source}: {fault}")
    ignored, pixels[dataset.ignore_index] = int(pixels[dataset.ignore_index]), 0
    return (
        [f"{source}: {split}: {note}" for note in doubtful(dataset, pixels, ignored)] if len(part) == len(every) else []
    )


def check_sample(dataset: Dataset, index: int) -> SampleCheck:
    """Read a sample's image and label completely; return problems with the files instead of raising them."""
    sample, problems = dataset.samples[index], list[str]()
    if isinstance(dataset, PairDataset):  # made once
        image, label = _collect(problems, lambda: dataset.pair(index)) or (None, None)
    else:
        image = _collect(problems, lambda: dataset.image(index))
        label = _collect(problems, lambda: dataset.label(index)) if sample.label else None
    if image is not None and label is not None:
        _collect(problems, lambda: check_sizes(sample, image.shape[:2], label.shape))
    pixels = None if label is None else np.bincount(label.ravel(), minlength=dataset.label_values)
    return SampleCheck(None if image is None else image.shape[:2], pixels, tuple(problems))


def check_headers(dataset: Dataset) -> list[str]:
    """Return one line per file that is missing or not an image, and per label whose size differs from its image's.

    Reads only the beginning of each file, as a quick check before training; `check` finds damage further inside. Pairs
    that a program makes are not read.
    """
    if isinstance(dataset, PairDataset):
        return []
    return [
        line
        for lines in _each(lambda i: _headers(dataset, i), len(dataset), "checking that images and labels open")
        for line in lines
    ]


def cache_note(folder: Path, datasets: Sequence[Dataset]) -> str:
    """Return a line about what the cache of decoded images and labels in `folder`, that of all `datasets`, will take.

    Raises UserError when there is less space, or the folder cannot be made or written.
    """
    needed = 0
    for dataset in datasets:
        needed += sum(_each(partial(_bytes_to_cache, dataset), len(dataset), "sizing data.cache"))
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if needed and not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        free = shutil.disk_usage(folder).free
    count = sum(map(len, datasets))
    line = f"data.cache {folder}: {count} images, {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free"
    if needed > free:
        raise UserError(f"{line}; name a folder on a larger disk, or leave data.cache out")
    return line


def _bytes_to_cache(dataset: Dataset, index: int) -> int:
    """Return the bytes that the cache lacks of a sample, 0 for one that cannot be read."""
    sample = dataset.samples[index]
    try:
        if not (each := dataset.not_cached(index)):
            return 0
        height, width = read_size(sample.image)
    except OSError:
        return 0
    except UserError:  # only OpenCV or NumPy can read it, or it is damaged
        found = _collect([], lambda: read_image(sample.image, dataset.channels, dataset.bit_depth, dataset.max_pixels))
        height, width = (0, 0) if found is None else found.shape[:2]
    if sample.box:
        y1, x1, y2, x2 = sample.box
        height, width = y2 - y1, x2 - x1
    return height * width * sum(each)


def label_pixels(
    dataset: Dataset, indices: Sequence[int] | None = None, images: list[list[int]] | None = None
) -> tuple[np.ndarray, list[str]]:
    """Return the pixels per train id, int64, of readable labels, and one line per unreadable one; None: of all labels.

    The array has `dataset.label_values` entries. The lists in `images`, one per class, get the indices of the samples
    that have a pixel of the class.
    """
    total, problems = np.zeros(dataset.label_values, np.int64), list[str]()
    indices = range(len(dataset)) if indices is None else indices

    def count(position: int) -> tuple[np.ndarray | None, list[str]]:
        lines = list[str]()
        label = _collect(lines, lambda: dataset.label(indices[position]))
        return None if label is None else np.bincount(label.ravel(), minlength=len(total)), lines

    for position, (pixels, lines) in enumerate(_each(count, len(indices), "counting label pixels")):
        problems += lines
        total += 0 if pixels is None else pixels
        for holding, found in zip(images or (), () if pixels is None else pixels, strict=False):
            if found:
                holding.append(indices[position])
    return total, problems


def _headers(dataset: Dataset, index: int) -> list[str]:
    problems, sample = list[str](), dataset.samples[index]
    try:
        image, label = read_size(sample.image), read_size(sample.label or sample.image)
    except UserError:
        return list(check_sample(dataset, index).problems)  # only OpenCV or NumPy can read it, or it is damaged
    if sorted(image) != sorted(label):  # the EXIF orientation may turn the image
        _collect(problems, lambda: check_sizes(sample, image, label))
    return problems


def _collect(problems: list[str], read: Callable[[], T]) -> T | None:
    """Return the result of `read`, or None after adding the message of its UserError to `problems`."""
    try:
        return read()
    except UserError as error:
        problems.append(str(error))
        return None


def _each(function: Callable[[int], T], count: int, title: str) -> Iterator[T]:
    """Yield function(0) .. function(count - 1) in order, computed in threads, with a progress bar."""
    pool = ThreadPoolExecutor()
    try:
        with progress(title) as advance:
            for done, result in enumerate(pool.map(function, range(count)), 1):
                advance(done, count)
                yield result
    finally:
        pool.shutdown(cancel_futures=True)


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
