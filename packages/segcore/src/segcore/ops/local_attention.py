"""Deformable local attention (Zhang et al., "Dynamic Graph Message Passing Networks for Visual Recognition", 2022).

Every token of a map attends to a small window around itself, whose positions it shifts itself. With M heads of width D,
N = height * width tokens row by row, and K = kh * kw taps:

    q, k, v   (B, N, M, D)      layout of a linear layer's output, which needs no permutation
    offset    (B, N, M, 2 * K)  (dy, dx) per tap in pixels, added to the tap's position in the window
    bias      (B, M, N, K)      added to the logits
    output    (B, N, M, D)      sum over the taps j of softmax_j(scale * <q, k_j> + bias_j) * v_j

k_j and v_j are bilinear samples at the same position, pixel + tap + offset, as `segcore.ops.bilinear` defines them:
outside the map they are zero vectors and stay in the softmax. Neither the forward nor the backward pass builds
K-fold keys or values: only the inputs are saved. `window` is (height, width, kh, kw).

Positions and sums are float32 (float64 with float64 inputs) for any dtype; each gradient has its input's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from segcore.errors import UserError
from segcore.ops import bilinear, registry

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def deform_local_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offset: Tensor,
    bias: Tensor | None = None,
    *,
    height: int,
    width: int,
    kernel_size: int | tuple[int, int] = 3,
    scale: float | None = None,
) -> Tensor:
    """Return the attended values (B, N, M, D) in the dtype of q; the module docstring gives shapes and conventions.

    `kernel_size` is odd: the window is centered on its token; `scale` defaults to D ** -0.5. q, k and v share a dtype
    of float32, float64, bfloat16 or float16; offset and bias may have another dtype. Inputs may be non-contiguous.
    Differentiable once. Raises ValueError naming the sizes that disagree.
    """
    kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    window = [height, width, *kernel]
    check(q, k, v, offset, bias, window)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if registry.exporting():
        return with_gather(q, k, v, offset, bias, window, scale)
    result: Tensor = torch.ops.segcore.deform_local_attn(q, k, v, offset, bias, window, scale)
    return result


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    window: Sequence[int],
) -> None:
    """Raise a one-line ValueError when the inputs are inconsistent."""
    op = "deform_local_attn"
    tensors = {"q": (q, 4), "k": (k, 4), "v": (v, 4), "offset": (offset, 4), "bias": (bias, 4)}
    registry.check_tensors(op, tensors)
    if len(window) != 4 or any(size < 1 or size % 2 == 0 for size in window[2:]):
        raise UserError(f"{op}: kernel_size {list(window[2:])} must be one or two odd numbers >= 1")
    (b, n, m, _), (height, width, kh, kw) = q.shape, window
    taps = kh * kw
    if not q.shape == k.shape == v.shape or not q.dtype == k.dtype == v.dtype:
        raise UserError(
            f"{op}: q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype} and v {tuple(v.shape)} {v.dtype} "
            "must have one shape and dtype"
        )
    if height < 1 or width < 1 or n != height * width:
        raise UserError(f"{op}: q has {n} tokens but height {height} and width {width} give {height * width}")
    if offset.shape != (b, n, m, 2 * taps):
        raise UserError(f"{op}: offset has shape {tuple(offset.shape)}; it must be {(b, n, m, 2 * taps)}")
    if bias is not None and bias.shape != (b, m, n, taps):
        raise UserError(f"{op}: bias has shape {tuple(bias.shape)}; it must be {(b, m, n, taps)}")


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    window: Sequence[int],
    scale: float,
) -> Tensor:
    """Return the output (B, N, M, D), contiguous, on any device; no autograd."""
    check(q, k, v, offset, bias, window)
    if not q.numel():
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    queries, keys, values = (_rows(t) for t in (q, k, v))
    rows, weights = bilinear.corners(q.shape, window[:2], [_places(offset, q.dtype, window)])
    products = bilinear.dots(queries, keys, rows).mul_(weights)
    attention = _softmax(products.sum(-1).mul_(scale), bias)
    out = bilinear.bag(rows, values, weights.mul_(attention.unsqueeze(-1)), 4 * attention.shape[-1])
    return out.view(q.shape).to(q.dtype)


def reference_backward(
    grad_output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    window: Sequence[int],
    scale: float,
) -> Gradients:
    """Return the gradients of q, k, v, offset and bias (empty without one), contiguous, on any device; no autograd."""
    if not q.numel():
        inputs = (q, k, v, offset, bias)
        grad_q, grad_k, grad_v, grad_offset, grad_bias = (registry.empty_gradient(t, q).zero_() for t in inputs)
        return grad_q, grad_k, grad_v, grad_offset, grad_bias
    grad, queries, keys, values = (_rows(t, q.dtype) for t in (grad_output, q, k, v))
    y, x = _places(offset, q.dtype, window)
    rows, weights = bilinear.corners(q.shape, window[:2], [(y, x)])
    taps, size = y.shape[-1], (window[0], window[1])
    # The gradients of a corner's weight in k_j and v_j, the attention again, and the gradients of its logits.
    of_key, of_value = bilinear.dots(queries, keys, rows), bilinear.dots(grad, values, rows)
    attention = _softmax((of_key * weights).sum(-1).mul_(scale), bias)
    by_tap = (of_value * weights).sum(-1)
    by_logit = attention * (by_tap - (attention * by_tap).sum(-1, keepdim=True))
    to_key, to_value = by_logit.mul(scale).unsqueeze(-1), attention.unsqueeze(-1)

    _, d_y, d_x = bilinear.derivatives(of_key.mul_(to_key).add_(of_value.mul_(to_value)).squeeze(3), y, x, size)
    grad_offset = torch.stack((d_y, d_x), -1).to(offset.dtype).view(offset.shape)
    del of_key, of_value, d_y, d_x
    scatter = bilinear.Scatter(rows[..., 0], taps, q.shape, size)
    grad_v = scatter(grad, weights * to_value).to(v.dtype)
    weights.mul_(to_key)
    grad_k = scatter(queries, weights).to(k.dtype)
    grad_q = bilinear.bag(rows, keys, weights, 4 * taps).view(q.shape).to(q.dtype)
    if bias is None:
        return grad_q, grad_k, grad_v, grad_offset, q.new_empty(0)
    return grad_q, grad_k, grad_v, grad_offset, by_logit.squeeze(3).transpose(1, 2).to(bias.dtype).contiguous()


def with_gather(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    window: Sequence[int],
    scale: float,
) -> Tensor:
    """Return the output in differentiable PyTorch, for torch.export."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = (t.to(dtype) for t in (q, k, v))
    y, x = _places(offset, q.dtype, window)
    size = (window[0], window[1])
    logits = (bilinear.gather(keys, size, y, x) @ queries.unsqueeze(-1)).squeeze(-1) * scale
    attention = _softmax(logits.unsqueeze(3), bias)  # (B, N, M, 1, K)
    return (attention @ bilinear.gather(values, size, y, x)).squeeze(3).to(q.dtype)


