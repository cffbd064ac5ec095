"""A data set of your own: any torch Dataset of (image, mask).

segcore check ddrnet_23_slim_toy --data.dataset examples/dataset_pairs.py:open_split --model.num-classes 3
segcore train ddrnet_23_slim_toy --data.dataset examples/dataset_pairs.py:open_split --model.num-classes 3
"""

import cv2
import numpy as np
from torch.utils.data import Dataset

from segcore.data.pairs import from_pairs

CLASSES = ("ground", "disk", "square")
COLORS = ((110, 110, 110), (220, 60, 40), (40, 90, 220))


class Shapes(Dataset):
    """Disks and squares on noise. Yours reads files, an archive, a database …"""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The same index always gives the same pair. Random augmentation follows in training."""
        rng = np.random.RandomState(self.first + index)
        mask = np.zeros((96, 128), np.uint8)
        (x, y), (u, v) = rng.randint(20, 76, (2, 2)).tolist()
        cv2.circle(mask, (x, y), 18, 1, -1)
        cv2.rectangle(mask, (u, v), (u + 30, v + 18), 2, -1)
        image = np.array(COLORS)[mask] + rng.normal(0, 20, (*mask.shape, 3))
        return np.clip(image, 0, 255).astype(np.uint8), mask  # uint8 RGB (H, W, 3); classes (H, W), 255: ignored


def open_split(data, split):
    """Return the split "train" or "val"; `data` holds all data settings, such as `data.root`."""
    pairs = Shapes(0, 64) if split == "train" else Shapes(1000, 8)
    return from_pairs(pairs, CLASSES, COLORS)
