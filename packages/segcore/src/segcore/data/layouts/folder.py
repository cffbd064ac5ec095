"""A user's own images and masks: two globs per split and a list of class names.

A mask belongs to the image of the same stem. Endings that only state the kind of a file do not count: an `_`,
`-` or `.` followed by image(s), img, rgb, leftImg8bit, mask(s), label(s), labelIds, labelTrainIds, gtFine, gt, seg,
annotation(s), in any case, one or several. So `a_rgb.jpg` and `a_mask.png` are a pair. Below a `**`, sub-folders
count as well: `x/a.jpg` matches `x/a.png`.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

import cv2
import numpy as np

from segcore.config.schema import DataConfig
from segcore.data.dataset import Dataset
from segcore.data.images import IMAGE_SUFFIXES
from segcore.data.labels import IGNORE, label_lut
from segcore.data.layouts.files import pair_files
from segcore.errors import UserError

MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif")
"""Suffixes of masks: lossless formats, read as indices."""
_ENDING = re.compile(
    r"([._-](images?|img|rgb|leftimg8bit|masks?|labels?|labelids|labeltrainids|gtfine|gt|seg|annotations?))+$",
    re.IGNORECASE,
)


def open_split(data: DataConfig, split: str) -> Dataset:
    """Return the split `train` or `val` that the globs of `data` name; mask values are 0 .. K-1 and 255 (ignored).

    An empty `data.val_masks` gives samples without labels. Raises UserError when classes are missing, when nothing
    matches, or when two files share a stem.
    """
    if not 1 <= len(data.classes) <= 253:
        raise UserError(
            f"data.classes has {len(data.classes)} names; give 1 to 253, in the order of the mask values 0, 1, 2 …"
        )
    train = split == "train"
    image_glob, mask_glob = (data.train_images, data.train_masks) if train else (data.val_images, data.val_masks)
    masks = find_by_stem(data.root, mask_glob, MASK_SUFFIXES) if mask_glob or train else None
    wanted = (f"{data.root}/{image_glob}", f"{data.root}/{mask_glob}")
    samples, missing, unmatched = pair_files(find_by_stem(data.root, image_glob), masks, wanted)
    names, palette = classes(data)
    return Dataset(
        names, palette, IGNORE, samples, data.root / fixed_part(image_glob), label_lut(len(names)),
        missing=missing, unmatched_labels=unmatched,
    )  # fmt: skip


def classes(data: DataConfig) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the class names of `data` and (K, 3) uint8 RGB colors."""
    return data.classes, distinct_colors(len(data.classes))


def find_by_stem(root: Path, pattern: str, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> dict[str, Path]:
    """Return the files of these types that match `pattern` below `root`, keyed by stem and sorted by path as text.

    Hidden files, files of other types and folders are left out. Raises UserError when two share a stem or the pattern
    is not a relative glob.
    """
    try:
        paths = sorted(root.glob(pattern), key=lambda path: path.relative_to(root).as_posix())
    except (ValueError, NotImplementedError) as error:
        raise UserError(
            f"{pattern!r} is not a file pattern below {root} ({error}); write it like images/train/*.png"
        ) from None
    found: dict[str, Path] = {}
    for path in paths:
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and not path.is_dir():
            relative = path.relative_to(root / fixed_part(pattern))
            key = (relative.parent / (_ENDING.sub("", relative.stem) or relative.stem)).as_posix()
            if key in found:
                raise UserError(
                    f"{found[key]} and {path}: both have the stem {key!r}; narrow the pattern {pattern} to one of them"
                )
            found[key] = path
    return found


def fixed_part(pattern: str) -> PurePosixPath:
    """Return the folder part of a glob before its first wildcard."""
    parts = PurePosixPath(pattern).parent.parts
    wild = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), len(parts))
    return PurePosixPath(*parts[:wild])


def distinct_colors(count: int) -> np.ndarray:
    """Return (count, 3) uint8 RGB: of 512 spaced colors, each the farthest in CIELAB from black and earlier ones.

    Color i does not depend on `count`, which is at most 511.
    """
    levels = np.linspace(0, 255, 8).astype(np.uint8)
    colors = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)  # starts with black
    lab = cv2.cvtColor(colors[None].astype(np.float32) / 255, cv2.COLOR_RGB2Lab)[0]
    chosen, distance = [0], np.full(len(colors), np.inf)
    for _ in range(count):
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
        chosen.append(int(distance.argmax()))
    return colors[chosen[1:]]
