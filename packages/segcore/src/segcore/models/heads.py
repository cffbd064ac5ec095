"""Necks and heads shared by several methods."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from segcore.models.layers import ConvNorm


class FPN(nn.Module):
    """Feature pyramid network (Lin et al. 2017) without activations; convolutions have GroupNorm or biases.

    Input maps of decreasing size with `in_channels` each become maps with `width` channels: a 1x1 convolution, nearest
    upsampling added from coarse to fine, then a 3x3 convolution. `groups` None omits the norms.
    """

    def __init__(self, in_channels: Sequence[int], width: int, groups: int | None = 32) -> None:
        super().__init__()

        def conv(channels: int, kernel: int) -> nn.Module:
            if groups is None:
                return nn.Conv2d(channels, width, kernel, padding=kernel // 2)
            return ConvNorm(channels, width, kernel, partial(nn.GroupNorm, groups))

        self.lateral = nn.ModuleList(conv(c, 1) for c in in_channels)
        self.output = nn.ModuleList(conv(width, 3) for _ in in_channels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return maps (N, width, H_i, W_i) for maps (N, C_i, H_i, W_i), finest first."""
        merged = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        for i in range(len(merged) - 1, 0, -1):
            merged[i - 1] = merged[i - 1] + F.interpolate(merged[i], size=merged[i - 1].shape[-2:], mode="nearest")
        return [output(x) for output, x in zip(self.output, merged, strict=True)]


class FCNHead(nn.Module):
    """Fully convolutional head: 3x3 convolution, batch norm, ReLU, channel dropout, 1x1 classifier."""

    def __init__(self, in_channels: int, width: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.hidden = ConvNorm(in_channels, width, 3, nn.BatchNorm2d, nn.ReLU())
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        nn.init.kaiming_normal_(self.hidden.conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.classifier.weight, std=0.01)
        assert self.classifier.bias is not None
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, K, H, W) for a map (N, C, H, W)."""
        return self.classifier(self.dropout(self.hidden(x)))
