"""Multi-scale deformable attention (Zhu et al., "Deformable DETR", ICLR 2021, equation 3).

Shapes, with L levels of H_l x W_l pixels, M heads of width D, Q queries and P points per level:

    value               (N, S, M, D)        S = sum of H_l * W_l; levels concatenated, each row by row
    spatial_shapes      H_1, W_1, H_2, W_2 … (pairs in the public function)
    sampling_locations  (N, Q, M, L, P, 2)  (x, y); 0 is the left or top edge of the map, 1 the right or bottom one
    attention_weights   (N, Q, M, L, P)     used unchanged; the caller's softmax runs over L and P jointly
    output              (N, Q, M * D)       per head, the sum over l and p of weight * bilinear sample of level l

A point lies at x = loc_x * W - 0.5, y = loc_y * H - 0.5 in pixels; corners outside the map count as zero. A point gives
zero and gets zero gradients unless -1 < x < W and -1 < y < H, hence also for NaN. At a pixel center the slope is
the right-hand one. Values are assumed finite.

Locations and weights are float32 in every computation (float64 with a float64 value), for any dtype of the value:
rounded to bfloat16, a location in a map 512 wide is off by up to a pixel. Sums are also float32; the output has the
value's dtype, each gradient its input's dtype.

`segcore::ms_deform_attn` and `segcore::ms_deform_attn_backward` are the operators, `reference` and `reference_backward`
their kernels on every device without a registered one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segcore.errors import UserError
from segcore.ops import bilinear, registry


def ms_deform_attn(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Return the attended values (N, Q, M * D) in the value's dtype; the module docstring gives shapes and conventions.

    `spatial_shapes` holds a pair of ints (H, W) per level. Inputs may be non-contiguous, and each of float32, float64,
    bfloat16 or float16. Differentiable once. Raises ValueError naming the sizes that disagree.
    """
    shapes = [size for height, width in spatial_shapes for size in (height, width)]
    check(value, shapes, sampling_locations, attention_weights)
    if registry.exporting():
        return with_grid_sample(value, shapes, sampling_locations, attention_weights)
    if torch.compiler.is_compiling() and not registry.compiled(value.device):
        return with_gather(value, shapes, sampling_locations, attention_weights)
    result: Tensor = torch.ops.segcore.ms_deform_attn(value, shapes, sampling_locations, attention_weights)
    return result


def check(value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor) -> None:
    """Raise a one-line ValueError when the inputs are inconsistent; `spatial_shapes` is H_1, W_1, H_2, W_2 …"""
    v, loc, attn = value.shape, sampling_locations.shape, attention_weights.shape
    registry.check_tensors(
        "ms_deform_attn",
        {
            "value": (value, 4),
            "sampling_locations": (sampling_locations, 6),
            "attention_weights": (attention_weights, 5),
        },
    )
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
    total = sum(h * w for h, w in bilinear.pairs(spatial_shapes))
    if total != v[1]:
        raise UserError(
            f"ms_deform_attn: value has {v[1]} pixels but spatial_shapes {list(spatial_shapes)} have {total}; "
            "make them equal"
        )


# The default kernels; `benchmarks/ops_cpu.py` compares them with grid_sample and with the compiled ones.


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
    rows, weights = bilinear.corners(value.shape, spatial_shapes, _points(spatial_shapes, loc), attn)
    return bilinear.bag(rows, pixels, weights, rows[0, 0, 0].numel()).view(n, q, m * d).to(value.dtype)


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
    points = _points(spatial_shapes, loc)
    rows, weights = bilinear.corners(value.shape, spatial_shapes, points, attn)
    grad_loc, grad_attn = torch.empty_like(loc), torch.empty_like(attn)
    dots = bilinear.dots(grad, pixels, rows)
    for level, (size, (y, x)) in enumerate(zip(bilinear.pairs(spatial_shapes), points, strict=True)):
        sample, d_y, d_x = bilinear.derivatives(dots[:, :, :, level], y, x, size)
        weight = attn[:, :, :, level]
        grad_attn[:, :, :, level] = sample
        grad_loc[:, :, :, level, :, 0] = d_x * weight * size[1]
        grad_loc[:, :, :, level, :, 1] = d_y * weight * size[0]
    grad_value = bilinear.Scatter(rows[..., 0], attn[0, 0, 0].numel(), value.shape, spatial_shapes)(grad, weights)
    return grad_value.to(value.dtype), grad_loc.to(sampling_locations.dtype), grad_attn.to(attention_weights.dtype)


