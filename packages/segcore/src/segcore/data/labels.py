"""Label tables: values in the files to train ids, class names and colors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

IGNORE = 255
FORBIDDEN = 254  # what a label table holds for values that may not occur


def behind_background(classes: tuple[str, ...], palette: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the class names and colors with a black class `background` in front."""
    return ("background", *classes), np.concatenate([np.zeros((1, 3), np.uint8), palette])


def label_lut(values: Mapping[int, int] | int) -> np.ndarray:
    """Return the (256,) uint8 table of label values -> train ids; every value that is not given may not occur.

    An integer K stands for 0 .. K-1 as they are and 255 ignored.
    """
    if isinstance(values, int):
        values = {IGNORE: IGNORE} | {index: index for index in range(values)}
    table = np.full(256, FORBIDDEN, np.uint8)
    table[list(values)] = list(values.values())
    return table


def parse_classes(text: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Return names and (K, 3) uint8 RGB colors of a text such as `road 804080; sidewalk f423e8`."""
    names, colors = zip(*(entry.strip().rsplit(" ", 1) for entry in text.split(";")), strict=True)
    palette = np.array([list(bytes.fromhex(color)) for color in colors], np.uint8)
    return tuple(" ".join(name.split()) for name in names), palette


def ranges(values: np.ndarray) -> str:
    """Return sorted integers as text, runs joined: `0-18, 255`."""
    runs = np.split(values, np.flatnonzero(np.diff(values) != 1) + 1)
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
