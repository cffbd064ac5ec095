"""The operators of segcore.ops and the usual way to compute each: what `ops_cpu.py` and `ops_gpu.py` time.

The usual forms are plain PyTorch or torchvision, kept apart from segcore so that they stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from segcore import ops


@dataclass(frozen=True)
class Case:
    """An operator on given inputs: `ours` and the `usual` forms by name take `tensors` and return the output."""

    title: str
    tensors: list[Tensor]
    ours: Callable[..., Tensor]
    usual: dict[str, Callable[..., Tensor]]


def attention(height: int, width: int, heads: int = 8, batch: int = 1, dtype: torch.dtype = torch.float32) -> Case:
    """Return DDP's deformable attention: one level, 4 points per pixel about 2 pixels away, heads of width 32."""
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    offsets = _offsets(2, batch, height * width, heads, 1, 4, 2) / torch.tensor([width, height])
    loc = torch.stack([x, y], -1).view(1, -1, 1, 1, 1, 2) + offsets
    attn = torch.randn(batch, height * width, heads, 1, 4).softmax(-1)
    value, shapes = torch.randn(batch, height * width, heads, 32).to(dtype), [(height, width)]

    def ours(value: Tensor, loc: Tensor, attn: Tensor) -> Tensor:
        return ops.ms_deform_attn(value, shapes, loc, attn)

    def grid_sample(value: Tensor, loc: Tensor, attn: Tensor) -> Tensor:
        n, _, m, d = value.shape
        q = loc.shape[1]
        maps = value.split([height * width for height, width in shapes], 1)
        samples = []
        for level, (height, width) in enumerate(shapes):
            image = maps[level].flatten(2).transpose(1, 2).reshape(n * m, d, height, width)
            grid = (2 * loc[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1).to(value.dtype)
            samples.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
        weights = attn.transpose(1, 2).reshape(n * m, 1, q, -1)
        out = (torch.stack(samples, dim=-2).flatten(-2) * weights).sum(-1)
        return out.view(n, m * d, q).transpose(1, 2).to(value.dtype)

    title = f"ms_deform_attn {batch}x{height}x{width}, {heads} heads of 32, 4 points"
    return Case(title, [value, loc, attn], ours, {"grid_sample": grid_sample})


def convolution(
    channels: int, out: int, height: int, width: int, batch: int = 1, dtype: torch.dtype = torch.float32
) -> Case:
    """Return a 3x3 deformable convolution v2 with offsets of about 2 pixels."""
    image = torch.randn(batch, channels, height, width).to(dtype)
    offset, mask = _offsets(2, batch, 18, height, width), torch.rand(batch, 9, height, width)
    weight = (torch.randn(out, channels, 3, 3) / (9 * channels) ** 0.5).to(dtype)

    def ours(image: Tensor, offset: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        return ops.deform_conv2d(image, offset, weight, padding=1, mask=mask)

    def torchvision(image: Tensor, offset: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        from torchvision.ops import deform_conv2d

        return deform_conv2d(image, offset.to(dtype), weight, padding=1, mask=mask.to(dtype))

    def grid_sample(image: Tensor, offset: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        columns = _sample(image, _window(offset)) * mask.flatten(2).unsqueeze(1).to(image.dtype)
        return (weight.flatten(1) @ columns.flatten(1, 2)).unflatten(2, offset.shape[2:])

    usual = {"torchvision": torchvision, "grid_sample": grid_sample}
    title = f"deform_conv2d {batch}x{channels}x{height}x{width} -> {out}, 3x3 with mask"
    return Case(title, [image, offset, mask, weight], ours, usual)


def unfold(channels: int, height: int, width: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> Case:
    """Return the columns of a 3x3 deformable convolution."""
    image = torch.randn(batch, channels, height, width).to(dtype)
    offset = _offsets(2, batch, 18, height, width)

    def ours(image: Tensor, offset: Tensor) -> Tensor:
        return ops.deform_unfold(image, offset, kernel_size=3, padding=1)

    def grid_sample(image: Tensor, offset: Tensor) -> Tensor:
        return _sample(image, _window(offset)).flatten(1, 2)

    title = f"deform_unfold {batch}x{channels}x{height}x{width}, 3x3"
    return Case(title, [image, offset], ours, {"grid_sample": grid_sample})


def local_attention(height: int, width: int, heads: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> Case:
    """Return DGMN2's attention at one scale: 3x3 positions per token about 1 pixel away, heads of width 64."""
    shape = (batch, height * width, heads)
    q, k, v = (torch.randn(*shape, 64).to(dtype) for _ in range(3))
    offset, bias = _offsets(1, *shape, 18), torch.randn(batch, heads, height * width, 9)

    def ours(*tensors: Tensor) -> Tensor:
        return ops.deform_local_attn(*tensors, height=height, width=width)

    def unfolded(q: Tensor, k: Tensor, v: Tensor, offset: Tensor, bias: Tensor) -> Tensor:
        """Unfold keys and values nine times, as the published code does, and multiply matrices."""

        def image(t: Tensor) -> Tensor:
            return t.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, (height, width))

        places = _window(image(offset))
        keys, values = (_sample(image(t), places).permute(0, 3, 1, 2) for t in (k, v))  # (B * M, N, D, 9)
        queries = q.transpose(1, 2).flatten(0, 1).unsqueeze(2)
        logits = (queries @ keys).squeeze(2) * 64**-0.5 + bias.flatten(0, 1)
        out = values @ logits.softmax(-1).to(q.dtype).unsqueeze(-1)
        return out.view(batch, heads, -1, 64).transpose(1, 2)

    title = f"deform_local_attn {batch}x{height}x{width}, {heads} head(s) of 64, 3x3"
    return Case(title, [q, k, v, offset, bias], ours, {"unfold + matmul": unfolded})


def _offsets(pixels: float, *shape: int) -> Tensor:
    """Return offsets about `pixels` large that keep clear of pixel centers, where a rounding changes the slope."""
    offsets = pixels * torch.randn(shape)
    return offsets.floor() + 0.05 + 0.9 * (offsets - offsets.floor())


def _window(offset: Tensor) -> tuple[Tensor, Tensor]:
    """Return y and x (N, 9, H, W) in pixels of 3x3 taps around every pixel, moved by offsets (N, 18, H, W)."""
    moved, (height, width) = offset.float().unflatten(1, (9, 2)), offset.shape[2:]
    tap = torch.arange(9, device=offset.device).view(9, 1, 1)
    y = torch.arange(height, device=offset.device).view(height, 1) + tap.div(3, rounding_mode="floor") - 1
    x = torch.arange(width, device=offset.device) + tap % 3 - 1
    return moved[:, :, 0] + y, moved[:, :, 1] + x


def _sample(image: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
    """Return the samples (N, C, 9, H * W) of images (N, C, H, W) at the places of `_window`."""
    height, width = image.shape[2:]
    y, x = (t.flatten(2) for t in places)
    grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), -1).to(image.dtype)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
