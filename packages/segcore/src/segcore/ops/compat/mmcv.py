"""Operators of `mmcv.ops`, 1.x and 2.x: multi-scale deformable attention and deformable convolution.

Layers have mmcv's constructor and forward arguments, initial values and state-dict keys, and are plain `nn.Module`s:
`init_cfg` and `norm_cfg` are accepted and unused, as mmcv's own layers leave them. Inside mmcv's configurations,
`CONV_LAYERS.register_module("DCNv2", module=ModulatedDeformConv2dPack, force=True)` puts them in place of mmcv's.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from segcore.errors import UserError
from segcore.ops import deform_conv
from segcore.ops.compat.deformable_detr import (
    MSDeformAttn,
    MSDeformAttnFunction,
    Shapes,
    Starts,
    ms_deform_attn_core_pytorch,
)
from segcore.ops.deform_unfold import Pair

__all__ = [
    "DeformConv2d",
    "DeformConv2dPack",
    "ModulatedDeformConv2d",
    "ModulatedDeformConv2dPack",
    "MultiScaleDeformableAttention",
    "MultiScaleDeformableAttnFunction",
    "deform_conv2d",
    "modulated_deform_conv2d",
    "multi_scale_deformable_attn_pytorch",
]

MultiScaleDeformableAttnFunction = MSDeformAttnFunction
multi_scale_deformable_attn_pytorch = ms_deform_attn_core_pytorch


class MultiScaleDeformableAttention(MSDeformAttn):
    """Deformable attention with dropout and the residual added; sequences are (Q, N, C) unless `batch_first`."""

    def __init__(
        self,
        embed_dims: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        im2col_step: int = 64,
        dropout: float = 0.1,
        batch_first: bool = False,
        norm_cfg: dict[str, Any] | None = None,
        init_cfg: Any = None,
        value_proj_ratio: float = 1.0,
    ) -> None:
        super().__init__(embed_dims, num_levels, num_heads, num_points)
        self.embed_dims, self.num_heads, self.num_levels, self.num_points = (
            embed_dims,
            num_heads,
            num_levels,
            num_points,
        )
        self.im2col_step, self.batch_first, self.norm_cfg, self.init_cfg = im2col_step, batch_first, norm_cfg, init_cfg
        self.dropout = nn.Dropout(dropout)
        if value_proj_ratio != 1:
            width = int(embed_dims * value_proj_ratio)
            if width % num_heads:
                raise UserError(f"MultiScaleDeformableAttention: {num_heads} heads do not divide values of {width}")
            self.value_proj, self.output_proj = nn.Linear(embed_dims, width), nn.Linear(width, embed_dims)
            self._reset_parameters()

    def init_weights(self) -> None:
        """Initialize all parameters again."""
        self._reset_parameters()

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Shapes | None = None,
        level_start_index: Starts = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the query's shape: identity (default: query) + dropout(attention of query + query_pos to value).

        value: (S, N, C), the query by default. `key` and further keywords are unused. reference_points (N, Q, L, 2 or
        4), key_padding_mask (N, S), spatial_shapes and level_start_index: as for `MSDeformAttn`, always batch first.
        """
        if reference_points is None or spatial_shapes is None or "residual" in kwargs:
            raise UserError(
                "MultiScaleDeformableAttention needs reference_points and spatial_shapes; write identity for `residual`"
            )
        value = query if value is None else value
        identity = query if identity is None else identity
        query = query if query_pos is None else query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)
        out = super().forward(query, reference_points, value, spatial_shapes, level_start_index, key_padding_mask)
        dropped: Tensor = self.dropout(out if self.batch_first else out.transpose(0, 1))
        return dropped + identity


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    deform_groups: int = 1,
    bias: bool = False,
    im2col_step: int = 32,
) -> Tensor:
    """Return the deformable convolution (N, Co, Ho, Wo), v1; a bias is refused, as in mmcv."""
    if bias:
        raise UserError("deform_conv2d: v1 has no bias in mmcv; add it to the output, or use modulated_deform_conv2d")
    _check(input, offset, weight, groups, deform_groups)
    return deform_conv.deform_conv2d(input, offset, weight, stride=stride, padding=padding, dilation=dilation)


