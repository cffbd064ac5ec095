"""Losses and training accuracy, with the published conventions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from segcore.config.schema import LossConfig
from segcore.models.layers import resize, widened


def segmentation_loss(
    logits: Tensor, labels: Tensor, loss: LossConfig, *, ignore_index: int, align_corners: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the configured loss and the accuracy of logits (N, K, h, w) for labels (N, H, W) int64.

    The logits are resized bilinearly to the labels, in at least float32. The loss is the sum of `loss.terms`, each
    times its factor; every function of this module describes one. The accuracy is `pixel_accuracy`.
    """
    weight = None if loss.class_weight is None else class_weight_tensor(loss.class_weight, logits.device)
    logits = resize(widened(logits), labels.shape[-2:], align_corners=align_corners)
    options = {"ignore_index": ignore_index, "class_weight": weight}
    terms = [factor * LOSSES[kind](loss)(logits, labels, **options) for kind, factor in loss.terms]
    return torch.stack(terms).sum(), pixel_accuracy(logits, labels, ignore_index)


def pixel_accuracy(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Return the percentage of correct pixels among the non-ignored ones, without gradient; 0 when all are ignored.

    Logits (N, K, H, W), labels (N, H, W) int64.
    """
    valid = labels != ignore_index
    return 100 * ((logits.detach().max(1).indices == labels) & valid).sum() / valid.sum().clamp(min=1)


def head_losses(
    heads: Mapping[str, tuple[Tensor, float]],
    labels: Tensor,
    loss: LossConfig,
    *,
    ignore_index: int,
    align_corners: bool = False,
) -> dict[str, Tensor]:
    """Return what `Segmentor.losses` does for heads by name, each with logits (N, K, h, w) and the factor of its loss.

    The names are MMSegmentation's: HEAD.loss_ce, whatever the loss is, and HEAD.acc_seg; "loss" is the sum of the
    losses.
    """
    losses = dict[str, Tensor]()
    for name, (logits, factor) in heads.items():
        value, accuracy = segmentation_loss(
            logits, labels, loss, ignore_index=ignore_index, align_corners=align_corners
        )
        losses |= {f"{name}.loss_ce": factor * value, f"{name}.acc_seg": accuracy}
    losses["loss"] = torch.stack([losses[f"{name}.loss_ce"] for name in heads]).sum()
    return losses


@cache
def class_weight_tensor(weight: tuple[float, ...] | str, device: torch.device) -> Tensor:
    """Return class weights (K,) float32 on a device, created once per training run."""
    if isinstance(weight, str):
        raise ValueError(f"loss.class_weight is {weight}; segcore.training.class_weight turns it into numbers")
    with torch.inference_mode(False):
        return torch.tensor(weight, dtype=torch.float32, device=device)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int,
    class_weight: Tensor | None = None,
    avg_non_ignore: bool = False,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the cross entropy, a scalar, of logits (N, K, H, W) for labels (N, H, W) int64.

    The loss is the mean cross entropy over **all** pixels, as the published systems trained: ignored pixels count as
    zero, so it is 0 when all are ignored. With `avg_non_ignore` it is the mean over the labeled pixels. `class_weight`
    (K,) multiplies each pixel's loss by the weight of its class; the mean is still over pixels, not over weights.
    `label_smoothing` spreads this share of every pixel's target evenly over the classes (arXiv 1512.00567, section 7).
    """
    weight = None if class_weight is None else class_weight.to(logits)
    loss = F.cross_entropy(
        logits, labels, weight, ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing
    )
    count = (labels != ignore_index).sum().clamp(min=1) if avg_non_ignore else labels.numel()
    return loss / count


def ohem_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int,
    threshold: float = 0.9,
    min_kept: int = 131_072,
    class_weight: Tensor | None = None,
) -> Tensor:
    """Return the cross entropy of hard pixels only (online hard example mining), as MMSegmentation defines it.

    A pixel is hard if the probability of its true class is below `threshold`; if there are `min_kept` or fewer, the
    `min_kept` pixels of lowest probability are used. They are chosen from all non-ignored pixels of the batch on this
    device. The loss is the cross entropy times `class_weight`, averaged over the hard pixels; 0 if there are none. If a
    batch has `min_kept` pixels or fewer, the most confident one is left out unless it is below the threshold, as
    published. Otherwise as `cross_entropy`.
    """
    losses, weights, valid = _pixel_losses(logits, labels, ignore_index, class_weight)
    probabilities = (-losses.detach()).exp()
    hard = valid & (probabilities < _ohem_limit(probabilities, valid, threshold, min_kept))
    return (losses * weights).where(hard, 0).sum() / hard.sum().clamp(min=1)


