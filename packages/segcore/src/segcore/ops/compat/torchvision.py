"""`torchvision.ops.deform_conv2d` and `DeformConv2d`, also in bfloat16; see `segcore.ops.deform_conv` for the shapes.

One number differs: where a tap lies exactly one pixel before the first row or column, as at zero offsets with padding,
torchvision's gradient of that offset is the slope on one side, and here it is 0.
"""

from __future__ import annotations

from torch import Tensor

from segcore.ops import deform_conv
from segcore.ops.deform_conv import DeformConv2d
from segcore.ops.deform_unfold import Pair

__all__ = ["DeformConv2d", "deform_conv2d"]


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """Return (N, Co, Ho, Wo) in the input's dtype."""
    window = {"stride": stride, "padding": padding, "dilation": dilation}
    return deform_conv.deform_conv2d(input, offset, weight, bias, mask=mask, **window)
