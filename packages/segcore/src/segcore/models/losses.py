"""Losses and training accuracy, with the published conventions."""

import torch
from torch import Tensor
from torch.nn import functional as F

from segcore.models.layers import resize


def cross_entropy(logits: Tensor, labels: Tensor, *, ignore_index: int, align_corners: bool = False) -> Tensor:
    """Return the mean cross entropy over **all** pixels, ignored ones counting as zero.

    logits (N, K, h, w) are resized bilinearly to the labels (N, H, W) int64; computed in at least float32. With every
    pixel ignored the loss is 0. Averaging over all pixels is what the published systems trained with.
    """
    logits = resize(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), labels.shape[-2:], align_corners=align_corners
    )
    return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum") / labels.numel()


@torch.no_grad()
def pixel_accuracy(logits: Tensor, labels: Tensor, *, ignore_index: int) -> Tensor:
    """Return the share of non-ignored pixels that are right, in percent; NaN when all are ignored. Shapes as above."""
    valid = labels != ignore_index
    right = resize(logits.float(), labels.shape[-2:]).argmax(1) == labels
    return 100 * (right & valid).sum() / valid.sum()
