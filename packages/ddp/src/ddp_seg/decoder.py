"""The map decoder, deformable self-attention layers modulated by time, and the time embedding (paper, section 3.2)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segcore.models.layers import cpu_inference, widened
from segcore.ops.ms_deform_attn import ms_deform_attn, reset_projections

ROWS = 1024
"""Number of tokens that a CPU processes in a layer at a time."""


class TimeEmbedding(nn.Module):
    """Log-SNR (n,) -> embedding (n, dim): learned sinusoids, then a two-layer MLP; never in half precision."""

    def __init__(self, dim: int, frequencies: int = 8) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(frequencies))
        self.fc1 = nn.Linear(2 * frequencies + 1, dim)
        self.fc2 = nn.Linear(dim, dim)

    def sinusoid(self, log_snr: Tensor) -> Tensor:
        """Return (n, 2 * frequencies + 1): the log-SNR, then sines, then cosines."""
        phase = log_snr[:, None] * self.frequencies * 2 * math.pi
        return torch.cat([log_snr[:, None], phase.sin(), phase.cos()], 1)

    def forward(self, log_snr: Tensor) -> Tensor:
        # Autocast would round a log-SNR of -18.907 to -18.875, far more than neighboring times differ by.
        with torch.autocast(log_snr.device.type, enabled=False):
            return self.fc2(F.gelu(self.fc1(self.sinusoid(log_snr.to(self.frequencies)))))


class DeformableAttention(nn.Module):
    """Deformable self-attention on one map (Zhu et al. 2021, one level), with the residual added by the caller."""

    def __init__(self, dim: int, heads: int, points: int) -> None:
        super().__init__()
        self.heads, self.points = heads, points
        self.sampling_offsets = nn.Linear(dim, heads * points * 2)
        self.attention_weights = nn.Linear(dim, heads * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)

    def reset_parameters(self) -> None:
        """Initialize with even weights; head k looks in compass direction k, its point i is i + 1 pixels away."""
        reset_projections(self, self.heads, 1, self.points)

    def values(self, tokens: Tensor) -> Tensor:
        """Return the values to sample, (N, S, heads, C / heads), for all tokens (N, S, C) of the map."""
        return self.value_proj(tokens).unflatten(-1, (self.heads, -1))

    def attend(self, tokens: Tensor, values: Tensor, grid: Grid) -> Tensor:
        """Return the attended tokens (N, Q, C) for some of the map's tokens and their part of the grid."""
        n, q, _ = tokens.shape
        query = tokens + grid.position
        offsets = self.sampling_offsets(query).view(n, q, self.heads, 1, self.points, 2)
        weights = _softmax(self.attention_weights(query).view(n, q, self.heads, 1, self.points))
        # Offsets are in pixels. Locations in half precision would be off by a pixel on wide maps.
        locations = grid.centers[:, None, None, None] + offsets.to(grid.centers.dtype) / grid.width_height
        return self.output_proj(ms_deform_attn(values, [grid.size], locations, weights))

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Return the attended tokens (N, S, C), row-major over a map of S = h * w pixels; the residual is not added."""
        return self.attend(tokens, self.values(tokens), grid)


class DecoderLayer(nn.Module):
    """Attention, norm, feed-forward, norm, then scale and shift by time."""

    def __init__(self, dim: int, heads: int, points: int, time_dim: int) -> None:
        super().__init__()
        self.attention = DeformableAttention(dim, heads, points)
        self.norm1 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.time = nn.Linear(time_dim, 2 * dim)

    def forward(self, tokens: Tensor, time: Tensor, grid: Grid) -> Tensor:
        """Return tokens (N, S, C) for tokens (N, S, C) and a time embedding (N or 1, time_dim)."""
        values = self.attention.values(tokens)
        scale, shift = self.time(F.silu(time))[:, None].chunk(2, -1)
        if not cpu_inference(tokens):
            return self._block(tokens, values, scale + 1, shift, grid)
        # From here on tokens are independent. Processing some at a time keeps the intermediate tensors, up to four
        # times as wide as the map, in the CPU's caches.
        values = values.to(grid.centers.dtype)  # once instead of per chunk
        rows = [slice(start, start + ROWS) for start in range(0, tokens.shape[1], ROWS)]
        parts = [self._block(tokens[:, part], values, scale + 1, shift, grid.rows(part)) for part in rows]
        return torch.cat(parts, 1)

    def _block(self, tokens: Tensor, values: Tensor, scale: Tensor, shift: Tensor, grid: Grid) -> Tensor:
        tokens = self.norm1(tokens + self.attention.attend(tokens, values, grid))
        tokens = self.norm2(tokens + self.fc2(F.gelu(self.fc1(tokens))))
        return torch.addcmul(shift, tokens, scale)


class MapDecoder(nn.Module):
    """Layers over the tokens of a map, then a 1x1 classifier."""

    def __init__(self, dim: int, num_classes: int, layers: int, heads: int, points: int, time_dim: int) -> None:
        super().__init__()
        stack = [DecoderLayer(dim, heads, points, time_dim) for _ in range(layers)]
        self.layers = nn.ModuleList(stack)
        self.classifier = nn.Conv2d(dim, num_classes, 1)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        for layer in stack:
            layer.attention.reset_parameters()

    def encode(self, x: Tensor, time: Tensor, grid: Grid | None = None) -> Tensor:
        """Return the map (N, C, h, w) after all layers.

        time: (N or 1, time_dim). grid: `make_grid(x)`, to be passed when many maps of one size are decoded.
        """
        grid = grid or make_grid(x)
        tokens = to_tokens(x)
        for layer in self.layers:
            tokens = layer(tokens, time, grid)
        return to_map(tokens, grid.size)

    def forward(self, x: Tensor, time: Tensor, grid: Grid | None = None) -> Tensor:
        """Return logits (N, K, h, w) for a map (N, C, h, w); arguments as for `encode`."""
        return self.classifier(self.encode(x, time, grid))


def to_tokens(x: Tensor) -> Tensor:
    """Return the tokens (N, h * w, C) of a map (N, C, h, w): a view if the map is in channels_last layout."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the map (N, C, h, w), in channels_last layout, for tokens (N, h * w, C); the inverse of `to_tokens`."""
    return tokens.unflatten(1, size).permute(0, 3, 1, 2)


