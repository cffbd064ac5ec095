"""`predict` on a video or a camera: a video with the classes in color over it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from segcore.data.video import CutVideoError, is_camera, reading, writer
from segcore.errors import UserError
from segcore.inference import LoadedModel
from segcore.progress import progress


def run(seg: LoadedModel, source: Path, path: Path, *, frames: int | None = None, **look: Any) -> int:
    """Write the overlay of the first `frames` frames (None: all) to `path`, whole or not at all; return their number.

    It has the video's mean rate, no sound, and the codec of its ending: VP9 for .webm, else H.264; odd sides grow by a
    pixel. `look` are arguments of `Result.overlay`; a legend lists all classes, because all frames have one size.
    Ctrl-C ends a camera's recording, which is then written. Raises UserError about a video that cannot be read and a
    file that cannot be written; of a video that was cut, what can be read is written first.
    """
    data, look["legend"] = seg.experiment.data, "all" if look.get("legend") else False
    if data.channels != 3 or data.bit_depth != 8:
        raise UserError(f"{source}: videos are 8-bit RGB, but the model takes {data.channels} channels")
    if frames is not None and frames < 1:
        raise UserError(f"--frames {frames}: give at least 1")
    written, cut = 0, None
    with reading(source) as (images, rate, total), writer(path, rate) as write, progress("predicting") as advance:
        try:
            for image in itertools.islice(images, frames):
                write(np.asarray(seg(image).overlay(**look)))
                written += 1
                advance(written, max(written, min(total, frames or total)))
        except CutVideoError as error:
            cut = error
        except KeyboardInterrupt:
            if not is_camera(source):
                raise
        if not written:
            raise UserError(f"{source}: holds no frame; give another video")
    if cut:
        raise UserError(f"{cut}; {path} has the {written} frames that can be read")
    print(f"{path}: {written} frames")
    return written
