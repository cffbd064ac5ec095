"""Losses and training accuracy, with the published conventions."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from segcore.config.schema import LossConfig
from segcore.models.layers import resize


def segmentation_loss(
    logits: Tensor, labels: Tensor, loss: LossConfig, *, ignore_index: int, align_corners: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the configured loss and the accuracy of logits (N, K, h, w) for labels (N, H, W) int64.

    See `cross_entropy`, `ohem_cross_entropy` and `ohem_pyradd`.
    """
    weight = None if loss.class_weight is None else class_weight_tensor(loss.class_weight, logits.device)
    options = {"ignore_index": ignore_index, "align_corners": align_corners, "class_weight": weight}
    return LOSSES[loss.kind](loss)(logits, labels, **options)


@cache
def class_weight_tensor(weight: tuple[float, ...] | str, device: torch.device) -> Tensor:
    """Return class weights (K,) float32 on a device, created once per training run."""
    if isinstance(weight, str):
        raise ValueError("loss.class_weight is auto; segcore.training.class_weight turns it into numbers")
    with torch.inference_mode(False):
        return torch.tensor(weight, dtype=torch.float32, device=device)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int,
    align_corners: bool = False,
    class_weight: Tensor | None = None,
    avg_non_ignore: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the loss and the accuracy of logits (N, K, h, w), resized bilinearly to the labels (N, H, W) int64.

    The loss is the mean cross entropy over **all** pixels, as the published systems trained: ignored pixels count as
    zero, so it is 0 when all are ignored. With `avg_non_ignore` it is the mean over the labeled pixels. It is computed
    in at least float32. `class_weight` (K,) multiplies each pixel's loss by the weight of its class; the mean is still
    over pixels, not over weights. The accuracy is the percentage of correct pixels among the non-ignored ones, without
    gradient; NaN when all are ignored.
    """
    logits = _resized(logits, labels, align_corners)
    weight = None if class_weight is None else class_weight.to(logits)
    loss = F.cross_entropy(logits, labels, weight, ignore_index=ignore_index, reduction="sum")
    count = (labels != ignore_index).sum().clamp(min=1) if avg_non_ignore else labels.numel()
    return loss / count, _accuracy(logits, labels, ignore_index)


def ohem_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int,
    threshold: float = 0.9,
    min_kept: int = 131_072,
    align_corners: bool = False,
    class_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the loss and the accuracy on hard pixels only (online hard example mining), as MMSegmentation defines it.

    A pixel is hard if the probability of its true class is below `threshold`; if there are `min_kept` or fewer, the
    `min_kept` pixels of lowest probability are used. They are chosen from all non-ignored pixels of the batch on this
    device. The loss is the cross entropy times `class_weight`, averaged over the hard pixels; 0 if there are none. If a
    batch has `min_kept` pixels or fewer, the most confident one is left out unless it is below the threshold, as
    published. Otherwise as `cross_entropy`.
    """
    losses, weights, valid, accuracy = pixel_losses(
        logits, labels, ignore_index=ignore_index, align_corners=align_corners, class_weight=class_weight
    )
    probabilities = (-losses.detach()).exp()
    hard = valid & (probabilities < _ohem_limit(probabilities, valid, threshold, min_kept))
    return (losses * weights).where(hard, 0).sum() / hard.sum().clamp(min=1), accuracy


def _ohem_limit(probabilities: Tensor, valid: Tensor, threshold: float, min_kept: int) -> Tensor:
    """Return the probability below which a pixel is hard: a scalar, at least `threshold`.

    It is the probability of valid pixel number min(min_kept, n - 1) + 1 of n in ascending order. n stays on the device:
    ignored pixels count as infinite and sort last; if n is smaller, the greatest valid probability is used.
    """
    limit = smallest(probabilities, valid, min_kept + 1)
    greatest = probabilities.masked_fill(~valid, -math.inf).max()
    return torch.where(valid.sum() > min_kept, limit, greatest).clamp(min=threshold)


def smallest(values: Tensor, valid: Tensor, k: int) -> Tensor:
    """Return the k-th smallest of the valid values, a scalar; infinity, or the greatest, if there are fewer."""
    return values.masked_fill(~valid, math.inf).flatten().kthvalue(min(k, values.numel())).values


def ohem_pyradd(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int,
    threshold: float = 0.7,
    min_kept: int = 100_000,
    align_corners: bool = False,
    class_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the loss and the accuracy on hard pixels only, as pyradd/DDRNet-pytorch defines it.

    A pixel is hard if the probability of its true class is at most `threshold`. At least `min_kept` pixels are kept, or
    all if the batch has fewer labeled pixels. The loss is the weighted mean: the weighted cross entropies divided by
    the sum of the weights. For a batch without labeled pixels it is 0 where the original has NaN. Otherwise as
    `ohem_cross_entropy`.
    """
    losses, weights, valid, accuracy = pixel_losses(
        logits, labels, ignore_index=ignore_index, align_corners=align_corners, class_weight=class_weight
    )
    probabilities = (-losses.detach()).exp()
    hard = valid & (probabilities <= smallest(probabilities, valid, min_kept).clamp(min=threshold))
    total = (losses * weights).where(hard, 0).sum()
    return total / weights.where(hard, 0).sum().where(valid.any(), 1), accuracy


def _mined(function: Callable[..., Any], loss: LossConfig) -> Callable[..., Any]:
    return partial(function, threshold=loss.ohem_threshold, min_kept=loss.ohem_min_kept)


LOSSES: dict[str, Callable[[LossConfig], Callable[..., tuple[Tensor, Tensor]]]] = {
    "cross_entropy": lambda loss: partial(cross_entropy, avg_non_ignore=loss.avg_non_ignore),
    "ohem": partial(_mined, ohem_cross_entropy),
    "ohem_pyradd": partial(_mined, ohem_pyradd),
}
"""`loss.kind` -> the function of logits, labels and the other settings."""


def pixel_losses(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int,
    align_corners: bool = False,
    class_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return cross entropy, class weight and validity (N, H, W) of every pixel, and the accuracy.

    Arguments and accuracy as for `cross_entropy`. The cross entropy is not weighted yet, and 0 where a pixel is
    ignored; without `class_weight` the weights are 1. Ignored pixels stay in the tensors: boolean indexing would make
    the host wait for the device to count the others.
    """
    logits = _resized(logits, labels, align_corners)
    valid = labels != ignore_index
    losses = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
    weights = torch.ones_like(losses) if class_weight is None else class_weight.to(logits)[labels.where(valid, 0)]
    return losses, weights, valid, _accuracy(logits, labels, ignore_index)


def _resized(logits: Tensor, labels: Tensor, align_corners: bool) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return resize(logits, labels.shape[-2:], align_corners=align_corners)


def _accuracy(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    right = (logits.detach().max(1).indices == labels) & (labels != ignore_index)
    return 100 * right.sum() / (labels != ignore_index).sum()
