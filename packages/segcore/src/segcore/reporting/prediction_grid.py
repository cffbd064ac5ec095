"""Some validation images with ground truth and prediction, drawn at every evaluation of a run."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from segcore import distributed
from segcore.data.dataset import Dataset
from segcore.reporting.figures import colorize, hstack_panels, step_title, to_uint8_rgb, vstack

ROWS = 4
HEIGHT = 256
"""Height of a row in pixels; larger images are subsampled."""


class PredictionGrid:
    """Collect a row `image, ground truth, prediction` of a few images, evenly spread over this process's share."""

    def __init__(self, dataset: Dataset, step_unit: str = "") -> None:
        self.dataset, self.by = dataset, step_unit
        own = range(distributed.rank(), len(dataset), distributed.world_size())
        self.wanted = {own[i] for i in np.linspace(0, len(own) - 1, min(ROWS, len(own))).astype(int)}
        self.rows: dict[int, np.ndarray] = {}

    def add(self, index: int, image: np.ndarray, label: np.ndarray, entries: Mapping[str, Tensor]) -> None:
        """Keep image `index` (H, W, C) with its label and classes (H, W) of every step entry, if the grid has it."""
        if index not in self.wanted:
            return
        titles = {"final": "prediction"} if len(entries) == 1 else {}
        found = {titles.get(key) or step_title(key, self.by): value.cpu().numpy() for key, value in entries.items()}
        classes = {"ground truth": label, **found}
        maps = {
            name: colorize(value, self.dataset.palette, self.dataset.ignore_index) for name, value in classes.items()
        }
        panels = [to_uint8_rgb(image), *maps.values()]
        every = -(-image.shape[0] // HEIGHT)
        self.rows[index] = hstack_panels([panel[::every, ::every] for panel in panels], ["image", *maps])

    def picture(self) -> np.ndarray | None:
        """Return the rows below each other, (H, W, 3) uint8 RGB; None when no image was added."""
        rows = [self.rows[index] for index in sorted(self.rows)]
        return vstack(rows) if rows else None
