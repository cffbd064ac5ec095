"""Streaming segmentation metrics on integer counts, as MMSegmentation 0.x defines them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from segcore.errors import UserError


class ConfusionMatrix:
    """Counts of (label, prediction) pairs over any number of images, and the metrics computed from them.

    Attributes:
        matrix: (K + 1, K + 1) int64; entry [g, p] counts pixels of class g predicted as p. The last row and column hold
            values outside 0 .. K-1: such a label adds to the predicted class's area only, such a prediction to the
            label's. Matrices of several parts of a data set, or of several processes, are simply added.

    Pixels labeled `ignore_index` (which may lie inside 0 .. K-1) are not counted.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, device: torch.device | str | None = None) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.matrix = torch.zeros(num_classes + 1, num_classes + 1, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor | np.ndarray, label: Tensor | np.ndarray) -> ConfusionMatrix:
        """Count class indices: two integer arrays or tensors of one shape, on any device. Returns itself.

        Raises UserError when the shapes differ or the prediction is not of an integer type.
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
        first = np.arange(self.num_classes + 1)  # 0 .. K-1 separately, K .. 255 together
        return np.add.reduceat(np.add.reduceat(pairs, first, axis=0), first, axis=1)

    def _count(self, p: Tensor, g: Tensor) -> Tensor:
        """Return the counts of any two integer tensors on one device, computed there."""
        outside = self.num_classes
        p, g = (t.to(torch.int32).reshape(-1) for t in (p, g))
        row = torch.where((g < 0) | (g >= outside), outside, g)
        row.masked_fill_(g == self.ignore_index, outside + 1)  # a row that is cut off: cheaper than masking
        column = torch.where((p < 0) | (p >= outside), outside, p)
        counts = torch.bincount(row.mul_(outside + 1).add_(column), minlength=(outside + 2) * (outside + 1))
        return counts.view(outside + 2, outside + 1)[:-1]

    def merge(self, other: ConfusionMatrix) -> None:
        """Add the counts of another part of the data set."""
        self.matrix += other.matrix.to(self.matrix.device)

    def compute(self) -> dict[str, float | Tensor]:
        """Return fractions 0..1: means as float, per-class values as float64 tensors (K,) on the CPU.

        Keys: aAcc, mIoU, mAcc, mDice, mFscore, mPrecision, mRecall, then IoU, Acc, Dice, Fscore, Precision, Recall. A
        value is NaN where it is 0/0, and each mean leaves out its own NaNs: a class in neither label nor prediction
        does not count; a class that is only predicted has IoU 0. So if `ignore_index` is one of the classes, it counts
        as 0 once it is predicted anywhere, as published; "mIoU without ignored" is the mean of the others.

        One class is a special case, as published: labels and predictions are 0 or 1, every pixel that is not ignored
        adds to both areas, and the intersection is where the two agree.
        """
        counts = self.matrix.cpu().double()
        if self.num_classes == 1:
            intersection, predicted, labeled = counts.trace()[None], counts.sum()[None], counts.sum()[None]
        else:
            intersection, predicted, labeled = counts.diagonal()[:-1], counts.sum(0)[:-1], counts.sum(1)[:-1]
        precision, recall = intersection / predicted, intersection / labeled
        classes = {
            "IoU": intersection / (predicted + labeled - intersection),
            "Acc": recall,
            "Dice": 2 * intersection / (predicted + labeled),
            # Unlike Dice, published F-scores are 0/0 and left out where a class has no true positive.
            "Fscore": 2 * precision * recall / (precision + recall),
            "Precision": precision,
            "Recall": recall,
        }
        means = {f"m{name}": values.nanmean().item() for name, values in classes.items()}
        if 0 <= self.ignore_index < self.num_classes > 1:
            real = torch.arange(self.num_classes) != self.ignore_index
            means["mIoU without ignored"] = classes["IoU"][real].nanmean().item()
        return {"aAcc": (intersection.sum() / labeled.sum()).item(), **means, **classes}


def _as_bytes(classes: Tensor) -> np.ndarray | None:
    """Return an integer tensor as uint8 (n,); None if uint8 cannot hold its values or it is not on the CPU."""
    if classes.device.type != "cpu":
        return None
    values = classes.numpy().ravel()
    if values.dtype != np.uint8 and values.size and (values.min() < 0 or values.max() > 255):
        return None
    return values.astype(np.uint8, copy=False)


class BoundaryIoU:
    """IoU of class boundaries (Cheng et al. 2021, as DDPS measures it), over any number of images.

    A class's boundary is the band of its pixels within round(0.02 * diagonal) pixels (a diagonal step counts one) of
    another class or the image border. Ignored label pixels belong to no class, so boundaries also run along them;
    predictions count there as anywhere.

    Attributes:
        intersection, union: (K,) int64 counts, on the device.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, device: torch.device | str | None = None) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts = torch.zeros(2, num_classes, dtype=torch.int64, device=device)
        self.intersection, self.union = self.counts

    def update(self, prediction: Tensor | np.ndarray, label: Tensor | np.ndarray) -> BoundaryIoU:
        """Count one image's class indices: two integer maps (H, W), on any device. Returns itself.

        Raises UserError when they are not two maps of one size.
        """
        p, g = (torch.as_tensor(x).to(self.counts.device) for x in (prediction, label))
        if p.shape != g.shape or p.ndim != 2:
            raise UserError(
                f"prediction {tuple(p.shape)} does not go with label {tuple(g.shape)}; give two maps (H, W) of one size"
            )
        p, g = (x.to(torch.int16 if self.num_classes < 8000 else torch.int32) for x in (p, g))  # 4 * K has to fit
        band = round(0.02 * (p.shape[0] ** 2 + p.shape[1] ** 2) ** 0.5)
        near = boundaries((p, g), band)
        p, g = self._known(p), self._known(g)
        of_p, of_g = (self._count(x * 4 + near) for x in (p, g))  # by class and bits
        both = self._count(p.masked_fill(p != g, self.num_classes) * 4 + near)[:, 3]
        self.intersection += both
        self.union += of_p[:, 1] + of_p[:, 3] + of_g[:, 2] + of_g[:, 3] - both
        return self

    def compute(self) -> dict[str, float | Tensor]:
        """Return fractions 0..1: "BIoU" (K,) float64 on the CPU, NaN for classes without boundary, and "mBIoU"."""
        intersection, union = self.counts.cpu().double()
        biou = intersection / union
        return {"mBIoU": biou.nanmean().item(), "BIoU": biou}

    def _known(self, classes: Tensor) -> Tensor:
        """Return the classes with K in place of ignored and invalid values."""
        outside = self.num_classes
        odd = (classes < 0) | (classes >= outside) | (classes == self.ignore_index)
        return classes.masked_fill(odd, outside)  # much faster than torch.where, as below

    def _count(self, codes: Tensor) -> Tensor:
        """Return how often class * 4 + bits occurs, (K, 4)."""
        return torch.bincount(codes.ravel(), minlength=4 * self.num_classes + 4).view(-1, 4)[:-1]


