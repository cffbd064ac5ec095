"""The operator of Deformable DETR (Zhu et al., ICLR 2021): its extension module, its autograd function, its layer.

This module takes the place of the compiled extension:
`sys.modules["MultiScaleDeformableAttention"] = segcore.ops.compat.deformable_detr`.

Shapes and conventions are those of `segcore.ops.ms_deform_attn`. `spatial_shapes` (L, 2) holds H and W per level, and
`level_start_index` (L,) the first row of each level, or None; both are tensors or sequences of ints. Reading them from
a CUDA tensor waits for the device, as no other part does, and torch.compile cannot trace it: pass sequences there.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from segcore.errors import UserError
from segcore.ops.ms_deform_attn import check, ms_deform_attn, reset_projections

Shapes = Tensor | Sequence[Sequence[int]]
Starts = Tensor | Sequence[int] | None


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Shapes,
    level_start_index: Starts,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    im2col_step: int = 64,
) -> Tensor:
    """Return the attended values (N, Q, M * D), differentiable."""
    return ms_deform_attn(value, sizes(spatial_shapes, level_start_index), sampling_loc, attn_weight)


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Shapes,
    level_start_index: Starts,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    grad_output: Tensor,
    im2col_step: int = 64,
) -> list[Tensor]:
    """Return the gradients of value, locations and weights for the output's gradient (N, Q, M * D)."""
    flat = [size for pair in sizes(spatial_shapes, level_start_index) for size in pair]
    check(value, flat, sampling_loc, attn_weight)
    shape = (*sampling_loc.shape[:2], value.shape[2] * value.shape[3])
    if grad_output.shape != shape:
        raise UserError(f"ms_deform_attn: grad_output has shape {tuple(grad_output.shape)}; it must be {shape}")
    inputs = (value, flat, sampling_loc, attn_weight)
    return list(torch.ops.segcore.ms_deform_attn_backward(grad_output.contiguous(), *inputs))


def ms_deform_attn_core_pytorch(
    value: Tensor, value_spatial_shapes: Shapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Return the attended values (N, Q, M * D), differentiable; there is one implementation under both names."""
    return ms_deform_attn_forward(value, value_spatial_shapes, None, sampling_locations, attention_weights)


class MSDeformAttnFunction:
    """`MSDeformAttnFunction.apply(…)`; no torch.autograd.Function, since the operator itself is differentiable."""

    apply = staticmethod(ms_deform_attn_forward)


def sizes(spatial_shapes: Shapes, level_start_index: Starts) -> list[tuple[int, int]]:
    """Return (H, W) per level as ints; raise ValueError unless the levels follow each other without gaps."""
    levels = [(height, width) for height, width in _ints(spatial_shapes)]
    starts = [0, *accumulate(height * width for height, width in levels)][:-1]
    if level_start_index is not None and (given := list(_ints(level_start_index))) != starts:
        raise UserError(f"ms_deform_attn: level_start_index is {given}; levels of {levels} must start at {starts}")
    return levels


def _ints(values: Any) -> Any:
    return values.tolist() if isinstance(values, Tensor) else values


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention with its four projections, as Deformable DETR's layers use it."""

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4) -> None:
        super().__init__()
        if d_model % n_heads:
            raise UserError(f"MSDeformAttn: {n_heads} heads do not divide a width of {d_model}")
        self.im2col_step = 64
        self.d_model, self.n_levels, self.n_heads, self.n_points = d_model, n_levels, n_heads, n_points
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Initialize with even weights; head k looks in compass direction k, its point i is i + 1 pixels away."""
        reset_projections(self, self.n_heads, self.n_levels, self.n_points)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Shapes,
        input_level_start_index: Starts = None,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Return (N, Q, C) for queries (N, Q, C) that attend to levels (N, S, C), concatenated, each row by row.

        reference_points: (N, Q, L, 2) as (x, y) in [0, 1], with offsets in pixels; or (N, Q, L, 4) as (x, y, w, h),
        with offsets in half boxes per number of points. input_padding_mask: (N, S), True where a value is padding.
        """
        shape = (*query.shape[:2], self.n_heads, self.n_levels, self.n_points)
        value = self.value_proj(input_flatten)
        if input_padding_mask is not None:
            value = value.masked_fill(input_padding_mask.unsqueeze(-1), 0.0)
        offsets = self.sampling_offsets(query).view(*shape, 2)
        weights = self.attention_weights(query).view(*shape[:3], -1).softmax(-1).view(shape)
        levels = sizes(input_spatial_shapes, input_level_start_index)
        # In half precision a location would be off by a pixel on wide maps.
        points = reference_points.to(torch.promote_types(offsets.dtype, torch.float32))[:, :, None, :, None]
        if points.shape[-1] == 2:
            # Filled on the device: it would wait for a copy from the host.
            sides = [points.new_full((1,), size) for height, width in levels for size in (width, height)]
            locations = points + offsets / torch.cat(sides).view(-1, 1, 2)
        elif points.shape[-1] == 4:
            locations = points[..., :2] + offsets / self.n_points * points[..., 2:] * 0.5
        else:
            raise UserError(
                f"MSDeformAttn: reference_points has shape {tuple(reference_points.shape)}; its last dimension must be "
                "(x, y) or (x, y, w, h)"
            )
        value = value.unflatten(-1, (self.n_heads, -1))
        attended: Tensor = self.output_proj(ms_deform_attn(value, levels, locations, weights))
        return attended
