"""Floating-point operations of our operators for `torch.utils.flop_counter`, which otherwise counts them as none.

Importing this module registers the formulas. A multiply-add is 2, as everywhere in the counter. Counted is the work on
channels; that on coordinates, a few operations per point, is not.

    ms_deform_attn            8 N Q M L P D     a point sums four corners: 4 multiply-adds per channel
    ms_deform_attn_backward   16 N Q M L P D    gradient of the value, and of the corners' weights: 4 each
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from segcore.ops import ms_deform_attn  # noqa: F401  (defines the operator)

Shape = Sequence[int]


@register_flop_formula(torch.ops.segcore.ms_deform_attn)
def _ms_deform_attn(value: Shape, spatial_shapes: Any, loc: Shape, attn: Shape, *_: Any, **__: Any) -> int:
    return 8 * math.prod(attn) * value[3]


@register_flop_formula(torch.ops.segcore.ms_deform_attn_backward)
def _ms_deform_attn_backward(
    grad: Shape, value: Shape, spatial_shapes: Any, loc: Shape, attn: Shape, *_: Any, **__: Any
) -> int:
    return 16 * math.prod(attn) * value[3]
