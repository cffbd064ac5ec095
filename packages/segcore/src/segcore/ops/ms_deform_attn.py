"""Multi-scale deformable attention (Zhu et al., "Deformable DETR", ICLR 2021, equation 3).

Shapes, with L levels of H_l x W_l pixels, M heads of width D, Q queries and P points per level:

    value               (N, S, M, D)        S = sum of H_l * W_l; levels one after the other, each row by row
    spatial_shapes      H_1, W_1, H_2, W_2 … (pairs in the public function)
    sampling_locations  (N, Q, M, L, P, 2)  (x, y); 0 is the left or top edge of the map, 1 the right or bottom one
    attention_weights   (N, Q, M, L, P)     used as they are; the caller's softmax runs over L and P jointly
    output              (N, Q, M * D)       per head, the sum over l and p of weight * bilinear sample of level l

A point lies at x = loc_x * W - 0.5, y = loc_y * H - 0.5 in pixels; corners outside the map count as zero. A point gives
zero and gets zero gradients unless -1 < x < W and -1 < y < H, so also where it is NaN. At a pixel centre the slope is
the right-hand one. Values are taken to be finite.

Locations and weights are float32 in every computation (float64 with a float64 value), whatever the dtype of the value:
rounded to bfloat16, a location in a map 512 wide is off by up to a pixel. Sums are float32 too; the output has the
value's dtype, each gradient its input's.

`segcore::ms_deform_attn` and `segcore::ms_deform_attn_backward` are the operators, `reference` and `reference_backward`
their kernels on every device for which no other one is registered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from segcore.errors import UserError

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def ms_deform_attn(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Return the attended values (N, Q, M * D) in the value's dtype; the module's text has shapes and conventions.

    `spatial_shapes` holds a pair of ints (H, W) per level. Inputs may be non-contiguous, and each of float32, float64,
    bfloat16 or float16. Differentiable once. Raises ValueError naming the sizes that disagree.
    """
    shapes = [size for height, width in spatial_shapes for size in (height, width)]
    check(value, shapes, sampling_locations, attention_weights)
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        return with_grid_sample(value, shapes, sampling_locations, attention_weights)
    if torch.compiler.is_compiling():
        return with_gather(value, shapes, sampling_locations, attention_weights)
    return torch.ops.segcore.ms_deform_attn(value, shapes, sampling_locations, attention_weights)


def check(value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor) -> None:
    """Raise ValueError in one line when the inputs do not fit together; `spatial_shapes` is H_1, W_1, H_2, W_2 …"""
    v, loc, attn = value.shape, sampling_locations.shape, attention_weights.shape
    tensors = {"value": value, "sampling_locations": sampling_locations, "attention_weights": attention_weights}
    for (name, tensor), ndim in zip(tensors.items(), (4, 6, 5), strict=True):
        if tensor.dim() != ndim:
            raise UserError(f"ms_deform_attn: {name} has shape {tuple(tensor.shape)}; it needs {ndim} dimensions")
        if tensor.dtype not in DTYPES:
            raise UserError(
                f"ms_deform_attn: {name} is {tensor.dtype}; convert it to one of {', '.join(map(str, DTYPES))}"
            )
        if tensor.device != value.device:
            raise UserError(f"ms_deform_attn: {name} is on {tensor.device} but value on {value.device}; move it there")
    levels = len(spatial_shapes) // 2
    if levels == 0 or len(spatial_shapes) % 2 or any(size < 1 for size in spatial_shapes):
        raise UserError(
            f"ms_deform_attn: spatial_shapes {list(spatial_shapes)} must be H, W of at least one level, all >= 1"
        )
    if loc[5] != 2:
        raise UserError(f"ms_deform_attn: sampling_locations has shape {tuple(loc)}; its last dimension must be (x, y)")
    if loc[:5] != attn or loc[0] != v[0] or loc[2] != v[2] or loc[3] != levels:
        raise UserError(
            f"ms_deform_attn: value {tuple(v)}, sampling_locations {tuple(loc)}, attention_weights {tuple(attn)} "
            f"disagree for {levels} levels; they must be (N, S, M, D), (N, Q, M, L, P, 2), (N, Q, M, L, P)"
        )
    total = sum(h * w for h, w in _pairs(spatial_shapes))
    if total != v[1]:
        raise UserError(
            f"ms_deform_attn: value has {v[1]} pixels but spatial_shapes {list(spatial_shapes)} have {total}; "
            "make them equal"
        )


