"""`predict` on a video or a camera: a video with the classes in color over it."""

from __future__ import annotations

import itertools
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np

from segcore.cli.predict_images import predict_image
from segcore.config.schema import Experiment
from segcore.data.video import is_camera, reading, writer
from segcore.errors import UserError
from segcore.models.segmentor import Segmentor
from segcore.progress import progress
from segcore.reporting.figures import overlay


def run(
    model: Segmentor,
    exp: Experiment,
    source: Path,
    path: Path,
    palette: np.ndarray,
    *,
    opacity: float = 0.5,
    frames: int | None = None,
) -> int:
    """Write the overlay of the first `frames` frames (None: all) to `path`, whole or not at all; return their number.

    H.264 at the video's mean rate, without sound; odd sides grow by a pixel. Ctrl-C ends a camera's recording, which is
    then written. Raises UserError about a video that cannot be read and a file that cannot be written.
    """
    if exp.data.channels != 3 or exp.data.bit_depth != 8:
        raise UserError(f"{source}: videos are 8-bit RGB, but the model takes {exp.data.channels} channels")
    if not 0 <= opacity <= 1:
        raise UserError(f"--opacity {opacity} is not between 0 and 1")
    if frames is not None and frames < 1:
        raise UserError(f"--frames {frames}: give at least 1")
    written = 0
    with reading(source) as (images, rate, total), writer(path, rate) as write, progress("predicting") as advance:
        with suppress(KeyboardInterrupt) if is_camera(source) else nullcontext():
            for image in itertools.islice(images, frames):
                classes = predict_image(model, exp, image)
                write(overlay(image, classes, palette, opacity))
                written += 1
                advance(written, max(written, min(total, frames or total)))
        if not written:
            raise UserError(f"{source}: holds no frame; give another video")
    print(f"{path}: {written} frames")
    return written
