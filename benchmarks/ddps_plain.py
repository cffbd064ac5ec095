"""DDPS with SegFormer-B2 in its plain form: the yardstick of `ddps_inference.py`, kept apart so that it stays as it is.

A direct reading of the published model's denoising as functions of a state dict with published names: the image is
encoded once; then every step samples a label map over all classes, concatenates it with the condition, and runs the
UNet, whose convolution weights are standardized anew each time. Float32, inference only.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = Mapping[str, Tensor]
TINY, EPS, HEADS = 1e-30, 1e-5, 4


def denoise(w: Weights, condition: Tensor, mask: Tensor, uniforms: Sequence[Tensor], steps: Sequence[int]) -> Tensor:
    """Return logits (N, K, h, w) of the last step for a condition (N, C, h, w) and label maps (N, h, w)."""
    total = len(w["decode_head.log_at"])
    for i, step in enumerate(steps):
        if i:
            mask = noised(w, logits.argmax(1), total - 1 - step, uniforms[i - 1])  # noqa: F821  (of the step before)
        embedded = F.embedding(mask, w["decode_head.embed.weight"]).permute(0, 3, 1, 2)
        features = unet(w, torch.cat([condition, embedded], 1), torch.full((len(mask),), step))
        logits = F.conv2d(features, w["decode_head.conv_seg_new.weight"], w["decode_head.conv_seg_new.bias"])
    return logits


def noised(w: Weights, labels: Tensor, index: int, uniform: Tensor) -> Tensor:
    """Return labels (N, h, w) drawn from the noise of an index, by Gumbel samples of all classes."""
    one_hot = F.one_hot(labels, uniform.shape[1]).permute(0, 3, 1, 2)
    log_x = torch.log(one_hot.float().clamp(min=TINY))
    log_p = log_add_exp(log_x + w["decode_head.log_cumprod_at"][index], w["decode_head.log_cumprod_bt"][index])
    return (-torch.log(-torch.log(uniform + TINY) + TINY) + log_p).argmax(1)


def log_add_exp(a: Tensor, b: Tensor) -> Tensor:
    m = torch.max(a, b)
    return m + torch.log(torch.exp(a - m) + torch.exp(b - m))


def unet(w: Weights, x: Tensor, t: Tensor) -> Tensor:
    """Return features (N, 256, h, w)."""
    name = "decode_head.unet"
    x = F.conv2d(x, w[f"{name}.init_conv.weight"], w[f"{name}.init_conv.bias"], padding=3)
    stem, half = x, x.shape[1] // 2
    angles = t[:, None] * torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
    time = linear(w, f"{name}.time_mlp.1", torch.cat([angles.sin(), angles.cos()], 1))
    time = linear(w, f"{name}.time_mlp.3", F.gelu(time))
    saved = []
    for k in range(3):
        x = block(w, f"{name}.downs.{k}.0", x, time)
        saved.append(x)
        x = linear_attention(w, f"{name}.downs.{k}.2", block(w, f"{name}.downs.{k}.1", x, time))
        saved.append(x)
        stride = {"stride": 2} if k < 2 else {}
        x = F.conv2d(x, w[f"{name}.downs.{k}.3.weight"], w[f"{name}.downs.{k}.3.bias"], padding=1, **stride)
    x = block(w, f"{name}.mid_block1", x, time)
    x = block(w, f"{name}.mid_block2", full_attention(w, f"{name}.mid_attn", x), time)
    for k in range(3):
        x = block(w, f"{name}.ups.{k}.0", torch.cat([x, saved.pop()], 1), time)
        x = block(w, f"{name}.ups.{k}.1", torch.cat([x, saved.pop()], 1), time)
        x = linear_attention(w, f"{name}.ups.{k}.2", x)
        conv = f"{name}.ups.{k}.3.1" if k < 2 else f"{name}.ups.{k}.3"
        x = F.interpolate(x, scale_factor=2, mode="nearest") if k < 2 else x
        x = F.conv2d(x, w[f"{conv}.weight"], w[f"{conv}.bias"], padding=1)
    x = block(w, f"{name}.final_res_block", torch.cat([x, stem], 1), time)
    return F.conv2d(x, w[f"{name}.final_conv.weight"], w[f"{name}.final_conv.bias"])


def block(w: Weights, name: str, x: Tensor, time: Tensor) -> Tensor:
    scale, shift = linear(w, f"{name}.mlp.1", F.silu(time))[..., None, None].chunk(2, 1)
    y = standard_conv(w, f"{name}.block1", x)
    y = F.silu(y * (scale + 1) + shift)
    y = F.silu(standard_conv(w, f"{name}.block2", y))
    if f"{name}.res_conv.weight" in w:
        x = F.conv2d(x, w[f"{name}.res_conv.weight"], w[f"{name}.res_conv.bias"])
    return y + x


def standard_conv(w: Weights, name: str, x: Tensor) -> Tensor:
    """Return the normalized answer of a convolution with standardized weights."""
    weight = w[f"{name}.proj.weight"]
    mean, variance = weight.mean((1, 2, 3), keepdim=True), weight.var((1, 2, 3), unbiased=False, keepdim=True)
    x = F.conv2d(x, (weight - mean) * (variance + EPS).rsqrt(), w[f"{name}.proj.bias"], padding=1)
    return F.group_norm(x, 8, w[f"{name}.norm.weight"], w[f"{name}.norm.bias"])


def linear_attention(w: Weights, name: str, x: Tensor) -> Tensor:
    q, k, v = qkv(w, name, x)
    context = torch.einsum("nhdp,nhep->nhde", k.softmax(-1), v / v.shape[-1])
    y = torch.einsum("nhde,nhdp->nhep", context, q.softmax(2) * 32**-0.5).flatten(1, 2).unflatten(2, x.shape[-2:])
    y = F.conv2d(y, w[f"{name}.fn.fn.to_out.0.weight"], w[f"{name}.fn.fn.to_out.0.bias"])
    return x + channel_norm(y, w[f"{name}.fn.fn.to_out.1.g"])


def full_attention(w: Weights, name: str, x: Tensor) -> Tensor:
    q, k, v = qkv(w, name, x)
    weights = torch.einsum("nhdi,nhdj->nhij", q * 32**-0.5, k).softmax(-1)
    y = torch.einsum("nhij,nhdj->nhdi", weights, v).flatten(1, 2).unflatten(2, x.shape[-2:])
    return x + F.conv2d(y, w[f"{name}.fn.fn.to_out.weight"], w[f"{name}.fn.fn.to_out.bias"])


def qkv(w: Weights, name: str, x: Tensor) -> list[Tensor]:
    """Return queries, keys and values (N, heads, 32, pixels)."""
    y = F.conv2d(channel_norm(x, w[f"{name}.fn.norm.g"]), w[f"{name}.fn.fn.to_qkv.weight"])
    return [part.flatten(2).unflatten(1, (HEADS, 32)) for part in y.chunk(3, 1)]


def channel_norm(x: Tensor, gain: Tensor) -> Tensor:
    variance, mean = x.var(1, unbiased=False, keepdim=True), x.mean(1, keepdim=True)
    return (x - mean) * (variance + EPS).rsqrt() * gain


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])
