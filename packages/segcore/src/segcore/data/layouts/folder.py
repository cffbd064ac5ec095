"""A user's own images and masks: two globs per split, and what the mask values mean.

A mask belongs to the image of the same stem. Endings that only state the kind of a file do not count: an `_`,
`-` or `.` followed by image(s), img, rgb, leftImg8bit, mask(s), label(s), labelIds, labelTrainIds, gtFine, gt, seg,
annotation(s), anon or instance_color, in any case, one or several. So `a_rgb.jpg` and `a_mask.png` are a pair. Folders
that a `*` or `**` stands for count as well, those that a glob spells out do not: with `*/images/*` and `*/masks/*`,
`x/images/a.jpg` matches `x/masks/a.png`. Both may lie in one folder: a file that matches the masks' glob is no image.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.random import RandomState

from segcore.config.label_rows import IGNORED, class_names, parse_rows
from segcore.config.schema import DataConfig
from segcore.data.dataset import Dataset, Sample
from segcore.data.images import IMAGE_SUFFIXES
from segcore.data.labels import FORBIDDEN, distinct_colors, ignored_label, label_lut
from segcore.data.layouts.files import fixed_part, glob_files, pair_files
from segcore.errors import UserError
from segcore.files import expanded, regular_file

MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif"), (".jpg", ".jpeg")
"""Suffixes of masks: lossless formats, else JPEG, whose values are refused where it has changed them."""
MAX_CLASSES = 8190
"""The metrics pack a class and two bits into 16 bits."""
_ENDING = re.compile(
    r"([._-](images?|img|rgb|anon|leftimg8bit|masks?|labels?|labelids|labeltrainids|gtfine|gt|seg|annotations?"
    r"|instance_color))+$",
    re.IGNORECASE,
)


def open_split(data: DataConfig, split: str) -> Dataset:
    """Return the split `train` or `val` that the globs, lists and `data.val_share` name.

    An empty `data.val_masks` gives samples without labels. Raises UserError when classes are missing, when nothing
    matches, when a list names what is not there, or when two files share a stem.
    """
    names, palette = classes(data)
    if not 1 <= len(names) <= MAX_CLASSES:
        raise UserError(
            f"data.classes has {len(names)} names; give 1 to {MAX_CLASSES}, in the order of the mask values 0, 1, 2 …, "
            "or set data.labels"
        )
    own = split == "train" or bool(data.val_share)  # of the training images
    which = "train" if own else "val"
    image_glob, mask_glob, listed = (getattr(data, f"{which}_{name}") for name in ("images", "masks", "list"))
    lines = _lines_of(listed, data.root) if listed else []
    if pairs := _pairs(lines, data.root):
        samples, missing, unmatched = pairs, tuple[str, ...](), tuple[Path, ...]()
    else:
        remedy = f"set data.root, data.{which}_images and data.{which}_masks, or list the pairs in data.{which}_list"
        if not own:
            remedy += ", or data.val_share to hold out training images"
        samples, missing, unmatched = _matching(data.root, image_glob, mask_glob, mask_glob or own, remedy)
        if listed:
            (samples, missing), unmatched = _of_list(listed, lines, data.root, samples, missing), ()
    if data.val_share and samples:
        samples = _share(samples, data, split)
    ignored = ignored_label(len(names))
    unlisted = ignored if data.unlisted == "ignore" else FORBIDDEN
    dataset = Dataset(
        names, palette, ignored, samples, data.root / fixed_part(image_glob), label_lut(len(names), unlisted),
        missing=missing, unmatched_labels=unmatched,
    )  # fmt: skip
    return _with_table(dataset, data, unlisted) if data.labels else dataset


def _matching(
    root: Path, image_glob: str, mask_glob: str, labeled: object, remedy: str
) -> tuple[tuple[Sample, ...], tuple[str, ...], tuple[Path, ...]]:
    """Return what `pair_files` does for the files that the globs match."""
    spelled, masks = {*PurePosixPath(image_glob).parent.parts, *PurePosixPath(mask_glob).parent.parts}, None
    if labeled:
        lossless, lossy = MASK_SUFFIXES
        found = (find_by_stem(root, mask_glob, spelled, suffixes) for suffixes in (lossless, lossy))
        masks = next(filter(None, found), {})
    images = find_by_stem(root, image_glob, spelled, without={*(masks or {}).values()})
    return pair_files(images, masks, (f"{root}/{image_glob}", f"{root}/{mask_glob}"), remedy)


def classes(data: DataConfig) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the class names of `data` and (K, 3) uint8 RGB colors: those of the masks, if these hold colors."""
    names = data.classes or class_names(data.labels)
    palette = distinct_colors(len(names))
    for row in reversed(parse_rows(data.labels)):
        if isinstance(row.key, str) and row.name != IGNORED:
            palette[names.index(row.name)] = list(bytes.fromhex(row.key[1:]))
    return names, palette


