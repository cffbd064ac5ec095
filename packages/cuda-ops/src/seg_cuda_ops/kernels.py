"""The operators' kernels: checks, layout and allocation here, arithmetic in an extension module.

Extensions take addresses of contiguous arrays and sizes. `Backend` is one of them with what it can do; the functions
below are the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MaybeTensor = Tensor | None
Window = Sequence[int]


@dataclass(frozen=True)
class Backend:
    """An extension module.

    `call(name, dtype, tensors, *sizes)` runs the function `name` for values of `dtype` on tensors or None.
    `half` says that values may be half precision; if not they are converted, so that sums are float32 either way.
    """

    call: Callable[..., None]
    half: bool

    def values(self, *tensors: Tensor) -> list[Tensor]:
        """Return features contiguous and in a dtype that the extension takes."""
        return [t.contiguous() if self.half else exact(t, t) for t in tensors]


def exact(tensor: Tensor, values: Tensor) -> Tensor:
    """Return coordinates or weights contiguous, in float32, or float64 beside values of float64."""
    return tensor.to(torch.promote_types(values.dtype, torch.float32)).contiguous()


def maybe(function: Callable[..., Tensor], tensor: MaybeTensor, *args: Any) -> MaybeTensor:
    """Return `function(tensor, …)`, or None for None."""
    return None if tensor is None else function(tensor, *args)


def as_inputs(grads: Sequence[MaybeTensor], inputs: Sequence[MaybeTensor], like: Tensor) -> tuple[Tensor, ...]:
    """Return contiguous gradients in their inputs' dtypes; an empty one for an input that is None."""
    pairs = zip(grads, inputs, strict=True)
    return tuple(like.new_empty(0) if g is None or t is None else packed(g.to(t.dtype)) for g, t in pairs)