def modulated_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    deform_groups: int = 1,
) -> Tensor:
    """Return the deformable convolution (N, Co, Ho, Wo), v2: samples are multiplied by the mask."""
    _check(input, offset, weight, groups, deform_groups)
    window = {"stride": stride, "padding": padding, "dilation": dilation}
    return deform_conv.deform_conv2d(input, offset, weight, bias, mask=mask, **window)


def _check(input: Tensor, offset: Tensor, weight: Tensor, groups: int, deform_groups: int) -> None:
    """Raise ValueError where the shapes, which decide, mean other groups than the arguments."""
    channels, offsets = groups * weight.shape[1], 2 * deform_groups * math.prod(weight.shape[2:])
    if (input.shape[1], offset.shape[1]) != (channels, offsets):
        raise UserError(
            f"deform_conv2d: input has {input.shape[1]} channels and offset {offset.shape[1]}; groups={groups} and "
            f"deform_groups={deform_groups} need {channels} and {offsets}"
        )


class DeformConv2d(deform_conv.DeformConv2d):
    """Deformable convolution v1 with offsets from outside. State dict: `weight`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = False,
        im2col_step: int = 32,
    ) -> None:
        if bias:
            raise UserError("DeformConv2d: v1 has no bias in mmcv; use ModulatedDeformConv2d")
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.deform_groups, self.im2col_step = deform_groups, im2col_step
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the weight for a ReLU after the layer."""
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:  # type: ignore[override]
        """Return (N, Co, Ho, Wo) for offsets (N, deform_groups * 2 * kh * kw, Ho, Wo)."""
        window = (self.stride, self.padding, self.dilation)
        return deform_conv2d(x, offset, self.weight, *window, self.groups, self.deform_groups)


class DeformConv2dPack(DeformConv2d):
    """The same with offsets predicted by `conv_offset`, at first zero. State dict: `weight`, `conv_offset.*`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conv_offset = deform_conv.predictor(self, 2 * self.deform_groups)

    def init_offset(self) -> None:
        """Set predicted offsets to zero."""
        for parameter in self.conv_offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return (N, Co, Ho, Wo)."""
        return super().forward(x, self.conv_offset(x))


class ModulatedDeformConv2d(deform_conv.DeformConv2d):
    """Deformable convolution v2 with offsets and mask from outside. State dict: `weight`, `bias`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool | str = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bool(bias))
        self.deform_groups = deform_groups
        self.init_weights()

    def init_weights(self) -> None:
        """Initialize the weight uniformly, within 1 / sqrt(inputs of a sum); biases and `conv_offset` with zeros."""
        bound = 1 / math.sqrt(self.in_channels * math.prod(self.kernel_size))
        nn.init.uniform_(self.weight, -bound, bound)
        for name, parameter in self.named_parameters():
            if name != "weight":
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        """Return (N, Co, Ho, Wo) for offsets (N, deform_groups * 2 * kh * kw, Ho, Wo) and half as many masks."""
        window = (self.stride, self.padding, self.dilation)
        return modulated_deform_conv2d(
            x, offset, mask, self.weight, self.bias, *window, self.groups, self.deform_groups
        )


class ModulatedDeformConv2dPack(ModulatedDeformConv2d):
    """The same with offsets and mask predicted by `conv_offset`. State dict: `weight`, `bias`, `conv_offset.*`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conv_offset = deform_conv.predictor(self, 3 * self.deform_groups)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return (N, Co, Ho, Wo)."""
        predicted = self.conv_offset(x)
        taps = predicted.shape[1] // 3
        return super().forward(x, predicted[:, : 2 * taps], predicted[:, 2 * taps :].sigmoid())
