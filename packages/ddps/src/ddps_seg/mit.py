"""Mix Transformer (MiT), the backbone of SegFormer (arXiv 2105.15203, section 3.1).

Tokens are (N, L, C), maps (N, C, H, W). There is no positional embedding: the depthwise convolution inside each
feed-forward part encodes positions, so any image size works.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segcore.models.backbones import Backbone
from segcore.models.key_map import rename
from segcore.models.layers import DropPath, linear


class Variant(NamedTuple):
    """The configuration of a MiT variant."""

    width: int
    """Channels of the first stage, and of every attention head."""
    depths: tuple[int, int, int, int]
    """Blocks per stage."""


VARIANTS = {
    "mit_b0": Variant(32, (2, 2, 2, 2)),
    "mit_b1": Variant(64, (2, 2, 2, 2)),
    "mit_b2": Variant(64, (3, 4, 6, 3)),
    "mit_b3": Variant(64, (3, 4, 18, 3)),
    "mit_b4": Variant(64, (3, 8, 27, 3)),
    "mit_b5": Variant(64, (3, 6, 40, 3)),
}
HEADS, REDUCTIONS, KERNELS, STRIDES = (1, 2, 5, 8), (8, 4, 2, 1), (7, 3, 3, 3), (4, 2, 2, 2)
EPS = 1e-6
"""Epsilon of every LayerNorm."""


def as_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return tokens (N, H * W, C) as a map (N, C, H, W)."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def as_tokens(x: Tensor) -> Tensor:
    """Return a map (N, C, H, W) as tokens (N, H * W, C)."""
    return x.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Efficient self-attention: keys and values come from the map, downsampled by `reduction`.

    No padding: pixels that do not fill a kernel of the downsampling convolution are left out.
    """

    def __init__(self, width: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads = heads
        self.projection = nn.Linear(width, 3 * width)  # of queries, keys and values
        self.out = nn.Linear(width, width)
        self.reduce = nn.Conv2d(width, width, reduction, reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(width, eps=EPS) if reduction > 1 else None

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Return tokens (N, L, C) for tokens (N, L, C)."""
        source, channels = tokens, tokens.shape[2]
        if self.reduce is not None and self.norm is not None:
            source = self.norm(as_tokens(self.reduce(as_map(tokens, height, width))))
        weight, bias = self.projection.weight, self.projection.bias
        q = linear(tokens, weight[:channels], bias[:channels])
        k, v = linear(source, weight[channels:], bias[channels:]).chunk(2, -1)
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MixFFN(nn.Module):
    """Feed-forward part with a depthwise 3x3 convolution inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 4 * width
        self.expand = nn.Conv2d(width, hidden, 1)
        self.mix = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.shrink = nn.Conv2d(hidden, width, 1)

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Return tokens (N, L, C) for tokens (N, L, C)."""
        x = self.expand(as_map(tokens, height, width))
        return as_tokens(self.shrink(F.gelu(self.mix(x))))


class Block(nn.Module):
    """Attention and feed-forward part, each preceded by a norm and with a residual connection."""

    def __init__(self, width: int, heads: int, reduction: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attention = Attention(width, heads, reduction)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.ffn = MixFFN(width)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Return tokens (N, L, C) for tokens (N, L, C)."""
        tokens = tokens + self.drop_path(self.attention(self.norm1(tokens), height, width))
        return tokens + self.drop_path(self.ffn(self.norm2(tokens), height, width))


class Stage(nn.Module):
    """Overlapping patch embedding, blocks, norm."""

    def __init__(self, in_channels: int, width: int, index: int, drop_paths: list[float]) -> None:
        super().__init__()
        kernel = KERNELS[index]
        self.patches = nn.Conv2d(in_channels, width, kernel, STRIDES[index], kernel // 2)
        self.patch_norm = nn.LayerNorm(width, eps=EPS)
        self.blocks = nn.ModuleList(Block(width, HEADS[index], REDUCTIONS[index], rate) for rate in drop_paths)
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map (N, width, H / stride, W / stride) for (N, in_channels, H, W)."""
        x = self.patches(x)
        height, width = x.shape[-2:]
        tokens = self.patch_norm(as_tokens(x))
        for block in self.blocks:
            tokens = block(tokens, height, width)
        return as_map(self.norm(tokens), height, width)


class MiT(Backbone):
    """MiT-B0 to B5. `drop_path` is the rate of the last block; it grows linearly from 0 at the first."""

    min_size = 32  # below it, the first stage's reduction has no complete kernel

    def __init__(self, variant: str, in_channels: int = 3, drop_path: float = 0.1) -> None:
        super().__init__()
        width, depths = VARIANTS[variant]
        self.channels = tuple(width * heads for heads in HEADS)
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())
        inputs = (in_channels, *self.channels)
        self.stages = nn.ModuleList(
            Stage(inputs[i], self.channels[i], i, [next(rates) for _ in range(depth)]) for i, depth in enumerate(depths)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                fan_out = module.weight[:, 0].numel() / module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> list[Tensor]:
        x, maps = images, []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def key_map(self) -> dict[str, str]:
        return {name: rename(name, RULES) for name in self.state_dict()}


RULES = (
    (r"^stages\.(\d)\.patches\.", r"layers.\1.0.projection."),
    (r"^stages\.(\d)\.patch_norm\.", r"layers.\1.0.norm."),
    (r"^stages\.(\d)\.blocks\.", r"layers.\1.1."),
    (r"^stages\.(\d)\.norm\.", r"layers.\1.2."),
    (r"\.attention\.projection\.", ".attn.attn.in_proj_"),
    (r"\.attention\.out\.", ".attn.attn.out_proj."),
    (r"\.attention\.reduce\.", ".attn.sr."),
    (r"\.attention\.norm\.", ".attn.norm."),
    (r"\.ffn\.expand\.", ".ffn.layers.0."),
    (r"\.ffn\.mix\.", ".ffn.layers.1."),
    (r"\.ffn\.shrink\.", ".ffn.layers.4."),
)
