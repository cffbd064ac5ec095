"""Check a data set before a long training run: read every file and report every problem in one line.

Files are read in threads: decoding, nearly all of the work, releases the interpreter's lock in both OpenCV and Pillow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np

from segcore.config.schema import DataConfig
from segcore.data.dataset import Dataset, check_sizes
from segcore.data.images import read_size
from segcore.data.layouts import find_files
from segcore.errors import UserError
from segcore.progress import progress

Split = Literal["train", "val"]
T = TypeVar("T")


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
        return "\n".join([*lines, *(f"  {problem}" for problem in self.problems)])


@dataclass(frozen=True)
class SampleCheck:
    """One sample: the image's (H, W) and the pixels per train id (256,), each None if it cannot be read."""

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
    count, has_label = len(dataset.classes), sum(sample.label is not None for sample in dataset.samples)
    report = Report(split, len(dataset), has_label, classes=dataset.classes, problems=list(dataset.missing))
    if num_classes not in (None, count):
        report.problems.append(
            f"{data.root}: has {count} classes but model.num_classes is {num_classes}; make them equal"
        )
    pixels, present = np.zeros(256, np.int64), np.zeros(256, np.int64)
    for sample in _each(lambda index: check_sample(dataset, index), len(dataset), f"reading {split}"):
        report.problems += sample.problems
        if sample.size:
            report.sizes[sample.size] += 1
        if sample.pixels is not None:
            pixels += sample.pixels
            present += sample.pixels > 0
    report.ignored, pixels[dataset.ignore_index] = int(pixels[dataset.ignore_index]), 0
    report.pixels, report.present = pixels[:count].tolist(), present[:count].tolist()
    if dataset.ignore_index < count:
        report.present[dataset.ignore_index] = 0
    if dataset.unmatched_labels:
        more = f" (and {len(dataset.unmatched_labels) - 1} more)" if len(dataset.unmatched_labels) > 1 else ""
        report.notes.append(f"{dataset.unmatched_labels[0]}: a label without an image{more}")
    if not has_label:
        report.notes.append(f"{data.root}: no labels, so this split cannot be evaluated")
    elif absent := [name for i, name in enumerate(dataset.classes) if not pixels[i] and i != dataset.ignore_index]:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        report.notes.append(f"{data.root}: no pixel is labeled {', '.join(absent[:5])}{more}")
    return report


def check_sample(dataset: Dataset, index: int) -> SampleCheck:
    """Read a sample's image and label completely; return problems with the files instead of raising them."""
    sample, problems = dataset.samples[index], list[str]()
    image = _collect(problems, lambda: dataset.image(index))
    label = _collect(problems, lambda: dataset.label(index)) if sample.label else None
    if image is not None and label is not None:
        _collect(problems, lambda: check_sizes(sample, image.shape[:2], label.shape))
    pixels = None if label is None else np.bincount(label.ravel(), minlength=256)
    return SampleCheck(None if image is None else image.shape[:2], pixels, tuple(problems))


def check_headers(dataset: Dataset) -> list[str]:
    """Return one line per file that is missing or not an image, and per label whose size differs from its image's.

    Reads only the beginning of each file, as a quick check before training; `check` finds damage further inside.
    """
    return [
        line
        for lines in _each(lambda i: _headers(dataset, i), len(dataset), "checking that images and labels open")
        for line in lines
    ]


def label_pixels(dataset: Dataset) -> tuple[np.ndarray, list[str]]:
    """Return the pixels per train id (256,) int64 of all readable labels, and one line per unreadable one."""
    total, problems = np.zeros(256, np.int64), list[str]()

    def count(index: int) -> tuple[np.ndarray | None, list[str]]:
        lines = list[str]()
        label = _collect(lines, lambda: dataset.label(index))
        return None if label is None else np.bincount(label.ravel(), minlength=256), lines

    for pixels, lines in _each(count, len(dataset), "counting label pixels"):
        problems += lines
        total += 0 if pixels is None else pixels
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
