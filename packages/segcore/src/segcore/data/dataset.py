"""A data set: image and label files in a fixed order, and the table from label values to train ids.

Nothing here imports torch, and everything pickles, so that worker processes start with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from segcore.data.images import read_image, read_label
from segcore.data.labels import FORBIDDEN, ranges
from segcore.errors import UserError


@dataclass(frozen=True)
class Sample:
    """An image file and its label file, if it has one."""

    image: Path
    label: Path | None


@dataclass(frozen=True, eq=False)
class Dataset:
    """The samples of one split.

    Attributes:
        classes: K names in the order of the train ids.
        palette: (K, 3) uint8 RGB.
        ignore_index: the train id that loss and metrics exclude.
        samples: the files, in a fixed order.
        image_root: folder that `name` is relative to.
        table: (256,) uint8, value in the label file -> train id; see `label_lut`.
        channels, bit_depth: required of the image files.
        missing: one line per image without a label (it is left out of `samples`); `open_dataset` raises for these.
        unmatched_labels: label files without an image.
    """

    classes: tuple[str, ...]
    palette: np.ndarray
    ignore_index: int
    samples: tuple[Sample, ...]
    image_root: Path
    table: np.ndarray
    channels: int = 3
    bit_depth: int = 8
    missing: tuple[str, ...] = ()
    unmatched_labels: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        """Return the image's path below the image folder, with `/` and without its suffix, to name outputs."""
        return self.samples[index].image.relative_to(self.image_root).with_suffix("").as_posix()

    def image(self, index: int) -> np.ndarray:
        """Return (H, W, C) RGB, uint8 or uint16 by bit depth. Raises UserError as `read_image` does."""
        return read_image(self.samples[index].image, self.channels, self.bit_depth)

    def label(self, index: int) -> np.ndarray:
        """Return (H, W) uint8 train ids: 0 .. K-1 and `ignore_index`.

        Raises UserError naming the file and the values when some are neither a class nor ignored.
        """
        path = self.samples[index].label
        if path is None:
            raise UserError(f"{self.samples[index].image}: has no label file; provide the masks of this split")
        raw = read_label(path)
        label = cv2.LUT(raw, self.table)
        if (label == FORBIDDEN).any():
            found = np.unique(raw[label == FORBIDDEN])
            allowed = np.flatnonzero(self.table != FORBIDDEN)
            raise UserError(
                f"{path}: label values {ranges(found)} are not classes; allowed are {ranges(allowed)}: "
                "correct the mask or data.dataset and data.classes"
            )
        return label

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
