"""Read image and label files, without executing anything in them."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from segcore.data.formats import check_size, checked, decode
from segcore.data.silence import silent_codecs
from segcore.errors import UserError
from segcore.files import regular_file

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".jp2", ".gif", ".npy")
"""Suffixes, in lower case, of the files that count as images when a folder is searched."""

MAX_PIXELS = 1 << 28
"""The default of `data.max_pixels`: a file of some kilobytes can claim to hold any number."""
DTYPES = {8: np.uint8, 16: np.uint16, 32: np.float32}
"""Type of an image by `data.bit_depth`."""


def read_image(path: Path | str, channels: int = 3, bit_depth: int = 8, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return the image (H, W, channels), uint8, uint16 or float32 by `bit_depth`; three channels are RGB, four RGBA.

    Three channels are decoded as in the published systems: gray is repeated, a palette resolved, alpha dropped, and the
    EXIF orientation applied. Other counts are read as stored: gray, RGBA, the bands of a TIFF side by side or as pages,
    .npy (H, W, C). Of several images in a file the first counts. With `bit_depth` 32 any number is taken as it is.
    Raises UserError for a file that is missing, damaged, has more than `max_pixels`, numbers that are not finite, or
    does not match `channels` and `bit_depth`.
    """
    path = Path(path)
    with reading(path, "an image"):
        image = (
            _load_npy(path, channels, max_pixels)
            if path.suffix.lower() == ".npy"
            else decode(path.read_bytes(), channels, max_pixels)
        )
        return as_configured(path, image[..., None] if image.ndim == 2 else image, channels, bit_depth)


def as_configured(path: Path, image: np.ndarray, channels: int, bit_depth: int) -> np.ndarray:
    """Return the stored numbers of an image (H, W, C) in the type of `bit_depth`.

    Raises UserError naming `path` when the image has no pixels, does not match `channels` and `bit_depth`, or is not
    finite.
    """
    _require_pixels(path, image)
    wanted = DTYPES[bit_depth]
    if (bit_depth == 32 and image.dtype.kind in "uif") or (
        bit_depth == 16 and image.dtype == np.int16 and image.min() >= 0
    ):
        image = image.astype(wanted)
    if image.shape[2:] != (channels,) or image.dtype != wanted:
        raise UserError(
            f"{path}: holds {image.dtype} of shape {image.shape}, but data.channels is {channels} and data.bit_depth "
            f"{bit_depth}; set them to match the files, or convert the file"
        )
    if bit_depth == 32 and not np.isfinite(image).all():
        raise UserError(f"{path}: holds numbers that are not finite (NaN or infinite); fill them with a value")
    return image


def read_label(path: Path | str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return the values of a label file, (H, W) uint8 or uint16, unchanged: a palette PNG yields its indices.

    Raises UserError for a file that is missing, damaged, has more than one channel, or values that are not whole
    numbers 0 .. 65535.
    """
    with reading(Path(path), "a label"):
        return label_values(path, np.array(_open_label(path, max_pixels)))


def label_values(path: Path | str, label: np.ndarray) -> np.ndarray:
    """Return the stored numbers of a label file as (H, W) uint8 or uint16; raises UserError as `read_label` does."""
    if label.ndim != 2:
        raise UserError(
            f"{path}: label of shape {label.shape}; save one channel of class indices, or set data.labels to its colors"
        )
    _require_pixels(path, label)
    if label.dtype in (np.uint8, np.uint16):
        return label
    whole = np.isfinite(label) & (label == np.round(label))
    if not whole.all():
        raise UserError(
            f"{path}: holds numbers that are not whole, such as {label[~whole][0]:g}; "
            "save class indices as 8-bit or 16-bit integers"
        )
    if label.min() < 0 or label.max() >= 1 << 16:
        raise UserError(f"{path}: label values {label.min():g} to {label.max():g}; save class indices 0 to 65535")
    return label.astype(np.uint8 if label.max() < 256 else np.uint16)


def read_label_colors(path: Path | str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return a label file that holds gray values, a palette, RGB or RGBA as (H, W, 3) uint8; alpha does not count."""
    with reading(Path(path), "a label"):
        return np.asarray(_open_label(path, max_pixels).convert("RGB"))


def color_indices(label: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Return which of `colors` (n, 3) each pixel of a label (H, W, 3) has, (H, W) uint16, and n for another color."""
    codes, wanted = _color_codes(label), _color_codes(colors)
    order = np.argsort(wanted)
    places = np.minimum(np.searchsorted(wanted[order], codes), len(wanted) - 1)
    return np.where(wanted[order][places] == codes, order[places], len(wanted)).astype(np.uint16)


def hex_colors(label: np.ndarray, known: np.ndarray, most: int = 5) -> str:
    """Return the first colors of a label (H, W, 3) that are not among `known` (n, 3), as text: `#804080, …`."""
    found = np.setdiff1d(_color_codes(label), _color_codes(known))
    return ", ".join(f"#{code:06x}" for code in found[:most]) + (" …" if len(found) > most else "")


def _color_codes(rgb: np.ndarray) -> np.ndarray:
    """Return colors (..., 3) as numbers 0xRRGGBB."""
    red, green, blue = np.moveaxis(np.asarray(rgb, np.int32), -1, 0)
    codes: np.ndarray = red << 16 | green << 8 | blue
    return codes


def _open_label(path: Path | str, max_pixels: int) -> Image.Image:
    path = Path(path)
    with reading(path, "a label"), Image.open(io.BytesIO(checked(path.read_bytes()))) as file:
        check_size(file.height, file.width, max_pixels)
        file.load()
        return file


def read_size(path: Path) -> tuple[int, int]:
    """Return the (height, width) in the header of an image or label file. Raises UserError where Pillow finds none."""
    with reading(path, "an image"), Image.open(path) as file:
        return file.height, file.width


@contextlib.contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Every file is opened and decoded inside this block, which turns whatever that raises into one UserError.

    Libraries raise errors of any type for a damaged file, and MemoryError for one that is too large.
    """
    try:
        regular_file(path)
        with silent_codecs():
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: cannot be read as {kind} ({_reason(error)}); replace the file") from None


def _require_pixels(path: Path | str, array: np.ndarray) -> None:
    if not array.size:
        raise UserError(f"{path}: has no pixels (shape {array.shape}); replace the file or remove it")


def _load_npy(path: Path, channels: int, max_pixels: int) -> np.ndarray:
    # This refuses a header that promises more than the file holds, unlike read_array.
    shape = np.lib.format.open_memmap(path, "r").shape
    check_size(math.prod(shape[:2]), 1, max_pixels)
    check_size(math.prod(shape), 1, max_pixels * max(channels, 4))
    with path.open("rb") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _reason(error: Exception) -> str:
    """Return the first line of the message of the error, or of the one that caused it, shortened."""
    error = error.__cause__ if isinstance(error.__cause__, Exception) else error  # rasterio's only refers to it
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnidentifiedImageError):  # its message names an object in memory
        return "not an image, or damaged"
    return (str(error) or type(error).__name__).splitlines()[0][:120]