def boundaries(maps: Sequence[Tensor], band: int) -> Tensor:
    """Return (H, W) uint8; bit i is set if maps[i] (H, W) has another value or its border within `band` pixels.

    A square has a single value if every 2x2 block in it does: one map of blocks, dilated in all directions, serves all
    classes, and a byte holds it for up to 8 maps.
    """
    height, width = maps[0].shape
    if not band:
        return torch.zeros(height, width, dtype=torch.uint8, device=maps[0].device)
    ring = (1 << len(maps)) - 1  # blocks at the border never have a single value
    mixed = torch.full((height + 1, width + 1), ring, dtype=torch.uint8, device=maps[0].device)
    inner = mixed[1:-1, 1:-1].zero_()
    for bit, x in enumerate(maps):
        corner = x[:-1, :-1]
        other = (corner != x[1:, :-1]) | (corner != x[:-1, 1:]) | (corner != x[1:, 1:])
        inner |= other.to(torch.uint8) << bit
    near = F.pad(mixed, (band - 1,) * 4)
    for dim in (0, 1):
        near = _running_or(near, dim, 2 * band)
    return near


def _running_or(x: Tensor, dim: int, size: int) -> Tensor:
    """Return the bitwise OR of every `size` neighbors along a dimension, which shrinks by `size` - 1."""
    width = 1
    while width < size:
        step = min(width, size - width)
        length = x.shape[dim] - step
        x = x.narrow(dim, 0, length) | x.narrow(dim, step, length)
        width += step
    return x
