"""Annotations of COCO's format (https://cocodataset.org/#format-data), instances or stuff, as masks of classes.

The file is untrusted and pycocotools is C code that checks nothing: it is given only what was checked here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np

from segcore.data.images import MAX_PIXELS
from segcore.data.labels import FORBIDDEN
from segcore.data.layouts.files import SYSTEM
from segcore.errors import UserError
from segcore.files import read_json

MAX_FILE = 1 << 30
"""Bytes of an annotation file: COCO's own have up to 450 MB."""
MAX_OUTLINE = 1 << 24
"""Points of a polygon's outline, five per pixel, for which pycocotools takes memory."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_AGAIN = "export the annotations again, as COCO instances"


class CocoImage(NamedTuple):
    """An image and what is drawn on it."""

    where: str
    """The file and the image's id, to begin messages with."""
    name: str
    """Its path below the folder of the images."""
    height: int
    width: int
    annotations: list[dict[str, Any]]


@dataclass(frozen=True)
class Coco:
    """What an annotation file holds."""

    path: Path
    names: dict[int, str]
    """Names of the categories by id, in the order of the ids."""
    images: tuple[CocoImage, ...]


def read_coco(path: Path) -> Coco:
    """Return the content of an annotation file; outlines are checked by `paint`.

    Raises UserError naming the file, the id and the value that is wrong, and FileNotFoundError.
    """
    try:
        data = read_json(path, MAX_FILE)
    except UserError as error:
        raise UserError(f"{error}; {_AGAIN}") from None
    names = {}
    for where, entry in _entries(path, data, "categories", "category"):
        given = entry.get("name")
        name = " ".join(given.split()) if isinstance(given, str) else ""
        if not name or _CONTROL.search(name):
            raise UserError(f"{where}: name is {_short(given)}; name the class")
        names[entry["id"]] = name
    images: dict[int, CocoImage] = {}
    for where, entry in _entries(path, data, "images", "image"):
        height, width = (_whole(where, entry, key, 1) for key in ("height", "width"))
        if height * width > MAX_PIXELS:
            raise UserError(f"{where}: has {height}x{width} pixels (height x width); at most {MAX_PIXELS} are read")
        images[entry["id"]] = CocoImage(where, _file_name(where, entry.get("file_name")), height, width, [])
    for where, entry in _entries(path, data, "annotations", "annotation"):
        for key, known, kind in (("image_id", images, "image"), ("category_id", names, "category")):
            if _whole(where, entry, key) not in known:
                raise UserError(f"{where}: {key} is {entry[key]}, but there is no such {kind}; {_AGAIN}")
        images[entry["image_id"]].annotations.append(entry)
    if not (names and images):
        raise UserError(f"{path}: has {len(names)} categories and {len(images)} images; {_AGAIN}")
    return Coco(path, dict(sorted(names.items())), tuple(images.values()))


def paint(image: CocoImage, values: Mapping[int, int], background: int, path: Path) -> tuple[np.ndarray, int]:
    """Return the mask of an image, (H, W) uint16, and the number of its pixels without an annotation.

    `values` are the mask's values by category id, `background` that of pixels without an annotation. Where outlines
    overlap, the smaller one is on top, of equal ones the later. Crowds count like single objects. Raises UserError
    naming the file `path`, the annotation and what is wrong with its outline.
    """
    from pycocotools import mask as coco_mask

    shape = image.height, image.width
    encoded = [encode(f"{path}: annotation {entry['id']}", entry, shape) for entry in image.annotations]
    areas = coco_mask.area(encoded) if encoded else []
    mask = np.full(shape, FORBIDDEN, np.uint16)
    for index in sorted(range(len(encoded)), key=lambda index: int(areas[index]), reverse=True):
        mask[coco_mask.decode(encoded[index]) > 0] = values[image.annotations[index]["category_id"]]
    free = mask == FORBIDDEN
    mask[free] = background
    return mask, int(free.sum())


def encode(where: str, annotation: Mapping[str, Any], shape: tuple[int, int]) -> Any:
    """Return pycocotools' run lengths of an annotation on an image of `shape` (height, width).

    Raises UserError, which begins with `where`, for what is no outline.
    """
    from pycocotools import mask as coco_mask

    outline = annotation.get("segmentation")
    if isinstance(outline, dict):
        return coco_mask.frPyObjects({"size": list(shape), "counts": _counts(where, outline, shape)}, *shape)
    if not isinstance(outline, list) or not outline:
        raise UserError(f"{where}: has no outline (segmentation is {_short(outline)}), only a box? Draw or remove it")
    for polygon in outline:
        _check_polygon(where, polygon, shape)
    return coco_mask.merge(coco_mask.frPyObjects(outline, *shape))


