"""Bilinear samples of pixels stored as rows: the shared arithmetic of the operators' plain kernels.

A map has the layout (N, S, M, D): N images, S pixels (levels concatenated, each of H_l x W_l pixels row by
row), M heads or groups, rows of D numbers. Every (image, query, head) looks at P points per level, given in pixels of
that level: integers are pixel centers, (0, 0) is the first one. A point is the weighted sum of its four corners;
corners outside the map count as zero, and a point gives zero and gets zero gradients unless -1 < x < W and -1 < y < H,
hence also for NaN. At a pixel center the slope is the right-hand one. Values are assumed finite.

The points of one query and head are a bag of rows: embedding_bag sums such a bag with weights in one pass, so that no
temporary needs more than one number per corner.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Points = Sequence[tuple[Tensor, Tensor]]
"""Per level the coordinates y and x in pixels, each (N, Q, M, P), float32 or float64."""


def pairs(spatial_shapes: Sequence[int]) -> list[tuple[int, int]]:
    """Return (H, W) per level from H_1, W_1, H_2, W_2 …"""
    return list(zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True))


def _axis(coordinate: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return per point the first of its two pixels along an axis and the coordinate relative to that pixel.

    At the border the pair is shifted into the map, so that no index needs a check; the coordinate then leaves [0, 1).
    """
    coordinate = torch.nan_to_num(coordinate, nan=-2.0)  # anywhere outside
    first = coordinate.floor().clamp_(0, max(size - 2, 0))
    return first, coordinate - first