def packed(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor, whose strides are the usual ones also where a size is 1 or 0."""
    return tensor.contiguous().view(-1).view(tensor.shape)


def kernels(checks: Mapping[str, Callable[..., Any]], backend: Backend) -> dict[str, Callable[..., Any]]:
    """Return the kernel of every operator and gradient by name.

    `checks` holds for every operator NAME_shape, which checks the inputs and returns the shape of the output.
    """

    def shape_of(name: str, *inputs: Any, grad: MaybeTensor = None) -> list[int]:
        shape = list(checks[f"{name}_shape"](*inputs))
        if grad is not None and list(grad.shape) != shape:
            raise ValueError(f"{name}: the gradient has shape {tuple(grad.shape)}; it must be {tuple(shape)}")
        return shape

    def ms_deform_attn(value: Tensor, shapes: Window, loc: Tensor, attn: Tensor) -> Tensor:
        shape = shape_of("ms_deform_attn", value, shapes, loc, attn)
        (values,) = backend.values(value)
        out = values.new_empty(shape)
        tensors = [values, exact(loc, value), exact(attn, value), None, out, None, None, None]
        backend.call("ms_deform_attn", out.dtype, tensors, shapes, attn_sizes(value, attn))
        return out.to(value.dtype)

    def ms_deform_attn_backward(
        grad: Tensor, value: Tensor, shapes: Window, loc: Tensor, attn: Tensor
    ) -> tuple[Tensor, ...]:
        shape_of("ms_deform_attn", value, shapes, loc, attn, grad=grad)
        values, grads = backend.values(value, grad.to(value.dtype))
        x, a = exact(loc, value), exact(attn, value)
        out = torch.zeros(value.shape, dtype=a.dtype, device=a.device), torch.empty_like(x), torch.empty_like(a)
        tensors = [values, x, a, grads, None, *out]
        backend.call("ms_deform_attn_backward", values.dtype, tensors, shapes, attn_sizes(value, attn))
        return as_inputs(out, (value, loc, attn), value)

    def deform_unfold(input: Tensor, offset: Tensor, mask: MaybeTensor, window: Window) -> Tensor:
        shape = shape_of("deform_unfold", input, offset, mask, window)
        return packed(columns(input, offset, mask, window).permute(0, 3, 2, 1).reshape(shape).to(input.dtype))

    def deform_unfold_backward(
        grad: Tensor, input: Tensor, offset: Tensor, mask: MaybeTensor, window: Window
    ) -> tuple[Tensor, ...]:
        _, rows, places = shape_of("deform_unfold", input, offset, mask, window, grad=grad)
        taps = window[0] * window[1]
        by_place = grad.to(input.dtype).reshape(len(grad), rows // taps, taps, places).permute(0, 3, 2, 1)
        return as_inputs(columns_backward(by_place, input, offset, mask, window), (input, offset, mask), input)

    def deform_conv2d(input: Tensor, offset: Tensor, weight: Tensor, mask: MaybeTensor, window: Window) -> Tensor:
        out = input.new_empty(shape_of("deform_conv2d", input, offset, weight, mask, window))
        rows = matrix(weight, input, backend)
        with torch.autocast(input.device.type, enabled=False):  # it would reach into the product
            for i in range(len(input)):  # an image at a time: its columns are nine times as large as its input
                part = columns(input[i : i + 1], offset[i : i + 1], maybe(Tensor.narrow, mask, 0, i, 1), window)
                out[i] = torch.bmm(rows, by_group(part, len(rows)).transpose(1, 2)).view(out.shape[1:])
        return out

    def deform_conv2d_backward(
        grad: Tensor, input: Tensor, offset: Tensor, weight: Tensor, mask: MaybeTensor, window: Window
    ) -> tuple[Tensor, ...]:
        shape_of("deform_conv2d", input, offset, weight, mask, window, grad=grad)
        rows = matrix(weight, input, backend)
        of_rows = torch.zeros_like(rows, dtype=torch.promote_types(rows.dtype, torch.float32))
        inputs = input, offset, mask
        grads = as_inputs([maybe(torch.empty_like, t) for t in inputs], inputs, input)
        with torch.autocast(input.device.type, enabled=False):
            for i in range(len(input)):
                image = input[i : i + 1], offset[i : i + 1], maybe(Tensor.narrow, mask, 0, i, 1)
                part = columns(*image, window)
                of_out = grad[i].to(rows.dtype).reshape(len(rows), rows.shape[1], -1)
                of_rows += torch.bmm(of_out, by_group(part, len(rows)))
                of_part = torch.bmm(of_out.transpose(1, 2), rows).unflatten(2, (part.shape[2], -1))
                by_place = of_part.permute(1, 2, 0, 3).flatten(2).unsqueeze(0)
                for target, g in zip(grads, columns_backward(by_place, *image, window), strict=True):
                    if g is not None:
                        target[i : i + 1] = g
        taps_last = of_rows.view(len(weight), *weight.shape[2:], weight.shape[1])
        grad_weight = packed(taps_last.permute(0, 3, 1, 2).to(weight.dtype))
        return grads[0], grads[1], grad_weight, grads[2]

    def columns(input: Tensor, offset: Tensor, mask: MaybeTensor, window: Window) -> Tensor:
        """Return the samples (N, L, K, C) of an input (N, C, H, W)."""
        (pixels,) = backend.values(input.permute(0, 2, 3, 1))
        places, taps = offset.shape[2] * offset.shape[3], window[0] * window[1]
        out = pixels.new_empty(len(input), places, taps, input.shape[1])
        places_and_mask = exact(offset, input), maybe(exact, mask, input)
        tensors = [pixels, *places_and_mask, None, out, None, None, None]
        backend.call("columns", out.dtype, tensors, column_sizes(input, offset, taps), window)
        return out

    def columns_backward(
        grad: Tensor, input: Tensor, offset: Tensor, mask: MaybeTensor, window: Window
    ) -> list[MaybeTensor]:
        """Return the gradients of input (N, C, H, W), offset and mask from that of the samples (N, L, K, C)."""
        pixels, grads = backend.values(input.permute(0, 2, 3, 1), grad)
        places, masks = exact(offset, input), maybe(exact, mask, input)
        of_pixels = torch.zeros(pixels.shape, dtype=places.dtype, device=places.device)
        out: list[MaybeTensor] = [of_pixels, torch.empty_like(places), maybe(torch.empty_like, masks)]
        sizes = column_sizes(input, offset, window[0] * window[1])
        backend.call("columns_backward", pixels.dtype, [pixels, places, masks, grads, None, *out], sizes, window)
        return [of_pixels.permute(0, 3, 1, 2), *out[1:]]

    def deform_local_attn(
        q: Tensor, k: Tensor, v: Tensor, offset: Tensor, bias: MaybeTensor, window: Window, scale: float
    ) -> Tensor:
        shape = shape_of("deform_local_attn", q, k, v, offset, bias, window, scale)
        qkv = backend.values(q, k, v)
        out = qkv[0].new_empty(shape)
        tensors = [*qkv, exact(offset, q), maybe(exact, bias, q), None, out, *[None] * 6]
        backend.call("local_attn", out.dtype, tensors, local_sizes(q, window), scale)
        return out.to(q.dtype)

    def deform_local_attn_backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, offset: Tensor, bias: MaybeTensor, window: Window, scale: float
    ) -> tuple[Tensor, ...]:
        shape = shape_of("deform_local_attn", q, k, v, offset, bias, window, scale, grad=grad)
        *qkv, grads = backend.values(q, k, v, grad.to(q.dtype))
        places, biases = exact(offset, q), maybe(exact, bias, q)
        of_k, of_v = (torch.zeros(shape, dtype=places.dtype, device=places.device) for _ in range(2))
        out = [torch.empty_like(of_k), of_k, of_v, torch.empty_like(places), maybe(torch.empty_like, biases)]
        tensors = [*qkv, places, biases, grads, None, *out, torch.empty_like(places)]
        backend.call("local_attn_backward", grads.dtype, tensors, local_sizes(q, window), scale)
        return as_inputs(out, (q, k, v, offset, bias), q)

    return {
        "ms_deform_attn": ms_deform_attn,
        "ms_deform_attn_backward": ms_deform_attn_backward,
        "deform_unfold": deform_unfold,
        "deform_unfold_backward": deform_unfold_backward,
        "deform_conv2d": deform_conv2d,
        "deform_conv2d_backward": deform_conv2d_backward,
        "deform_local_attn": deform_local_attn,
        "deform_local_attn_backward": deform_local_attn_backward,
    }


def attn_sizes(value: Tensor, attn: Tensor) -> list[int]:
    """Return N, S, M, D, Q, L and P."""
    return [*value.shape, attn.shape[1], attn.shape[3], attn.shape[4]]


def local_sizes(q: Tensor, window: Window) -> list[int]:
    """Return B, height, width, M, D and the kernel."""
    return [len(q), *window[:2], *q.shape[2:], *window[2:]]


def column_sizes(input: Tensor, offset: Tensor, taps: int) -> list[int]:
    """Return N, H, W, offset groups, channels of a group, and the height and width of the output."""
    (n, channels, height, width), groups = input.shape, offset.shape[1] // (2 * taps)
    return [n, height, width, groups, channels // groups, *offset.shape[2:]]


def matrix(weight: Tensor, input: Tensor, backend: Backend) -> Tensor:
    """Return the weight as (groups, Co / groups, K * C / groups), taps slow, in the dtype of the columns."""
    groups = input.shape[1] // weight.shape[1]
    (rows,) = backend.values(weight.flatten(2).transpose(1, 2))
    return rows.view(groups, len(weight) // groups, -1)


def by_group(columns: Tensor, groups: int) -> Tensor:
    """Return samples (1, L, K, C) of one image as (groups, L, K * C / groups)."""
    _, places, taps, channels = columns.shape
    return columns.view(places, taps, groups, channels // groups).permute(2, 0, 1, 3).flatten(2)
