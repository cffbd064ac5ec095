"""List and pair image and label files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from segcore.data.dataset import Sample
from segcore.errors import UserError


def list_files(folder: Path, suffix: str) -> dict[str, Path]:
    """Return the files below `folder` that end in `suffix`, keyed by their relative path without it.

    They are sorted by relative path as text, as in the published systems. Raises UserError if the folder is missing.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; unpack the dataset there, or set data.root")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob(f"*{suffix}") if not path.is_dir())
    return {name.removesuffix(suffix): folder / name for name in names}


def pair_files(
    images: Mapping[str, Path], labels: Mapping[str, Path] | None, wanted: tuple[str, str]
) -> tuple[tuple[Sample, ...], tuple[str, ...], tuple[Path, ...]]:
    """Return samples that pair images and labels by name, in the images' order; with `labels` None, without labels.

    The second value has one line per image without a label, the third lists labels without an image. `wanted` holds
    the searched patterns of images and labels, for messages. Raises UserError when there is no image.
    """
    if not images:
        raise UserError(f"{wanted[0]}: no images found; put them there or set data.root")
    if labels is None:
        return tuple(Sample(path, None) for path in images.values()), (), ()
    remedy = f"has no label in {wanted[1]}; add one or remove the image"
    return (
        tuple(Sample(path, labels[name]) for name, path in images.items() if name in labels),
        tuple(f"{path}: {remedy}" for name, path in images.items() if name not in labels),
        tuple(path for name, path in labels.items() if name not in images),
    )
