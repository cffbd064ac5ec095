"""The backbone of DGMN2-Tiny in its plain form: the yardstick of `dgmn2.py`, kept apart so that it stays as it is.

A direct reading of the published backbone as functions of a state dict with `dgmn2_seg`'s names. Keys and values are
unfolded: nine deformed samples of every token and head are written out and multiplied with the queries as batched
matrices. `unfold_by_gather` gathers the four corners of each sample and is exact in values and gradients, at the border
too. The position term is computed against all W + 8 rows of its table, and the nine that count are cut out by padding
and reshaping. Evaluation mode, float32 or float64.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = Mapping[str, Tensor]
Unfold = Callable[[Tensor, Tensor], Tensor]

DEPTHS, HEADS = (2, 2, 2, 2), (1, 2, 5, 8)


def unfold_by_gather(image: Tensor, offset: Tensor) -> Tensor:
    """Return the nine samples (B, N, D, 9) of each pixel of images (B, D, H, W) with offsets (B, H, W, 18)."""
    b, d, height, width = image.shape
    y, x = places(offset)
    inside = (y > -1) & (y < height) & (x > -1) & (x < width)
    y, x = torch.where(inside, y, -2.0), torch.where(inside, x, -2.0)
    top, left, pixels = y.floor(), x.floor(), image.flatten(2)
    columns = torch.zeros(())
    for row, tall in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, wide in ((left, 1 - (x - left)), (left + 1, x - left)):
            valid = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).long()
            corner = pixels.gather(2, index.reshape(b, 1, -1).expand(-1, d, -1))
            columns = columns + corner * (tall * wide * valid).reshape(b, 1, -1)
    return columns.reshape(b, d, height * width, 9).transpose(1, 2).contiguous()


def unfold_by_grid_sample(image: Tensor, offset: Tensor) -> Tensor:
    """The same through `grid_sample`, whose gradients at pixel centers and at the border are other ones."""
    b, d, height, width = image.shape
    y, x = places(offset)
    grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), -1).flatten(2, 3)
    columns = F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return columns.reshape(b, d, height * width, 9).transpose(1, 2).contiguous()


def places(offset: Tensor) -> tuple[Tensor, Tensor]:
    """Return y and x (B, H, W, 9) in pixels of samples with offsets (B, H, W, 18)."""
    (_, height, width, _), taps = offset.shape, torch.arange(9, device=offset.device)
    offset = offset.unflatten(3, (9, 2))
    y = torch.arange(height, device=offset.device).view(-1, 1, 1) + taps // 3 - 1 + offset[..., 0]
    x = torch.arange(width, device=offset.device).view(-1, 1) + taps % 3 - 1 + offset[..., 1]
    return y, x


def backbone(w: Weights, images: Tensor, *, dense: bool, unfold: Unfold = unfold_by_gather) -> list[Tensor]:
    """Return the maps of the four stages for images (N, 3, H, W); `dense` keeps the last two at 1/8."""
    maps, x, late = [], images, (1,) if dense else (2,)
    for stage, strides in enumerate(((2, 1, 2), (2,), late, late)):
        for i, stride in enumerate(strides):
            name = f"stages.{stage}.embed.{i}"
            x = F.conv2d(x, w[f"{name}.conv.weight"], stride=stride, padding=1)
            statistics = w[f"{name}.norm.running_mean"], w[f"{name}.norm.running_var"]
            x = F.relu(F.batch_norm(x, *statistics, w[f"{name}.norm.weight"], w[f"{name}.norm.bias"]))
        size = x.shape[2:]
        tokens = x.flatten(2).transpose(1, 2)
        for i in range(DEPTHS[stage]):
            name = f"stages.{stage}.blocks.{i}"
            tokens = tokens + attention(
                w, f"{name}.attention", norm(w, f"{name}.norm1", tokens), size, HEADS[stage], unfold
            )
            hidden = F.gelu(linear(w, f"{name}.mlp.fc1", norm(w, f"{name}.norm2", tokens)))
            tokens = tokens + linear(w, f"{name}.mlp.fc2", hidden)
        x = tokens.transpose(1, 2).reshape(len(images), -1, *size)
        maps.append(x)
    return maps


def attention(w: Weights, name: str, x: Tensor, size: tuple[int, int], heads: int, unfold: Unfold) -> Tensor:
    """Return (B, N, C) for normalized tokens (B, N, C)."""
    b, n, c = x.shape
    qkv = linear(w, f"{name}.qkv", x).reshape(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = (t.reshape(b * heads, n, -1) for t in qkv)
    offset = linear(w, f"{name}.offset", x.reshape(b, n, heads, -1)).transpose(1, 2).reshape(b * heads, *size, 18)
    k, v = (unfold(t.transpose(1, 2).reshape(b * heads, -1, *size), offset) for t in (k, v))
    logits = (q.unsqueeze(2) * q.shape[2] ** -0.5) @ k
    bias = position(w, f"{name}.position", q.reshape(b * heads, *size, -1)).reshape(b * heads, n, 1, 9)
    out = (logits + bias).softmax(-1) @ v.transpose(2, 3)
    return linear(w, f"{name}.proj", out.reshape(b, heads, n, -1).transpose(1, 2).reshape(b, n, c))


def position(w: Weights, name: str, q: Tensor) -> Tensor:
    """Return the position term (B, H, W, 9) of queries (B, H, W, D)."""
    across = absolute(q, w[f"{name}.x"])
    down = absolute(q.transpose(1, 2), w[f"{name}.y"])  # (B, W, H, 9), and not turned back
    down = F.interpolate(down.permute(0, 3, 1, 2), q.shape[1:3], mode="bilinear", align_corners=False)
    return across + down.permute(0, 2, 3, 1)


def absolute(q: Tensor, table: Tensor) -> Tensor:
    """Return (B, H, W, 9): of the products with a table's W + 8 rows, for column j those from W - 1 - j on."""
    b, height, width, _ = q.shape
    table = F.interpolate(table.T[None], width + 8, mode="linear", align_corners=False)[0]
    logits = F.pad(q @ table, (0, 1)).flatten(2)  # one column of zeros
    logits = F.pad(logits, (0, 8)).reshape(b, height, width + 1, width + 8)
    return logits[:, :, :width, -9:]


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[2:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])
