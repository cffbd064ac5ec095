"""The four heads: Semantic FPN (Kirillov et al. 2019) and SETR's naive, PUP and MLA (Zheng et al. 2021, section 3.3).

Each takes the maps of the four stages and the images' size, and returns logits at its own size, which the model
resizes. Every resize here has align_corners True. SETR's heads output **square** maps, as published: the width of their
features is used for both axes, and the model's last resize undoes the distortion. With `img_size` None each axis has
its own size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segcore.models.heads import FPN
from segcore.models.layers import ConvNorm
from segcore.models.layers import resize as resize_

Size = Sequence[int]


def resize(x: Tensor, size: Size) -> Tensor:
    """Return `x` (N, C, H, W) resized to `size` (height, width), corners aligned."""
    return resize_(x, size, align_corners=True)


def conv_bn_relu(in_channels: int, out_channels: int, *, bias: bool = False) -> ConvNorm:
    """Return a 3x3 convolution, batch norm and ReLU."""
    return ConvNorm(in_channels, out_channels, 3, nn.BatchNorm2d, nn.ReLU(inplace=True), bias=bias)


class SemanticFPN(nn.Module):
    """A feature pyramid; each map is convolved and doubled until it has 1/4 of the images' size, then all are added."""

    def __init__(self, widths: Sequence[int], num_classes: int, dropout: float) -> None:
        super().__init__()
        self.fpn = FPN(widths, 256, groups=None)
        self.scales = nn.ModuleList(
            nn.Sequential(conv_bn_relu(256, 128), *(conv_bn_relu(128, 128) for _ in range(doublings - 1)))
            for doublings in (1, 1, 2, 3)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(128, num_classes, 1)

    def forward(self, maps: Sequence[Tensor], size: Size) -> Tensor:
        """Return logits (N, K, H_0, W_0) for maps (N, C_i, H_i, W_i); `size` is not used."""
        first, *rest = self.fpn(maps)
        total = self.scales[0](first)
        for scale, x in zip(self.scales[1:], rest, strict=True):
            for conv in scale.children():
                x = conv(x)
                x = resize(x, [2 * side for side in x.shape[2:]])
            total = total + resize(x, total.shape[2:])
        return self.classifier(self.dropout(total))


class SETRNaive(nn.Module):
    """A classifier on the last map."""

    def __init__(self, widths: Sequence[int], num_classes: int, img_size: int | None) -> None:
        super().__init__()
        self.img_size = img_size
        self.classifier = nn.Conv2d(widths[-1], num_classes, 1)

    def forward(self, maps: Sequence[Tensor], size: Size) -> Tensor:
        """Return logits (N, K, img_size, img_size), or with None at `size`, for the stages' maps (N, C_i, H_i, W_i)."""
        return resize(self.classifier(maps[-1]), _target(self.img_size, size))


class SETRPUP(nn.Module):
    """Progressive upsampling: three convolutions and the classifier on the last map, doubling it after each."""

    def __init__(self, widths: Sequence[int], num_classes: int, img_size: int | None) -> None:
        super().__init__()
        self.square = img_size is not None
        self.convs = nn.ModuleList(conv_bn_relu(a, b, bias=True) for a, b in pairwise((widths[-1], 256, 256, 256)))
        self.classifier = nn.Conv2d(256, num_classes, 1)

    def forward(self, maps: Sequence[Tensor], size: Size) -> Tensor:
        """Return logits (N, K, 16 W_3, 16 W_3), or with None (N, K, 16 H_3, 16 W_3); `size` is not used."""
        x = maps[-1]
        for conv in (*self.convs, self.classifier):
            x = conv(x)
            x = resize(x, _times(x, 2, self.square))
        return x


class SETRMLA(nn.Module):
    """Multi-level aggregation: two convolutions on each of the four maps, concatenation, a classifier.

    A 1x1 convolution and a bilinear resize commute, so each map is classified before it is resized and the logits are
    added: 19 channels are resized instead of 512.
    """

    def __init__(self, widths: Sequence[int], num_classes: int, img_size: int | None) -> None:
        super().__init__()
        self.img_size = img_size
        branches = (nn.Sequential(conv_bn_relu(width, 128), conv_bn_relu(128, 128)) for width in widths)
        self.branches = nn.ModuleList(branches)
        self.classifier = nn.Conv2d(128 * len(widths), num_classes, 1)

    def forward(self, maps: Sequence[Tensor], size: Size) -> Tensor:
        """Return logits (N, K, img_size, img_size), or with None at `size`, for the stages' maps (N, C_i, H_i, W_i)."""
        wide = _times(maps[1], 4, self.img_size is not None)  # the size does not come from the first map, as published
        weights = self.classifier.weight.split(128, 1)
        biases = (self.classifier.bias, *[None] * (len(maps) - 1))
        logits = [
            resize(F.conv2d(branch(x), weight, bias), wide)
            for branch, x, weight, bias in zip(self.branches, maps, weights, biases, strict=True)
        ]
        return resize(torch.stack(logits).sum(0), _target(self.img_size, size))


def _target(img_size: int | None, size: Size) -> Size:
    return size if img_size is None else (img_size, img_size)


def _times(x: Tensor, factor: int, square: bool) -> Size:
    """Return the size of `x` (N, C, H, W) times `factor`; with `square` the width is used for both axes."""
    height, width = x.shape[2:]
    return factor * (width if square else height), factor * width
