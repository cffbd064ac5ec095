"""Read image and label files, without executing anything in them."""

from __future__ import annotations

import contextlib
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from segcore.data.silence import silent_codecs
from segcore.errors import UserError
from segcore.files import regular_file

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
    with _reading(path, "an image"):
        image = _load_npy(path) if path.suffix.lower() == ".npy" else _decode(_checked(path.read_bytes()), channels)
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
    path = Path(path)
    with _reading(path, "a label"), Image.open(io.BytesIO(_checked(path.read_bytes()))) as file:
        file.load()
        return file


def read_size(path: Path) -> tuple[int, int]:
    """Return the (height, width) in the header of an image or label file. Raises UserError where Pillow finds none."""
    with _reading(path, "an image"), Image.open(path) as file:
        return file.height, file.width


@contextlib.contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
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


def _checked(data: bytes) -> bytes:
    """Return an encoded image that is complete, of a PNG only what its pixels follow from.

    Decoders fill what is missing of a file with zeros or gray. Raises ValueError with the reason.
    """
    if not data:
        raise ValueError("the file is empty")
    if data.startswith(_PNG):
        return _checked_png(data)
    if data.startswith(b"\xff\xd8") and data.find(b"\xff\xd9", _first_scan(data)) < 0:
        raise ValueError("the file is truncated")
    return data


_PNG = b"\x89PNG\r\n\x1a\n"
_OF_THE_PIXELS = (b"tRNS", b"eXIf")
"""Optional chunks that decoders need: alpha and orientation. libpng warns about damage in the others, such as iCCP."""


def _checked_png(data: bytes) -> bytes:
    """Return a PNG's chunks that concern the pixels, after a check of their CRCs."""
    kept, start, name = [_PNG], len(_PNG), b""
    while name != b"IEND":
        name, end = data[start + 4 : start + 8], start + 12 + int.from_bytes(data[start : start + 4], "big")
        if end > len(data):
            raise ValueError("the file is truncated")
        if name[:1].isupper() or name in _OF_THE_PIXELS:
            if zlib.crc32(data[start + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
                raise ValueError("the file is damaged: wrong checksum")
            kept.append(data[start:end])
        elif not name.isalpha():
            raise ValueError("the file is damaged: not a PNG chunk")
        start = end
    return b"".join(kept)


def _decode(data: bytes, channels: int) -> np.ndarray:
    """Return the pixels of an encoded image in RGB order; raises ValueError with the reason on failure."""
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
    np.lib.format.open_memmap(path, "r")  # refuses a header that promises more than the file holds, unlike read_array
    with path.open("rb") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _reason(error: Exception) -> str:
    """Return the first line of the error's message, shortened."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnidentifiedImageError):  # its message names an object in memory
        return "not an image, or damaged"
    return (str(error) or type(error).__name__).splitlines()[0][:120]
