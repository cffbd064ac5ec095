"""Streaming segmentation metrics on integer counts, as MMSegmentation 0.x defines them."""

from __future__ import annotations

import sys

import cv2
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
        p, g = p.to(self.matrix.device), g.to(self.matrix.device)
        small_p, small_g = _as_bytes(p), _as_bytes(g)
        if small_p is None or small_g is None or self.num_classes > 255:
            self.matrix += self._count(p, g)
        else:
            self.matrix += torch.from_numpy(self._count_bytes(small_p, small_g))
        return self

    def _count_bytes(self, p: np.ndarray, g: np.ndarray) -> np.ndarray:
        """Return the counts of two uint8 arrays (n,): OpenCV's histogram of their pairs as 16-bit codes."""
        pairs = np.zeros((256, 256), np.int64)
        for i in range(0, len(g), 1 << 24):  # the histogram is float32, exact up to here
            low_high = (p, g) if sys.byteorder == "little" else (g, p)
            codes = cv2.merge([x[None, i : i + (1 << 24)] for x in low_high]).view(np.uint16)  # g << 8 | p, in one pass
            histogram = cv2.calcHist([codes], [0], None, [1 << 16], [0, 1 << 16])
            pairs += histogram.reshape(256, 256).astype(np.int64)
        if 0 <= self.ignore_index < 256:
            pairs[self.ignore_index] = 0
        first = np.arange(self.num_classes + 1)  # 0 .. K-1 by themselves, K .. 255 together
        return np.add.reduceat(np.add.reduceat(pairs, first, axis=0), first, axis=1)

    def _count(self, p: Tensor, g: Tensor) -> Tensor:
        """Return the counts of any two integer tensors of one device, made there."""
        outside = self.num_classes
        p, g = (t.to(torch.int32).reshape(-1) for t in (p, g))
        row = torch.where((g < 0) | (g >= outside), outside, g)
        row.masked_fill_(g == self.ignore_index, outside + 1)  # a row that is cut off: cheaper than picking the others
        column = torch.where((p < 0) | (p >= outside), outside, p)
        counts = torch.bincount(row.mul_(outside + 1).add_(column), minlength=(outside + 2) * (outside + 1))
        return counts.view(outside + 2, outside + 1)[:-1]

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


def _as_bytes(classes: Tensor) -> np.ndarray | None:
    """Return an integer tensor as uint8 (n,); None where that cannot hold its values, or they are not on the CPU."""
    if classes.device.type != "cpu":
        return None
    values = classes.numpy().ravel()
    if values.dtype != np.uint8 and values.size and (values.min() < 0 or values.max() > 255):
        return None
    return values.astype(np.uint8, copy=False)


class BoundaryIoU:
    """IoU of class boundaries (Cheng et al. 2021, as DDPS measures it), over any number of images.

    A class's boundary is the band of its pixels within round(0.02 * diagonal) pixels, diagonal steps counting one, of
    another class or of the image's edge. Ignored label pixels belong to no class, so boundaries run along them, too;
    predictions count there as anywhere.

    Attributes:
        intersection, union: (K,) int64 counts.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.intersection = np.zeros(num_classes, np.int64)
        self.union = np.zeros(num_classes, np.int64)

    def update(self, prediction: Tensor | np.ndarray, label: Tensor | np.ndarray) -> BoundaryIoU:
        """Count one image's class indices: two integer maps (H, W). Returns itself.

        Raises UserError when they are not two maps of one size.
        """
        p, g = (np.asarray(torch.as_tensor(x).cpu(), np.int16) for x in (prediction, label))
        if p.shape != g.shape or p.ndim != 2:
            raise UserError(f"prediction {p.shape} does not go with label {g.shape}; give two maps (H, W) of one size")
        band = round(0.02 * (p.shape[0] ** 2 + p.shape[1] ** 2) ** 0.5)
        in_p, in_g = boundaries(p, band), boundaries(g, band)
        both, of_p, of_g = (self._count(classes) for classes in (p[in_p & in_g & (p == g)], p[in_p], g[in_g]))
        self.intersection += both
        self.union += of_p + of_g - both
        return self

    def compute(self) -> dict[str, float | Tensor]:
        """Return fractions 0..1: "BIoU" (K,) float64, NaN for classes without boundary, and their mean "mBIoU"."""
        biou = torch.from_numpy(self.intersection) / torch.from_numpy(self.union).double()
        return {"BIoU": biou, "mBIoU": biou.nanmean().item()}

    def _count(self, classes: np.ndarray) -> np.ndarray:
        kept = classes[(classes >= 0) & (classes < self.num_classes) & (classes != self.ignore_index)]
        return np.bincount(kept, minlength=self.num_classes)


def boundaries(classes: np.ndarray, band: int) -> np.ndarray:
    """Return which pixels (H, W) of an int16 map lie within `band` pixels of another value or of the edge.

    That is where the least and the greatest value of the square around a pixel differ: two filters serve all classes.
    """
    padded = cv2.copyMakeBorder(classes, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=-1)
    square = np.ones((2 * band + 1, 2 * band + 1), np.uint8)
    least, greatest = (f(padded, square, borderType=cv2.BORDER_REPLICATE) for f in (cv2.erode, cv2.dilate))
    return (least != greatest)[1:-1, 1:-1]
