"""Training transforms on numpy arrays with the semantics of MMSegmentation 0.x, which DDP, DDPS and DGMN2 train with.

Images are (H, W, C) uint8, uint16 or float32, labels (H, W) uint8 or uint16. Randomness comes from a numpy
RandomState, whose streams are frozen across numpy versions, and is drawn in the published order: ratio, crop offsets,
flip, photometric distortion, blur.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.random import RandomState
from torch import Tensor

from segcore.config.schema import DataConfig
from segcore.data.augment import Augmentation
from segcore.data.batch import Batch
from segcore.data.labels import IGNORE

CropBox = tuple[int, int, int, int]
"""Rows y1 to y2 and columns x1 to x2 of an image, as (y1, y2, x1, x2)."""
_MAX_CV_CHANNELS = 128  # every OpenCV version accepts this many in one call


def rescale_size(height: int, width: int, scale: tuple[int, int] | float) -> tuple[int, int]:
    """Return the (height, width) after resizing by a factor, or to fit a (long, short) box, keeping the aspect ratio.

    The box has no orientation: its larger entry bounds the longer side. Sides are rounded half up, and at least 1.
    """
    if isinstance(scale, tuple):
        scale = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def resize_image(image: np.ndarray, size: tuple[int, int], box: CropBox | None = None) -> np.ndarray:
    """Return the image at `size` (height, width): OpenCV's bilinear resize, no antialiasing; uint8 is exact.

    With a `box`, only that part of the resized image: the same bytes for uint8, within one of 65536 levels for uint16.
    """
    y1, y2, x1, x2 = box or (0, size[0], 0, size[1])
    if image.shape[:2] == size:
        return image[y1:y2, x1:x2]
    # OpenCV rounds positions to float32 and weights to 1/2048: they match only when counted from the image's own
    # corner at its own scale (`fx`, `fy`). Pixels to the right of the box and below it are not computed.
    (height, width), channels = image.shape[:2], image.shape[2]
    scale = size[0] / height, size[1] / width
    part = image[: math.ceil(y2 / scale[0]) + 2, : math.ceil(x2 / scale[1]) + 2]
    if (round(part.shape[0] * scale[0]), round(part.shape[1] * scale[1])) == part.shape[:2]:
        part = image  # OpenCV copies input that keeps its size, whatever the scale; the whole image changes size
    parts = [
        cv2.resize(part[..., i : i + _MAX_CV_CHANNELS], None, fx=scale[1], fy=scale[0])[y1:y2, x1:x2]
        for i in range(0, channels, _MAX_CV_CHANNELS)
    ]
    return (parts[0] if len(parts) == 1 else np.dstack(parts)).reshape(y2 - y1, x2 - x1, channels)


def resize_label(label: np.ndarray, size: tuple[int, int], box: CropBox | None = None) -> np.ndarray:
    """Return the label at `size` (height, width), or its `box`: nearest neighbor, source index floor(i * old / new).

    The index is computed as OpenCV does.
    """
    y1, y2, x1, x2 = box or (0, size[0], 0, size[1])
    if label.shape == size:
        return label[y1:y2, x1:x2]
    rows, columns = (
        np.minimum((np.arange(first, last) * (1 / (new / old))).astype(np.intp), old - 1)
        for first, last, new, old in ((y1, y2, size[0], label.shape[0]), (x1, x2, size[1], label.shape[1]))
    )
    return label.take(rows, axis=0).take(columns, axis=1)


def is_varied(label: np.ndarray, cat_max_ratio: float) -> bool:
    """Return whether the label has two or more values, the most frequent one below `cat_max_ratio`.

    255 does not count, or 65535 in a label of 16 bits.
    """
    values = 1 << 8 * label.itemsize
    counts = cv2.calcHist([label], [0], None, [values], [0, values]).ravel()[:-1].astype(np.int64)
    return bool(np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < cat_max_ratio)


def random_crop_box(
    label: np.ndarray,
    crop: tuple[int, int],
    cat_max_ratio: float,
    rng: RandomState,
    size: tuple[int, int] | None = None,
) -> CropBox:
    """Return (y1, y2, x1, x2) of a random window of at most `crop` (height, width), inside the label.

    The label is treated as resized to `size` (None: not resized). With `cat_max_ratio` below 1, a window that is not
    `is_varied` is drawn again up to 10 times; the 11th is not checked.
    """
    height, width = size = size or (label.shape[0], label.shape[1])
    for trial in range(11):
        y = rng.randint(0, max(height - crop[0], 0) + 1)
        x = rng.randint(0, max(width - crop[1], 0) + 1)
        box = y, min(y + crop[0], height), x, min(x + crop[1], width)
        if cat_max_ratio >= 1 or trial == 10 or is_varied(resize_label(label, size, box), cat_max_ratio):
            break
    return box


def flip(array: np.ndarray) -> np.ndarray:
    """Return an image or label mirrored left to right."""
    if array.ndim > 2 and array.shape[2] > _MAX_CV_CHANNELS:
        return array[:, ::-1]
    return cv2.flip(array, 1).reshape(array.shape)


def photometric_distortion(image: np.ndarray, rng: RandomState) -> np.ndarray:
    """Return an 8-bit RGB image with random brightness, contrast, saturation and hue, each with probability 1/2.

    Every step clips and truncates to 8 bits. Brightness adds [-32, 32), contrast multiplies by [0.5, 1.5) before or
    after the color steps, saturation by [0.5, 1.5) and hue adds -18 .. 17 (of 180) in 8-bit HSV, each in a
    separate round trip.
    """
    values = np.arange(256, dtype=np.float32)

    def scaled(factor: float, shift: float = 0.0) -> np.ndarray:
        return np.clip(values * np.float32(factor) + np.float32(shift), 0, 255).astype(np.uint8)

    def in_hsv(image: np.ndarray, channel: int, table: np.ndarray) -> np.ndarray:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        cv2.insertChannel(cv2.LUT(cv2.extractChannel(hsv, channel), table), hsv, channel)
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)

    if rng.randint(2):
        image = cv2.LUT(image, scaled(1, rng.uniform(-32, 32)))
    contrast_first = rng.randint(2) == 1
    if contrast_first and rng.randint(2):
        image = cv2.LUT(image, scaled(rng.uniform(0.5, 1.5)))
    if rng.randint(2):
        image = in_hsv(image, 1, scaled(rng.uniform(0.5, 1.5)))
    if rng.randint(2):
        image = in_hsv(image, 0, ((np.arange(256) + rng.randint(-18, 18)) % 180).astype(np.uint8))
    if not contrast_first and rng.randint(2):
        image = cv2.LUT(image, scaled(rng.uniform(0.5, 1.5)))
    return image


def gaussian_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Return an image (H, W, C) blurred with a Gaussian of standard deviation `sigma`, in pixels."""
    return cv2.GaussianBlur(image, (0, 0), max(sigma, 0.01)).reshape(image.shape)


