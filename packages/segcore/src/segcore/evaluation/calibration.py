"""Calibration: whether the probability of a pixel's class is how often that class is right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BINS = 15
"""Equal-width bins of the confidence, as in Guo et al. 2017."""


@dataclass(frozen=True)
class Calibration:
    """Pixels by the confidence of their class; a value per bin, and bin i is i / BINS to (i + 1) / BINS."""

    counts: tuple[int, ...]
    """Number of labeled pixels."""
    confidence: tuple[float, ...]
    """Mean probability of the predicted class, 0..1; NaN in an empty bin."""
    accuracy: tuple[float, ...]
    """Share of pixels whose predicted class is right, 0..1; NaN in an empty bin."""

    @property
    def ece(self) -> float:
        """The expected calibration error, 0..1: the mean over pixels of |accuracy - confidence| of their bins."""
        gaps = zip(self.counts, self.confidence, self.accuracy, strict=True)
        return sum(n * abs(c - a) for n, c, a in gaps if n) / max(sum(self.counts), 1)

    def to_json(self) -> dict[str, Any]:
        """Return plain data: NaN is None."""
        bins = {name: [x if x == x else None for x in getattr(self, name)] for name in ("confidence", "accuracy")}
        return {"ece": self.ece, "counts": list(self.counts), **bins}


class CalibrationError:
    """Counts of pixels by confidence, over any number of images (Guo et al. 2017, arXiv 1706.04599).

    Attributes:
        sums: (3, BINS) int64: pixels, their confidences in units of 2 ** -24, right ones. Integers, so that sums over
            parts of a data set, or over processes, do not depend on the order.
    """

    UNIT = 1 << 24

    def __init__(self, ignore_index: int = 255, device: torch.device | str | None = None) -> None:
        self.ignore_index = ignore_index
        device = torch.device(device or "cpu")
        self.sums = torch.zeros(3, BINS, dtype=torch.int64, device="cpu" if device.type == "mps" else device)

    def update(self, confidence: Tensor, prediction: Tensor, label: Tensor) -> None:
        """Add an image: probability in 0..1 of the predicted class, that class and the label, each (H, W)."""
        confidence = confidence.to(self.sums.device)
        # uint16 does not compare with other integers.
        prediction, label = (x.to(self.sums.device, torch.int32) for x in (prediction, label))
        known = label != self.ignore_index
        confidence, right = confidence[known].clamp(0, 1), (prediction == label)[known]
        bins = (confidence * BINS).long().clamp(max=BINS - 1)
        # float64, which holds these sums of integers exactly; float32 weights would be summed in float32
        units = torch.bincount(bins, (confidence * self.UNIT).round().double(), minlength=BINS).long()
        self.sums += torch.stack(
            [torch.bincount(bins, minlength=BINS), units, torch.bincount(bins[right], minlength=BINS)]
        )

    def compute(self) -> Calibration:
        """Return the counts and the means of every bin."""
        counts, confidence, right = self.sums.cpu().double()
        means = confidence / self.UNIT / counts, right / counts
        return Calibration(tuple(self.sums[0].tolist()), *(tuple(mean.tolist()) for mean in means))
