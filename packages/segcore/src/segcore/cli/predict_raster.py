"""`predict` on large and georeferenced images: TIFFs of classes and probabilities with the image's georeference."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from segcore.data.labels import ignored_label
from segcore.data.rasters import class_writer, confidence_writer, open_raster, probability_writer
from segcore.errors import UserError
from segcore.inference import LoadedModel
from segcore.progress import progress
from segcore.reporting.figures import to_gray
from segcore.result import probability_of

SUFFIXES = (".tif", ".tiff")


def plan(source: Path, target: Path, **kinds: bool) -> dict[str, Path]:
    """Return the files by kind: `mask`, which is `target`, and where asked for `confidence` and `probabilities`.

    Those lie beside it as NAME_<kind>.tif. Raises UserError unless `source` is one file that none of them overwrites.
    """
    if source.is_dir():
        raise UserError(f"{target}: one file for all images of the folder {source}; give a folder, or one image")
    beside = {kind: target.with_stem(f"{target.stem}_{kind}") for kind, asked in kinds.items() if asked}
    for path in (target, *beside.values()):
        if os.path.realpath(source) == os.path.realpath(path):  # `Path.resolve` raises for a link to itself
            raise UserError(f"{path}: would overwrite the image; choose another output")
    return {"mask": target, **beside}


def run(
    seg: LoadedModel, source: Path, mask: Path, confidence: Path | None = None, probabilities: Path | None = None
) -> None:
    """Write the classes of an image of any size, and what else is wanted, to TIFFs, each whole or not at all.

    The image is read and predicted in windows (`evaluate.crop`, `evaluate.stride`), with the result of `evaluate.mode`
    slide at the image's own size. Pixels without data become 255 in the mask, or 65535 above 255 classes. CRS,
    transform and control points are kept. Raises UserError for an image that cannot be predicted so, and for a file
    that cannot be written.
    """
    if scale := seg.experiment.evaluate.img_scale:
        print(f"note: a .tif keeps the image's own size; evaluate.img_scale {scale} is not applied", file=sys.stderr)
    data, used, done = seg.experiment.data, list[int](), 0
    palette = seg.mask_classes[1]
    nodata = ignored_label(len(palette))
    with (
        open_raster(source, data.channels, data.bit_depth, data.max_pixels) as raster,
        progress("predicting") as advance,
        ExitStack() as stack,
    ):
        size, tags = (raster.height, raster.width), raster.tags()
        put = stack.enter_context(class_writer(mask, size, palette, nodata, tags))
        put_gray = confidence and stack.enter_context(confidence_writer(confidence, size, tags))
        put_floats = probabilities and stack.enter_context(
            probability_writer(probabilities, size, seg.class_names, tags)
        )
        try:
            for y, x, classes, p in seg.blocks(size, lambda box: raster.read(box)[0], used):
                _, valid = raster.read((y, x, y + classes.shape[0], x + classes.shape[1]))
                put(y, x, np.where(valid, seg.mask(classes), nodata))
                if put_gray:
                    gray = to_gray(probability_of(classes, p.cpu().numpy()))
                    put_gray(y, x, np.where(valid, gray.clip(1), 0))  # 0 stands for no data
                if put_floats:
                    put_floats(y, x, np.where(valid, p.cpu().numpy(), np.nan))
                done += classes.size
                advance(done, size[0] * size[1])
        except UserError as error:  # too small for the model
            raise UserError(str(error) if str(source) in str(error) else f"{source}: {error}") from None
    print(*filter(None, (mask, confidence, probabilities)), sep="\n")
    if used:
        print(f"{sum(used) / len(used):.2f} denoising steps on average")