def _pixel_losses(
    logits: Tensor, labels: Tensor, ignore_index: int, class_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return cross entropy, class weight and validity (N, H, W) of every pixel.

    The cross entropy is not weighted yet, and 0 where a pixel is ignored; without `class_weight` the weights are 1.
    Ignored pixels stay in the tensors: boolean indexing would make the host wait for the device to count the others.
    """
    valid = labels != ignore_index
    losses = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
    weights = torch.ones_like(losses) if class_weight is None else class_weight.to(logits)[labels.where(valid, 0)]
    return losses, weights, valid


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
    flat, k = values.masked_fill(~valid, math.inf).flatten(), min(k, values.numel())
    # CUDA's kthvalue of one row runs on a single multiprocessor; sorting all of it takes a fraction of that time.
    return flat.sort().values[k - 1] if flat.is_cuda else flat.kthvalue(k).values


def ohem_pyradd(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int,
    threshold: float = 0.7,
    min_kept: int = 100_000,
    class_weight: Tensor | None = None,
) -> Tensor:
    """Return the cross entropy of hard pixels only, as pyradd/DDRNet-pytorch defines it.

    A pixel is hard if the probability of its true class is at most `threshold`. At least `min_kept` pixels are kept, or
    all if the batch has fewer labeled pixels. The loss is the weighted mean: the weighted cross entropies divided by
    the sum of the weights. For a batch without labeled pixels it is 0 where the original has NaN. Otherwise as
    `ohem_cross_entropy`.
    """
    losses, weights, valid = _pixel_losses(logits, labels, ignore_index, class_weight)
    probabilities = (-losses.detach()).exp()
    hard = valid & (probabilities <= smallest(probabilities, valid, min_kept).clamp(min=threshold))
    total = (losses * weights).where(hard, 0).sum()
    return total / weights.where(hard, 0).sum().where(valid.any(), 1)


def focal(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int,
    class_weight: Tensor | None = None,
    gamma: float = 2.0,
    alpha: float | None = None,
) -> Tensor:
    """Return the focal loss (arXiv 1708.02002, section 3), as segmentation_models_pytorch defines it.

    Every class is a binary decision by the sigmoid of its logit: a pixel's loss is its binary cross entropy times
    (1 - p)^gamma, p being the probability of the right decision; `alpha` multiplies that of the pixel's own class and
    1 - alpha those of the others. The loss is the mean over the labeled pixels and over the classes, which
    `class_weight` weights; 0 if all pixels are ignored. Otherwise as `cross_entropy`.
    """
    valid = labels != ignore_index
    own = labels.where(valid, 0)[:, None]
    wrong = logits.scatter(1, own, -logits.gather(1, own))  # the logit of deciding wrongly
    losses = -(gamma * F.logsigmoid(wrong)).exp() * F.logsigmoid(-wrong)
    if alpha is not None:
        losses = losses * torch.full_like(losses, 1 - alpha).scatter(1, own, alpha)
    by_class = losses.where(valid[:, None], 0).sum((0, 2, 3)) / valid.sum().clamp(min=1)
    return _mean_over_classes(by_class, class_weight)


def dice(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int,
    class_weight: Tensor | None = None,
) -> Tensor:
    """Return the Dice loss (arXiv 1606.04797), as segmentation_models_pytorch defines it.

    It is 1 - 2 sum(p t) / (sum(p) + sum(t)) of each class over the labeled pixels of the batch on this device, p being
    the softmax probability and t 1 where the label is the class, else 0. The loss is the mean over all K classes, which
    `class_weight` weights; a class without a pixel counts as 0. Otherwise as `cross_entropy`.
    """
    valid = labels != ignore_index
    classes = torch.arange(logits.shape[1], device=logits.device)[:, None, None]
    own = labels.where(valid, -1)[:, None] == classes  # a byte per logit, an eighth of what F.one_hot takes
    probabilities = logits.softmax(1).where(valid[:, None], 0)
    pixels, overlap = own.sum((0, 2, 3)), probabilities.where(own, 0).sum((0, 2, 3))
    by_class = 1 - 2 * overlap / (probabilities.sum((0, 2, 3)) + pixels).clamp(min=1)
    return _mean_over_classes(by_class.where(pixels > 0, 0), class_weight)


def lovasz_softmax(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int,
    class_weight: Tensor | None = None,
) -> Tensor:
    """Return the Lovász-softmax loss (arXiv 1705.08790).

    It is a convex surrogate of 1 - IoU of each class over the labeled pixels of the batch on this device. The loss is
    the mean over the classes that the labels have, which `class_weight` weights; 0 if all pixels are ignored. It sorts
    the pixels once per class. Otherwise as `cross_entropy`.
    """
    valid = labels != ignore_index
    by_class, present = [], []
    for k, probability in enumerate(logits.softmax(1).where(valid[:, None], 0).unbind(1)):
        own = valid & (labels == k)
        errors = torch.where(own, 1 - probability, probability).flatten()
        by_class.append((errors * _lovasz_gradient(errors.detach(), own.flatten())).sum())
        present.append(own.any())
    return _mean_over_classes(torch.stack(by_class), class_weight, torch.stack(present))


def _lovasz_gradient(errors: Tensor, own: Tensor) -> Tensor:
    """Return by how much each pixel (P,), from the greatest error on, raises the Jaccard loss of a class (algorithm 1).

    `own` (P,) tells the pixels of the class. Each step is computed for itself, not as the difference of two losses,
    which float32 would round away among millions of pixels.
    """
    order = errors.argsort(descending=True)
    missed = own[order]
    before = missed.cumsum(0)
    rest = (before[-1] - before).to(errors.dtype)  # pixels of the class that still count as found
    union = before[-1] + torch.arange(1, len(own) + 1, device=own.device) - before
    union = union.to(errors.dtype)
    steps = torch.where(missed, 1 / union, rest / (union * (union - 1).clamp(min=1)))
    return torch.empty_like(errors).scatter(0, order, steps)


def _mean_over_classes(losses: Tensor, class_weight: Tensor | None, counted: Tensor | None = None) -> Tensor:
    """Return the weighted mean of losses (K,) over the classes that are `counted` (K,); 0 if none is."""
    weights = torch.ones_like(losses) if class_weight is None else class_weight.to(losses)
    if counted is not None:
        weights = weights.where(counted, 0)
    total = weights.sum()
    return (losses * weights).sum() / total.where(total > 0, 1)


def _mined(function: Callable[..., Tensor], loss: LossConfig) -> Callable[..., Tensor]:
    return partial(function, threshold=loss.ohem_threshold, min_kept=loss.ohem_min_kept)


LOSSES: dict[str, Callable[[LossConfig], Callable[..., Tensor]]] = {
    "cross_entropy": lambda loss: partial(
        cross_entropy, avg_non_ignore=loss.avg_non_ignore, label_smoothing=loss.label_smoothing
    ),
    "ohem": partial(_mined, ohem_cross_entropy),
    "ohem_pyradd": partial(_mined, ohem_pyradd),
    "focal": lambda loss: partial(focal, gamma=loss.focal_gamma, alpha=loss.focal_alpha),
    "dice": lambda loss: dice,
    "lovasz": lambda loss: lovasz_softmax,
}
"""`loss.kind` -> the function of logits, labels and the other settings."""