def _rows(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return (B * N * M, D), contiguous and in the dtype of the computation."""
    return t.reshape(-1, t.shape[3]).to(torch.promote_types(dtype or t.dtype, torch.float32))


def _places(offset: Tensor, dtype: torch.dtype, window: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return y and x (B, N, M, K) of the taps in pixels."""
    height, width, kh, kw = window
    dtype = torch.promote_types(dtype, torch.float32)
    place = torch.arange(height * width, device=offset.device).view(-1, 1, 1)
    row, tap = place // width, torch.arange(kh * kw, device=offset.device)
    moved = offset.to(dtype).unflatten(-1, (-1, 2))
    y = (row + (tap // kw - kh // 2)).to(dtype)
    x = (place - row * width + (tap % kw - kw // 2)).to(dtype)  # the remainder, which ONNX lacks for a dynamic width
    return y + moved[..., 0], x + moved[..., 1]


def _softmax(logits: Tensor, bias: Tensor | None) -> Tensor:
    """Return the attention (B, N, M, 1, K) of logits of that shape and a bias (B, M, N, K)."""
    return (logits if bias is None else logits + bias.to(logits.dtype).transpose(1, 2).unsqueeze(3)).softmax(-1)


def _shape(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    window: Sequence[int],
    scale: float,
) -> tuple[int, ...]:
    check(q, k, v, offset, bias, window)
    return tuple(q.shape)


registry.define(
    "deform_local_attn",
    "Tensor q, Tensor k, Tensor v, Tensor offset, Tensor? bias, SymInt[] window, float scale",
    reference,
    reference_backward,
    _shape,
)
