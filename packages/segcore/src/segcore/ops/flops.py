"""Floating-point operations of our operators and oneDNN's for `torch.utils.flop_counter`, which counts them as none.

Importing this module registers the formulas. A multiply-add counts 2, as always in the counter, and a bilinear sample 8
per channel, for its four corners. Work on coordinates and in the softmax, a few operations per point, is not counted.

    ms_deform_attn       8 N Q M L P D
    deform_unfold        8 N C K Ho Wo
    deform_conv2d        8 N C K Ho Wo + 2 N Co (C / groups) K Ho Wo
    deform_local_attn    20 B N M K D       samples of key and value, the logits and the weighted sum

    products, 1x1 convolutions   2 per output and input channel

A gradient, `NAME_backward`, counts twice as much as its operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from segcore import ops  # noqa: F401  (defines the operators)

Shape = Sequence[int]


def _ms_deform_attn(value: Shape, spatial_shapes: Shape, locations: Shape, weights: Shape) -> int:
    return 8 * math.prod(weights) * value[3]


def _deform_unfold(input: Shape, offset: Shape, mask: Shape | None, window: Shape) -> int:
    return 8 * input[0] * input[1] * window[0] * window[1] * offset[2] * offset[3]


def _deform_conv2d(input: Shape, offset: Shape, weight: Shape, mask: Shape | None, window: Shape) -> int:
    return _deform_unfold(input, offset, mask, window) + 2 * input[0] * math.prod(weight) * offset[2] * offset[3]


def _deform_local_attn(q: Shape, k: Shape, v: Shape, offset: Shape, *_: Any) -> int:
    return 20 * math.prod(q) * (offset[3] // 2)


def _products(input: Shape, weight: Shape, *_: Any, out_shape: Shape) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def _register(name: str, formula: Callable[..., int]) -> None:
    def forward(*args: Any, out_shape: Any = None) -> int:
        return formula(*args)

    def backward(grad_output: Shape, *args: Any, out_shape: Any = None) -> int:
        return 2 * formula(*args)

    register_flop_formula(getattr(torch.ops.segcore, name))(forward)
    register_flop_formula(getattr(torch.ops.segcore, f"{name}_backward"))(backward)


for _formula in (_ms_deform_attn, _deform_unfold, _deform_conv2d, _deform_local_attn):
    _register(_formula.__name__[1:], _formula)

for _operator in ("mkldnn::_linear_pointwise", "aten::mkldnn_convolution"):
    _space, _, _name = _operator.partition("::")
    if hasattr(getattr(torch.ops, _space), _name):  # private: may be missing
        register_flop_formula(getattr(getattr(torch.ops, _space), _name))(_products)
