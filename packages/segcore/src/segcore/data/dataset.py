"""A data set: image and label files in a fixed order, and the table from label values to train ids.

Nothing here imports torch, and everything pickles, so that worker processes start with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from segcore.data.cache import cache_file, cached
from segcore.data.images import MAX_PIXELS, color_indices, hex_colors, read_image, read_label, read_label_colors
from segcore.data.labels import FORBIDDEN, ranges
from segcore.data.rasters import Box, read_label_window, read_window
from segcore.errors import UserError

_IGNORE_THEM = "set data.unlisted to ignore"


@dataclass(frozen=True)
class Sample:
    """An image file and its label file, if it has one."""

    image: Path
    label: Path | None
    box: Box | None = None
    """The part of both files that is the sample; None: all."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """The samples of one split.

    Attributes:
        classes: K names in the order of the train ids.
        palette: (K, 3) uint8 RGB.
        ignore_index: the train id that loss and metrics exclude.
        samples: the files, in a fixed order.
        image_root: folder that `name` is relative to.
        table: (65536,) uint16, value in the label file -> train id; see `label_lut`.
        colors: (n, 3) uint8, the colors in label files that hold colors: their values are the rows; else None.
        channels, bit_depth: required of the image files.
        max_pixels: size limit of images and labels.
        missing: one line per image without a label (it is left out of `samples`); `open_dataset` raises for these.
        unmatched_labels: label files without an image.
        cache: folder of decoded images and labels, see `segcore.data.cache`; None: files are decoded every time.
        opened_by: opens the same split in another process, where what a user's function made need not pickle.
    """

    classes: tuple[str, ...]
    palette: np.ndarray
    ignore_index: int
    samples: tuple[Sample, ...]
    image_root: Path
    table: np.ndarray
    channels: int = 3
    bit_depth: int = 8
    max_pixels: int = MAX_PIXELS
    colors: np.ndarray | None = None
    missing: tuple[str, ...] = ()
    unmatched_labels: tuple[Path, ...] = ()
    cache: Path | None = None
    opened_by: Callable[[], Dataset] | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        return (self.opened_by, ()) if self.opened_by else super().__reduce_ex__(protocol)

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        """Return the image's path below the image folder, with `/` and without its suffix, to name outputs.

        The name of a part of an image ends in the row and column of its upper left corner. For an image outside the
        folder, which a list may name, every step up to a folder above becomes `__`, and so does another drive: no name
        leads out of a folder.
        """
        sample = self.samples[index]
        corner = "_{}_{}".format(*sample.box) if sample.box else ""
        try:
            path = Path(os.path.relpath(sample.image, self.image_root)).with_suffix("")
        except ValueError:  # of Windows: on another drive
            path = sample.image.with_suffix("")
        return "/".join("__" if part in ("..", path.anchor) else part for part in path.parts) + corner

    def image(self, index: int) -> np.ndarray:
        """Return (H, W, C) RGB, uint8, uint16 or float32 by bit depth. Raises UserError as `read_image` does."""
        sample, how = self.samples[index], (self.channels, self.bit_depth, self.max_pixels)

        def read() -> np.ndarray:
            return read_window(sample.image, sample.box, *how) if sample.box else read_image(sample.image, *how)

        return cached(self.cache, sample.image, read, *self._decoding(sample.box))

    @property
    def label_values(self) -> int:
        """Train ids, ignored ones included, are below this number."""
        return max(len(self.classes), self.ignore_index + 1)

    def label(self, index: int) -> np.ndarray:
        """Return (H, W) train ids, 0 .. K-1 and `ignore_index`: uint8, or uint16 where these do not fit.

        Raises UserError naming the file and the values when some are neither a class nor ignored.
        """
        path, box = self.samples[index].label, self.samples[index].box
        if path is None:
            raise UserError(f"{self.samples[index].image}: has no label file; provide the masks of this split")

        def ids() -> np.ndarray:
            read = read_label if self.colors is None else read_label_colors
            stored = read_label_window(path, box, read, self.max_pixels) if box else read(path, self.max_pixels)
            return self.train_ids(path, stored)

        return cached(self.cache, path, ids, *self._decoding(box, label=True))

    def _decoding(self, box: Box | None, label: bool = False) -> tuple[object, ...]:
        """Return what an image, or the train ids of a label, depend on beside their file."""
        if not label:
            return "image", box, self.max_pixels, self.channels, self.bit_depth
        colors = b"" if self.colors is None else self.colors.tobytes()
        return "label", box, self.max_pixels, self.label_values, self.table.tobytes(), b"colors" + colors

    def not_cached(self, index: int) -> tuple[int, ...]:
        """Return the bytes per pixel of the image and the label of a sample, of those that the cache lacks."""
        sample = self.samples[index]
        parts = [(sample.image, self._decoding(sample.box), self.channels * self.bit_depth // 8)]
        if sample.label:
            parts.append((sample.label, self._decoding(sample.box, label=True), 1 if self.label_values <= 256 else 2))
        return tuple(
            size for path, how, size in parts if self.cache and not cache_file(self.cache, path, *how).exists()
        )

    def train_ids(self, path: Path, stored: np.ndarray) -> np.ndarray:
        """Return the train ids of label values (H, W), or colors (H, W, 3), as `label` does; errors name `path`."""
        raw = stored if self.colors is None else color_indices(stored, self.colors)
        label = cv2.LUT(raw, self.table[:256]) if raw.dtype == np.uint8 else self.table[raw]
        if (label == FORBIDDEN).any():
            raise UserError(f"{path}: {self._unlisted(path, stored[label == FORBIDDEN])}")
        return label.astype(np.uint8 if self.label_values <= 256 else np.uint16)

    def _unlisted(self, path: Path, values: np.ndarray) -> str:
        """Return what is wrong with a label file that holds these values or colors (n, 3), and the remedy."""
        if self.colors is not None:
            found = hex_colors(values, self.colors)
            return f"colors {found} are not classes; add them to data.labels, or {_IGNORE_THEM}"
        lossy = " (JPEG changes values: save masks as PNG)" if path.suffix.lower() in (".jpg", ".jpeg") else ""
        allowed = ranges(np.flatnonzero(self.table != FORBIDDEN))
        return (
            f"label values {ranges(np.unique(values))} are not classes; allowed are {allowed}{lossy}: "
            f"correct the mask or data.classes, name the values in data.labels, or {_IGNORE_THEM}"
        )

    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return (image, label) as `image` and `label` do; label is None for a sample without a label file.

        Raises UserError when the two differ in height or width.
        """
        sample, image = self.samples[index], self.image(index)
        if sample.label is None:
            return image, None
        label = self.label(index)
        check_sizes(sample, image.shape[:2], label.shape)
        return image, label


def check_sizes(sample: Sample, image: tuple[int, ...], label: tuple[int, ...]) -> None:
    """Raise UserError when the (height, width) of a sample's image and label differ."""
    if image != label:
        raise UserError(
            f"{sample.label}: label of {label[0]}x{label[1]} pixels (height x width) for an image of "
            f"{image[0]}x{image[1]} ({sample.image}); make their sizes equal"
        )
