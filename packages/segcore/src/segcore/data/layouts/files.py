"""List and pair image and label files."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from segcore.data.dataset import Sample
from segcore.errors import UserError

SYSTEM = ("@eaDir", "__MACOSX", "Thumbs.db")
"""Names, beside hidden ones, that operating systems leave between images."""


def walk(folder: Path, depth: float = math.inf, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """Yield the files below a folder, at most `depth` levels down, in the order of their names.

    Hidden files and folders and those of operating systems are left out. Links are followed, except to a folder that
    they lie in (`above`).
    """
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.name.startswith(".") or entry.name in SYSTEM:
            continue
        folder_link = entry.is_symlink() and Path(entry.path).is_dir()  # unlike `entry.is_dir`, never raises
        if not entry.is_dir(follow_symlinks=False) and not folder_link:
            yield Path(entry.path)
        elif depth > 1:
            status = entry.stat()
            place = status.st_dev, status.st_ino
            if place not in above:
                yield from walk(Path(entry.path), depth - 1, above | {place})


def list_files(folder: Path, suffix: str) -> dict[str, Path]:
    """Return the files below `folder` that end in `suffix`, in any case, keyed by their relative path without it.

    They are sorted by relative path as text, as in the published systems. Raises UserError if the folder is missing.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; unpack the dataset there, or set data.root")
    names = (path.relative_to(folder).as_posix() for path in walk(folder))
    return {name[: -len(suffix)]: folder / name for name in sorted(names) if name.lower().endswith(suffix.lower())}


def glob_files(root: Path, pattern: str) -> list[Path]:
    """Return the files below `root` that match a pattern such as `images/train/*.png`, sorted by path as text.

    `**` stands for any number of folders. What `walk` leaves out is left out. Raises UserError for a pattern that is
    not relative, or is a folder.
    """
    parts = PurePosixPath(pattern).parts
    if not parts or pattern.startswith("/") or ".." in parts:
        raise UserError(f"{pattern!r} is not a file pattern below {root}; write it like images/train/*.png")
    if (root / pattern).is_dir():
        raise UserError(f"{root / pattern}: is a folder; write {pattern.rstrip('/')}/* for the files in it")
    fixed = fixed_part(pattern)
    depth = math.inf if "**" in parts else len(parts) - len(fixed.parts)
    if not (root / fixed).is_dir():
        return []
    names = (path.relative_to(root) for path in walk(root / fixed, depth))
    return [root / name for name in sorted(names, key=Path.as_posix) if _matches(name.parts, parts)]


def fixed_part(pattern: str) -> PurePosixPath:
    """Return the folder part of a glob before its first wildcard."""
    parts = PurePosixPath(pattern).parent.parts
    wild = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), len(parts))
    return PurePosixPath(*parts[:wild])


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern or pattern == ("**",):
        return not parts or bool(pattern)
    if pattern[0] == "**":
        return any(_matches(parts[i:], pattern[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def pair_files(
    images: Mapping[str, Path],
    labels: Mapping[str, Path] | None,
    wanted: tuple[str, str],
    remedy: str = "set data.root",
) -> tuple[tuple[Sample, ...], tuple[str, ...], tuple[Path, ...]]:
    """Return samples that pair images and labels by name, in the images' order; with `labels` None, without labels.

    The second value has one line per image without a label, the third lists labels without an image. `wanted` holds
    the searched patterns of images and labels, for messages. Raises UserError when there is no image.
    """
    if not images:
        raise UserError(f"{wanted[0]}: no images found (labels: {wanted[1]}); put them there or {remedy}")
    if labels is None:
        return tuple(Sample(path, None) for path in images.values()), (), ()
    why = f"has no label of its name in {wanted[1]} (images: {wanted[0]}); add one, remove the image, or {remedy}"
    return (
        tuple(Sample(path, labels[name]) for name, path in images.items() if name in labels),
        tuple(f"{path}: {why}" for name, path in images.items() if name not in labels),
        tuple(path for name, path in labels.items() if name not in images),
    )
