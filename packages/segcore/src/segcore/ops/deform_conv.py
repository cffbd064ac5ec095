"""Deformable convolution, v1 (Dai et al., ICCV 2017) and v2 with a mask (Zhu et al., CVPR 2019).

    input   (N, C, H, W)      weight  (Co, C / groups, kh, kw)      bias  (Co,)
    offset  (N, G * 2 * K, Ho, Wo)   mask  (N, G * K, Ho, Wo)        as in `segcore.ops.deform_unfold`
    output  (N, Co, Ho, Wo)

The convolution of the samples of deform_unfold; with zero offsets and a mask of ones it equals `F.conv2d`. Offset
groups and the groups of the convolution are independent; both follow from the shapes. Input and weight share a dtype;
sums are float32 (float64 with a float64 input), offset and mask may stay float32 with half precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from segcore.errors import UserError
from segcore.ops import registry
from segcore.ops.deform_unfold import Pair, pair, sample, sample_backward, split
from segcore.ops.deform_unfold import check as check_unfold
from segcore.ops.deform_unfold import with_gather as unfold_with_gather

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the output (N, Co, Ho, Wo) in the dtype of the input; the module docstring gives shapes and conventions.

    The arguments are torchvision's. Under autocast input and weight are cast as for any convolution, but not offset
    and mask. Inputs may be non-contiguous, and each of float32, float64, bfloat16 or float16. Differentiable
    once. Raises ValueError naming the sizes that disagree. In ONNX it becomes DeformConv of opset 19.
    """
    if torch.is_autocast_enabled(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight = (t if t.dtype == torch.float64 else t.to(dtype) for t in (input, weight))
    window = [*weight.shape[2:], *pair(stride), *pair(padding), *pair(dilation)]
    check(input, offset, weight, mask, window)
    registry.check_tensors("deform_conv2d", {"input": (input, 4), "bias": (bias, 1)})
    if bias is not None and bias.shape != weight.shape[:1]:
        raise UserError(f"deform_conv2d: bias has shape {tuple(bias.shape)}; it must be {tuple(weight.shape[:1])}")
    if torch.onnx.is_in_onnx_export():
        return _onnx(input, offset, weight, bias, mask, window)
    function = with_gather if registry.exporting() else torch.ops.segcore.deform_conv2d
    out = function(input, offset, weight, mask, window)
    return out if bias is None else out + bias.to(out.dtype).view(-1, 1, 1)


def check(
    input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, window: Sequence[int]
) -> tuple[int, int, int]:
    """Return the groups of the convolution and (Ho, Wo); raise ValueError when the inputs are inconsistent."""
    op = "deform_conv2d"
    registry.check_tensors(op, {"input": (input, 4), "weight": (weight, 4)})
    _, height, width = check_unfold(op, input, offset, mask, window)
    channels, (out, inner) = input.shape[1], weight.shape[:2]
    if weight.dtype != input.dtype:
        raise UserError(f"{op}: weight is {weight.dtype} but input {input.dtype}; convert one of them")
    if inner < 1 or channels % inner or out % (channels // inner):
        raise UserError(
            f"{op}: weight {tuple(weight.shape)} does not fit an input of {channels} channels; it must be "
            "(Co, C / groups, kh, kw) with groups that divide C and Co"
        )
    if tuple(weight.shape[2:]) != tuple(window[:2]):
        raise UserError(f"{op}: weight {tuple(weight.shape)} does not have the kernel size {list(window[:2])}")
    return channels // inner, height, width


# The default kernels: columns of one image at a time, and a matrix product.


def reference(input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, window: Sequence[int]) -> Tensor:
    """Return the output (N, Co, Ho, Wo) without bias, contiguous, on any device; no autograd."""
    groups, height, width = check(input, offset, weight, mask, window)
    out = input.new_zeros(len(input), len(weight), height, width)
    if not input.numel():
        return out
    matrix = _matrix(weight, groups)
    for i, image in enumerate(_images(input, offset, mask)):
        products = torch.bmm(_columns(sample(*image, window), groups), matrix)  # (groups, L, Co / groups)
        out[i] = products.transpose(1, 2).reshape(out.shape[1:])
    return out


def reference_backward(
    grad_output: Tensor, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, window: Sequence[int]
) -> Gradients:
    """Return the gradients of input, offset, weight and mask (empty without one), contiguous; no autograd."""
    groups, *_ = check(input, offset, weight, mask, window)
    grads = [registry.empty_gradient(t, input).zero_() for t in (input, offset, weight, mask)]
    if input.numel():
        matrix = _matrix(weight, groups)
        grad_matrix = torch.zeros_like(matrix)
        for i, image in enumerate(_images(input, offset, mask)):
            samples = sample(*image, window)
            grad = grad_output[i].reshape(groups, matrix.shape[2], -1).to(matrix.dtype)
            grad_matrix.baddbmm_(_columns(samples, groups).transpose(1, 2), grad.transpose(1, 2))
            of_columns = torch.bmm(grad.transpose(1, 2), matrix.transpose(1, 2))  # (groups, L, K * C / groups)
            of_samples = _from_columns(of_columns, samples.shape)
            for target, part in zip(
                (grads[0], grads[1], grads[3]), sample_backward(of_samples, *image, window), strict=True
            ):
                if target.numel():
                    target[i] = part[0]
        taps_last = grad_matrix.transpose(1, 2).reshape(len(weight), *weight.shape[2:], weight.shape[1])
        grads[2].copy_(taps_last.permute(0, 3, 1, 2))
    grad_input, grad_offset, grad_weight, grad_mask = grads
    return grad_input, grad_offset, grad_weight, grad_mask


def with_gather(input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, window: Sequence[int]) -> Tensor:
    """Return the output in differentiable PyTorch, for torch.export."""
    groups, height, width = check(input, offset, weight, mask, window)
    columns: Tensor = unfold_with_gather(input, offset, mask, window).unflatten(1, (groups, -1))
    matrix: Tensor = weight.flatten(1).unflatten(0, (groups, -1))
    return (matrix @ columns).reshape(len(input), -1, height, width)


def _images(input: Tensor, offset: Tensor, mask: Tensor | None) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    masks = [None] * len(input) if mask is None else mask.split(1)
    return list(zip(input.split(1), offset.split(1), masks, strict=True))


def _matrix(weight: Tensor, groups: int) -> Tensor:
    """Return the weight as (groups, K * C / groups, Co / groups), taps slow, in the dtype of the computation."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(dtype).flatten(2).transpose(1, 2).reshape(groups, len(weight) // groups, -1).transpose(1, 2)


def _columns(samples: Tensor, groups: int) -> Tensor:
    """Return samples (1, L, G, K, C / G) as (groups, L, K * C / groups), taps slow."""
    _, places, _, taps, _ = samples.shape
    return samples.transpose(2, 3).reshape(places, taps, groups, -1).permute(2, 0, 1, 3).flatten(2)


def _from_columns(columns: Tensor, shape: Sequence[int]) -> Tensor:
    """Return columns (groups, L, K * C / groups) as samples of `shape` (1, L, G, K, C / G)."""
    _, places, offset_groups, taps, _ = shape
    split: Tensor = columns.unflatten(2, (taps, -1))
    return split.permute(1, 2, 0, 3).reshape(1, places, taps, offset_groups, -1).transpose(2, 3)


def _onnx(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    window: Sequence[int],
) -> Tensor:
    """Return the node DeformConv, which requires one dtype for all tensors and padding on all four sides."""
    groups, height, width = check(input, offset, weight, mask, window)
    kernel, stride, padding, dilation = (list(values) for values in split(window))
    inputs = [input, weight, *(None if t is None else t.to(input.dtype) for t in (offset, bias, mask))]
    attributes: dict[str, Any] = {
        "kernel_shape": kernel,
        "strides": stride,
        "pads": padding * 2,
        "dilations": dilation,
        "group": groups,
        "offset_group": offset.shape[1] // (2 * math.prod(kernel)),
    }
    shape = (len(input), len(weight), height, width)
    return torch.onnx.ops.symbolic("DeformConv", inputs, attributes, dtype=input.dtype, shape=shape, version=19)


def _shape(
    input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, window: Sequence[int]
) -> tuple[int, ...]:
    _, height, width = check(input, offset, weight, mask, window)
    return len(input), len(weight), height, width


registry.define(
    "deform_conv2d",
    "Tensor input, Tensor offset, Tensor weight, Tensor? mask, SymInt[] window",
    reference,
    reference_backward,
    _shape,
)


class DeformConv2d(nn.Module):
    """Deformable convolution v1 with offsets from outside: `layer(input, offset)`, or v2 with a mask as third argument.

    Parameters `weight` and `bias` have the names, shapes and initial values of `nn.Conv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if in_channels % groups or out_channels % groups:
            raise UserError(f"DeformConv2d: groups {groups} must divide {in_channels} and {out_channels} channels")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        window = (tuple(pair(value)) for value in (kernel_size, stride, padding, dilation))
        self.kernel_size, self.stride, self.padding, self.dilation = window
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (N, Co, Ho, Wo)."""
        return deform_conv2d(
            input,
            offset,
            self.weight,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            mask=mask,
        )


class ModulatedDeformConv2d(DeformConv2d):
    """Deformable convolution v2 that predicts its own offsets and mask with `conv_offset`, as detectors use it.

    `conv_offset` gives 3 * G * K channels in three chunks: two of offsets, whose order (dy, dx) per tap stays as it is,
    and one of masks before their sigmoid. It starts at zero: offsets of zero and masks of a half.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        offset_groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.conv_offset = predictor(self, 3 * offset_groups)

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """Return (N, Co, Ho, Wo)."""
        first, second, mask = self.conv_offset(input).chunk(3, 1)
        return super().forward(input, torch.cat((first, second), 1), mask.sigmoid())


def predictor(layer: DeformConv2d, per_tap: int) -> nn.Conv2d:
    """Return a convolution over the layer's windows with `per_tap` channels for each of its taps, all zero at first."""
    windows = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    size, stride, padding, dilation = ((window[0], window[1]) for window in windows)
    conv = nn.Conv2d(layer.in_channels, per_tap * math.prod(size), size, stride, padding, dilation)
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv
