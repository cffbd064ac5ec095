"""Decode image files by their format, strictly: what decoders would fill in, guess or repeat is refused.

Every function raises ValueError with the reason.
"""

from __future__ import annotations

import contextlib
import io
import logging
import zlib
from collections.abc import Iterator

import cv2
import numpy as np
import simplejpeg
import tifffile
from PIL import Image

_JPEG, _PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_OF_THE_PIXELS = (b"tRNS", b"eXIf")
"""Optional chunks that decoders need: alpha and orientation. libpng warns about damage in the others, such as iCCP."""

# Unreadable files raise an error of one line, so what libraries log about them is off. OpenCV 5 moved the function.
(cv2.setLogLevel if hasattr(cv2, "setLogLevel") else cv2.utils.logging.setLogLevel)(0)
logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)
Image.MAX_IMAGE_PIXELS = None  # `check_size` has one limit for all formats


def decode(data: bytes, channels: int, max_pixels: int) -> np.ndarray:
    """Return the pixels of an encoded image, (H, W) or (H, W, C) as stored, in RGB order.

    With three `channels`, gray is repeated, a palette resolved and alpha dropped. An EXIF orientation is applied. Of
    several images in a file the first counts; pages of one band each are the bands of a TIFF.
    """
    data = checked(data)
    if data.startswith(TIFF):
        found = _decode_tiff(data, channels, max_pixels)
    else:
        found = _decode_jpeg(data, channels, max_pixels) if data.startswith(_JPEG) else None
    if found is not None:
        return found
    check_size(*_size(data), max_pixels)
    color = {1: cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH, 3: cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH}
    image = cv2.imdecode(np.frombuffer(data, np.uint8), color.get(channels, cv2.IMREAD_UNCHANGED))
    if image is None:
        raise ValueError("not an image, or damaged")
    if image.ndim == 3 and image.shape[2] in (3, 4):
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB if image.shape[2] == 3 else cv2.COLOR_BGRA2RGBA)
    return image


def check_size(height: int, width: int, max_pixels: int, remedy: str = "raise that") -> None:
    """Raise ValueError for an image with more pixels than `data.max_pixels`."""
    if height * width > max_pixels:
        raise ValueError(f"it has {height * width} pixels, data.max_pixels is {max_pixels}: {remedy}")


def checked(data: bytes) -> bytes:
    """Return an encoded image that is complete, of a PNG only what its pixels follow from."""
    if not data:
        raise ValueError("the file is empty")
    if data.startswith(_PNG):
        return _checked_png(data)
    if data.startswith(_JPEG):
        _check_jpeg(data)
    return data


def _size(data: bytes) -> tuple[int, int]:
    """Return the (height, width) in the header; (0, 0) for a format that Pillow does not know."""
    try:
        with Image.open(io.BytesIO(data)) as file:
            return file.height, file.width
    except (OSError, ValueError, SyntaxError):
        return 0, 0  # OpenCV's own limit of 2^30 pixels holds


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


def _check_jpeg(data: bytes) -> None:
    """Raise ValueError unless a JPEG has its end. What follows that, such as a phone's film or depth, is not read."""
    start = _first_scan(data)
    end = data.find(b"\xff\xd9", start)  # in a scan, 0 or the number of a restart follows each 255
    if end < 0:
        raise ValueError("the file is truncated")
    if data.find(b"\xff\xd8", start, end) >= 0:
        raise ValueError("the file is damaged: another JPEG begins before its end")


def _first_scan(data: bytes) -> int:
    """Return the offset of a JPEG's first scan, after its headers, which may hold a thumbnail with its own markers."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] != 0xDA:
        fill = data[position + 1] == 0xFF  # any number of fill bytes may precede a marker
        position += 1 if fill else 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return position


def _decode_jpeg(data: bytes, channels: int, max_pixels: int) -> np.ndarray | None:
    """Return the pixels of a JPEG, or None for one that OpenCV reads: turned by its EXIF tag, or of an unusual kind.

    simplejpeg gives the same bytes as OpenCV in less time, and reports damage, where OpenCV fills in gray.
    """
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except ValueError:
        return None
    check_size(height, width, max_pixels)
    if space in ("CMYK", "YCCK"):
        raise ValueError(f"its colors are {space}: convert it to RGB")
    gray = space == "Gray" and channels != 3
    try:
        image: np.ndarray = simplejpeg.decode_jpeg(data, "GRAY" if gray else "RGB", strict=True)
    except ValueError as error:
        if str(error).startswith(("Corrupt JPEG data", "Premature end")):
            raise ValueError(f"the file is damaged: {error}") from None
        return None
    head = data[: _first_scan(data)]
    turned = b"Exif\0" in head and Image.open(io.BytesIO(data)).getexif().get(0x0112, 1) != 1
    return None if turned else image


@contextlib.contextmanager
def codec_of(page: tifffile.TiffPage, extra: str) -> Iterator[None]:
    """Raise a ValueError that names `extra` where the compression of a TIFF needs imagecodecs and it is missing."""
    try:
        yield
    except ValueError as error:
        if "imagecodecs" not in str(error):
            raise
        raise ValueError(f"{tifffile.COMPRESSION(page.compression).name} needs `pip install {extra}`") from None


def _decode_tiff(data: bytes, channels: int, max_pixels: int) -> np.ndarray | None:
    """Return the bands of a TIFF as they are stored, or None for a gray, palette or RGB image, which OpenCV reads."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page, series = file.pages.first, file.series[0]
        windows = "raise that, or take windows: data.tile, predict to a .tif"
        check_size(page.imagelength, page.imagewidth, max_pixels, windows)
        kind = tifffile.PHOTOMETRIC(page.photometric).name
        if channels == 3 and kind in ("CIELAB", "SEPARATED", "ICCLAB", "ITULAB"):
            raise ValueError(f"its colors are {kind}: convert it to RGB")
        bands, pages = page.samplesperpixel, len(series.pages)
        whole = page.dtype in (np.uint8, np.uint16, np.bool_)
        if whole and ((kind in ("RGB", "YCBCR") and bands == 3) or (bands == 1 and (pages == 1 or channels == 1))):
            return None
        check_size(int(np.prod(series.shape)), 1, max_pixels * max(channels, 4))
        for part in series.pages:
            places = () if part is None else zip(part.dataoffsets, part.databytecounts, strict=True)
            if max((start + count for start, count in places), default=0) > len(data):
                raise ValueError("the file is truncated")
        with codec_of(page, "segcore[tiff]"):
            array, axes = series.asarray(), series.axes
    while array.ndim > 3 or (array.ndim == 3 and bands > 1 and axes[0] not in "YXS"):  # several images: the first
        array, axes = array[0], axes[1:]
    if array.ndim == 3:
        array = np.moveaxis(array, next(i for i, axis in enumerate(axes) if axis not in "YX"), -1)
    if kind == "RGB" and channels == 3:
        array = array[..., :3]  # OpenCV would multiply the colors by alpha
    return np.ascontiguousarray(array, array.dtype.newbyteorder("="))
