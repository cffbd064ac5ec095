"""A folder that `data.dataset folder` reads, from annotation files of COCO's format and their images."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from segcore.config.label_rows import IGNORED
from segcore.data.coco import Coco, paint, read_coco
from segcore.data.images import IMAGE_SUFFIXES, reading
from segcore.data.labels import ignored_label
from segcore.data.layouts.folder import MAX_CLASSES, short_stem
from segcore.data.rasters import ORIENTATION, is_tiff, tiff_size
from segcore.errors import UserError
from segcore.files import write, writing_folder
from segcore.progress import progress


@dataclass(frozen=True)
class Imported:
    """What was written."""

    images: dict[str, int]
    """Number of images by split."""
    classes: tuple[str, ...]
    unused: tuple[str, ...]
    """Categories without an annotation."""
    free: float
    """Share of the pixels without an annotation."""


def import_coco(sources: Mapping[str, tuple[Path, Path]], out: Path, background: str) -> Imported:
    """Write `images/SPLIT`, `masks/SPLIT` and `labels.csv` below `out`, which must be empty or not be there.

    `sources` are an annotation file and the folder of its images by split, train first; `background` is the class of
    pixels without an annotation, `ignore` for none. Images are linked (hard), or copied where that is not possible.
    Raises UserError for anything that is wrong in the files; then nothing is written.
    """
    files = {split: read_coco(path) for split, (path, _) in sources.items()}
    names = class_names(list(files.values()), background)
    ignored = ignored_label(len(names))
    values = {IGNORED: ignored} | {name: value for value, name in enumerate(names)}
    images = {split: image_files(coco, sources[split][1]) for split, coco in files.items()}
    dtype, free, total = np.dtype(np.uint8 if ignored < 256 else np.uint16), 0, 0
    with writing_folder(out) as folder:
        for split, coco in files.items():
            image_folder, mask_folder = folder / "images" / split, folder / "masks" / split
            image_folder.mkdir(parents=True)
            mask_folder.mkdir(parents=True)
            value_of = {number: values[name] for number, name in coco.names.items()}
            with progress(f"writing the masks of {split}") as advance:
                for done, (image, (name, source)) in enumerate(zip(coco.images, images[split], strict=True), 1):
                    mask, unlabeled = paint(image, value_of, values[background], coco.path)
                    link(source, image_folder / name)
                    Image.fromarray(mask.astype(dtype)).save(mask_folder / f"{Path(name).stem}.png")
                    free, total = free + unlabeled, total + mask.size
                    advance(done, len(coco.images))
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([("value", "name"), *enumerate(names), (ignored, IGNORED)])
        write(folder / "labels.csv", table.getvalue())
    drawn = {
        coco.names[entry["category_id"]]
        for coco in files.values()
        for image in coco.images
        for entry in image.annotations
    }
    unused = tuple(name for name in names if name not in {*drawn, background})
    return Imported({split: len(found) for split, found in images.items()}, names, unused, free / total)


def class_names(files: list[Coco], background: str) -> tuple[str, ...]:
    """Return the classes in the order of the category ids, equal names joined, and `background` unless it is ignored.

    Raises UserError when a file has a category that the first has not, and for too many.
    """
    first, *others = files
    names = tuple(name for name in dict.fromkeys(first.names.values()) if name != IGNORED)
    for coco in others:
        if new := sorted({*coco.names.values()} - {*names, IGNORED}):
            raise UserError(f"{coco.path}: {first.path} has no category {new[0]!r}; export both from one project")
    if background not in (*names, IGNORED):
        names = (*names, background)
    if not 1 <= len(names) <= MAX_CLASSES:
        raise UserError(f"{first.path}: has {len(names)} classes; 1 to {MAX_CLASSES} are read")
    return names


def image_files(coco: Coco, folder: Path) -> list[tuple[str, Path]]:
    """Return the file name that each image gets, and its path below `folder`, in the order of `coco.images`.

    Folders become a part of the name: `a/b.jpg` is written as `a_b.jpg`. Raises UserError for a file that is missing,
    of a type that is not read, or of another size than the annotations', and for two with one stem.
    """
    found, stems = list[tuple[str, Path]](), dict[str, str]()
    for image in coco.images:
        source, name = folder / image.name, image.name.replace("/", "_")
        stem = short_stem(Path(name)).casefold()  # on some systems `A` and `a` are one file
        if not source.is_file():
            raise UserError(f"{image.where}: there is no file {source}; give the folder where file_name begins")
        if source.suffix.lower() not in IMAGE_SUFFIXES:
            raise UserError(f"{image.where}: {source} is none of {' '.join(IMAGE_SUFFIXES)}; convert it")
        if stem in stems:
            raise UserError(
                f"{image.where}: {image.name} and {stems[stem]} have the same stem; rename one, here and in the folder"
            )
        size = displayed_size(source)
        if size != (image.height, image.width):
            raise UserError(
                f"{image.where}: {source} has {size[0]}x{size[1]} pixels (height x width), the annotations are of "
                f"{image.height}x{image.width}; take the images that were annotated"
            )
        stems[stem] = image.name
        found.append((name, source))
    return found


def displayed_size(path: Path) -> tuple[int, int]:
    """Return the (height, width) of an image as viewers show it, turned by its EXIF orientation."""
    if is_tiff(path):
        return tiff_size(path)
    with reading(path, "an image"), Image.open(path) as file:
        turned = file.getexif().get(ORIENTATION, 1) >= 5
        return (file.width, file.height) if turned else (file.height, file.width)


def link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`; a copy where the file system does not allow that."""
    try:
        target.hardlink_to(source.resolve())
    except FileExistsError:  # may be a link to another image
        raise
    except OSError:
        shutil.copyfile(source, target)