def _check_polygon(where: str, polygon: Any, shape: tuple[int, int]) -> None:
    """Raise UserError unless a polygon is x1, y1, x2, y2 …, of three or more points in or around the image."""
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        size = f"{len(polygon)} numbers" if isinstance(polygon, list) else _short(polygon)
        raise UserError(f"{where}: a polygon is {size}; three or more points x, y are needed: draw or remove it")
    for number, side in zip(polygon, (shape[1], shape[0]) * (len(polygon) // 2), strict=True):
        if type(number) not in (int, float) or not -side <= number <= 2 * side:
            raise UserError(
                f"{where}: a polygon has the coordinate {_short(number)} on an image of {shape[0]}x{shape[1]} pixels "
                "(height x width); draw it again"
            )
    points = np.array(polygon, float).reshape(-1, 2)
    steps = np.abs(points - np.roll(points, 1, 0)).max(1).sum()
    if 5 * steps + len(points) > MAX_OUTLINE:
        raise UserError(f"{where}: the outline of a polygon has {steps:.0f} pixels; draw it with fewer turns")


def _counts(where: str, outline: Mapping[str, Any], shape: tuple[int, int]) -> list[int]:
    """Return the lengths of an RLE's runs, which go down the columns and begin with one outside of the object."""
    size, counts = outline.get("size"), outline.get("counts")
    if size != list(shape):
        raise UserError(
            f"{where}: its RLE is of size {_short(size)}, the image of {list(shape)} (height, width); {_AGAIN}"
        )
    try:
        found = decompressed(counts) if isinstance(counts, str) else counts
    except ValueError as error:
        raise UserError(f"{where}: the counts of its RLE are damaged ({error}); {_AGAIN}") from None
    if not isinstance(found, list):
        raise UserError(f"{where}: the counts of its RLE are {_short(counts)}; {_AGAIN}")
    if wrong := [count for count in found if type(count) is not int or count < 0]:
        raise UserError(f"{where}: the counts of its RLE hold {_short(wrong[0])}; {_AGAIN}")
    if sum(found) != math.prod(shape):
        raise UserError(
            f"{where}: the counts of its RLE add up to {sum(found)}, not to {math.prod(shape)} pixels; {_AGAIN}"
        )
    return found


def decompressed(text: str) -> list[int]:
    """Return the counts of a compressed RLE; raises ValueError with the reason when it is damaged.

    A number has five bits per character, the lowest first; the sixth says that more follow, and the fifth of the last
    character is the sign. From the fourth number on, each is the difference from the last but one.
    """
    counts, value, shift = list[int](), 0, 0
    for place, character in enumerate(text):
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            raise ValueError(f"character {place}: {character!r}")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) * (bits >> 4 & 1)
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("the last number has no end")
    return counts


def _entries(path: Path, data: Mapping[str, Any], key: str, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects in a list of the file, each with how messages about it begin, after a check of their ids."""
    found = data.get(key)
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise UserError(f"{path}: {key!r} is {'missing' if found is None else 'not a list of objects'}; {_AGAIN}")
    seen = set[int]()
    for number, entry in enumerate(found, 1):
        number = _whole(f"{path}: {kind} number {number}", entry, "id")
        if number in seen and kind != "annotation":  # whose ids only name them in messages
            raise UserError(f"{path}: {kind} {number} is there twice; {_AGAIN}")
        seen.add(number)
        yield f"{path}: {kind} {number}", entry


def _whole(where: str, entry: Mapping[str, Any], key: str, least: float = -math.inf) -> int:
    """Return a whole number of an object in the file."""
    value = entry.get(key)
    if type(value) is not int or value < least:
        raise UserError(f"{where}: {key} is {_short(value)}, not a whole number; {_AGAIN}")
    return value


def _file_name(where: str, name: Any) -> str:
    """Return the path of an image with `/`, whatever system wrote it, if it lies below the folder of the images."""
    if not isinstance(name, str) or not name or _CONTROL.search(name):
        raise UserError(f"{where}: file_name is {_short(name)}; {_AGAIN}")
    parts = re.split(r"[/\\]", name)
    if ".." in parts or name.startswith(("/", "\\")) or PureWindowsPath(name).drive:
        raise UserError(f"{where}: file_name is {_short(name)}; write it relative to the folder of the images")
    parts = [part for part in parts if part not in ("", ".")]
    if not parts or any(part.startswith(".") or part in SYSTEM for part in parts):
        raise UserError(f"{where}: file_name is {_short(name)}, a hidden or system file, which are not read; rename it")
    return "/".join(parts)


def _short(value: Any) -> str:
    """Return a value of the file as text of one line."""
    return "missing" if value is None else f"{value!r:.60}"
