"""Losses and training accuracy, with the published conventions."""

import torch
from torch import Tensor
from torch.nn import functional as F

from segcore.models.layers import resize


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int,
    align_corners: bool = False,
    class_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the loss and the accuracy of logits (N, K, h, w), resized bilinearly to the labels (N, H, W) int64.

    The loss is the mean cross entropy over **all** pixels, ignored ones counting as zero: 0 when all are ignored. That
    is what the published systems trained with. It is computed in at least float32. `class_weight` (K,) multiplies the
    loss of every pixel by the weight of its class; the mean stays one over pixels, not over weights. The accuracy is
    the share of non-ignored pixels that are right, in percent, without gradient; NaN when all are ignored.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = resize(logits, labels.shape[-2:], align_corners=align_corners)
    weight = None if class_weight is None else class_weight.to(logits)
    loss = F.cross_entropy(logits, labels, weight, ignore_index=ignore_index, reduction="sum") / labels.numel()
    right = (logits.detach().max(1).indices == labels) & (labels != ignore_index)
    return loss, 100 * right.sum() / (labels != ignore_index).sum()
