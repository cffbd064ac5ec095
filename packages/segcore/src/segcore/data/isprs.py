"""Cut ISPRS Potsdam and Vaihingen into tiles, as MMSegmentation's converters do.

Facts: open-mmlab/mmsegmentation 1.2.2, tools/dataset_converters/potsdam.py and vaihingen.py. Tiles have 512 pixels a
side and begin every 512 pixels; the last of a row or column ends at the edge of the image. (The converters' stride of
256 counts tiles only, which then coincide.) Masks hold 1 to 6 in the order of the classes; black, which is the eroded
border, and any other color are 0. Files are named AREA_X1_Y1_X2_Y2.png.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from segcore.config.data_sets import CLASS_FILES
from segcore.data.dataset import Sample, check_sizes
from segcore.data.images import color_indices, hex_colors
from segcore.data.labels import read_classes
from segcore.data.layouts.files import walk
from segcore.data.rasters import Box, open_raster
from segcore.errors import UserError
from segcore.files import writing_folder
from segcore.progress import progress

TILE = 512
"""Pixels per side of a tile."""


class Source(NamedTuple):
    """The files of a set."""

    image: str
    """File name of an area's image; AREA stands for the area."""
    label: str
    """File name of its colors of classes."""
    archives: str
    """What holds these files."""
    splits: dict[str, tuple[str, ...]]
    """Areas by split."""


SOURCES = {
    "potsdam": Source(
        "top_potsdam_AREA_RGB.tif",
        "top_potsdam_AREA_label_noBoundary.tif",
        "2_Ortho_RGB.zip and 5_Labels_all_noBoundary.zip",
        {
            "train": (
                *(f"{row}_{column}" for row in range(2, 8) for column in (10, 11, 12)),
                *(f"{row}_{column}" for row in (6, 7) for column in (7, 8, 9)),
            ),
            "val": (
                *(f"{row}_{column}" for row in range(2, 7) for column in (13, 14)),
                *("4_15", "5_15", "6_15", "7_13"),
            ),
        },
    ),
    "vaihingen": Source(
        "top/top_mosaic_09cm_AREA.tif",  # the same name is a label in the folder gts_for_participants
        "top_mosaic_09cm_AREA_noBoundary.tif",
        "ISPRS_semantic_labeling_Vaihingen.zip and ISPRS_semantic_labeling_Vaihingen_ground_truth_eroded_COMPLETE.zip",
        {
            "train": tuple(f"area{i}" for i in (1, 3, 5, 7, 11, 13, 15, 17, 21, 23, 26, 28, 30, 32, 34, 37)),
            "val": tuple(f"area{i}" for i in (2, 4, 6, 8, 10, 12, 14, 16, 20, 22, 24, 27, 29, 31, 33, 35, 38)),
        },
    ),
}


@dataclass(frozen=True)
class Cut:
    """What was written."""

    tiles: dict[str, int]
    """Number of tiles by split."""
    absent: list[str]
    """Areas without files."""
    other_colors: dict[str, str]
    """Colors of labels that are no class, by area."""


def cut(name: str, folder: Path, out: Path) -> Cut:
    """Write `img_dir/SPLIT` and `ann_dir/SPLIT` below `out`, which must be empty or not be there.

    Raises UserError for files that are missing or cannot be read, or differ in size; then nothing is written.
    """
    source, files = SOURCES[name], list(walk(folder))
    names = [area for areas in source.splits.values() for area in areas]
    found = {area: sample for area in names if (sample := find_area(source, files, area))}
    if not found:
        raise UserError(f"{folder}: has no {source.image.replace('AREA', '*')}; unpack {source.archives} there")
    done = Cut(dict.fromkeys(source.splits, 0), [area for area in names if area not in found], {})
    with writing_folder(out) as temporary, progress(f"cutting {name}") as advance:
        for split, areas in source.splits.items():
            image_folder, label_folder = temporary / "img_dir" / split, temporary / "ann_dir" / split
            image_folder.mkdir(parents=True)
            label_folder.mkdir(parents=True)
            for area in [area for area in areas if area in found]:
                for (y1, x1, y2, x2), image, mask, other in tiles(found[area]):
                    file = f"{area}_{x1}_{y1}_{x2}_{y2}.png"
                    Image.fromarray(image).save(image_folder / file)
                    Image.fromarray(mask).save(label_folder / file)
                    done.tiles[split] += 1
                    if other:
                        done.other_colors.setdefault(area, other)
                advance([*found].index(area) + 1, len(found))
    return done


def find_area(source: Source, files: list[Path], area: str) -> Sample | None:
    """Return the files of an area, None without any; raises UserError for one of the two, or for several."""
    names = [name.replace("AREA", area) for name in (source.image, source.label)]
    images, labels = ([path for path in files if f"/{path.as_posix()}".endswith(f"/{name}")] for name in names)
    for paths in (images, labels):
        if len(paths) > 1:
            raise UserError(f"{paths[0]} and {paths[1]}: two files of {area}; remove one")
    if len(images) != len(labels):
        there, missing = (images[0], names[1]) if images else (labels[0], names[0])
        raise UserError(f"{there}: there is no {missing}; unpack {source.archives}")
    return Sample(images[0], labels[0]) if images else None


def tiles(sample: Sample) -> Iterator[tuple[Box, np.ndarray, np.ndarray, str]]:
    """Yield the tiles of an area: window, image (512, 512, 3), mask (512, 512) uint8, and colors that are no class."""
    assert sample.label is not None
    _, palette = read_classes(CLASS_FILES / "isprs.txt")
    with open_raster(sample.image) as image, open_raster(sample.label) as label:
        size = image.height, image.width
        check_sizes(sample, size, (label.height, label.width))
        if min(size) < TILE:
            raise UserError(f"{sample.image}: has {size[0]}x{size[1]} pixels; a tile has {TILE}x{TILE}")
        for box in tile_boxes(*size):
            colors = label.read(box)[0]
            classes = color_indices(colors, palette)
            mask = np.where(classes < len(palette), classes + 1, 0).astype(np.uint8)
            yield box, image.read(box)[0], mask, hex_colors(colors[mask == 0], np.append(palette, [[0, 0, 0]], 0))


def tile_boxes(height: int, width: int) -> list[Box]:
    """Return the windows of the tiles of an image, row by row."""
    rows, columns = ([min(start, size - TILE) for start in range(0, size, TILE)] for size in (height, width))
    return [(y, x, y + TILE, x + TILE) for y in rows for x in columns]
