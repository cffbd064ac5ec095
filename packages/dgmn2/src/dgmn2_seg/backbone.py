"""The backbone: four stages of blocks; each token attends to nine nearby positions, shifted by its own offsets.

DGMN2 (Zhang, Chen, Arnab, Xue, Torr, arXiv 2209.09760). The position term has oddities that the published weights were
trained with: see `RelativePositionBias`.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from segcore.models.layers import ConvNorm, DropPath, cpu_inference, resize
from segcore.ops import deform_local_attn

TAPS = 9
"""Positions that a token attends to: a window of 3x3."""
ROWS = 1024
"""Number of tokens that a CPU processes in an MLP at a time, at inference."""
TABLES = (56, 28, 14, 7)
"""Sides of the stages' maps in ImageNet training, at 224x224; they determine the rows of the position tables."""


class Variant(NamedTuple):
    """The configuration of a backbone, by stage."""

    depths: tuple[int, int, int, int]
    """Blocks."""
    widths: tuple[int, int, int, int] = (64, 128, 320, 512)
    """Channels."""
    heads: tuple[int, int, int, int] = (1, 2, 5, 8)
    """Attention heads; in the published backbones each has 64 channels."""
    ratios: tuple[int, int, int, int] = (8, 8, 4, 4)
    """Ratio of the MLP's hidden channels to its input channels."""


VARIANTS = {
    "nano": Variant((1, 1, 1, 1), (32, 64, 128, 192), (1, 2, 4, 6), (4, 4, 4, 4)),
    "tiny": Variant((2, 2, 2, 2)),
    "small": Variant((3, 4, 6, 3)),
    "medium": Variant((3, 4, 18, 3)),
    "large": Variant((3, 8, 27, 3)),
}


class RelativePositionBias(nn.Module):
    """Position term of the attention's logits: q times rows of two learned tables.

    With the tables resized to the map, `x` to W + 8 rows and `y` to H + 8, the position term of a query q(i, j) at row
    i and column j and the tap s, 0 to 8, is

        q(i, j) · x[W - 1 - j + s] + R(i, j, s)

    where R is q(i, j) · y[H - 1 - i + s] with its spatial axes swapped, as an image of W x H, and resized bilinearly to
    H x W. So it depends on the query's own row and column and the tap's number, not on the tap's position. For a square
    map the second term is that of the query at the transposed position (j, i). Neither is corrected: the published
    weights were trained with it.
    """

    def __init__(self, side: int, channels: int) -> None:
        """`side` is the side of the map that the tables are made for, `channels` the channels of a head."""
        super().__init__()
        self.y, self.x = (nn.Parameter(torch.randn(side + TAPS - 1, channels) * channels**-0.5) for _ in range(2))

    def forward(self, q: Tensor) -> Tensor:
        """Return (B, M, H * W, 9) for queries (B, H, W, M, D) of M heads, which are not scaled."""
        size = q.shape[1:3]
        across = _products(q.movedim(2, 0), self.x).permute(1, 3, 2, 0, 4)
        down = _products(q.movedim(1, 0), self.y).permute(1, 3, 4, 2, 0)
        down = resize(_flat(down, 1, 2), size).unflatten(1, (-1, TAPS)).movedim(2, -1)
        return _flat(across + down, 2, 3)


def _products(q: Tensor, table: Tensor) -> Tensor:
    """Return (S, …, 9): products of queries (S, …, D) along an axis of S positions with the rows for their positions.

    The table (rows, D) is resized to S + 8 rows; position p has the nine rows that start at S - 1 - p.
    """
    size = q.shape[0]
    wide = resize(table.T[None, :, :, None], (size + TAPS - 1, 1))[0, :, :, 0]
    places, taps = (torch.arange(n, device=table.device) for n in (size, TAPS))
    rows = wide[:, size - 1 - places[:, None] + taps]
    return torch.bmm(_flat(q, 1, -2), rows.transpose(0, 1)).unflatten(1, q.shape[1:-1])