def normalize(image: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Return (image - mean) / std as float32 (H, W, C), computed in float32; `mean`, `std` in units of the image.

    In memory, the channels are planes (CHW), as models read them.
    """
    center, width = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    planes = np.empty((image.shape[2], *image.shape[:2]), np.float32)
    if image.dtype == np.uint8:  # a lookup table gives the same numbers several times faster
        tables = (np.arange(256, dtype=np.float32) - center[:, None]) / width[:, None]
        for c, (plane, table) in enumerate(zip(planes, tables, strict=True)):
            cv2.LUT(np.ascontiguousarray(image[..., c]), table, dst=plane)
    else:
        np.divide(image.transpose(2, 0, 1) - center[:, None, None], width[:, None, None], out=planes)
    return planes.transpose(1, 2, 0)


class TrainTransform:
    """The published training pipeline: random resize, crop, flip, photometric distortion, blur, normalize, pad.

    Not published, and without a draw unless it is set: a vertical flip and quarter turns after the flip, the user's
    function before the normalization.
    `Batch` does the last two steps: labels are padded with `ignore_index`, images with 0 after normalization (the mean
    color). The crop's class limit always excludes the label without a class alone (255, or 65535 in 16 bits), so a
    `background` class counts, as published.
    """

    def __init__(self, data: DataConfig, ignore_index: int = IGNORE, num_classes: int | None = None) -> None:
        """Raises UserError when `data.augment` names no function; its masks are checked if `num_classes` is given."""
        self.data = data
        self.ignore_index = ignore_index
        self.augment = Augmentation(data, ignore_index, num_classes) if data.augment else None

    def __call__(self, image: np.ndarray, label: np.ndarray, rng: RandomState) -> tuple[Tensor, Tensor]:
        """Return the image as float32 (C, *crop) and the label as int64 (*crop), as the model gets them."""
        batch = Batch.of([self.crop(image, label, rng)], self.data.crop, self.ignore_index, [0], 0)
        images, labels = batch.on("cpu", self.data.mean, self.data.std)
        return images[0], labels[0]

    def crop(self, image: np.ndarray, label: np.ndarray, rng: RandomState) -> tuple[np.ndarray, np.ndarray]:
        """Return image (h, w, C) and label (h, w) before the last two steps, of the given types; at most the crop."""
        data, (height, width) = self.data, image.shape[:2]
        low, high = data.ratio_range
        ratio = rng.random_sample() * (high - low) + low
        long, short = data.img_scale or (width, height)
        size = rescale_size(height, width, (int(long * ratio), int(short * ratio)))
        turns = rng.randint(4) if data.quarter_turns else 0
        crop = data.crop if turns % 2 == 0 else data.crop[::-1]
        box = random_crop_box(label, crop, data.cat_max_ratio, rng, size)
        image, label = resize_image(image, size, box), resize_label(label, size, box)
        if rng.rand() < data.flip:
            image, label = flip(image), flip(label)
        if data.vertical_flip and rng.rand() < data.vertical_flip:
            image, label = np.ascontiguousarray(image[::-1]), np.ascontiguousarray(label[::-1])
        if turns:
            image, label = np.ascontiguousarray(np.rot90(image, turns)), np.ascontiguousarray(np.rot90(label, turns))
        if data.photometric:
            image = photometric_distortion(image, rng)
        if data.blur and rng.rand() < data.blur:
            image = gaussian_blur(image, rng.random_sample())
        if self.augment:
            image, label = self.augment(image, label, rng)
        return image, label
