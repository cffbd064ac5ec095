"""Read image and label files, without executing anything in them."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

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
    """Return the values of a label file, (H, W) uint8, unchanged: a palette PNG yields its indices.

    Raises UserError for a file that is missing, damaged, has more than one channel or values beyond 255.
    """
    path = Path(path)
    with _reading(path, "a label"), Image.open(io.BytesIO(_checked(path.read_bytes()))) as file:
        label = np.array(file)
    if label.ndim != 2:
        raise UserError(f"{path}: label of shape {label.shape}; save one channel of class indices, not colors")
    if label.dtype not in (np.uint8, np.bool_) and (label.min() < 0 or label.max() > 255):
        raise UserError(
            f"{path}: label values {label.min()} to {label.max()}; save class indices 0 to 254, and 255 to ignore"
        )
    return label.astype(np.uint8, copy=False)


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
        with _silent_codecs():
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: cannot be read as {kind} ({_reason(error)}); replace the file") from None


_silent_lock = threading.Lock()
_silent_threads = 0
_terminal = -1
"""A duplicate of standard error while that is silent."""


@contextlib.contextmanager
def _silent_codecs() -> Iterator[None]:
    """Discard what libpng, libjpeg and libtiff print on standard error themselves, in any number of threads at once."""
    global _silent_threads, _terminal
    if sys.__stderr__ is None:  # closed: the number 2 may be that of any file
        yield
        return
    with _silent_lock:
        _silent_threads += 1
        if _silent_threads == 1:
            _terminal, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 2)
            os.close(nowhere)
    try:
        yield
    finally:
        with _silent_lock:
            _silent_threads -= 1
            if _silent_threads == 0:
                os.dup2(_terminal, 2)
                os.close(_terminal)


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
