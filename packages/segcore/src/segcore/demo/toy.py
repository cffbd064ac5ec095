"""Generate street scenes in the Cityscapes layout: a data set for the demo and the tests.

17 of the 19 Cityscapes classes occur (no train, no motorcycle); the hood of the ego car is ignored. Colors vary more
between scenes than between classes, so that shape, texture and position matter. `segcore.demo.street` draws them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from segcore.data.layouts.cityscapes import RAW_IDS
from segcore.data.layouts.toy import MARKER, SPLITS, files_of, is_complete, items_of, missing_files, read_marker
from segcore.demo.street import draw_scene
from segcore.errors import UserError
from segcore.files import write
from segcore.progress import progress as show_progress
from segcore.seeds import scene_seed

TRAIN, VAL = 200, 50
VERSION = 1
"""Increases whenever the same seed yields different images."""
TO_RAW = np.ones(256, np.uint8)
"""Train id -> raw id. Every ignored pixel is raw 1, "ego vehicle"."""
TO_RAW[: len(RAW_IDS)] = RAW_IDS


def generate(
    root: Path,
    *,
    train: int = TRAIN,
    val: int = VAL,
    height: int = 256,
    width: int = 512,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `train` + `val` images of height x width pixels, with labels in both Cityscapes forms, under `root`.

    Image i of a split depends only on (seed, split, i) and the size, so a smaller set is a prefix of a larger one.
    Every file is written completely, and the marker `toy.json` is set to `complete` last: the next call continues an
    interrupted one. `progress(done, total)` is called after every image. Nothing is ever deleted.

    Raises UserError when a parameter is too small, or when `root` holds a toy set with other parameters.
    """
    for name, value, least in (("train", train, 1), ("val", val, 1), ("height", height, 32), ("width", width, 32)):
        if value < least:
            raise UserError(f"toy {name} is {value}; it must be at least {least}")
    parameters = {"version": VERSION, "train": train, "val": val, "height": height, "width": width, "seed": seed}
    marker = root / MARKER
    if read_marker(marker) | {"complete": True} not in ({"complete": True}, parameters | {"complete": True}):
        raise UserError(f"{marker}: marks a toy set with other parameters; delete its folder or choose another")
    write(marker, json.dumps(parameters | {"complete": False}))
    items = items_of(parameters)
    for done, (split, index) in enumerate(items, 1):
        image_file, raw_file, label_file = files = files_of(root, split, index)
        if not all(file.is_file() for file in files):
            # RandomState, not default_rng: NumPy guarantees that its stream never changes.
            rng = np.random.RandomState(scene_seed(seed, SPLITS.index(split), index))
            image, label = draw_scene(rng, height, width)
            for file, array in ((raw_file, TO_RAW[label]), (label_file, label), (image_file, image[..., ::-1])):
                write(file, cv2.imencode(".png", array)[1].tobytes())
        if progress:
            progress(done, len(items))
    write(marker, json.dumps(parameters | {"complete": True}))


def generate_missing(root: Path) -> None:
    """Generate the set below `root`, or the missing files of an existing one, and report this on standard error.

    An existing set keeps its own parameters. Raises UserError when `root` holds something else.
    """
    if is_complete(root):
        return
    marker = read_marker(root / MARKER)
    parameters = {name: marker[name] for name in ("train", "val", "height", "width", "seed") if name in marker}
    if parameters:
        print(f"{root}: {len(missing_files(root))} of its files are missing; generating them again", file=sys.stderr)
    elif root.is_dir() and any(root.iterdir()):
        raise UserError(f"{root}: not a toy set; choose another folder as data.root, or set data.dataset to its layout")
    else:
        print(f"{root}: missing; generating {TRAIN + VAL} street scenes", file=sys.stderr)
    with show_progress("generating street scenes") as advance:
        generate(root, **parameters, progress=advance)
