"""Large and georeferenced images: windows of TIFFs are read; TIFFs of results are written block by block.

Windows are read with rasterio (segcore[geo]) where it is installed, which knows all codecs, masks and georeferences
in files beside the image; otherwise with tifffile. Other formats cannot be read in parts: they are decoded whole.
Windows are (y1, x1, y2, x2), half open. Nothing here imports torch.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import tifffile

from segcore.data.formats import TIFF, codec_of
from segcore.data.images import MAX_PIXELS, as_configured, label_values, read_image, read_label_colors, reading
from segcore.files import replacing

Box = tuple[int, int, int, int]
CACHE = 1 << 28
"""Bytes of decoded tiles and strips that are kept, because windows overlap."""
TILE = 256
"""Side of the tiles of the written file, in pixels."""
GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737, 50844)
"""TIFF tags that hold the CRS, the transform, ground control points and rational polynomials."""
GDAL_METADATA, GDAL_NODATA, ORIENTATION = 42112, 42113, 274


Tags = tuple[tuple[Any, ...], ...]
"""TIFF tags as tifffile writes them: code, type, count, value, whether they are for the first page only."""


@dataclass(frozen=True)
class Raster:
    """An open image."""

    height: int
    width: int
    read: Callable[[Box], tuple[np.ndarray, np.ndarray]]
    """Returns a window as (h, w, C), and where it holds data (h, w) bool: pixels without data are 0 in all channels."""
    tags: Callable[[], Tags] = tuple
    """Returns the georeference."""


@contextmanager
def open_raster(path: Path, channels: int = 3, bit_depth: int = 8, max_pixels: int = MAX_PIXELS) -> Iterator[Raster]:
    """Open an image whose windows are then as `read_image` returns the whole of it.

    A TIFF may be of any size, but `max_pixels` bounds each of its tiles or strips. Raises UserError, on opening or
    reading, as `read_image` does, and for a TIFF that cannot be read in windows.
    """
    if not is_tiff(path):
        image = read_image(path, channels, bit_depth, max_pixels)
        height, width, _ = image.shape
        full = np.ones((height, width), bool)
        yield Raster(height, width, lambda box: (cut(image, box), cut(full, box)))
        return
    with ExitStack() as stack:
        with reading(path, "an image"):
            stored = stack.enter_context(_open_tiff(path, channels, max_pixels))

        def read(box: Box) -> tuple[np.ndarray, np.ndarray]:
            with reading(path, "an image"):
                image, valid = stored.read(box)
                image[~valid] = 0
                return as_configured(path, image, channels, bit_depth), valid

        def tags() -> Tags:
            with reading(path, "an image"):
                return stored.tags()

        yield Raster(stored.height, stored.width, read, tags)


def read_window(path: Path, box: Box, channels: int, bit_depth: int, max_pixels: int) -> np.ndarray:
    """Return the window of an image (h, w, channels) as `read_image` does."""
    with open_raster(path, channels, bit_depth, max_pixels) as raster:
        return raster.read(box)[0]


def read_label_window(path: Path, box: Box, read: Callable[[Path, int], np.ndarray], max_pixels: int) -> np.ndarray:
    """Return the window of what `read(path, max_pixels)`, one of `read_label` and `read_label_colors`, returns."""
    colors = read is read_label_colors
    with reading(path, "a label"):
        if not is_tiff(path):
            return cut(read(path, max_pixels), box)
        with _open_tiff(path, 3 if colors else 1, max_pixels) as stored:
            label, _ = stored.read(box)
        return label if colors else label_values(path, label[..., 0] if label.shape[2] == 1 else label)


def is_tiff(path: Path) -> bool:
    """Return whether a file begins as a TIFF; raises UserError when it cannot be opened."""
    with reading(path, "an image"), path.open("rb") as file:
        return file.read(4) in TIFF


def tiff_size(path: Path) -> tuple[int, int]:
    """Return the (height, width) of a TIFF."""
    with reading(path, "an image"), tifffile.TiffFile(path) as file:
        return file.pages.first.imagelength, file.pages.first.imagewidth


def cut(array: np.ndarray, box: Box) -> np.ndarray:
    """Return the window of an image or label; raises ValueError when it is not inside."""
    y1, x1, y2, x2 = box
    if y2 > array.shape[0] or x2 > array.shape[1]:
        raise ValueError(f"has {array.shape[0]}x{array.shape[1]} pixels, which do not contain the window {box}")
    return array[y1:y2, x1:x2]


def tile_boxes(height: int, width: int, side: int) -> list[Box]:
    """Return windows of nearly equal sizes, at most `side`, that cover an image once, row by row."""
    rows, columns = (np.linspace(0, size, -(-size // side) + 1).astype(int).tolist() for size in (height, width))
    return [(y1, x1, y2, x2) for y1, y2 in pairwise(rows) for x1, x2 in pairwise(columns)]


# Reading TIFFs


@contextmanager
def _open_tiff(path: Path, channels: int, max_pixels: int) -> Iterator[Raster]:
    """Open a TIFF whose windows have the stored type, and the stored bands unless `channels` is 3."""
    rasterio = _rasterio()
    with tifffile.TiffFile(path) as file, ExitStack() as stack:
        page = file.pages.first
        kind = _checked_kind(file, channels, max_pixels)
        if rasterio:
            stack.enter_context(rasterio.Env(GDAL_CACHEMAX=CACHE >> 20))
            dataset = stack.enter_context(rasterio.open(path, driver="GTiff"))  # no format that names other files
            read, tags = functools.partial(_read_rasterio, dataset), functools.partial(_tags_of, dataset)
        else:
            read, tags = (
                functools.partial(_read_tifffile, page, _segments(page)),
                functools.partial(_own_tags, path, page),
            )

        def window(box: Box) -> tuple[np.ndarray, np.ndarray]:
            if box[2] > page.imagelength or box[3] > page.imagewidth:
                raise ValueError(f"it has {page.imagelength}x{page.imagewidth} pixels and no window {box}")
            image, valid = read(box)
            if channels == 3 and kind == "PALETTE":
                image = (np.asarray(page.colormap) >> 8).astype(np.uint8).T[image[..., 0]]
            elif channels == 3 and image.shape[2] == 1:
                image = np.repeat(image, 3, 2)
            elif channels == 3 and kind == "RGB":
                image = image[..., :3]  # without alpha
            return np.ascontiguousarray(image, image.dtype.newbyteorder("=")), valid

        yield Raster(page.imagelength, page.imagewidth, window, tags)


def _checked_kind(file: tifffile.TiffFile, channels: int, max_pixels: int) -> str:
    """Return the meaning of the bands of a TIFF; raises ValueError for one that cannot be read in windows."""
    page = file.pages.first
    kind: str = tifffile.PHOTOMETRIC(page.photometric).name
    if kind not in ("MINISBLACK", "RGB", "PALETTE") and not (kind == "YCBCR" and page.compression == 7):
        raise ValueError(f"its colors are {kind}: convert it to RGB")
    if page.bitspersample not in (8, 16, 32, 64):
        raise ValueError(f"it has {page.bitspersample} bits per band: convert it to 8 or 16")
    if page.tags.valueof(ORIENTATION, 1) != 1:
        raise ValueError("it is stored turned or mirrored (Orientation): turn its pixels upright")
    if channels > 1 and page.samplesperpixel == 1 and len(file.series[0].pages) > 1:
        raise ValueError("its bands are pages: write them side by side")
    rows, columns = _part(page)
    if rows * columns > max_pixels and not page.is_memmappable:
        raise ValueError(
            f"a tile or strip has {rows * columns} pixels, data.max_pixels is {max_pixels}: write it in tiles"
        )
    return kind


def _part(page: Any) -> tuple[int, int]:
    """Return the (height, width) of the tiles or strips of a TIFF."""
    rows = min(page.rowsperstrip, page.imagelength)
    return (page.tilelength, page.tilewidth) if page.is_tiled else (rows, page.imagewidth)


def _rasterio() -> Any:
    """Return the module rasterio, None where it is not installed."""
    try:
        import rasterio
    except ImportError:
        return None
    warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
    return rasterio


def _read_rasterio(dataset: Any, box: Box) -> tuple[np.ndarray, np.ndarray]:
    window = ((box[0], box[2]), (box[1], box[3]))
    return np.moveaxis(dataset.read(window=window), 0, -1), dataset.dataset_mask(window=window) > 0


def _tags_of(dataset: Any) -> Tags:
    """Return the georeference that GDAL has found, inside a file or beside it, as the TIFF tags that GDAL writes."""
    from rasterio.io import MemoryFile

    points, crs = dataset.gcps
    found = {"gcps": points, "crs": crs} if points else {"crs": dataset.crs, "transform": dataset.transform}
    with MemoryFile() as memory:
        with memory.open(driver="GTiff", width=1, height=1, count=1, dtype="uint8", rpcs=dataset.rpcs, **found):
            pass
        with tifffile.TiffFile(memory) as file:
            return _geo_tags(file.pages.first)


def _geo_tags(page: Any) -> Tags:
    return tuple((tag.code, tag.dtype, tag.count, tag.value, True) for tag in page.tags if tag.code in GEO_TAGS)


def _own_tags(path: Path, page: Any) -> Tags:
    """Return the georeference inside a file; raises ValueError when it is beside it."""
    tags = _geo_tags(page)
    beside = [path.with_suffix(suffix) for suffix in (".tfw", ".tifw", ".wld")]
    if not tags and (found := next(filter(Path.exists, beside), None)):
        raise ValueError(f"{found.name} beside it needs `pip install segcore[geo]`")
    return tags


def _read_tifffile(page: Any, segment: Any, box: Box) -> tuple[np.ndarray, np.ndarray]:
    y1, x1, y2, x2 = box
    planes, _, height, width, samples = page.shaped  # planes or samples are 1
    if page.is_memmappable:
        dtype = page.dtype.newbyteorder(page.parent.byteorder)
        array = np.memmap(
            page.parent.filehandle.path, dtype, "r", page.dataoffsets[0], (planes, height, width, samples)
        )
        image = np.array(array[:, y1:y2, x1:x2])
    else:
        image = np.empty((planes, y2 - y1, x2 - x1, samples), page.dtype)
        rows, columns = _part(page)
        down, across = -(-height // rows), -(-width // columns)
        for plane in range(planes):
            for row in range(y1 // rows, -(-y2 // rows)):
                for column in range(x1 // columns, -(-x2 // columns)):
                    part, top, left = segment((plane * down + row) * across + column), row * rows, column * columns
                    (ya, yb), (xa, xb) = (max(y1, top), min(y2, top + rows)), (max(x1, left), min(x2, left + columns))
                    image[plane, ya - y1 : yb - y1, xa - x1 : xb - x1] = part[
                        ya - top : yb - top, xa - left : xb - left
                    ]
    image = image.transpose(1, 2, 0, 3).reshape(y2 - y1, x2 - x1, -1)
    if GDAL_NODATA in page.tags:
        nodata = float(page.tags.valueof(GDAL_NODATA))
        empty = np.isnan(image) if np.isnan(nodata) else image == nodata
        return image, ~empty.all(-1)
    alpha = page.extrasamples and page.extrasamples[0] in (1, 2) and page.samplesperpixel in (2, 4)
    return image, image[..., -1] > 0 if alpha else np.ones(image.shape[:2], bool)


def _segments(page: Any) -> Callable[[int], np.ndarray]:
    """Return a function that decodes a tile or strip (h, w, samples) by its number and keeps the last ones."""
    file = page.parent.filehandle

    def decode(number: int) -> np.ndarray:
        file.seek(page.dataoffsets[number])
        count = page.databytecounts[number]
        data = file.read(count)
        if len(data) < count:
            raise ValueError("the file is truncated")
        with codec_of(page, "segcore[geo]` or `segcore[tiff]"):
            array, _, shape = page.decode(data or None, number, jpegtables=page.jpegtables)
        found: np.ndarray = np.full(shape, page.nodata, page.dtype) if array is None else array
        return found[0]

    size = np.prod(_part(page)) * page.dtype.itemsize * page.samplesperpixel
    return functools.lru_cache(int(max(CACHE // max(size, 1), 1)))(decode)


# Writing

Put = Callable[[int, int, np.ndarray], None]
"""Takes (y, x, block): a block (h, w), or (K, h, w) of K bands, in any order."""


@contextmanager
def class_writer(path: Path, size: tuple[int, int], palette: np.ndarray, nodata: int, tags: Tags = ()) -> Iterator[Put]:
    """Yield `put` for blocks of classes; a TIFF of all exists afterwards, or none.

    The TIFF is tiled, deflated and has a color table, (K, 3) uint8; it is 8-bit if `nodata` is 255, else 16-bit. The
    classes wait in a file without compression beside it. Raises UserError when the folder cannot hold them.
    """
    dtype = np.dtype(np.uint8 if nodata < 256 else np.uint16)
    colors = np.zeros((3, 256**dtype.itemsize), np.uint16)
    colors[:, : len(palette)] = palette.T.astype(np.uint16) * 257
    with _writer(path, size, dtype, dtype, nodata, tags, photometric="palette", colormap=colors) as put:
        yield put


@contextmanager
def confidence_writer(path: Path, size: tuple[int, int], tags: Tags = ()) -> Iterator[Put]:
    """Yield `put` for blocks of uint8, which become a TIFF as those of `class_writer` do; 0 stands for no data."""
    dtype = np.dtype(np.uint8)
    with _writer(path, size, dtype, dtype, 0, tags, photometric="minisblack") as put:
        yield put


@contextmanager
def probability_writer(path: Path, size: tuple[int, int], names: Sequence[str], tags: Tags = ()) -> Iterator[Put]:
    """Yield `put` for blocks of probabilities (K, h, w), which become a TIFF of K bands as `class_writer` makes one.

    The bands are float32, which GDAL reads in every version, but rounded to float16: they compress to less, and wait in
    2 bytes per value. They are described by `names`; NaN stands for no data.
    """
    items = (
        f'<Item name="DESCRIPTION" sample="{band}" role="description">{escape(escape(name))}</Item>'  # as GDAL does
        for band, name in enumerate(names)
    )
    described = f"<GDALMetadata>{''.join(items)}</GDALMetadata>".encode()
    tags = (*tags, (GDAL_METADATA, "s", 0, described, True))
    half, full = np.dtype(np.float16), np.dtype(np.float32)
    how = {"photometric": "minisblack"} | ({"planarconfig": "separate"} if len(names) > 1 else {})
    with _writer(path, (len(names), *size), half, full, "nan", tags, **how) as put:
        yield put


@contextmanager
def _writer(
    path: Path, shape: tuple[int, ...], kept: np.dtype[Any], dtype: np.dtype[Any], nodata: object, tags: Tags,
    **how: Any,
) -> Iterator[Put]:  # fmt: skip
    """Yield `put` for an array of `shape` that waits as `kept` in a file and becomes a TIFF of `dtype`."""
    height, width = shape[-2:]
    with replacing(path) as temporary:
        stored = temporary.with_suffix(".raw")
        try:
            with stored.open("w+b") as file:
                if hasattr(os, "posix_fallocate"):  # a full disk is reported now
                    os.posix_fallocate(file.fileno(), 0, math.prod(shape) * kept.itemsize)

                def put(y: int, x: int, block: np.ndarray) -> None:
                    for band, plane in enumerate(block.astype(kept).reshape(-1, *block.shape[-2:])):
                        for row, line in enumerate(plane, band * height + y):
                            file.seek((row * width + x) * kept.itemsize)
                            file.write(line.tobytes())

                yield put
                file.seek(0)
                tifffile.imwrite(
                    temporary, _tiles(file, shape, kept, dtype), shape=shape, dtype=dtype, tile=(TILE, TILE),
                    compression="zlib", metadata=None, bigtiff=math.prod(shape) * dtype.itemsize > 1 << 31,
                    extratags=[*tags, (GDAL_NODATA, "s", 0, str(nodata), True)], **how,
                )  # fmt: skip
        finally:
            stored.unlink(missing_ok=True)


def _tiles(file: Any, shape: tuple[int, ...], kept: np.dtype[Any], dtype: np.dtype[Any]) -> Iterator[np.ndarray]:
    """Yield the tiles of rows that lie in a file one after the other, band by band."""
    height, width = shape[-2:]
    for _ in range(math.prod(shape[:-2])):
        for y in range(0, height, TILE):
            data = file.read(min(TILE, height - y) * width * kept.itemsize)
            rows = np.frombuffer(data, kept).reshape(-1, width).astype(dtype, copy=False)
            yield from (rows[:, x : x + TILE] for x in range(0, width, TILE))
