"""Classes from logits at a network's own resolution: bilinear resize and argmax in one pass over the output.

The resized logits, K values per pixel, never exist as a whole: the plain kernel computes them for some rows at a time,
the compiled one for some pixels. The resize is that of `torch.nn.functional.interpolate(mode="bilinear")`; values agree
to rounding, so that another class can win only where two are equal to rounding. Inference only: there is no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from segcore.errors import UserError
from segcore.ops import registry


def resize_argmax(
    logits: Tensor,
    size: Sequence[int],
    *,
    crop: Sequence[int] | None = None,
    align_corners: bool = False,
    confidence: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the classes (N, H, W) of highest logit, and their softmax (N, H, W) float32 if `confidence`, else (0,).

    `logits` (N, K, h, w) are resized to `size` (height, width); `crop` (H, W) keeps the first rows and columns, by
    default all. Classes are uint8 up to K = 256, int32 above; of equal logits the first class wins. One class is
    decided as published: 1 where the sigmoid exceeds 0.5, and the confidence is that of the answer. Where a logit is
    NaN, so is the confidence. Raises ValueError
    for logits that are not (N, K, h, w) of float dtype, and for a crop larger than `size`.
    """
    result: tuple[Tensor, Tensor] = torch.ops.segcore.resize_argmax(
        logits, list(size), list(size if crop is None else crop), align_corners, confidence
    )
    return result


class Strip(NamedTuple):
    """Some rows of a resized map: between rows `first` and `second` of `wide` (N, K, rows, W)."""

    rows: slice
    """The rows of the output."""
    wide: Tensor
    first: Tensor
    second: Tensor | None
    """None where the rows are those of `wide` as they are."""
    weight: Tensor
    """Of the second row, (rows, 1)."""

    def of(self, classes: slice) -> Tensor:
        """Return these rows (N, classes, rows, W)."""
        wide = self.wide[:, classes]
        if self.second is None:
            return wide
        return torch.lerp(wide.index_select(2, self.first), wide.index_select(2, self.second), self.weight)


def strips(
    logits: Tensor, size: Sequence[int], crop: Sequence[int], align_corners: bool, values: int
) -> Iterator[Strip]:
    """Yield the rows of logits (N, K, h, w) resized to `size`, of which the first `crop` (H, W) count.

    A strip has `values` pixels (N, rows, W) or one row.
    """
    (n, _, h, w), (full_h, full_w), (height, width) = logits.shape, size, crop
    rows = torch.arange(height, dtype=torch.float32)
    if align_corners:
        place = rows * ((h - 1) / (full_h - 1) if full_h > 1 else 0)
    else:
        place = ((rows + 0.5) * (h / full_h) - 0.5).clamp(min=0)
    above = place.long().clamp(max=h - 1)
    below, weight = (above + 1).clamp(max=h - 1), (place - above).to(logits.dtype)[:, None]
    first, second, weights = (x.to(logits.device, non_blocking=True) for x in (above, below, weight))
    step = max(1, values // max(n * width, 1))
    for start in range(0, height, step):
        part = slice(start, min(start + step, height))
        if h == full_h:
            low, high = part.start, part.stop
        else:
            low, high = int(above[part.start]), int(below[part.stop - 1]) + 1
        wide = logits[:, :, low:high]
        if w != full_w:
            wide = F.interpolate(wide, (high - low, full_w), mode="bilinear", align_corners=align_corners)
        other = None if h == full_h else second[part] - low
        yield Strip(part, wide[..., :width], first[part] - low, other, weights[part])


def reference(
    logits: Tensor, size: Sequence[int], crop: Sequence[int], align_corners: bool, confidence: bool
) -> tuple[Tensor, Tensor]:
    """Return classes and confidence as `resize_argmax` does, on any device."""
    shape = _shape(logits, size, crop)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    classes = logits.new_empty(shape, dtype=_index(logits))
    found = logits.new_empty(shape if confidence else 0, dtype=torch.float32)
    count, on_cpu = logits.shape[1], logits.device.type == "cpu"
    # Of one class at a time, what a CPU's cache holds; elsewhere all classes, because every operation is a launch.
    values = 1 << 16 if on_cpu else (1 << 24) // count
    for strip in strips(logits, size, crop, align_corners, values) if classes.numel() else ():
        rows, sure = classes[:, strip.rows], found[:, strip.rows] if confidence else None
        if count == 1:
            p = strip.of(slice(1))[:, 0].sigmoid()
            rows.copy_(p > 0.5)
            if sure is not None:
                torch.maximum(p, 1 - p, out=sure)
        elif on_cpu:
            _class_by_class(strip, count, rows, sure)
        else:
            _all_classes(strip, rows, sure)
    return classes, found


def _class_by_class(strip: Strip, count: int, rows: Tensor, sure: Tensor | None) -> None:
    """Write a strip's classes to `rows` and their confidence to `sure`, both (N, rows, W)."""
    best = strip.of(slice(1))[:, 0].clone()
    rows.zero_()
    for k in range(1, count):
        x = strip.of(slice(k, k + 1))[:, 0]
        more = x > best
        rows.masked_fill_(more, k)
        torch.where(more, x, best, out=best)  # of NaN, too, the class is that of the compiled kernel
    if sure is not None:
        total = torch.zeros_like(best)
        for k in range(count):
            total += (strip.of(slice(k, k + 1))[:, 0] - best).exp_()
        sure.copy_(total.reciprocal_())


def _all_classes(strip: Strip, rows: Tensor, sure: Tensor | None) -> None:
    """Do the same with a few operations."""
    x = strip.of(slice(None))
    nan = x.isnan()  # never the largest, but nothing is larger than it as the first class
    best, index = x.masked_fill(nan, -math.inf).max(1)
    rows.copy_(index.masked_fill_(nan[:, 0], 0))
    if sure is not None:
        sure.copy_((x - best[:, None]).exp_().sum(1).reciprocal_())


def _index(logits: Tensor) -> torch.dtype:
    return torch.uint8 if logits.shape[1] <= 256 else torch.int32


def _shape(logits: Tensor, size: Sequence[int], crop: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the classes."""
    registry.check_tensors("resize_argmax", {"logits": (logits, 4)})
    if logits.shape[1] < 1 or min(logits.shape[2:]) < 1 or len(size) != 2 or len(crop) != 2:
        raise UserError(f"resize_argmax: logits {tuple(logits.shape)} cannot be resized to {tuple(size)}")
    if not (0 < crop[0] <= size[0] and 0 < crop[1] <= size[1]):
        raise UserError(f"resize_argmax: crop {tuple(crop)} must lie within the size {tuple(size)}")
    return (len(logits), *crop)


def _fake(
    logits: Tensor, size: Sequence[int], crop: Sequence[int], align_corners: bool, confidence: bool
) -> tuple[Tensor, Tensor]:
    shape = _shape(logits, size, crop)
    classes = logits.new_empty(shape, dtype=_index(logits))
    return classes, logits.new_empty(shape if confidence else 0, dtype=torch.float32)


registry.define_inference(
    "resize_argmax",
    "Tensor logits, SymInt[] size, SymInt[] crop, bool align_corners, bool confidence",
    "(Tensor, Tensor)",
    reference,
    _fake,
    _shape,
)
