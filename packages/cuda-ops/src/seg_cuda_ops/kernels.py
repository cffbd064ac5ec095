"""The operators' kernels: checks, layout and allocation here, arithmetic in an extension module.

Extensions take addresses of contiguous arrays, or of parts of such, and sizes. `Backend` is one of them with what it
can do; the functions below are the same for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    `chunk` is how many samples of a convolution are worth computing at a time: what the processor's cache holds.
    """

    call: Callable[..., None]
    half: bool
    chunk: int

    def cast(self, tensor: Tensor) -> Tensor:
        """Return features in a dtype that the extension takes."""
        return tensor if self.half else tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    def values(self, *tensors: Tensor) -> list[Tensor]:
        """Return features contiguous and in a dtype that the extension takes."""
        return [self.cast(t).contiguous() for t in tensors]

    def tokens(self, *tensors: Tensor) -> tuple[list[Tensor], int]:
        """Return features (B, N, M, D) in a dtype that the extension takes, and the numbers from token to token.

        Parts of one projection, whose tokens have the same distance, are not copied.
        """
        parts = [self.cast(t) for t in tensors]
        (_, n, m, d), step = parts[0].shape, parts[0].stride(1)
        if any(t.stride() != (n * step, step, d, 1) for t in parts):
            parts, step = [t.contiguous() for t in parts], m * d
        return parts, step

    def swapped(self, tensor: Tensor) -> Tensor:
        """Return (N, A, K, B) as (N, B, K, A), contiguous."""
        view = tensor.permute(0, 3, 2, 1)
        if tensor.is_cuda or view.is_contiguous():
            return view.contiguous()
        out = tensor.new_empty(view.shape)
        self.call("transpose", out.dtype, [tensor.contiguous(), out], list(tensor.shape))  # torch's takes twice as long
        return out


class Samples:
    """The samples of a deformable convolution on an input (N, C, H, W): K taps at each of N * L places."""

    def __init__(self, backend: Backend, input: Tensor, offset: Tensor, mask: MaybeTensor, window: Window) -> None:
        self.backend, self.window, self.inputs = backend, window, (input, offset, mask)
        (n, channels, *size), self.taps = input.shape, window[0] * window[1]
        offset_groups, self.places = offset.shape[1] // (2 * self.taps), offset.shape[2] * offset.shape[3]
        self.pixels = backend.swapped(backend.cast(input).reshape(n, channels, 1, math.prod(size)))
        self.offset, self.mask = exact(offset, input), maybe(exact, mask, input)
        self.sizes = [n, *size, offset_groups, channels // offset_groups, *offset.shape[2:]]
        self.room = self.pixels.new_empty(0)

    def chunks(self) -> Iterator[tuple[slice, slice]]:
        """Yield images and their places, as many as are worth computing at a time: part of one image, or whole ones."""
        step = max(256, self.backend.chunk // (self.taps * self.pixels.shape[3]))
        images = max(1, step // max(1, self.places))
        for image in range(0, len(self.pixels), images):
            for first in range(0, self.places, step):
                yield slice(image, image + images), slice(first, first + step)

    def columns(self, first: int, count: int) -> Tensor:
        """Return the samples (count, K, C) of places from `first` on, in memory that the next call uses again."""
        if count > len(self.room):  # fresh memory for every chunk would cost more than it takes to fill it
            self.room = self.pixels.new_empty(count, self.taps, self.pixels.shape[3])
        out = self.room[:count]
        tensors = [self.pixels, self.offset, self.mask, None, out, None, None, None]
        self.backend.call("columns", out.dtype, tensors, [*self.sizes, first, count], self.window)
        return out

    def of(self, images: slice, places: slice, shape: Sequence[int], groups: int) -> Tensor:
        """Return a chunk's samples as (images * groups, L, K * C / groups); `shape` is (images, …, L)."""
        part = self.columns(images.start * self.places + places.start, shape[0] * shape[-1])
        by_group = part.view(shape[0], shape[-1], self.taps, groups, -1).permute(0, 3, 1, 2, 4)
        return by_group.flatten(3).flatten(0, 1)

    def unfolded(self, out: Tensor) -> Tensor:
        """Fill (N, C * K, L) with the samples of all places; only the extension for CUDA does."""
        tensors = [self.pixels, self.offset, self.mask, None, out, None, None, None]
        self.backend.call("unfold", out.dtype, tensors, [*self.sizes, 0, 0], self.window)
        return out

    def new_gradients(self) -> list[MaybeTensor]:
        """Return room for the gradients of pixels, offset and mask."""
        of_pixels = torch.zeros(self.pixels.shape, dtype=self.offset.dtype, device=self.offset.device)
        return [of_pixels, torch.empty_like(self.offset), maybe(torch.empty_like, self.mask)]

    def backward(self, grad: Tensor, first: int, out: list[MaybeTensor]) -> None:
        """Add to or set gradients, from those of the samples (count, K, C) of places from `first` on."""
        tensors = [self.pixels, self.offset, self.mask, grad.contiguous(), None, *out]
        sizes = [*self.sizes, first, len(grad)]
        self.backend.call("columns_backward", self.pixels.dtype, tensors, sizes, self.window)

    def as_inputs(self, grads: list[MaybeTensor]) -> tuple[Tensor, ...]:
        """Return the gradients of input, offset and mask as `as_inputs` does."""
        input = self.inputs[0]
        assert grads[0] is not None
        by_channel = self.backend.swapped(grads[0]).view(input.shape)
        return as_inputs([by_channel, *grads[1:]], self.inputs, input)


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


NAMES = ("ms_deform_attn", "deform_unfold", "deform_conv2d", "deform_local_attn")


class Kernels:
    """The kernels of every operator and of its gradient, NAME and NAME_backward, with segcore's signatures."""

    def __init__(self, checks: Mapping[str, Callable[..., Any]], backend: Backend) -> None:
        self.checks, self.backend = checks, backend

    def _shape(self, name: str, *inputs: Any, grad: MaybeTensor = None) -> list[int]:
        shape = list(self.checks[f"{name}_shape"](*inputs))
        if grad is not None and list(grad.shape) != shape:
            raise ValueError(f"{name}: the gradient has shape {tuple(grad.shape)}; it must be {tuple(shape)}")
        return shape

    def ms_deform_attn(self, value: Tensor, shapes: Window, loc: Tensor, attn: Tensor) -> Tensor:
        shape = self._shape("ms_deform_attn", value, shapes, loc, attn)
        (values,) = self.backend.values(value)
        out = values.new_empty(shape)
        tensors = [values, exact(loc, value), exact(attn, value), None, out, None, None, None]
        self.backend.call("ms_deform_attn", out.dtype, tensors, shapes, attn_sizes(value, attn))
        return out.to(value.dtype)

    def ms_deform_attn_backward(
        self, grad: Tensor, value: Tensor, shapes: Window, loc: Tensor, attn: Tensor
    ) -> tuple[Tensor, ...]:
        self._shape("ms_deform_attn", value, shapes, loc, attn, grad=grad)
        values, grads = self.backend.values(value, grad.to(value.dtype))
        x, a = exact(loc, value), exact(attn, value)
        out = torch.zeros(value.shape, dtype=a.dtype, device=a.device), torch.empty_like(x), torch.empty_like(a)
        tensors = [values, x, a, grads, None, *out]
        self.backend.call("ms_deform_attn_backward", values.dtype, tensors, shapes, attn_sizes(value, attn))
        return as_inputs(out, (value, loc, attn), value)

    def deform_unfold(self, input: Tensor, offset: Tensor, mask: MaybeTensor, window: Window) -> Tensor:
        shape = self._shape("deform_unfold", input, offset, mask, window)
        samples = Samples(self.backend, input, offset, mask, window)
        if input.is_cuda:
            return samples.unfolded(input.new_empty(shape))
        columns = samples.columns(0, len(input) * samples.places)
        by_place = columns.view(len(input), samples.places, samples.taps, input.shape[1])
        return packed(self.backend.swapped(by_place).view(shape).to(input.dtype))

    def deform_unfold_backward(
        self, grad: Tensor, input: Tensor, offset: Tensor, mask: MaybeTensor, window: Window
    ) -> tuple[Tensor, ...]:
        self._shape("deform_unfold", input, offset, mask, window, grad=grad)
        samples = Samples(self.backend, input, offset, mask, window)
        by_channel = self.backend.cast(grad.to(input.dtype)).reshape(*input.shape[:2], samples.taps, samples.places)
        grads = samples.new_gradients()
        samples.backward(self.backend.swapped(by_channel).flatten(0, 1), 0, grads)
        return samples.as_inputs(grads)

    def deform_conv2d(self, input: Tensor, offset: Tensor, weight: Tensor, mask: MaybeTensor, window: Window) -> Tensor:
        out = input.new_empty(self._shape("deform_conv2d", input, offset, weight, mask, window))
        samples, rows = Samples(self.backend, input, offset, mask, window), matrix(weight, input, self.backend)
        by_place = out.view(len(input), len(rows), rows.shape[1], samples.places)
        with torch.autocast(input.device.type, enabled=False):  # it would reach into the product
            for images, chunk in samples.chunks():
                target = by_place[images, :, :, chunk]
                columns = samples.of(images, chunk, target.shape, len(rows))
                multiply(repeated(rows, len(target)), columns.transpose(1, 2), target.flatten(0, 1))
        return out

    def deform_conv2d_backward(
        self, grad: Tensor, input: Tensor, offset: Tensor, weight: Tensor, mask: MaybeTensor, window: Window
    ) -> tuple[Tensor, ...]:
        self._shape("deform_conv2d", input, offset, weight, mask, window, grad=grad)
        samples, rows = Samples(self.backend, input, offset, mask, window), matrix(weight, input, self.backend)
        of_rows = torch.zeros_like(rows, dtype=torch.promote_types(rows.dtype, torch.float32))
        grads = samples.new_gradients()
        by_place = grad.to(rows.dtype).reshape(len(input), len(rows), rows.shape[1], samples.places)
        with torch.autocast(input.device.type, enabled=False):
            for images, chunk in samples.chunks():
                of_out = by_place[images, :, :, chunk]
                count, places = len(of_out), of_out.shape[3]
                columns = samples.of(images, chunk, of_out.shape, len(rows))
                of_out = of_out.flatten(0, 1)
                of_rows += torch.bmm(of_out, columns).view(count, *rows.shape).sum(0)
                of_part = torch.bmm(of_out.transpose(1, 2), repeated(rows, count))
                of_part = of_part.view(count, len(rows), places, samples.taps, -1).permute(0, 2, 3, 1, 4)
                samples.backward(of_part.flatten(3).flatten(0, 1), images.start * samples.places + chunk.start, grads)
        of_input, of_offset, of_mask = samples.as_inputs(grads)
        taps_last = of_rows.view(len(weight), *weight.shape[2:], weight.shape[1])
        return of_input, of_offset, packed(taps_last.permute(0, 3, 1, 2).to(weight.dtype)), of_mask

    def deform_local_attn(
        self, q: Tensor, k: Tensor, v: Tensor, offset: Tensor, bias: MaybeTensor, window: Window, scale: float
    ) -> Tensor:
        shape = self._shape("deform_local_attn", q, k, v, offset, bias, window, scale)
        qkv, step = self.backend.tokens(q, k, v)
        out = qkv[0].new_empty(shape)
        tensors = [*qkv, exact(offset, q), maybe(exact, bias, q), None, out, *[None] * 6]
        self.backend.call("local_attn", out.dtype, tensors, [*local_sizes(q, window), step], scale)
        return out.to(q.dtype)

    def deform_local_attn_backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        offset: Tensor,
        bias: MaybeTensor,
        window: Window,
        scale: float,
    ) -> tuple[Tensor, ...]:
        shape = self._shape("deform_local_attn", q, k, v, offset, bias, window, scale, grad=grad)
        qkv, step = self.backend.tokens(q, k, v)
        (grads,) = self.backend.values(grad.to(q.dtype))
        places, biases = exact(offset, q), maybe(exact, bias, q)
        # Those of keys and values are added to: in one buffer, unless they are the outputs, which must lie apart.
        rooms = [2] if places.dtype != q.dtype else [1, 1]
        buffers = [torch.zeros(n, *shape, dtype=places.dtype, device=places.device) for n in rooms]
        of_qkv = [places.new_empty(shape), *(part for buffer in buffers for part in buffer)]
        more = [torch.empty_like(places), maybe(torch.empty_like, biases)]
        factors = None if q.is_cuda else torch.empty_like(places)
        tensors = [*qkv, places, biases, grads, None, *of_qkv, *more, factors]
        self.backend.call("local_attn_backward", grads.dtype, tensors, [*local_sizes(q, window), step], scale)
        return as_inputs([*of_qkv, *more], (q, k, v, offset, bias), q)


def kernels(checks: Mapping[str, Callable[..., Any]], backend: Backend) -> dict[str, Callable[..., Any]]:
    """Return the kernel of every operator and gradient by name.

    `checks` holds for every operator NAME_shape, which checks the inputs and returns the shape of the output.
    """
    found = Kernels(checks, backend)
    return {name: getattr(found, name) for operator in NAMES for name in (operator, f"{operator}_backward")}


def resize_argmax(
    checks: Mapping[str, Callable[..., Any]], call: Callable[..., None]
) -> Callable[[Tensor, Window, Window, bool, bool], tuple[Tensor, Tensor]]:
    """Return the kernel of the operator without gradient, with segcore's signature; for the CPU alone.

    Plain PyTorch keeps float64 and the case of one class, which is decided by another rule.
    """
    default = checks["resize_argmax"]

    def kernel(
        logits: Tensor, size: Window, crop: Window, align_corners: bool, confidence: bool
    ) -> tuple[Tensor, Tensor]:
        shape = list(checks["resize_argmax_shape"](logits, size, crop))
        if logits.shape[1] == 1 or logits.dtype == torch.float64:
            found: tuple[Tensor, Tensor] = default(logits, size, crop, align_corners, confidence)
            return found
        values = logits.float().contiguous()
        classes = values.new_empty(shape, dtype=torch.uint8 if values.shape[1] <= 256 else torch.int32)
        certain = values.new_empty(shape if confidence else 0)
        tensors = [values, classes, certain if confidence else None]
        call("resize_argmax", values.dtype, tensors, [*values.shape, *size, *crop], align_corners)
        return classes, certain

    return kernel


def attn_sizes(value: Tensor, attn: Tensor) -> list[int]:
    """Return N, S, M, D, Q, L and P."""
    return [*value.shape, attn.shape[1], attn.shape[3], attn.shape[4]]


def local_sizes(q: Tensor, window: Window) -> list[int]:
    """Return B, height, width, M, D and the kernel."""
    return [len(q), *window[:2], *q.shape[2:], *window[2:]]


def matrix(weight: Tensor, input: Tensor, backend: Backend) -> Tensor:
    """Return the weight as (groups, Co / groups, K * C / groups), taps slow, in the dtype of the columns."""
    groups = input.shape[1] // weight.shape[1]
    (rows,) = backend.values(weight.flatten(2).transpose(1, 2))
    return rows.view(groups, len(weight) // groups, -1)


def repeated(rows: Tensor, images: int) -> Tensor:
    """Return the matrices (groups, …) once per image, (images * groups, …)."""
    return rows.expand(images, *rows.shape).flatten(0, 1)


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Set `out` to the products of matrices, without a copy where it has their dtype."""
    if out.dtype == a.dtype:
        torch.bmm(a, b, out=out)
    else:
        out.copy_(torch.bmm(a, b))
