"""Masks as the benchmark server of their data set takes them: its values and file names."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from segcore.config.data_sets import CLASS_FILES, DATA_SETS, SERVER_FILES
from segcore.data.labels import read_classes
from segcore.reporting.figures import write_class_png

FOLDER = "label_ids"
"""The folder of these files, beside the masks."""


def write_label_ids(path: Path, mask: np.ndarray, dataset: str) -> None:
    """Write a mask (H, W) of class indices, other values meaning no class, with the values of the data set's server."""
    files = SERVER_FILES[dataset]
    table = np.zeros(256, np.uint8)
    table[: len(files.values)] = files.values
    palette = read_classes(CLASS_FILES / f"{DATA_SETS[dataset].classes}.txt")[1] if files.indexed else None
    write_class_png(path, table[mask], palette)
