"""A data set of your own from files: a list `image,mask` in `data.root`, and masks whose values are no class indices.

    segcore check ddrnet_23_slim_toy --data.dataset examples/dataset_files.py:open_split --data.root data/mine \
        --model.num-classes 2
"""

import csv

import numpy as np

from segcore.data.dataset import Dataset, Sample
from segcore.data.labels import IGNORE, label_lut

CLASSES = ("background", "crack")
COLORS = np.array([(60, 60, 60), (255, 200, 0)], np.uint8)
VALUES = {0: 0, 200: 1, 100: IGNORE}  # value in the mask -> class; any other value is reported with its file


def open_split(data, split):
    """Return the split "train" or "val" that `train.csv` or `val.csv` lists."""
    with (data.root / f"{split}.csv").open(newline="", encoding="utf-8") as file:
        samples = tuple(Sample(data.root / image, data.root / mask) for image, mask in csv.reader(file))
    return Dataset(CLASSES, COLORS, IGNORE, samples, data.root, label_lut(VALUES))