def _with_table(dataset: Dataset, data: DataConfig, unlisted: int) -> Dataset:
    """Return the dataset with the label table of `data.labels`."""
    rows = parse_rows(data.labels)
    ids = [dataset.ignore_index if row.name == IGNORED else dataset.classes.index(row.name) for row in rows]
    colors = [list(bytes.fromhex(row.key[1:])) for row in rows if isinstance(row.key, str)]
    keys = [index if isinstance(row.key, str) else row.key for index, row in enumerate(rows)]
    table = label_lut(dict(zip(keys, ids, strict=True)), unlisted)
    return replace(dataset, table=table, colors=np.array(colors, np.uint8) if colors else None)


def _lines_of(path: Path, root: Path) -> list[str]:
    """Return the lines of a list, which may lie below `root`."""
    path = expanded(path)
    for place in (path, root / path):
        try:
            regular_file(place)
            return [line.strip() for line in place.read_text(encoding="utf-8").splitlines() if line.strip()]
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
            raise UserError(f"{place}: cannot be read as a list of images ({reason})") from None
    raise UserError(f"{path}: no such list of images, neither here nor in {root}")


def _pairs(lines: Sequence[str], root: Path) -> tuple[Sample, ...]:
    """Return the samples of a list whose every line is an image and its mask below `root`; none of another list."""
    pairs = [[root / word for word in line.split()] for line in lines]
    if not all(len(pair) == 2 and all(file.is_file() for file in pair) for pair in pairs):
        return ()
    return tuple(Sample(image, mask) for image, mask in pairs)


def _of_list(
    path: Path, lines: Sequence[str], root: Path, samples: Sequence[Sample], missing: Sequence[str]
) -> tuple[tuple[Sample, ...], tuple[str, ...]]:
    """Return the samples that a list names, in its order, and the lines of `missing` about images that it names."""
    known = defaultdict[str, list[tuple[Path, Sample | str]]](list)
    for sample in samples:
        known[sample.image.stem].append((sample.image, sample))
    for text in missing:
        image = Path(text.partition(": ")[0])
        known[image.stem].append((image, text))
    found, left = list[Sample](), list[str]()
    for number, line in enumerate(lines, 1):
        words = line.split()
        pair = [root / word for word in words] if len(words) == 2 else []
        if pair and all(file.is_file() for file in pair):
            found.append(Sample(pair[0], pair[1]))
            continue
        name = PurePosixPath(line)
        fits = known.get(line) or (len(words) == 1 and (known.get(name.name) or known.get(name.stem))) or []
        if len(fits) > 1:  # of several folders
            folder = name.parent.parts
            fits = [each for each in fits if each[0].parent.parts[-len(folder) :] == folder] if folder else fits
        if len(fits) > 1:
            raise UserError(
                f"{path}, line {number}: {line!r} is the stem of {fits[0][0]} and {fits[1][0]}; name the folder, too"
            )
        if not fits:
            raise UserError(
                f"{path}, line {number}: {line!r} is neither the stem of an image and mask nor two files below {root}"
            )
        _, item = fits[0]
        if isinstance(item, Sample):
            found.append(item)
        else:
            left.append(item)
    if not found and not left:
        raise UserError(f"{path}: names no image")
    return tuple(found), tuple(left)


def _share(samples: tuple[Sample, ...], data: DataConfig, split: str) -> tuple[Sample, ...]:
    """Return the part of the training samples that is held out for validation, or the rest, in their order."""
    count = max(round(data.val_share * len(samples)), 1)
    if count >= len(samples):
        raise UserError(f"data.val_share {data.val_share} of {len(samples)} images leaves none to train on")
    held = {*RandomState(data.val_seed).permutation(len(samples))[:count].tolist()}
    return tuple(sample for i, sample in enumerate(samples) if (i in held) == (split == "val"))


def short_stem(path: Path) -> str:
    """Return the stem of a file name without the endings that only state its kind."""
    return _ENDING.sub("", path.stem) or path.stem


def find_by_stem(
    root: Path,
    pattern: str,
    spelled: Collection[str],
    suffixes: tuple[str, ...] = IMAGE_SUFFIXES,
    without: Collection[Path] = (),
) -> dict[str, Path]:
    """Return the files of these types that match `pattern` below `root`, keyed by stem and sorted by path as text.

    Folders whose names are in `spelled` are no part of the key. Hidden files, files of other types and those in
    `without` are left out. Raises UserError when two share a stem or the pattern is not a relative glob.
    """
    found: dict[str, Path] = {}
    for path in glob_files(root, pattern):
        if path.suffix.lower() in suffixes and path not in without:
            folders = (part for part in path.relative_to(root).parent.parts if part not in spelled)
            key = PurePosixPath(*folders, short_stem(path)).as_posix()
            if key in found:
                raise UserError(
                    f"{found[key]} and {path}: both have the stem {key!r}; narrow the pattern {pattern} to one of them"
                )
            found[key] = path
    return found