# The default kernels. One pixel of one head is a row of D contiguous numbers in `value`, and the points of one query
# and head are a bag of rows: embedding_bag sums such a bag with weights in one pass, so no temporary is wider than one
# number per corner. `benchmarks/ms_deform_attn.py` compares this with grid_sample.


def reference(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Return the output (N, Q, M * D), contiguous, on any device; no autograd."""
    check(value, spatial_shapes, sampling_locations, attention_weights)
    n, _, m, d = value.shape
    q = sampling_locations.shape[1]
    if not value.numel() or not attention_weights.numel():
        return value.new_zeros(n, q, m * d)
    pixels, loc, attn = _in_full_precision(value, sampling_locations, attention_weights)
    rows, weights = _corners(value.shape, spatial_shapes, loc, attn)
    out = F.embedding_bag(rows.view(n * q * m, -1), pixels, mode="sum", per_sample_weights=weights.view(n * q * m, -1))
    return out.view(n, q, m * d).to(value.dtype)


def reference_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of value, locations and weights, contiguous, on any device; no autograd."""
    if not value.numel() or not attention_weights.numel():
        inputs = (value, sampling_locations, attention_weights)
        grad_value, grad_loc, grad_attn = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in inputs)
        return grad_value, grad_loc, grad_attn
    pixels, loc, attn = _in_full_precision(value, sampling_locations, attention_weights)
    grad = grad_output.reshape(-1, value.shape[3]).to(pixels.dtype)
    rows, weights = _corners(value.shape, spatial_shapes, loc, attn)
    grad_loc, grad_attn = torch.empty_like(loc), torch.empty_like(attn)
    dots = _corner_dots(grad, pixels, rows)
    for level, (height, width) in enumerate(_pairs(spatial_shapes)):
        (_, y), (_, x) = _axis(loc[:, :, :, level, :, 1], height), _axis(loc[:, :, :, level, :, 0], width)
        (y0, y1), (x0, x1) = _hats(y, height), _hats(x, width)
        (dy0, dy1), (dx0, dx1) = _slopes(y, height), _slopes(x, width)
        c00, c01, c10, c11 = dots[:, :, :, level].unbind(-1)
        upper, lower = x0 * c00 + x1 * c01, x0 * c10 + x1 * c11
        weight = attn[:, :, :, level]
        grad_attn[:, :, :, level] = y0 * upper + y1 * lower
        grad_loc[:, :, :, level, :, 0] = (dx0 * (y0 * c00 + y1 * c10) + dx1 * (y0 * c01 + y1 * c11)) * weight * width
        grad_loc[:, :, :, level, :, 1] = (dy0 * upper + dy1 * lower) * weight * height
    grad_value = _scatter(grad, value.shape, spatial_shapes, rows[..., 0], weights)
    return grad_value.to(value.dtype), grad_loc.to(sampling_locations.dtype), grad_attn.to(attention_weights.dtype)


