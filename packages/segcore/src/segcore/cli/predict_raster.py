"""`predict` on large and georeferenced images: a TIFF of classes with the georeference of the image."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

from segcore.data.labels import ignored_label
from segcore.data.rasters import class_writer, open_raster
from segcore.errors import UserError
from segcore.inference import LoadedModel
from segcore.progress import progress

SUFFIXES = (".tif", ".tiff")


def check(source: Path, target: Path) -> None:
    """Raise UserError unless `source` is one file that `target` does not overwrite."""
    if source.is_dir():
        raise UserError(f"{target}: one file for all images of the folder {source}; give a folder, or one image")
    if os.path.realpath(source) == os.path.realpath(target):  # `Path.resolve` raises for a link to itself
        raise UserError(f"{target}: would overwrite the image; choose another output")


def run(seg: LoadedModel, source: Path, target: Path) -> None:
    """Write the classes of an image of any size to a TIFF, whole or not at all.

    The image is read and predicted in windows (`evaluate.crop`, `evaluate.stride`), with the result of `evaluate.mode`
    slide at the image's own size. Pixels without data become 255, or 65535 above 255 classes. CRS, transform and
    control points are kept. Raises UserError for an image that cannot be predicted so, and for a file that cannot be
    written.
    """
    if scale := seg.experiment.evaluate.img_scale:
        print(f"note: a .tif keeps the image's own size; evaluate.img_scale {scale} is not applied", file=sys.stderr)
    data, used, done = seg.experiment.data, list[int](), 0
    palette = seg.palette[int(data.add_background_class) :]
    nodata = ignored_label(len(palette))
    with (
        open_raster(source, data.channels, data.bit_depth, data.max_pixels) as raster,
        progress("predicting") as advance,
    ):
        size = raster.height, raster.width
        with class_writer(target, size, palette, nodata, raster.tags()) as put:
            try:
                for y, x, classes in seg.blocks(size, lambda box: raster.read(box)[0], used):
                    _, valid = raster.read((y, x, y + classes.shape[0], x + classes.shape[1]))
                    put(y, x, np.where(valid, classes, nodata))
                    done += classes.size
                    advance(done, size[0] * size[1])
            except UserError as error:  # too small for the model
                raise UserError(str(error) if str(source) in str(error) else f"{source}: {error}") from None
    print(target)
    if used:
        print(f"{sum(used) / len(used):.2f} denoising steps on average")
