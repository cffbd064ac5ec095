"""`predict` on a video or a camera: a video with the classes in color over it."""

from __future__ import annotations

import itertools
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np

from segcore.data.video import is_camera, reading, writer
from segcore.errors import UserError
from segcore.inference import LoadedModel
from segcore.progress import progress


def run(seg: LoadedModel, source: Path, path: Path, *, opacity: float = 0.5, frames: int | None = None) -> int:
    """Write the overlay of the first `frames` frames (None: all) to `path`, whole or not at all; return their number.

    H.264 at the video's mean rate, without sound; odd sides grow by a pixel. Ctrl-C ends a camera's recording, which is
    then written. Raises UserError about a video that cannot be read and a file that cannot be written.
    """
    data = seg.experiment.data
    if data.channels != 3 or data.bit_depth != 8:
        raise UserError(f"{source}: videos are 8-bit RGB, but the model takes {data.channels} channels")
    if frames is not None and frames < 1:
        raise UserError(f"--frames {frames}: give at least 1")
    written = 0
    with reading(source) as (images, rate, total), writer(path, rate) as write, progress("predicting") as advance:
        with suppress(KeyboardInterrupt) if is_camera(source) else nullcontext():
            for image in itertools.islice(images, frames):
                write(np.asarray(seg(image).overlay(opacity=opacity)))
                written += 1
                advance(written, max(written, min(total, frames or total)))
        if not written:
            raise UserError(f"{source}: holds no frame; give another video")
    print(f"{path}: {written} frames")
    return written
