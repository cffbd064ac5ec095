"""The network of the mask prior: a time-conditioned UNet with weight-standardized convolutions (arXiv 2306.01721)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segcore.models.layers import by_onednn, linear, widened

HEADS, HEAD_WIDTH, GROUPS, EPS = 4, 32, 8, 1e-5


STRIP = 2048
"""Pixels, in whole rows, that `winograd` computes at a time; its buffers are six times as large."""


SMALLEST = 256
"""Pixels of the smallest map for which `winograd` is faster."""


class Conv3x3(nn.Conv2d):
    """3x3 convolution, by `winograd` where that is faster.

    In evaluation the weights in the form that is used are cached until the weights change; never in training, as fused
    optimizers change weights without increasing their version.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        self._kept: dict[bool, tuple[object, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Return a map (N, out_channels, h, w) for (N, in_channels, h, w)."""
        weight = self.weight
        recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if self.training or recorded or weight.is_inference():
            return F.conv2d(x, self.prepare(weight), self.bias, padding=1)
        tiled = weight.dtype == x.dtype and suits(x)
        state = (weight.data_ptr(), weight._version, weight.dtype, weight.device)
        if self._kept.get(tiled, (None,))[0] != state:
            with torch.inference_mode(False), torch.no_grad():  # the cache must be usable anywhere
                ready = self.prepare(weight)
                self._kept[tiled] = state, winograd_weight(ready) if tiled else ready
        kept = self._kept[tiled][1]
        return winograd(x, kept, self.bias) if tiled else F.conv2d(x, kept, self.bias, padding=1)

    def prepare(self, weight: Tensor) -> Tensor:
        """Return the weights to convolve with."""
        return weight

    def train(self, mode: bool = True) -> Conv3x3:
        """Clear the cache: weights may change without a version increase."""
        self._kept = {}
        return super().train(mode)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kept": {}}


class StandardConv(Conv3x3):
    """Its weights have mean 0 and variance 1 per output channel (Qiao et al., arXiv 1903.10520)."""

    def prepare(self, weight: Tensor) -> Tensor:
        """Return the standardized weights."""
        return standardize(weight)


def standardize(weight: Tensor) -> Tensor:
    """Return weights (O, I, kh, kw) minus their mean, divided by their standard deviation, per output channel."""
    variance, mean = torch.var_mean(weight, (1, 2, 3), correction=0, keepdim=True)
    return (weight - mean) * (variance + EPS).rsqrt()


def suits(x: Tensor) -> bool:
    """Return whether `winograd` is faster for a map than `F.conv2d`: with oneDNN's products, unless it is small."""
    height, width = x.shape[-2:]
    return by_onednn(x) and height % 2 == width % 2 == 0 and height * width >= SMALLEST and x.shape[1] >= 64


def winograd_weight(weight: Tensor) -> Tensor:
    """Return 3x3 weights (O, I, 3, 3) in the form for `winograd`, (4, 4, O, I)."""
    g = weight.new_tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
    return torch.einsum("ia,ocab,jb->ijoc", g, weight, g).contiguous()


def winograd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the 3x3 convolution, padded by 1, of maps (N, I, h, w), h and w even (Lavin and Gray, arXiv 1509.09308).

    Tiles of 2x2 outputs take 16 products instead of 36, so matrix products compute it with 1 / 2.25 of the
    multiplications. A strip of rows is computed at a time, so that what lies in between stays in the caches. Maps in
    channels_last layout are not copied, and the answer has that layout.
    """
    n, _, height, width = x.shape
    x = x.permute(0, 2, 3, 1)
    y = x.new_empty(n, height, width, weight.shape[2])
    step = max(STRIP // width // 2 * 2, 2)
    for k, top in itertools.product(range(n), range(0, height, step)):
        end = min(top + step, height)
        strip = F.pad(x[k, max(top - 1, 0) : end + 1], (0, 0, 1, 1, int(top == 0), int(end == height)))
        rows = [_sum(strip, i, 0) for i in range(4)]
        columns = []
        for j in range(4):  # the bias is in the one product that is a part of all four outputs
            tiles = [_sum(row, j, 1) for row in rows]
            a, b, c, d = (linear(t, weight[i, j], bias if i == j == 1 else None) for i, t in enumerate(tiles))
            columns.append((a.add_(b).add_(c), b.sub_(c).sub_(d)))
        for i, (a, b, c, d) in enumerate(zip(*columns, strict=True)):
            torch.add(a.add_(b), c, out=y[k, top + i : end : 2, 0::2])
            torch.sub(b.sub_(c), d, out=y[k, top + i : end : 2, 1::2])
    return y.permute(0, 3, 1, 2)


def _sum(x: Tensor, k: int, dim: int) -> Tensor:
    """Return sum `k` of the tiles along a dimension of a padded map, of two of the four positions in a tile."""
    first, second, sign = ((0, 2, -1), (1, 2, 1), (2, 1, -1), (1, 3, -1))[k]
    last = x.shape[dim] - 3
    a, b = (x[(slice(None),) * dim + (slice(start, start + last, 2),)] for start in (first, second))
    return torch.add(a, b, alpha=sign)


class ChannelNorm(nn.Module):
    """Norm over the channels of every pixel, with a gain and without a bias; always in float32 or wider."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape (N, C, h, w)."""
        if by_onednn(x) and x.is_contiguous(memory_format=torch.channels_last):
            gain = self.gain.flatten()
            return F.layer_norm(x.permute(0, 2, 3, 1), gain.shape, gain, None, EPS).permute(0, 3, 1, 2)
        wide = widened(x)
        centered = wide - wide.mean(1, keepdim=True)
        variance = centered.square().mean(1, keepdim=True)  # much faster than torch.var over strided memory
        return (centered * (variance + EPS).rsqrt() * self.gain).to(x.dtype)


class ResidualBlock(nn.Module):
    """Two convolutions with group norm and SiLU, the first scaled and shifted by the time, and a residual."""

    def __init__(self, in_channels: int, out_channels: int, time_width: int) -> None:
        super().__init__()
        self.time = nn.Linear(time_width, 2 * out_channels)
        self.conv1, self.conv2 = StandardConv(in_channels, out_channels), StandardConv(out_channels, out_channels)
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, out_channels), nn.GroupNorm(GROUPS, out_channels)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Return a map (N, out_channels, h, w) for (N, in_channels, h, w) and a time embedding (N or 1, E)."""
        scale, shift = self.time(F.silu(time))[..., None, None].chunk(2, 1)
        y = self.conv1(x)
        if len(time) == 1:  # one time for all: fold scale and shift into the norm's own
            norm, scale = self.norm1, 1 + scale[0, :, 0, 0]
            y = F.group_norm(y, GROUPS, norm.weight * scale, norm.bias * scale + shift[0, :, 0, 0], norm.eps)
        else:
            y = torch.addcmul(shift, self.norm1(y), scale + 1)
        inplace = not torch.is_grad_enabled()
        y = F.silu(self.norm2(self.conv2(F.silu(y, inplace))), inplace)
        return y + (x if self.shortcut is None else self.shortcut(x))


class LinearAttention(nn.Module):
    """Attention of linear cost in the pixels (Shen et al., arXiv 1812.01243), with norms and a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * HEADS * HEAD_WIDTH, 1, bias=False)
        self.out = nn.Conv2d(HEADS * HEAD_WIDTH, channels, 1)
        self.out_norm = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape (N, C, h, w)."""
        q, k, v = _heads(self.qkv(self.norm(x)))  # (N, head, 32, pixels)
        context = k.softmax(-1) @ v.transpose(2, 3) / v.shape[-1]
        q = q.softmax(2) * HEAD_WIDTH**-0.5
        if by_onednn(x):  # in channels-last layout, as x
            attended = (q.transpose(2, 3) @ context).transpose(1, 2).flatten(2).transpose(1, 2)
        else:
            attended = (context.transpose(2, 3) @ q).flatten(1, 2)
        return x + self.out_norm(self.out(attended.unflatten(2, x.shape[-2:])))


class FullAttention(nn.Module):
    """Softmax attention over all pixels, with a norm and a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * HEADS * HEAD_WIDTH, 1, bias=False)
        self.out = nn.Conv2d(HEADS * HEAD_WIDTH, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape (N, C, h, w)."""
        q, k, v = (part.transpose(2, 3) for part in _heads(self.qkv(self.norm(x))))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(2, 3)
        return x + self.out(attended.flatten(1, 2).unflatten(2, x.shape[-2:]))


def _heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values (N, head, 32, pixels) of a map (N, 3 * 128, h, w)."""
    q, k, v = qkv.flatten(2).unflatten(1, (3, HEADS, HEAD_WIDTH)).unbind(1)
    return q, k, v


BLOCKS = (ResidualBlock, LinearAttention, FullAttention)


class UNetStage(nn.Module):
    """One resolution: two blocks, linear attention, and the convolution to the next resolution or width."""

    def __init__(self, in_channels: int, channels: int, time_width: int, resample: nn.Module) -> None:
        super().__init__()
        self.block1 = ResidualBlock(in_channels, channels, time_width)
        self.block2 = ResidualBlock(in_channels, channels, time_width)
        self.attention = LinearAttention(channels)
        self.resample = resample


class Down(UNetStage):
    """A level of the encoder path."""

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next level's map, and this level's skip connections: after the first block and at the end."""
        first = self.block1(x, time)
        second = self.attention(self.block2(first, time))
        return self.resample(second), first, second


class Up(UNetStage):
    """A level of the decoder path."""

    def forward(self, x: Tensor, second: Tensor, first: Tensor, time: Tensor) -> Tensor:
        """Return the next level's map from (N, C, h, w) and the skip connections of this size."""
        x = self.block1(torch.cat([x, second], 1), time)
        return self.resample(self.attention(self.block2(torch.cat([x, first], 1), time)))


class UNet(nn.Module):
    """Predicts features of the clean label map from features, a noisy label map's embedding and the timestep.

    Resolutions are halved once per multiplier except the last; sides are multiples of 2 ** (number of multipliers - 1).
    """

    def __init__(self, in_channels: int, width: int, out_channels: int, multipliers: Sequence[int]) -> None:
        super().__init__()
        self.width, time_width = width, 4 * width
        widths = [width, *(width * multiplier for multiplier in multipliers)]
        pairs = list(itertools.pairwise(widths))
        self.stem = nn.Conv2d(in_channels, width, 7, padding=3)
        self.time1, self.time2 = nn.Linear(width, time_width), nn.Linear(time_width, time_width)
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for level, (a, b) in enumerate(pairs, 1):
            # The lowest level only changes the width.
            resample = Conv3x3(a, b) if level == len(pairs) else nn.Conv2d(a, b, 4, 2, 1)
            self.downs.append(Down(a, a, time_width, resample))
        self.middle1 = ResidualBlock(b, b, time_width)
        self.middle_attention = FullAttention(b)
        self.middle2 = ResidualBlock(b, b, time_width)
        for level, (a, b) in enumerate(pairs[::-1], 1):
            conv = Conv3x3(b, a)
            up = conv if level == len(pairs) else nn.Sequential(nn.Upsample(scale_factor=2), conv)
            self.ups.append(Up(a + b, b, time_width, up))
        self.last = ResidualBlock(2 * width, width, time_width)
        self.output = nn.Conv2d(width, out_channels, 1)

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """Return the embedding (N, 4 * width) of timesteps (N,)."""
        return self.time2(F.gelu(self.time1(sinusoid(timesteps, self.width).to(self.time1.weight.dtype))))

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Return a map (N, out_channels, h, w) for a map (N, in_channels, h, w) and timesteps (N,)."""
        return self.body(self.stem(x), self.embed_time(timesteps))

    def body(self, stem: Tensor, time: Tensor) -> Tensor:
        """Return the output for a stem output (N, width, h, w) and a time embedding (N or 1, 4 * width)."""
        if by_onednn(stem):
            stem = stem.contiguous(memory_format=torch.channels_last)  # the layout of `winograd`
        x, saved = stem, list[Tensor]()
        for down in self.downs:
            x, *left = down(x, time)
            saved += left
        x = self.middle2(self.middle_attention(self.middle1(x, time)), time)
        for up in self.ups:
            x = up(x, saved.pop(), saved.pop(), time)
        return self.output(self.last(torch.cat([x, stem], 1), time))


def sinusoid(timesteps: Tensor, width: int) -> Tensor:
    """Return sines and then cosines (N, width) float32 of timesteps (N,), at width / 2 frequencies from 1 to 1e-4."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=timesteps.device) * -(math.log(10000) / (half - 1)))
    angles = timesteps[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


RULES = (
    (r"^stem\.", "init_conv."),
    (r"^time1\.", "time_mlp.1."),
    (r"^time2\.", "time_mlp.3."),
    (r"^(downs|ups)\.(\d)\.block1\.", r"\1.\2.0."),
    (r"^(downs|ups)\.(\d)\.block2\.", r"\1.\2.1."),
    (r"^(downs|ups)\.(\d)\.attention\.", r"\1.\2.2."),
    (r"^(downs|ups)\.(\d)\.resample\.", r"\1.\2.3."),
    (r"^middle(\d)\.", r"mid_block\1."),
    (r"^middle_attention\.", "mid_attn."),
    (r"^last\.", "final_res_block."),
    (r"^output\.", "final_conv."),
    (r"\.time\.", ".mlp.1."),
    (r"\.conv(\d)\.", r".block\1.proj."),
    (r"\.norm(\d)\.", r".block\1.norm."),
    (r"\.shortcut\.", ".res_conv."),
    (r"\.norm\.gain$", ".fn.norm.g"),
    (r"\.qkv\.", ".fn.fn.to_qkv."),
    (r"^(mid_attn)\.out\.", r"\1.fn.fn.to_out."),
    (r"^((?:downs|ups).*)\.out\.", r"\1.fn.fn.to_out.0."),
    (r"\.out_norm\.gain$", ".fn.fn.to_out.1.g"),
)
