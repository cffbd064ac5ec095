"""How sure a diffusion model is of a mask, per pixel, and how well that separates wrong from right pixels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from segcore.config.schema import DataConfig, EvalConfig
from segcore.data.dataset import Dataset
from segcore.errors import UserError
from segcore.evaluation.predictor import Precision, predict_classes, predict_probabilities
from segcore.models.segmentor import Segmentor
from segcore.seeds import evaluation_seed

STARTS = 4
"""Noise starts per image."""


def predict_uncertainty(
    model: Segmentor,
    images: Sequence[np.ndarray],
    classes: Sequence[Tensor],
    evaluate: EvalConfig,
    data: DataConfig,
    seeds: Sequence[int],
    *,
    device: torch.device | str,
    precision: Precision = "fp32",
    channels_last: bool = False,
    starts: int = STARTS,
) -> list[Tensor]:
    """Return, per image, the probability (H, W) float32 in 0..1 that a pixel is not of the class that `classes` says.

    This is 1 - p(class of the mask), where p is the mean softmax over `starts` noise starts, their denoising steps and
    the views and windows of `evaluate`: least confidence (Hendrycks and Gimpel, arXiv 1610.02136) of an ensemble
    (Lakshminarayanan et al., arXiv 1612.01474) whose members are samples of the diffusion. Other than the predictive
    entropy it has a unit: of pixels at 0.3, a calibrated model gets 30 % wrong.

    `classes` holds masks (H, W) int64; the other arguments are those of `predict_probabilities`. Raises UserError when
    the method draws no noise.
    """
    marginal = predict_probabilities(
        model, images, evaluate, data, seeds, device=device, precision=precision, channels_last=channels_last,
        network=lambda batch, seeds: {"marginal": model.log_mean_probs(batch, seeds, starts)},
    )  # fmt: skip
    return [
        1 - by_entry["marginal"].gather(0, mask[None].to(by_entry["marginal"].device))[0]
        for by_entry, mask in zip(marginal, classes, strict=True)
    ]


def evaluate_uncertainty(
    model: Segmentor,
    dataset: Dataset,
    evaluate: EvalConfig,
    data: DataConfig,
    *,
    device: torch.device | str,
    seed: int = 0,
    precision: Precision = "fp32",
    channels_last: bool = False,
    starts: int = STARTS,
    on_progress: Callable[[int, int], None] | None = None,
) -> float:
    """Return the AUROC with which the uncertainty tells the wrong from the right pixels of a labeled data set.

    Every image is predicted as `segcore.evaluation.evaluate` does with the same seed: the configured answer. The model
    is on `device` and in evaluation mode. Raises UserError when the method draws no noise.
    """
    area = AUROC(model.ignore_index)
    settings = dataclasses.replace(evaluate, steps=())
    for index in range(len(dataset)):
        image, label = dataset.pair(index)
        if label is None:
            raise UserError(f"{dataset.samples[index].image}: has no label file; evaluation needs one")
        arguments: dict[str, Any] = {
            "evaluate": settings, "data": data, "seeds": [evaluation_seed(seed, index)],
            "device": device, "precision": precision, "channels_last": channels_last,
        }  # fmt: skip
        [entries] = predict_classes(model, [image], **arguments)
        mask = entries[list(entries)[-1]]
        [uncertainty] = predict_uncertainty(model, [image], [mask], starts=starts, **arguments)
        area.update(uncertainty.cpu(), mask.cpu(), torch.from_numpy(label))
        if on_progress:
            on_progress(index + 1, len(dataset))
    return area.compute()


class AUROC:
    """Area under the ROC curve of a score for telling wrong from right pixels, over any number of images.

    It is the probability that a wrong pixel, drawn at random, has a higher score than a right one, equal scores
    counting half: 0.5 is chance, 1 perfect. Scores are kept as counts of 65536 levels, so memory does not grow.
    """

    LEVELS = 1 << 16

    def __init__(self, ignore_index: int = 255) -> None:
        self.ignore_index = ignore_index
        self.counts = torch.zeros(2, self.LEVELS, dtype=torch.int64)
        """Pixels by score: right ones, wrong ones."""

    def update(self, score: Tensor, prediction: Tensor, label: Tensor) -> None:
        """Add an image: scores in 0..1, predicted and true classes, each (H, W); ignored pixels do not count."""
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
