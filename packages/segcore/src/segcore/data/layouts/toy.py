"""The generated street scenes as a dataset: the Cityscapes layout with a marker file that states its content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from segcore.config.schema import DataConfig
from segcore.data.dataset import Dataset
from segcore.data.layouts import cityscapes
from segcore.errors import UserError
from segcore.files import read_json

CITY, MARKER, SPLITS = "toytown", "toy.json", ("train", "val")
MAX_SCENES = 1_000_000


def open_split(data: DataConfig, split: str) -> Dataset:
    """Return the split `train` or `val`; `Dataset.missing` lists each file that is gone."""
    lost = missing_files(data.root, [split])
    missing = tuple(f"{file}: missing; `train` generates it again" for file in lost)
    dataset = cityscapes.open_split(data, split)
    return replace(dataset, missing=missing or dataset.missing)


def is_complete(root: Path) -> bool:
    """Return whether `root` holds a toy set that was generated completely and still has all of its files.

    Raises UserError when the marker cannot be read.
    """
    return bool(read_marker(root / MARKER).get("complete")) and not missing_files(root)


def missing_files(root: Path, splits: Sequence[str] = SPLITS) -> list[Path]:
    """Return the files that the marker below `root` lists but that do not exist; none without a marker."""
    items = items_of(read_marker(root / MARKER)) if (root / MARKER).exists() else []
    files = [file for split, index in items if split in splits for file in files_of(root, split, index)]
    return [file for file in files if not file.is_file()]


def items_of(parameters: dict[str, Any]) -> list[tuple[str, int]]:
    """Return (split, index) of every image of a toy set with these parameters."""
    return [(split, index) for split in SPLITS for index in range(parameters[split])]


def files_of(root: Path, split: str, index: int) -> tuple[Path, Path, Path]:
    """Return the image, its raw ids and its train ids."""
    images, labels = root / "leftImg8bit" / split / CITY, root / "gtFine" / split / CITY
    stem = f"{CITY}_{index:06d}_000000"
    return (
        images / f"{stem}_leftImg8bit.png",
        labels / f"{stem}_gtFine_labelIds.png",
        labels / f"{stem}_gtFine_labelTrainIds.png",
    )


def read_marker(marker: Path) -> dict[str, Any]:
    """Return the content of the marker, empty if there is no marker."""
    try:
        content = read_json(marker)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except UserError as error:
        raise UserError(f"{error}; delete the folder or choose another one") from None
    counts = [content.get(split) for split in SPLITS]
    if not all(isinstance(count, int) and 0 <= count < MAX_SCENES for count in counts):
        raise UserError(f"{marker}: not a valid toy set marker; delete the folder or choose another one")
    return content