def _hats(t: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the weights of both pixels, max(0, 1 - distance), which are zero for every point outside."""
    first, second = (1 - t.abs()).clamp_(min=0), (1 - (t - 1).abs_()).clamp_(min=0)
    return first, second if size > 1 else torch.zeros_like(second)


def _slopes(t: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the right-hand derivatives of `_hats`, and 0 at t = -1, where a point is outside."""
    before, between, after = [s.to(t.dtype) for s in ((t > -1) & (t < 0), (t >= 0) & (t < 1), (t >= 1) & (t < 2))]
    first, second = before - between, between - after
    return first, second if size > 1 else torch.zeros_like(second)


def corners(
    shape: Sequence[int], spatial_shapes: Sequence[int], points: Points, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return rows and weights (N, Q, M, L, P, 4) of every point's corners (y0, x0), (y0, x1), (y1, x0), (y1, x1).

    `shape` is the map's; weights are multiplied by `scale` (N, Q, M, L, P).
    """
    (n, s, m, _), like = shape, points[0][0]
    count = (*like.shape[:3], len(points), like.shape[3], 4)
    index = torch.int32 if max(n * s * m, math.prod(count)) < 2**31 else torch.int64  # half the memory
    rows = torch.empty(count, dtype=index, device=like.device)
    weights = torch.empty(count, dtype=like.dtype, device=like.device)
    image = torch.arange(n, dtype=index, device=like.device).view(n, 1, 1, 1) * (s * m)
    base = image + torch.arange(m, dtype=index, device=like.device).view(m, 1)
    start = 0
    for level, ((height, width), (ys, xs)) in enumerate(zip(pairs(spatial_shapes), points, strict=True)):
        (top, y), (left, x) = _axis(ys, height), _axis(xs, width)
        pixel = top.to(index).mul_(width).add_(left.to(index)).add_(start)
        row = pixel.mul_(m).add_(base)
        down, right = (width * m if height > 1 else 0), (m if width > 1 else 0)
        vertical, horizontal = _hats(y, height), _hats(x, width)
        if scale is not None:
            vertical = vertical[0] * scale[:, :, :, level], vertical[1] * scale[:, :, :, level]
        for corner in range(4):
            i, j = divmod(corner, 2)
            torch.add(row, i * down + j * right, out=rows[:, :, :, level, :, corner])
            torch.mul(vertical[i], horizontal[j], out=weights[:, :, :, level, :, corner])
        start += height * width
    return rows, weights


def bag(rows: Tensor, pixels: Tensor, weights: Tensor, per: int) -> Tensor:
    """Return (rows.numel() / per, D): sums of `per` consecutive rows of `pixels` (R, D) times their weights."""
    return F.embedding_bag(rows.view(-1, per), pixels, mode="sum", per_sample_weights=weights.view(-1, per))


def dots(grad: Tensor, pixels: Tensor, rows: Tensor) -> Tensor:
    """Return <grad of the bag, row> for every corner, in the shape of `rows`; `grad` (B, D) has a row per bag."""
    size = rows.numel() // len(grad)
    offsets = torch.arange(0, rows.numel(), size, dtype=rows.dtype, device=rows.device)
    bags = torch.arange(len(grad), dtype=rows.dtype, device=rows.device).repeat_interleave(size)
    products: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad, pixels, rows.flatten(), offsets, bags, 0
    )
    return products.view(rows.shape)


def derivatives(products: Tensor, y: Tensor, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return <grad, sample> and its derivatives with respect to y and x, each in the shape of y.

    `products` (…, 4) holds <grad, corner> of the points at (y, x) in a map of `size` (H, W).
    """
    (height, width), ((_, y), (_, x)) = size, (_axis(y, size[0]), _axis(x, size[1]))
    (y0, y1), (x0, x1) = _hats(y, height), _hats(x, width)
    (dy0, dy1), (dx0, dx1) = _slopes(y, height), _slopes(x, width)
    c00, c01, c10, c11 = products.unbind(-1)
    upper, lower = x0 * c00 + x1 * c01, x0 * c10 + x1 * c11
    d_x = dx0 * (y0 * c00 + y1 * c10) + dx1 * (y0 * c01 + y1 * c11)
    return y0 * upper + y1 * lower, dy0 * upper + dy1 * lower, d_x


class Scatter:
    """The adjoint of `bag`: gradients of the map (N, S, M, D). The order of all sums is fixed.

    Points are sorted by the row of their first corner, which gives each row a bag of queries. The other corners' sums
    are the same bags with other weights, one pixel further on.
    """

    def __init__(self, first: Tensor, per: int, shape: Sequence[int], spatial_shapes: Sequence[int]) -> None:
        """`first` holds the row of every point's first corner; `per` consecutive points share a gradient row."""
        n, s, m, _ = self.shape = tuple(shape)
        self.spatial_shapes = pairs(spatial_shapes)
        row, self.order = first.flatten().sort(stable=True)
        ends = torch.zeros(n * s * m + 1, dtype=row.dtype, device=row.device)
        self.ends = ends.index_add_(0, row + 1, torch.ones_like(row)).cumsum(0, dtype=row.dtype)
        self.query = (self.order // per).to(row.dtype)

    def __call__(self, grad: Tensor, weights: Tensor) -> Tensor:
        """Return per row of the map the sum of weight * grad over the corners on it.

        `grad` (points / per, D) and `weights` (points * 4, in any shape) are in the order of the points.
        """
        weights = weights.view(-1, 4).index_select(0, self.order)
        out = self._sums(grad, weights[:, 0])
        for corner in (1, 2, 3):
            i, j = divmod(corner, 2)
            part, start = self._sums(grad, weights[:, corner]), 0
            for height, width in self.spatial_shapes:
                area = slice(start, start + height * width)
                target, source = [t[:, area].unflatten(1, (height, width)) for t in (out, part)]
                target[:, i:, j:] += source[:, : height - i, : width - j]
                start += height * width
        return out

    def _sums(self, grad: Tensor, weights: Tensor) -> Tensor:
        out = F.embedding_bag(
            self.query,
            grad,
            self.ends,
            mode="sum",
            per_sample_weights=weights.contiguous(),
            include_last_offset=True,
        )
        return out.view(self.shape)


def gather(pixels: Tensor, size: tuple[int, int], y: Tensor, x: Tensor) -> Tensor:
    """Return samples (N, Q, M, …, D) of one level (N, H * W, M, D) at points (N, Q, M, …), in differentiable PyTorch.

    The compiler fuses gathers into one loop, which it cannot do with grid_sample. `pixels` is float32 or float64.
    """
    (n, s, m, d), (height, width), more = pixels.shape, size, (1,) * (y.dim() - 3)
    flat = pixels.reshape(n * s * m, d)
    image = torch.arange(n, device=pixels.device).view(n, 1, 1, *more) * s
    head = torch.arange(m, device=pixels.device).view(m, *more)
    inside = (x > -1) & (x < width) & (y > -1) & (y < height)
    x, y = torch.where(inside, x, -2), torch.where(inside, y, -2)  # both pixels of -2 are outside
    left, top = x.floor(), y.floor()
    out: Tensor | None = None
    for column, weight_x in ((left, 1 - (x - left)), (left + 1, x - left)):
        for row, weight_y in ((top, 1 - (y - top)), (top + 1, y - top)):
            valid = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            weight = torch.where(valid, weight_x * weight_y, 0)
            pixel = row.long().clamp(0, height - 1) * width + column.long().clamp(0, width - 1)
            part = flat[(pixel + image) * m + head] * weight.unsqueeze(-1)
            out = part if out is None else out + part
    assert out is not None
    return out