def _softmax(x: Tensor) -> Tensor:
    """Return the softmax over the last dimension; for a few points torch's own is five times as slow on a CPU."""
    if not cpu_inference(x):
        return x.softmax(-1)
    x = widened(x)
    shares = (x - x.amax(-1, keepdim=True)).exp_()
    return shares.div_(shares.sum(-1, keepdim=True))


class Grid(NamedTuple):
    """Pixel positions that the layers need: the same for every map of one size."""

    size: tuple[int, int]
    """(h, w)."""
    width_height: Tensor
    """(2,): dividing offsets in pixels by it normalizes them."""
    centers: Tensor
    """(S, 2): see `pixel_centers`."""
    position: Tensor
    """(1, S, C): see `positional_encoding`; added to the queries only."""

    def rows(self, part: slice) -> Grid:
        """Return the grid of some of the pixels of the same map."""
        return self._replace(centers=self.centers[part], position=self.position[:, part])


def make_grid(like: Tensor) -> Grid:
    """Return the grid of a map (N, C, h, w), on its device and in at least float32."""
    _, c, h, w = like.shape
    centers = pixel_centers(h, w, like)
    size = torch.stack([centers.new_full((), w), centers.new_full((), h)])  # `new_tensor` would wait for the device
    return Grid((h, w), size, centers, positional_encoding(h, w, c, like))


def _integers(start: int, stop: int, like: Tensor) -> Tensor:
    """Return start .. stop - 1 on the device of `like`, in at least float32."""
    return torch.arange(start, stop, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))


def pixel_centers(height: int, width: int, like: Tensor) -> Tensor:
    """Return (height * width, 2) normalized (x, y) of the pixel centers, row-major, in at least float32."""
    y = (_integers(0, height, like) + 0.5) / height
    x = (_integers(0, width, like) + 0.5) / width
    return torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]), -1).flatten(0, 1)


def positional_encoding(height: int, width: int, dim: int, like: Tensor) -> Tensor:
    """Return (1, height * width, dim): half the channels for y, then half for x; alternating sine and cosine."""
    k = _integers(0, dim // 2, like)
    period = 10000 ** (2 * torch.div(k, 2, rounding_mode="floor") / (dim // 2))

    def encode(size: int) -> Tensor:
        position = (_integers(1, size + 1, like) - 0.5) / (size + 1e-6) * (2 * math.pi)
        angle = position[:, None] / period
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], -1).flatten(1)

    y, x = encode(height)[:, None], encode(width)[None]
    return torch.cat([y.expand(height, width, -1), x.expand(height, width, -1)], -1).flatten(0, 1)[None]
