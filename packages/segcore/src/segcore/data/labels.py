"""Label tables: values in the files to train ids, class names and colors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np

IGNORE = 255
VALUES = 1 << 16
"""A label file holds values 0 .. 65535."""
FORBIDDEN = VALUES - 2
"""Entry of a label table for values that must not occur."""


def ignored_label(num_classes: int) -> int:
    """Return the train id of ignored pixels: 255, or 65535 above 255 classes."""
    return IGNORE if num_classes <= IGNORE else VALUES - 1


def add_background(classes: tuple[str, ...], palette: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the class names and colors with a black class `background` added in front."""
    return ("background", *classes), np.concatenate([np.zeros((1, 3), np.uint8), palette])


def label_lut(values: Mapping[int, int] | int, unlisted: int = FORBIDDEN) -> np.ndarray:
    """Return the (65536,) uint16 table of label values -> train ids; values that are not given become `unlisted`.

    An integer K keeps 0 .. K-1 unchanged and ignores `ignored_label(K)`.
    """
    if isinstance(values, int):
        ignored = ignored_label(values)
        values = {ignored: ignored} | {index: index for index in range(values)}
    table = np.full(VALUES, unlisted, np.uint16)
    table[list(values)] = list(values.values())
    return table


def read_classes(path: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """Return names and (K, 3) uint8 RGB colors from a file with one line per class, such as `804080 road`."""
    colors, names = zip(*(line.split(" ", 1) for line in path.read_text(encoding="utf-8").splitlines()), strict=True)
    return names, np.array([list(bytes.fromhex(color)) for color in colors], np.uint8)


OKABE_ITO = ("0072B2", "E69F00", "009E73", "D55E00", "56B4E9", "F0E442", "CC79A7")
"""Blue, orange, green, vermilion, sky blue, yellow and purple, which color-blind people tell apart, too.

Okabe and Ito, Color Universal Design, 2002; without their black.
"""


def distinct_colors(count: int) -> np.ndarray:
    """Return (count, 3) uint8 RGB: `OKABE_ITO`, then of 512 spaced colors each the farthest from all earlier ones.

    The distance is that in CIELAB, also from black. Color i does not depend on `count`. From the 519th on they are
    there again.
    """
    levels = np.linspace(0, 255, 8).astype(np.uint8)
    spaced = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)  # starts with black
    colors = np.concatenate([spaced, np.array([list(bytes.fromhex(color)) for color in OKABE_ITO], np.uint8)])
    lab = cv2.cvtColor(colors[None].astype(np.float32) / 255, cv2.COLOR_RGB2Lab)[0]
    chosen = [0, *range(len(spaced), len(colors))]
    distance = np.linalg.norm(lab[:, None] - lab[chosen], axis=2).min(1)
    while len(chosen) <= min(count, len(colors) - 1):
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
    return np.resize(colors[chosen[1:]], (count, 3))


def ranges(values: np.ndarray) -> str:
    """Return sorted integers as text, runs joined: `0-18, 255`."""
    runs = np.split(values, np.flatnonzero(np.diff(values) != 1) + 1)
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