def _flat(x: Tensor, start: int, end: int) -> Tensor:
    """Flatten a contiguous copy: stride conditions would become constraints on the sizes that an export accepts."""
    return x.clone(memory_format=torch.contiguous_format).flatten(start, end)


class Attention(nn.Module):
    """Deformable local attention: nine bilinear samples of the values, weighted by a softmax over those of the keys.

    See `segcore.ops.deform_local_attn`. Offsets are computed from the tokens, head by head, not from the queries.
    """

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.offset = nn.Linear(width // heads, 2 * TAPS)  # shared by the heads
        self.position = RelativePositionBias(side, width // heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Return (B, N, C) for tokens (B, N, C), the row-major pixels of a map of height x width."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).unbind(2)
        offset = self.offset(x.unflatten(2, (self.heads, -1)))
        bias = self.position(q.unflatten(1, (height, width)))
        return self.proj(deform_local_attn(q, k, v, offset, bias, height=height, width=width).flatten(2))


class Block(nn.Module):
    """Attention and MLP, each preceded by a LayerNorm and with a residual connection."""

    def __init__(self, width: int, heads: int, ratio: int, side: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads, side)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        layers = {"fc1": nn.Linear(width, ratio * width), "act": nn.GELU(), "fc2": nn.Linear(ratio * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Return tokens (B, N, C) for tokens (B, N, C)."""
        x = x + self.drop_path(self.attention(self.norm1(x), height, width))
        if self.training or not cpu_inference(x):
            return x + self.drop_path(self.mlp(self.norm2(x)))
        # Process some tokens at a time: the hidden layer, eight times as wide as the map, stays in the CPU's caches.
        parts = x.split(max(ROWS // x.shape[0], 1), 1)
        return torch.cat([part + self.mlp(self.norm2(part)) for part in parts], 1)


class Stage(nn.Module):
    """3x3 convolutions, which may halve the map, then blocks. There is no norm at the end."""

    def __init__(
        self, channels: tuple[int, ...], strides: tuple[int, ...], heads: int, ratio: int, side: int, drops: list[float]
    ) -> None:
        """`channels` lists those before and after each convolution; `drops` has one entry per block."""
        super().__init__()
        self.embed = nn.Sequential(
            *(
                ConvNorm(before, after, 3, nn.BatchNorm2d, nn.ReLU(inplace=True), stride=stride)
                for (before, after), stride in zip(pairwise(channels), strides, strict=True)
            )
        )
        self.blocks = nn.ModuleList(Block(channels[-1], heads, ratio, side, drop) for drop in drops)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map (N, C, H / stride, W / stride), rounded up, for a map (N, channels[0], H, W)."""
        x = self.embed(x)
        height, width = x.shape[2:]
        tokens = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens, height, width)
        return tokens.transpose(1, 2).unflatten(2, (height, width))


class Backbone(nn.Module):
    """Four stages with maps at 1/4, 1/8, 1/16 and 1/32 of the images' size, or with `dense` at 1/4 and three at 1/8.

    The parameters are the same in both forms.
    """

    def __init__(self, variant: Variant, in_channels: int = 3, *, dense: bool = False, drop_path: float = 0.0) -> None:
        super().__init__()
        depths, widths = variant.depths, variant.widths
        drops = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())
        half = widths[0] // 2
        channels = [(in_channels, half, half, widths[0]), *pairwise(widths)]
        late = 1 if dense else 2
        strides = [(2, 1, 2), (2,), (late,), (late,)]
        sizes = zip(channels, strides, depths, variant.heads, variant.ratios, TABLES, strict=True)
        self.stages = nn.ModuleList(
            Stage(c, s, heads, ratio, side, [next(drops) for _ in range(depth)])
            for c, s, depth, heads, ratio, side in sizes
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps of the four stages (N, C_i, H_i, W_i) for images (N, C, H, W)."""
        maps, x = [], images
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps
