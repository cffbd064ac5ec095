"""Deformable unfold: the columns of a deformable convolution (Dai et al., ICCV 2017; Zhu et al., CVPR 2019, section 3).

With G offset groups, K = kh * kw taps (k = i * kw + j) and an output of Ho x Wo positions:

    input   (N, C, H, W)           offset group g covers the channels [g * C / G, (g + 1) * C / G)
    offset  (N, G * 2 * K, Ho, Wo) channel g * 2K + 2k is dy, the next one dx, of tap k, in pixels
    mask    (N, G * K, Ho, Wo)     multiplies the samples
    output  (N, C * K, Ho * Wo)    channel c * K + k, position oy * Wo + ox

`window` is kernel, stride, padding and dilation, each (vertical, horizontal), in one flat list of eight numbers. A tap
samples at y = oy * stride - padding + i * dilation + dy, and x likewise; integers are pixel centers and
`segcore.ops.bilinear` defines the border. With zero offsets and no mask this is `torch.nn.Unfold`.

Positions and sums are float32 (float64 with a float64 input) for any dtype; each gradient has its input's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from segcore.errors import UserError
from segcore.ops import bilinear, registry

Pair = int | Sequence[int]


def deform_unfold(
    input: Tensor,
    offset: Tensor,
    *,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the columns (N, C * K, Ho * Wo) in the input's dtype; the module docstring gives shapes and conventions.

    The number of offset groups follows from the shape of `offset`. Inputs may be non-contiguous, and each of float32,
    float64, bfloat16 or float16. Differentiable once. Raises ValueError naming the sizes that disagree.
    """
    window = [*pair(kernel_size), *pair(stride), *pair(padding), *pair(dilation)]
    check("deform_unfold", input, offset, mask, window)
    if registry.exporting():
        return with_gather(input, offset, mask, window)
    result: Tensor = torch.ops.segcore.deform_unfold(input, offset, mask, window)
    return result


def pair(value: Pair) -> list[int]:
    """Return one number for both axes, or two given numbers, as a list (vertical, horizontal)."""
    return [value, value] if isinstance(value, int) else list(value)


def output_size(size: Sequence[int], window: Sequence[int]) -> tuple[int, int]:
    """Return (Ho, Wo) for an input of `size` (H, W)."""
    kernel, stride, padding, dilation = split(window)
    height, width = ((size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2))
    return height, width


def split(window: Sequence[int]) -> list[Sequence[int]]:
    """Return kernel, stride, padding and dilation, each (vertical, horizontal), of a flat window of eight numbers."""
    return [window[i : i + 2] for i in range(0, 8, 2)]


def check(
    op: str,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    window: Sequence[int],
) -> tuple[int, int, int]:
    """Return the offset groups and (Ho, Wo); raise a one-line ValueError when the inputs are inconsistent."""
    registry.check_tensors(op, {"input": (input, 4), "offset": (offset, 4), "mask": (mask, 4)})
    if len(window) != 8:
        raise UserError(f"{op}: kernel_size, stride, padding and dilation must be one or two numbers each")
    for name, values in zip(("kernel_size", "stride", "padding", "dilation"), split(window), strict=True):
        least = 0 if name == "padding" else 1
        if min(values) < least:
            raise UserError(f"{op}: {name} {list(values)} must be >= {least}")
    n, channels, *size = input.shape
    height, width = output_size(size, window)
    if height < 1 or width < 1:
        raise UserError(f"{op}: an input of {size} gives an output of {height} x {width}; pad it or shrink the kernel")
    taps = window[0] * window[1]
    groups = offset.shape[1] // (2 * taps)
    if groups < 1 or offset.shape[1] % (2 * taps):
        raise UserError(f"{op}: offset has {offset.shape[1]} channels; it needs a multiple of 2 * {taps} taps")
    if channels % groups:
        raise UserError(f"{op}: input has {channels} channels, which {groups} offset groups do not divide")
    if offset.shape != (n, groups * 2 * taps, height, width):
        expected = (n, groups * 2 * taps, height, width)
        raise UserError(f"{op}: offset has shape {tuple(offset.shape)}; it must be {expected}")
    if mask is not None and mask.shape != (n, groups * taps, height, width):
        expected = (n, groups * taps, height, width)
        raise UserError(f"{op}: mask has shape {tuple(mask.shape)}; it must be {expected}")
    return groups, height, width


# The default kernels. Channels go last, so that a pixel of one offset group is a row.


def reference(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    window: Sequence[int],
) -> Tensor:
    """Return the columns (N, C * K, Ho * Wo), contiguous, on any device; no autograd."""
    shape = _shape(input, offset, mask, window)
    if not input.numel():
        return input.new_zeros(shape)
    return sample(input, offset, mask, window).permute(0, 2, 4, 3, 1).to(input.dtype).reshape(shape).contiguous()


def reference_backward(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    window: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of input, offset and mask (empty without one), contiguous, on any device; no autograd."""
    groups, *_ = check("deform_unfold", input, offset, mask, window)
    if not input.numel():
        grad_input, grad_offset, grad_mask = (registry.empty_gradient(t, input).zero_() for t in (input, offset, mask))
        return grad_input, grad_offset, grad_mask
    n, channels = input.shape[:2]
    grad = grad_output.reshape(n, groups, channels // groups, window[0] * window[1], -1).permute(0, 4, 1, 3, 2)
    return sample_backward(grad, input, offset, mask, window)


def sample(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    window: Sequence[int],
) -> Tensor:
    """Return the samples (N, Ho * Wo, G, K, C / G), contiguous, in float32 or float64, times the mask."""
    groups = offset.shape[1] // (2 * window[0] * window[1])
    pixels, size = _pixels(input, groups), list(input.shape[2:])
    y, x = places(offset, input.dtype, window)
    rows, weights = bilinear.corners(pixels.shape, size, [(y, x)], _by_place(mask, y))
    return bilinear.bag(rows, pixels.flatten(0, 2), weights, 4).view(*y.shape, -1)


def sample_backward(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    window: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of input, offset and mask from the gradient of the samples (N, Ho * Wo, G, K, C / G)."""
    groups = offset.shape[1] // (2 * window[0] * window[1])
    pixels, (height, width) = _pixels(input, groups), input.shape[2:]
    grad = grad.to(pixels.dtype).reshape(-1, pixels.shape[3])
    y, x = places(offset, input.dtype, window)
    scale = _by_place(mask, y)
    rows, weights = bilinear.corners(pixels.shape, (height, width), [(y, x)], scale)
    products = bilinear.dots(grad, pixels.flatten(0, 2), rows)
    value, d_y, d_x = bilinear.derivatives(products.squeeze(3), y, x, (height, width))
    d_place = torch.stack((d_y, d_x), -1)
    if scale is not None:
        d_place *= scale.squeeze(3).unsqueeze(-1)
    grad_pixels = bilinear.Scatter(rows[..., 0], 1, pixels.shape, (height, width))(grad, weights)
    grad_input = grad_pixels.flatten(2).transpose(1, 2).to(input.dtype).reshape(input.shape).contiguous()
    grad_offset = d_place.permute(0, 2, 3, 4, 1).to(offset.dtype).reshape(offset.shape).contiguous()
    grad_mask = input.new_empty(0)
    if mask is not None:
        grad_mask = value.permute(0, 2, 3, 1).to(mask.dtype).reshape(mask.shape).contiguous()
    return grad_input, grad_offset, grad_mask


def with_gather(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    window: Sequence[int],
) -> Tensor:
    """Return the columns in differentiable PyTorch, for torch.export."""
    (n, channels, height, width), taps = input.shape, window[0] * window[1]
    pixels = _pixels(input, offset.shape[1] // (2 * taps))
    y, x = places(offset, input.dtype, window)
    columns = bilinear.gather(pixels, (height, width), y, x)  # (N, L, G, K, C / G)
    weight = _by_place(mask, y)
    if weight is not None:
        columns = columns * weight.transpose(3, 4)
    return columns.permute(0, 2, 4, 3, 1).reshape(n, channels * taps, -1).to(input.dtype)


def places(
    offset: Tensor,
    dtype: torch.dtype,
    window: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Return y and x (N, Ho * Wo, G, K) of the taps in pixels, for an input of `dtype`."""
    device, dtype = offset.device, torch.promote_types(dtype, torch.float32)
    height, width = offset.shape[2:]
    kernel, stride, padding, dilation = split(window)
    top, left = (
        torch.arange(size, device=device, dtype=dtype) * stride[i] - padding[i]
        for i, size in enumerate((height, width))
    )
    tap_y, tap_x = (torch.arange(kernel[i], device=device, dtype=dtype) * dilation[i] for i in range(2))
    moved = offset.to(dtype).reshape(len(offset), -1, window[0] * window[1], 2, height * width).permute(0, 4, 1, 2, 3)
    y = top.repeat_interleave(width).view(-1, 1, 1) + tap_y.repeat_interleave(kernel[1])
    x = left.repeat(height).view(-1, 1, 1) + tap_x.repeat(kernel[0])
    return y + moved[..., 0], x + moved[..., 1]


def _pixels(input: Tensor, groups: int) -> Tensor:
    """Return the input as (N, H * W, G, C / G), contiguous, in the dtype of the computation."""
    dtype = torch.promote_types(input.dtype, torch.float32)
    pixels: Tensor = input.flatten(2).transpose(1, 2).to(dtype).contiguous().unflatten(2, (groups, -1))
    return pixels


def _by_place(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Return the mask as (N, Ho * Wo, G, 1, K), where the coordinates `like` are (N, Ho * Wo, G, K)."""
    if mask is None:
        return None
    taps_last = mask.to(like.dtype).reshape(len(mask), *like.shape[2:], like.shape[1]).permute(0, 3, 1, 2)
    return taps_last.unsqueeze(3)


def _shape(input: Tensor, offset: Tensor, mask: Tensor | None, window: Sequence[int]) -> tuple[int, ...]:
    _, height, width = check("deform_unfold", input, offset, mask, window)
    return len(input), input.shape[1] * window[0] * window[1], height * width


registry.define(
    "deform_unfold",
    "Tensor input, Tensor offset, Tensor? mask, SymInt[] window",
    reference,
    reference_backward,
    _shape,
)
