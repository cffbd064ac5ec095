"""Read image and label files, without executing anything in them."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from segcore.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".jp2", ".gif", ".npy")
"""Suffixes, in lower case, of the files that count as images when a folder is searched."""

# Unreadable files raise a one-line UserError, so OpenCV's own messages are off. OpenCV 5 moved the function.
(cv2.setLogLevel if hasattr(cv2, "setLogLevel") else cv2.utils.logging.setLogLevel)(0)


def read_image(path: Path | str, channels: int = 3, bit_depth: int = 8) -> np.ndarray:
    """Return the image (H, W, channels), uint8 or uint16 by `bit_depth`; three channels are RGB, four may be RGBA.

    Three channels are decoded as in the published systems: gray is repeated, alpha is dropped, EXIF
    orientation is applied. Other counts are read as stored: gray, RGBA, TIFF with a page per band, .npy (H, W, C).
    Raises UserError for a file that is missing, empty, damaged, or does not match `channels` and `bit_depth`.
    """
    path = Path(path)
    try:
        image = _load_npy(path) if path.suffix.lower() == ".npy" else _decode(path.read_bytes(), channels)
    except (OSError, ValueError, EOFError, cv2.error) as error:
        raise UserError(f"{path}: cannot be read as an image ({_reason(error)}); replace the file") from None
    if image.ndim == 2:
        image = image[..., None]
    if image.shape[2:] != (channels,) or image.dtype != (np.uint8 if bit_depth == 8 else np.uint16):
        raise UserError(
            f"{path}: holds {image.dtype} of shape {image.shape}, but data.channels is {channels} and data.bit_depth "
            f"{bit_depth}; set them to match the files, or convert the file"
        )
    return image


def read_label(path: Path | str) -> np.ndarray:
    """Return the values of a label file, (H, W) uint8 or uint16, unchanged: a palette PNG yields its indices.

    Raises UserError for a file that is missing, damaged, has more than one channel, or values that are not whole
    numbers 0 .. 65535.
    """
    label = np.array(_open_label(path))
    if label.ndim != 2:
        raise UserError(
            f"{path}: label of shape {label.shape}; save one channel of class indices, or set data.labels to its colors"
        )
    if label.dtype in (np.uint8, np.uint16):
        return label
    if not (np.isfinite(label).all() and (label == np.round(label)).all()):
        raise UserError(
            f"{path}: holds numbers that are not whole, such as {label[label != np.round(label)][0]:g}; "
            "save class indices as 8-bit or 16-bit integers"
        )
    if label.min() < 0 or label.max() >= 1 << 16:
        raise UserError(f"{path}: label values {label.min():g} to {label.max():g}; save class indices 0 to 65535")
    return label.astype(np.uint8 if label.max() < 256 else np.uint16)


def read_colors(path: Path | str, colors: np.ndarray) -> np.ndarray:
    """Return which of `colors` (n, 3) each pixel of a label file has, (H, W) uint16, and n for another color.

    The file holds gray values, a palette, RGB or RGBA; transparency does not count.
    """
    codes, wanted = _color_codes(_open_label(path).convert("RGB")), _color_codes(colors)
    order = np.argsort(wanted)
    places = np.minimum(np.searchsorted(wanted[order], codes), len(wanted) - 1)
    return np.where(wanted[order][places] == codes, order[places], len(wanted)).astype(np.uint16)


def hex_colors(path: Path | str, known: np.ndarray, most: int = 5) -> str:
    """Return the first colors of a label file that are not among `known` (n, 3), as text: `#804080, …`."""
    found = np.setdiff1d(_color_codes(_open_label(path).convert("RGB")), _color_codes(known))
    return ", ".join(f"#{code:06x}" for code in found[:most]) + (" …" if len(found) > most else "")


def _color_codes(rgb: Image.Image | np.ndarray) -> np.ndarray:
    """Return colors (..., 3) as numbers 0xRRGGBB."""
    red, green, blue = np.moveaxis(np.asarray(rgb, np.int32), -1, 0)
    codes: np.ndarray = red << 16 | green << 8 | blue
    return codes


def _open_label(path: Path | str) -> Image.Image:
    try:
        with Image.open(path) as file:
            file.load()
            return file
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as a label ({_reason(error)}); replace the file") from None


def _decode(data: bytes, channels: int) -> np.ndarray:
    """Return the pixels of an encoded image in RGB order; raises ValueError with the reason on failure."""
    if not data:
        raise ValueError("the file is empty")
    # OpenCV 4 fills the missing part of a truncated file with gray.
    is_jpeg, is_png = data.startswith(b"\xff\xd8"), data.startswith(b"\x89PNG")
    if (is_jpeg and data.find(b"\xff\xd9", _first_scan(data)) < 0) or (is_png and b"IEND" not in data):
        raise ValueError("the file is truncated")
    color = {1: cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH, 3: cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH}
    buffer = np.frombuffer(data, np.uint8)
    image = cv2.imdecode(buffer, color.get(channels, cv2.IMREAD_UNCHANGED))
    if image is None:
        raise ValueError("not an image, or damaged")
    if image.ndim == 2 and channels > 1:  # bands as pages
        return np.dstack(cv2.imdecodemulti(buffer, cv2.IMREAD_UNCHANGED)[1])
    if image.ndim == 3 and image.shape[2] in (3, 4):
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB if image.shape[2] == 3 else cv2.COLOR_BGRA2RGBA)
    return image


def _first_scan(data: bytes) -> int:
    """Return the offset of a JPEG's first scan, after its headers, which may hold a thumbnail with its own markers."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] != 0xDA:
        fill = data[position + 1] == 0xFF  # any number of fill bytes may precede a marker
        position += 1 if fill else 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return position


def _load_npy(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _reason(error: Exception) -> str:
    """Return the first line of the error's message, shortened."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error) or type(error).__name__).splitlines()[0][:120]
