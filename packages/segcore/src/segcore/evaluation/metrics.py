"""Streaming segmentation metrics on integer counts, as MMSegmentation 0.x defines them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from segcore.errors import UserError


class ConfusionMatrix:
    """Counts of (label, prediction) pairs over any number of images, and the metrics that follow from them.

    Attributes:
        matrix: (K + 1, K + 1) int64; entry [g, p] counts pixels of class g predicted as p. The last row and column hold
            values outside 0 .. K-1: such a label adds to the predicted class's area only, such a prediction to the
            label's. Matrices of several parts of a data set, or of several processes, are simply added.

    Pixels labelled `ignore_index` (which may lie inside 0 .. K-1) are not counted.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, device: torch.device | str | None = None) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.matrix = torch.zeros(num_classes + 1, num_classes + 1, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor | np.ndarray, label: Tensor | np.ndarray) -> ConfusionMatrix:
        """Count class indices: two integer arrays or tensors of one shape, of any device. Returns itself.

        Raises UserError when the shapes differ or the prediction is not made of integers.
        """
        p, g = torch.as_tensor(prediction), torch.as_tensor(label)
        if p.shape != g.shape or p.is_floating_point():
            raise UserError(
                f"prediction {tuple(p.shape)} {p.dtype} does not go with label {tuple(g.shape)}; "
                "give class indices of one shape"
            )
        outside, device = self.num_classes, self.matrix.device
        p, g = (t.to(device).to(torch.int32).reshape(-1) for t in (p, g))
        row = torch.where((g < 0) | (g >= outside), outside, g)
        row.masked_fill_(g == self.ignore_index, outside + 1)  # a row that is cut off: cheaper than picking the others
        column = torch.where((p < 0) | (p >= outside), outside, p)
        counts = torch.bincount(row.mul_(outside + 1).add_(column), minlength=(outside + 2) * (outside + 1))
        self.matrix += counts.view(outside + 2, outside + 1)[:-1]
        return self

    def merge(self, other: ConfusionMatrix) -> None:
        """Add the counts of another part of the data set."""
        self.matrix += other.matrix.to(self.matrix.device)

    def compute(self) -> dict[str, float | Tensor]:
        """Return fractions 0..1: means as float, per-class values as float64 tensors (K,) on the CPU.

        Keys: aAcc, mIoU, mAcc, mDice, mFscore, mPrecision, mRecall, then IoU, Acc, Dice, Fscore, Precision, Recall. A
        value is NaN where it is 0/0, and each mean leaves out its own NaNs: a class that is in neither label nor
        prediction does not count, one that is only predicted has IoU 0.

        One class is the published special case: labels and predictions are 0 or 1, every pixel that is not ignored adds
        to both areas, and the intersection is where the two agree.
        """
        counts = self.matrix.cpu().double()
        if self.num_classes == 1:
            intersection, predicted, labelled = counts.trace()[None], counts.sum()[None], counts.sum()[None]
        else:
            intersection, predicted, labelled = counts.diagonal()[:-1], counts.sum(0)[:-1], counts.sum(1)[:-1]
        precision, recall = intersection / predicted, intersection / labelled
        classes = {
            "IoU": intersection / (predicted + labelled - intersection),
            "Acc": recall,
            "Dice": 2 * intersection / (predicted + labelled),
            # Unlike Dice, published F-scores are 0/0 and left out where a class has no true positive.
            "Fscore": 2 * precision * recall / (precision + recall),
            "Precision": precision,
            "Recall": recall,
        }
        means = {f"m{name}": values.nanmean().item() for name, values in classes.items()}
        return {"aAcc": (intersection.sum() / labelled.sum()).item(), **means, **classes}
