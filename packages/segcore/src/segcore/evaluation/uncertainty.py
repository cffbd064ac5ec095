"""Per-pixel uncertainty of a mask from a denoising model, and how well it separates wrong from right pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from segcore.evaluation.predictor import Predictor
from segcore.models.stepwise import require_stepwise

STARTS = 4
"""Noise starts per image."""


def predict_uncertainty(
    predictor: Predictor,
    images: Sequence[np.ndarray],
    classes: Sequence[Tensor],
    seeds: Sequence[int],
    *,
    starts: int = STARTS,
) -> list[Tensor]:
    """Return, per image, the probability (H, W) float32 in 0..1 that a pixel does not have the class in `classes`.

    This is 1 - p(class of the mask), where p is the mean softmax over `starts` noise starts, their denoising steps and
    the views and windows of the predictor: the least-confidence score (Hendrycks and Gimpel, arXiv 1610.02136) of an
    ensemble (Lakshminarayanan et al., arXiv 1612.01474) whose members are diffusion samples. Unlike the predictive
    entropy it has a unit: a calibrated model gets 30 % of the pixels at 0.3 wrong.

    `classes` holds masks (H, W) int64; images and seeds are those of `Predictor.probabilities`. Raises UserError when
    the model does not denoise.
    """
    model = require_stepwise(predictor.model, "--uncertainty")
    mean = predictor.probabilities(
        images,
        seeds,
        network=lambda batch, seeds: [("mean", model.log_mean_probs(batch, seeds, starts, resize=False))],
    )
    return [
        1 - by_entry["mean"].gather(0, mask[None].to(by_entry["mean"].device))[0]
        for by_entry, mask in zip(mean, classes, strict=True)
    ]


class AUROC:
    """Area under the ROC curve of a score for telling wrong from right pixels, over any number of images.

    It is the probability that a randomly drawn wrong pixel has a higher score than a right one, with ties counting
    half: 0.5 is chance, 1 perfect. Scores are kept as counts of 65536 levels, so memory does not grow.
    """

    LEVELS = 1 << 16

    def __init__(self, ignore_index: int = 255) -> None:
        self.ignore_index = ignore_index
        self.counts = torch.zeros(2, self.LEVELS, dtype=torch.int64)
        """Pixels by score: right ones, wrong ones."""

    def update(self, score: Tensor, prediction: Tensor, label: Tensor) -> None:
        """Add an image: scores in 0..1, predicted and true classes, each (H, W); ignored pixels do not count."""
        prediction, label = prediction.int(), label.int()  # uint16 does not compare with other integers
        known = label != self.ignore_index
        level = (score[known].clamp(0, 1) * (self.LEVELS - 1)).round().long()
        wrong = prediction[known] != label[known]
        flat = torch.bincount(wrong * self.LEVELS + level, minlength=2 * self.LEVELS)
        self.counts += flat.view(2, self.LEVELS).cpu()

    def compute(self) -> float:
        """Return the area, 0..1; NaN while there are no wrong or no right pixels."""
        right, wrong = self.counts
        below = right.cumsum(0) - right
        pairs = (wrong.double() * (below.double() + right.double() / 2)).sum()
        return float(pairs / (right.sum().double() * wrong.sum().double()))
