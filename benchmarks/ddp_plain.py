"""DDP with ConvNeXt-T in its plain form: the yardstick of `ddp_inference.py`, kept apart so that it stays as it is.

A direct reading of the published model, stage by stage, as functions of a state dict with `ddp_seg`'s names. The image
is encoded once; then every step concatenates features and map, projects them, and runs the decoder with one
`grid_sample` per attention. Nothing is fused or kept from one step to the next. Float32, inference only.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = Mapping[str, Tensor]

DEPTHS, HEADS, POINTS, LAYERS, BIT_SCALE = (3, 3, 9, 3), 8, 4, 6, 0.01


def predict(w: Weights, images: Tensor, noise: Tensor, steps: int) -> Tensor:
    """Return logits (N, K, H, W) for images (N, 3, H, W) and start noise (N, 256, H/4, W/4)."""
    features, noisy = merge(w, fpn(w, convnext(w, images))), noise
    for k in range(steps):
        now, after = 1 - k / steps, max(1 - (k + 2) / steps, 0)
        level, next_level = log_snr(now), log_snr(after)
        x = F.conv2d(torch.cat([features, noisy], 1), w["transform.weight"], w["transform.bias"])
        logits = decode(w, x, time_embedding(w, level[None]))
        predicted = (torch.sigmoid(F.embedding(logits.argmax(1), w["label_embedding.weight"])) * 2 - 1) * BIT_SCALE
        codes = predicted.permute(0, 3, 1, 2)
        noise_part = (noisy - level.sigmoid().sqrt() * codes) / (-level).sigmoid().sqrt().clamp(min=1e-8)
        noisy = codes * next_level.sigmoid().sqrt() + noise_part * (-next_level).sigmoid().sqrt()
    return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)


def convnext(w: Weights, x: Tensor) -> list[Tensor]:
    """Return the four normalized stage outputs (N, C_i, H_i, W_i)."""
    maps = []
    for i, depth in enumerate(DEPTHS):
        if i == 0:
            x = F.conv2d(x, w["backbone.net.stem.0.weight"], w["backbone.net.stem.0.bias"], stride=4)
            x = channel_norm(w, "backbone.net.stem.1", x, 1e-6)
        else:
            name = f"backbone.net.stages.{i}.downsample"
            x = channel_norm(w, f"{name}.0", x, 1e-5)
            x = F.conv2d(x, w[f"{name}.1.weight"], w[f"{name}.1.bias"], stride=2)
        for j in range(depth):
            x = convnext_block(w, f"backbone.net.stages.{i}.blocks.{j}", x)
        maps.append(channel_norm(w, f"backbone.norms.{i}", x, 1e-6))
    return maps


def convnext_block(w: Weights, name: str, x: Tensor) -> Tensor:
    y = F.conv2d(x, w[f"{name}.conv_dw.weight"], w[f"{name}.conv_dw.bias"], padding=3, groups=x.shape[1])
    y = layer_norm(w, f"{name}.norm", y.permute(0, 2, 3, 1), 1e-6)
    y = linear(w, f"{name}.mlp.fc2", F.gelu(linear(w, f"{name}.mlp.fc1", y)))
    return x + (w[f"{name}.gamma"] * y).permute(0, 3, 1, 2)


def fpn(w: Weights, maps: list[Tensor]) -> list[Tensor]:
    """Return four maps with 256 channels."""
    merged = [conv_norm(w, f"fpn.lateral.{i}", x) for i, x in enumerate(maps)]
    for i in (3, 2, 1):
        merged[i - 1] = merged[i - 1] + F.interpolate(merged[i], merged[i - 1].shape[-2:], mode="nearest")
    return [conv_norm(w, f"fpn.output.{i}", x) for i, x in enumerate(merged)]


def merge(w: Weights, maps: list[Tensor]) -> Tensor:
    """Return the image features (N, 256, H/4, W/4)."""
    size = maps[0].shape[-2:]
    resized = [F.interpolate(x, size, mode="bilinear", align_corners=False) for x in maps]
    return conv_norm(w, "fuse_conv", torch.cat(resized, 1))


def decode(w: Weights, x: Tensor, time: Tensor) -> Tensor:
    """Return logits (N, K, h, w) for a map (N, 256, h, w) and a time embedding (1, 1024)."""
    h, width = x.shape[-2:]
    q = x.flatten(2).transpose(1, 2)
    position, reference = positional_encoding(h, width, x.shape[1]), reference_points(h, width)
    for n in range(LAYERS):
        name = f"decoder.layers.{n}"
        q = layer_norm(w, f"{name}.norm1", q + attention(w, f"{name}.attention", q, position, reference, (h, width)))
        q = layer_norm(w, f"{name}.norm2", q + linear(w, f"{name}.fc2", F.gelu(linear(w, f"{name}.fc1", q))))
        scale, shift = linear(w, f"{name}.time", F.silu(time))[:, None].chunk(2, -1)
        q = q * (scale + 1) + shift
    x = q.transpose(1, 2).reshape(x.shape)
    return F.conv2d(x, w["decoder.classifier.weight"], w["decoder.classifier.bias"])


def attention(w: Weights, name: str, q: Tensor, position: Tensor, reference: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the deformable attention (N, S, 256), the usual formulation with grid_sample."""
    n, s, c = q.shape
    h, width = size
    value = linear(w, f"{name}.value_proj", q).view(n, s, HEADS, c // HEADS)
    query = q + position
    offsets = linear(w, f"{name}.sampling_offsets", query).view(n, s, HEADS, POINTS, 2)
    weights = linear(w, f"{name}.attention_weights", query).view(n, s, HEADS, POINTS).softmax(-1)
    locations = reference[None, :, None, None] + offsets / torch.tensor([width, h])
    image = value.flatten(2).transpose(1, 2).reshape(n * HEADS, c // HEADS, h, width)
    grid = (2 * locations - 1).transpose(1, 2).flatten(0, 1)
    samples = F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    out = (samples * weights.transpose(1, 2).reshape(n * HEADS, 1, s, POINTS)).sum(-1).view(n, c, s)
    return linear(w, f"{name}.output_proj", out.transpose(1, 2).contiguous())


def time_embedding(w: Weights, level: Tensor) -> Tensor:
    phase = level[:, None] * w["time_embedding.frequencies"] * 2 * math.pi
    x = torch.cat([level[:, None], phase.sin(), phase.cos()], 1)
    return linear(w, "time_embedding.fc2", F.gelu(linear(w, "time_embedding.fc1", x)))


def log_snr(time: float) -> Tensor:
    cosine = torch.cos((torch.tensor(time, dtype=torch.float32) + 0.0002) / 1.00025 * math.pi * 0.5)
    return -torch.log((cosine**-2 - 1).clamp(min=1e-5))


def positional_encoding(h: int, width: int, dim: int) -> Tensor:
    """Return (1, h * width, dim), y first."""
    k = torch.arange(dim // 2)
    period = 10000 ** (2 * (k // 2) / (dim // 2))
    y = ((torch.arange(h) + 0.5) / (h + 1e-6) * 2 * math.pi)[:, None] / period
    x = ((torch.arange(width) + 0.5) / (width + 1e-6) * 2 * math.pi)[:, None] / period
    y, x = (torch.stack([a[:, 0::2].sin(), a[:, 1::2].cos()], -1).flatten(1) for a in (y, x))
    return torch.cat([y[:, None].expand(-1, width, -1), x[None].expand(h, -1, -1)], -1).flatten(0, 1)[None]


def reference_points(h: int, width: int) -> Tensor:
    """Return (h * width, 2), normalized (x, y) of the pixel centers."""
    y, x = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(width) + 0.5) / width, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def layer_norm(w: Weights, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def channel_norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    """Layer norm over the channels of a map."""
    return layer_norm(w, name, x.permute(0, 2, 3, 1), eps).permute(0, 3, 1, 2)


def conv_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    """Convolution without bias that keeps the size, then GroupNorm(32)."""
    kernel = w[f"{name}.conv.weight"]
    x = F.conv2d(x, kernel, padding=kernel.shape[-1] // 2)
    return F.group_norm(x, 32, w[f"{name}.norm.weight"], w[f"{name}.norm.bias"])
