"""Condition maps from a backbone's four maps: the heads of SegFormer and DeepLabV3+ up to their classifiers.

Batch norm and ReLU follow every convolution, so a condition is never negative.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segcore.models.layers import ConvNorm, resize


class ConvBNReLU(ConvNorm):
    """Convolution, batch norm and ReLU: `conv`, `norm`, `act`."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1, *, dilation: int = 1, groups: int = 1):
        super().__init__(in_channels, out_channels, kernel, nn.BatchNorm2d, nn.ReLU(inplace=True))
        if dilation > 1 or groups > 1:
            padding = dilation * (kernel // 2)
            self.conv = nn.Conv2d(
                in_channels, out_channels, kernel, padding=padding, dilation=dilation, groups=groups, bias=False
            )


def separable(in_channels: int, out_channels: int, dilation: int = 1) -> nn.Sequential:
    """Return a depthwise-separable 3x3 convolution: `depthwise`, `pointwise`."""
    depthwise = ConvBNReLU(in_channels, in_channels, 3, dilation=dilation, groups=in_channels)
    return nn.Sequential(OrderedDict(depthwise=depthwise, pointwise=ConvBNReLU(in_channels, out_channels)))


class SegFormerHead(nn.Module):
    """The all-MLP head (arXiv 2105.15203, section 3.2): every map to `width` channels, merged at the finest size."""

    def __init__(self, in_channels: Sequence[int], width: int = 256) -> None:
        super().__init__()
        self.width = width
        self.maps = nn.ModuleList(ConvBNReLU(channels, width) for channels in in_channels)
        self.fuse_conv = ConvBNReLU(4 * width, width)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the condition (N, width, h, w) at the size of the first map."""
        # The merging 1x1 convolution is linear, and so is resizing: each map is merged at its own size.
        weights = self.fuse_conv.conv.weight.split(self.width, 1)
        parts = [F.conv2d(project(x), w) for project, x, w in zip(self.maps, maps, weights, strict=True)]
        merged = parts[0]
        for part in parts[1:]:
            merged = merged + resize(part, merged.shape[-2:])
        return self.fuse_conv.act(self.fuse_conv.norm(merged))


class DeepLabHead(nn.Module):
    """Atrous spatial pyramid pooling and refinement with the finest map (DeepLabV3+, arXiv 1802.02611)."""

    def __init__(self, in_channels: Sequence[int], width: int = 512) -> None:
        super().__init__()
        self.width = width
        first, *_, last = in_channels
        self.pool = ConvBNReLU(last, width)
        self.branches = nn.ModuleList([ConvBNReLU(last, width), *(separable(last, width, d) for d in (12, 24, 36))])
        self.bottleneck = ConvBNReLU(5 * width, width, 3)
        self.low = ConvBNReLU(first, 48)
        self.refine = nn.Sequential(separable(width + 48, width), separable(width, width))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the condition (N, width, h, w) at the size of the first map."""
        first, *_, last = maps
        pooled = self.pool(last.mean((2, 3), keepdim=True)).expand(-1, -1, *last.shape[-2:])
        x = self.bottleneck(torch.cat([pooled, *(branch(last) for branch in self.branches)], 1))
        return self.refine(torch.cat([resize(x, first.shape[-2:]), self.low(first)], 1))


RULES = (
    (r"\.norm\.", ".bn."),
    (r"^maps\.", "convs."),
    (r"^fuse_conv\.", "fusion_conv."),
    (r"^pool\.", "image_pool.1."),
    (r"^branches\.", "aspp_modules."),
    (r"^low\.", "c1_bottleneck."),
    (r"^refine\.", "sep_bottleneck."),
    (r"\.(depth|point)wise\.", r".\1wise_conv."),
)