def _in_full_precision(
    value: Tensor, sampling_locations: Tensor, attention_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return value as rows (N * S * M, D), locations and weights, contiguous and in the dtype of the computation."""
    dtype = torch.promote_types(value.dtype, torch.float32)
    pixels = value.reshape(-1, value.shape[3]).to(dtype)
    return pixels, sampling_locations.to(dtype).contiguous(), attention_weights.to(dtype).contiguous()


def _points(spatial_shapes: Sequence[int], loc: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return per level y and x (N, Q, M, P) in pixels."""
    by_level = zip(bilinear.pairs(spatial_shapes), loc.unbind(3), strict=True)
    return [(points[..., 1] * height - 0.5, points[..., 0] * width - 0.5) for (height, width), points in by_level]


# The same in differentiable PyTorch: gathers for the compiler, grid_sample for exporters, which support only that.


def with_gather(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Return the output as gathers, for torch.compile, point by point: a sum over points compiles to slow loops."""
    n, _, m, d = value.shape
    dtype = torch.promote_types(value.dtype, torch.float32)
    loc, attn = sampling_locations.to(dtype), attention_weights.to(dtype)
    sizes = bilinear.pairs(spatial_shapes)
    maps = value.to(dtype).split([height * width for height, width in sizes], 1)
    out = loc.new_zeros(n, loc.shape[1], m, d)
    for level, (ys, xs) in enumerate(_points(spatial_shapes, loc)):
        for point in range(attn.shape[4]):
            sample = bilinear.gather(maps[level], sizes[level], ys[..., point], xs[..., point])
            out = out + sample * attn[:, :, :, level, point, None]
    return out.flatten(2).to(value.dtype)


def with_grid_sample(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Return the output as one grid_sample per level, for torch.export and ONNX."""
    n, _, m, d = value.shape
    q = sampling_locations.shape[1]
    sizes = bilinear.pairs(spatial_shapes)
    dtype = torch.promote_types(value.dtype, torch.float32)
    loc, attn = sampling_locations.to(dtype), attention_weights.to(dtype)
    out = loc.new_zeros(n * m, d, q)
    maps = value.to(dtype).split([height * width for height, width in sizes], 1)
    for level, (height, width) in enumerate(sizes):
        image = maps[level].permute(0, 2, 3, 1).reshape(n * m, d, height, width)
        grid = (2 * loc[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)  # (N * M, Q, P, 2)
        weight = attn[:, :, :, level].transpose(1, 2).flatten(0, 1).unsqueeze(1)
        out = out + (F.grid_sample(image, grid, align_corners=False) * weight).sum(-1)
    return out.view(n, m * d, q).transpose(1, 2).to(value.dtype)


def _shape(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> tuple[int, ...]:
    check(value, spatial_shapes, sampling_locations, attention_weights)
    return value.shape[0], sampling_locations.shape[1], value.shape[2] * value.shape[3]


registry.define(
    "ms_deform_attn",
    "Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights",
    reference,
    reference_backward,
    _shape,
)


def reset_projections(layer: Any, heads: int, levels: int, points: int) -> None:
    """Initialize the four projections of a layer of deformable attention, under the names of Deformable DETR.

    The weights are even; head k looks in compass direction k, its point i is i + 1 pixels away.
    """
    for part in (layer.sampling_offsets, layer.attention_weights):
        nn.init.zeros_(part.weight)
        nn.init.zeros_(part.bias)
    for part in (layer.value_proj, layer.output_proj):
        nn.init.xavier_uniform_(part.weight)
        nn.init.zeros_(part.bias)
    angle = torch.arange(heads, dtype=torch.float32) * (2 * math.pi / heads)
    direction = torch.stack([angle.cos(), angle.sin()], -1)
    direction = direction / direction.abs().amax(-1, keepdim=True)
    steps = torch.arange(1, points + 1)
    bias = (direction[:, None, None] * steps[:, None]).expand(-1, levels, -1, -1)
    with torch.no_grad():
        layer.sampling_offsets.bias.copy_(bias.flatten())