def _in_full_precision(
    value: Tensor, sampling_locations: Tensor, attention_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return value as rows (N * S * M, D), locations and weights, contiguous and in the dtype of the computation."""
    dtype = torch.promote_types(value.dtype, torch.float32)
    pixels = value.reshape(-1, value.shape[3]).to(dtype)
    return pixels, sampling_locations.to(dtype).contiguous(), attention_weights.to(dtype).contiguous()


def _pairs(spatial_shapes: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True))


def _axis(location: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return per point the first of its two pixels along an axis and the coordinate relative to that pixel.

    At the border the pair is moved into the map, so that no index needs a test; the coordinate then is outside [0, 1).
    """
    coordinate = torch.nan_to_num(location * size - 0.5, nan=-2.0)  # anywhere outside
    first = coordinate.floor().clamp_(0, max(size - 2, 0))
    return first, coordinate - first


def _hats(t: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the weights of both pixels, max(0, 1 - distance): zero by themselves for every point that is outside."""
    first, second = (1 - t.abs()).clamp_(min=0), (1 - (t - 1).abs_()).clamp_(min=0)
    return first, second if size > 1 else torch.zeros_like(second)


def _slopes(t: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the right-hand derivatives of `_hats`, and 0 at t = -1, where a point is outside."""
    before, between, after = [s.to(t.dtype) for s in ((t > -1) & (t < 0), (t >= 0) & (t < 1), (t >= 1) & (t < 2))]
    first, second = before - between, between - after
    return first, second if size > 1 else torch.zeros_like(second)


def _corners(shape: Sequence[int], spatial_shapes: Sequence[int], loc: Tensor, attn: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows and weights (N, Q, M, L, P, 4) of every point's corners (y0, x0), (y0, x1), (y1, x0), (y1, x1)."""
    n, s, m, _ = shape
    index = torch.int32 if max(n * s * m, 4 * attn.numel()) < 2**31 else torch.int64  # half the memory
    rows = torch.empty(*attn.shape, 4, dtype=index, device=attn.device)
    weights = torch.empty_like(rows, dtype=attn.dtype)
    image = torch.arange(n, dtype=index, device=attn.device).view(n, 1, 1, 1) * (s * m)
    base = image + torch.arange(m, dtype=index, device=attn.device).view(m, 1)
    start = 0
    for level, (height, width) in enumerate(_pairs(spatial_shapes)):
        (top, y), (left, x) = _axis(loc[:, :, :, level, :, 1], height), _axis(loc[:, :, :, level, :, 0], width)
        pixel = top.to(index).mul_(width).add_(left.to(index)).add_(start)
        row = pixel.mul_(m).add_(base)
        down, right = (width * m if height > 1 else 0), (m if width > 1 else 0)
        vertical, horizontal = [hat * attn[:, :, :, level] for hat in _hats(y, height)], _hats(x, width)
        for corner in range(4):
            i, j = divmod(corner, 2)
            torch.add(row, i * down + j * right, out=rows[:, :, :, level, :, corner])
            torch.mul(vertical[i], horizontal[j], out=weights[:, :, :, level, :, corner])
        start += height * width
    return rows, weights


def _corner_dots(grad: Tensor, pixels: Tensor, rows: Tensor) -> Tensor:
    """Return <grad of the bag, row> for every corner: the gradient of its weight, in the shape of `rows`."""
    size = rows.numel() // len(grad)
    offsets = torch.arange(0, rows.numel(), size, dtype=rows.dtype, device=rows.device)
    bag = torch.arange(len(grad), dtype=rows.dtype, device=rows.device).repeat_interleave(size)
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(grad, pixels, rows.flatten(), offsets, bag, 0)
    return dots.view(rows.shape)


def _scatter(
    grad: Tensor, shape: Sequence[int], spatial_shapes: Sequence[int], first: Tensor, weights: Tensor
) -> Tensor:
    """Return the gradient (N, S, M, D) of the value: per row the sum of weight * grad over the corners that lie on it.

    Points are sorted by the row of their first corner (N, Q, M, L, P), which gives each row a bag of queries. The other
    corners' sums are the same bags with other weights, one pixel further on. The order of all sums is fixed.
    """
    n, s, m, d = shape
    points = first.numel() // len(grad)
    row, order = first.flatten().sort(stable=True)
    ends = torch.zeros(n * s * m + 1, dtype=row.dtype, device=row.device)
    ends = ends.index_add_(0, row + 1, torch.ones_like(row)).cumsum(0, dtype=row.dtype)
    query = (order // points).to(row.dtype)
    weights = weights.view(-1, 4).index_select(0, order)

    def sums(corner: int) -> Tensor:
        weight = weights[:, corner].contiguous()
        out = F.embedding_bag(query, grad, ends, mode="sum", per_sample_weights=weight, include_last_offset=True)
        return out.view(n, s, m, d)

    out = sums(0)
    for corner in (1, 2, 3):
        i, j = divmod(corner, 2)
        part, start = sums(corner), 0
        for height, width in _pairs(spatial_shapes):
            target, source = [t[:, start : start + height * width].unflatten(1, (height, width)) for t in (out, part)]
            target[:, i:, j:] += source[:, : height - i, : width - j]
            start += height * width
    return out


# The same in differentiable PyTorch: the compiler fuses gathers into one loop, but not grid_sample; exporters know only
# grid_sample.


def with_gather(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Return the output as gathers, for torch.compile; point by point: a sum over points compiles to slow loops."""
    n, s, m, d = value.shape
    dtype = torch.promote_types(value.dtype, torch.float32)
    loc, attn, pixels = sampling_locations.to(dtype), attention_weights.to(dtype), value.reshape(n * s * m, d)
    image = torch.arange(n, device=value.device).view(n, 1, 1) * s
    head = torch.arange(m, device=value.device)
    out = loc.new_zeros(n, loc.shape[1], m, d)
    start = 0
    for level, (height, width) in enumerate(_pairs(spatial_shapes)):
        for point in range(attn.shape[4]):
            x, y = (loc[:, :, :, level, point, axis] * size - 0.5 for axis, size in enumerate((width, height)))
            inside = (x > -1) & (x < width) & (y > -1) & (y < height)
            x, y = torch.where(inside, x, -2), torch.where(inside, y, -2)  # both pixels of -2 are outside
            left, top = x.floor(), y.floor()
            for column, weight_x in ((left, 1 - (x - left)), (left + 1, x - left)):
                for row, weight_y in ((top, 1 - (y - top)), (top + 1, y - top)):
                    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
                    weight = torch.where(inside, weight_x * weight_y * attn[:, :, :, level, point], 0)
                    pixel = row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()
                    out = out + pixels[(pixel + start + image) * m + head].to(dtype) * weight.unsqueeze(-1)
        start += height * width
    return out.flatten(2).to(value.dtype)


def with_grid_sample(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Return the output as one grid_sample per level, for torch.export and ONNX."""
    n, _, m, d = value.shape
    q = sampling_locations.shape[1]
    dtype = torch.promote_types(value.dtype, torch.float32)
    loc, attn = sampling_locations.to(dtype), attention_weights.to(dtype)
    out = loc.new_zeros(n * m, d, q)
    maps = value.to(dtype).split([height * width for height, width in _pairs(spatial_shapes)], 1)
    for level, (height, width) in enumerate(_pairs(spatial_shapes)):
        image = maps[level].permute(0, 2, 3, 1).reshape(n * m, d, height, width)
        grid = (2 * loc[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)  # (N * M, Q, P, 2)
        weight = attn[:, :, :, level].transpose(1, 2).flatten(0, 1).unsqueeze(1)
        out = out + (F.grid_sample(image, grid, align_corners=False) * weight).sum(-1)
    return out.view(n, m * d, q).transpose(1, 2).to(value.dtype)


# Registration. A package of compiled kernels adds its own by device: torch.library.Library("segcore", "IMPL").

library = torch.library.Library("segcore", "FRAGMENT")  # must stay alive
_INPUTS = "Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights"
_TAGS = (torch.Tag.pt2_compliant_tag,)
library.define(f"ms_deform_attn({_INPUTS}) -> Tensor", tags=_TAGS)
library.define(f"ms_deform_attn_backward(Tensor grad_output, {_INPUTS}) -> (Tensor, Tensor, Tensor)", tags=_TAGS)
library.impl("ms_deform_attn", reference, "CompositeExplicitAutograd")
library.impl("ms_deform_attn_backward", reference_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("segcore::ms_deform_attn", lib=library)
def _fake(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    check(value, spatial_shapes, sampling_locations, attention_weights)
    return value.new_empty(value.shape[0], sampling_locations.shape[1], value.shape[2] * value.shape[3])


@torch.library.register_fake("segcore::ms_deform_attn_backward", lib=library)
def _fake_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, ...]:
    inputs = (value, sampling_locations, attention_weights)
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.spatial_shapes, sampling_locations, attention_weights = inputs
    ctx.save_for_backward(value, sampling_locations, attention_weights)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, loc, attn = ctx.saved_tensors
    backward = torch.ops.segcore.ms_deform_attn_backward
    grad_value, grad_loc, grad_attn = backward(grad_output.contiguous(), value, ctx.spatial_shapes, loc, attn)
    return grad_value, None, grad_loc, grad_attn


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("segcore::ms_deform_attn does not support double backward")  # without this it would return zeros


torch.library.register_autograd("segcore::ms_deform_attn", _backward, setup_context=_setup_context, lib=library)
torch.library.register_autograd("segcore::ms_deform_attn_backward", _no_double_backward, lib=library)
