"""DDRNet: a low-resolution branch for context, a high-resolution one for detail (arXiv 2101.06085).

Every stage ends before its ReLU: the two branches exchange and add maps before rectification, and every consumer of
such a map rectifies it (section 3.2 of the paper, figure 4).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddrnet_seg.official import Source, official_name, recognize
from segcore.config.schema import LossConfig
from segcore.models.layers import ConvNorm, check_two_images, fused, resize, use_fast_products, widened
from segcore.models.losses import head_losses
from segcore.models.segmentor import LoadReport, Segmentor

STRIDE = 8
"""Stride of the high-resolution branch and the logits; images are padded to a multiple of it."""


class Variant(NamedTuple):
    """The configuration of a variant."""

    planes: int
    """Channels of the stem, p; the high-resolution branch has 2p."""
    blocks: tuple[int, ...]
    """Residual blocks of layer1, layer2, each round of stage 3 (one or two) and stage 4."""
    head: int
    """Channels inside the heads."""
    classifier: int
    """Channels before the ImageNet classifier."""


VARIANTS = {
    "23_slim": Variant(32, (2, 2, 2, 2), 64, 1024),
    "23": Variant(64, (2, 2, 2, 2), 128, 2048),
    "39": Variant(64, (3, 4, 3, 3, 3), 256, 2048),
}


def conv_bn(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, *, act: bool = True, bias: bool = False
) -> ConvNorm:
    """Return convolution, batch norm and, with `act`, ReLU."""
    relu = nn.ReLU(inplace=True) if act else None
    return ConvNorm(in_channels, out_channels, kernel, nn.BatchNorm2d, relu, stride=stride, bias=bias)


class Residual(nn.Module):
    """`body(x) + shortcut(x)`, followed by a ReLU with `act`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, *convs: ConvNorm, act: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(OrderedDict((f"conv{i}", x) for i, x in enumerate(convs, 1)))
        plain = stride == 1 and in_channels == out_channels
        self.shortcut = None if plain else conv_bn(in_channels, out_channels, 1, stride, act=False)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """Return a map (N, out_channels, H / stride, W / stride) for (N, in_channels, H, W)."""
        y = self.body(x).add_(x if self.shortcut is None else self.shortcut(x))
        return F.relu_(y) if self.act else y


def basic_block(in_channels: int, width: int, stride: int = 1, *, act: bool) -> Residual:
    """Return the basic residual block: two 3x3 convolutions."""
    convs = conv_bn(in_channels, width, 3, stride), conv_bn(width, width, 3, act=False)
    return Residual(in_channels, width, stride, *convs, act=act)


def bottleneck(in_channels: int, width: int, stride: int, *, act: bool) -> Residual:
    """Return the bottleneck residual block: 1x1, 3x3 and 1x1 convolutions, with 2 * `width` output channels."""
    convs = (
        conv_bn(in_channels, width, 1),
        conv_bn(width, width, 3, stride),
        conv_bn(width, 2 * width, 1, act=False),
    )
    return Residual(in_channels, 2 * width, stride, *convs, act=act)


def stage(in_channels: int, width: int, blocks: int, stride: int = 1) -> nn.Sequential:
    """Return basic blocks; the first has the stride, the last has no final ReLU."""
    first = basic_block(in_channels, width, stride, act=blocks > 1)
    return nn.Sequential(first, *(basic_block(width, width, act=i < blocks - 1) for i in range(1, blocks)))


class BilateralFusion(nn.Module):
    """A stage of both branches, then bilateral fusion: each branch receives the other's map from before the fusion.

    `down` maps the high-resolution branch to the low-resolution one, `compress` the reverse.
    """

    def __init__(self, low_in: int, low: int, high: int, blocks: int, stride: int, down: Sequence[int]) -> None:
        super().__init__()
        self.low = stage(low_in, low, blocks, stride)
        self.high = stage(high, high, blocks)
        widths = (high, *down)
        self.down = nn.Sequential(*(conv_bn(a, b, 3, 2, act=b != low) for a, b in zip(widths, down, strict=False)))
        self.compress = conv_bn(low, high, 1, act=False)

    def forward(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return both maps after stage and fusion, not rectified."""
        low, high = self.low(F.relu(low)), self.high(F.relu(high))
        return low + self.down(F.relu(high)), high + resize(self.compress(F.relu(low)), high.shape[-2:])


class Features(NamedTuple):
    """The backbone's outputs for images (N, C, H, W); p is the variant's `planes`."""

    low: Tensor
    """(N, 16p, H/64, W/64), or H/32 in the classifier."""
    high: Tensor
    """(N, 4p, H/8, W/8)."""
    middle: Tensor
    """(N, 2p, H/8, W/8), the high-resolution branch before stage 4, the input of the auxiliary head."""


class Backbone(nn.Module):
    """Both branches. `classifier` selects the form trained on ImageNet: other strides and ReLUs in stage 5."""

    def __init__(self, variant: Variant, in_channels: int = 3, *, classifier: bool = False) -> None:
        super().__init__()
        p, (first, second, *third, fourth) = variant.planes, variant.blocks
        self.conv1 = nn.Sequential(conv_bn(in_channels, p, 3, 2, bias=True), conv_bn(p, p, 3, 2, bias=True))
        self.layer1 = stage(p, p, first)
        self.layer2 = stage(p, 2 * p, second, 2)
        self.fusions = nn.ModuleList(
            BilateralFusion((4 if i else 2) * p, 4 * p, 2 * p, blocks, 1 if i else 2, [4 * p])
            for i, blocks in enumerate(third)
        )
        self.fusions.append(BilateralFusion(4 * p, 8 * p, 2 * p, fourth, 2, [4 * p, 8 * p]))
        self.low5 = bottleneck(8 * p, 8 * p, 1 if classifier else 2, act=classifier)
        self.high5 = bottleneck(2 * p, 2 * p, 1, act=classifier)

    def forward(self, images: Tensor) -> Features:
        """Return the features of images (N, C, H, W), both sides multiples of 8."""
        low = high = self.layer2(F.relu_(self.layer1(self.conv1(images))))
        for fusion in self.fusions:
            middle = high
            low, high = fusion(low, high)
        return Features(self.low5(F.relu_(low)), self.high5(F.relu_(high)), middle)


class NormConv(nn.Sequential):
    """Batch norm, ReLU and a convolution without bias, in this order: `norm`, `act`, `conv`."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.act = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)


class DAPPM(nn.Module):
    """Deep aggregation pyramid pooling: five scales of context, each refined by the previous one (section 3.3)."""

    def __init__(self, in_channels: int, width: int, out_channels: int) -> None:
        super().__init__()
        self.scales = nn.ModuleList(NormConv(in_channels, width, 1) for _ in range(5))
        self.processes = nn.ModuleList(NormConv(width, width, 3) for _ in range(4))
        self.compression = NormConv(5 * width, out_channels, 1)
        self.shortcut = NormConv(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map (N, out_channels, H, W) for (N, in_channels, H, W), neither rectified."""
        pooled = [F.avg_pool2d(x, 2 * stride + 1, stride, stride) for stride in (2, 4, 8)]  # includes the padding
        pooled.append(x.mean((2, 3), keepdim=True))
        maps = [self.scales[0](x)]
        for y, scale, process in zip(pooled, self.scales[1:], self.processes, strict=True):
            maps.append(process(resize(scale(y), x.shape[-2:]) + maps[-1]))
        return self.compression(torch.cat(maps, 1)) + self.shortcut(x)


class Head(nn.Module):
    """Batch norm, ReLU, 3x3 convolution, batch norm, ReLU, 1x1 classifier."""

    def __init__(self, in_channels: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.hidden = conv_bn(in_channels, width, 3)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, K, H, W) for a map (N, in_channels, H, W)."""
        return self.classifier(self.hidden(F.relu_(self.norm(x))))


class DDRNet(Segmentor):
    """DDRNet-23-slim, -23 and -39; the arguments are the fields of `ddrnet_seg.configs.DDRNetConfig`."""

    auxiliary_names = ("auxiliary_head.", "seghead_extra.")
    pad_to = size_divisor = STRIDE

    def __init__(
        self,
        *,
        num_classes: int = 19,
        in_channels: int = 3,
        variant: str = "23_slim",
        auxiliary: bool = True,
        auxiliary_weight: float = 0.4,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes, self.align_corners, self.auxiliary_weight = num_classes, align_corners, auxiliary_weight
        planes, width = VARIANTS[variant].planes, VARIANTS[variant].head
        self.backbone = Backbone(VARIANTS[variant], in_channels)
        self.context = DAPPM(16 * planes, 128, 4 * planes)
        self.head = Head(4 * planes, width, num_classes)
        self.auxiliary_head = Head(2 * planes, width, num_classes) if auxiliary else None
        initialize(self)
        use_fast_products(self)

    def logits(self, images: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """Return logits (N, K, H/8, W/8) of padded images (N, C, H, W); nothing is drawn."""
        return self.decode(self.backbone(images))

    def decode(self, features: Features) -> Tensor:
        """Return the main logits (N, K, H/8, W/8)."""
        return self.head(resize(self.context(features.low), features.high.shape[-2:]) + features.high)

    def losses(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        seeds: Sequence[int] | None = None,
        draws: Mapping[str, Tensor] | None = None,
        loss: LossConfig = LossConfig(),  # noqa: B008  (frozen)
    ) -> dict[str, Tensor]:
        """Return the losses of one training step; nothing is drawn. See `Segmentor`.

        Both heads use the configured loss, the auxiliary one times `auxiliary_weight`. Raises UserError for a single
        image while batch norm is in training mode: the global branch of DAPPM has one value per channel and image.
        """
        check_two_images("DDRNet", images, self.context.scales[-1].norm)
        features = self.backbone(self.pad(images))

        def full(logits: Tensor) -> Tensor:
            return self.resize_to_input(widened(logits), labels.shape[-2:])

        heads = {"decode": (full(self.decode(features)), 1.0)}
        if self.auxiliary_head is not None:
            heads["aux"] = full(self.auxiliary_head(features.middle)), self.auxiliary_weight
        return head_losses(heads, labels, loss, ignore_index=self.ignore_index)

    def recomputed_blocks(self) -> list[nn.Module]:
        return [self.backbone.conv1, *(part for part in self.modules() if isinstance(part, Residual | Head))]

    def fuse(self) -> DDRNet:
        """Return a copy for inference: batch norms folded into the convolutions before them, no auxiliary head."""
        copied = fused(self)
        copied.auxiliary_head = None
        return copied

    # Weights

    def key_map(self) -> dict[str, str]:
        """Return the authors' name of every entry of `state_dict()`."""
        return key_map(self)

    def load_official(self, state: Mapping[str, Tensor]) -> LoadReport:
        """Load a segmentation checkpoint of the authors, pyradd/DDRNet-pytorch or MMSegmentation; its names tell which.

        See `Segmentor.load_official`, and `official.recognize` for the names of the four kinds.
        """
        source = recognize(state)
        return _report(self._load(source.tensors, self.key_map(), self.convert), source)

    def is_full_checkpoint(self, state: Mapping[str, Tensor]) -> bool:
        """Return whether the names are those of a whole segmentation model; an ImageNet file has no head."""
        return any(name.startswith(("head.", "final_layer.")) for name in recognize(state).tensors)

    def load_backbone(self, state: Mapping[str, Tensor]) -> LoadReport:
        """Load the whole backbone from the authors' or MMSegmentation's ImageNet weights, without the classifier."""
        source = recognize(state)
        rest = tuple(name for name in source.tensors if name.startswith(CLASSIFIER))
        tensors = {name: tensor for name, tensor in source.tensors.items() if name not in rest}
        context = any(name.startswith("spp.") for name in tensors)  # MMSegmentation counts it as part of the backbone
        parts = ("backbone.", "context.") if context else ("backbone.",)
        names = {name: official for name, official in self.key_map().items() if name.startswith(parts)}
        return _report(self._load(tensors, names, self.convert), source, rest)


class DDRNetClassifier(nn.Module):
    """The form trained on ImageNet (section 4.2), to produce and check its weights here."""

    def __init__(self, variant: str = "23_slim", num_classes: int = 1000, in_channels: int = 3) -> None:
        super().__init__()
        p, width = VARIANTS[variant].planes, VARIANTS[variant].classifier
        self.backbone = Backbone(VARIANTS[variant], in_channels, classifier=True)
        self.down5 = nn.Sequential(conv_bn(4 * p, 8 * p, 3, 2), conv_bn(8 * p, 16 * p, 3, 2, act=False))
        self.last_layer = conv_bn(16 * p, width, 1)
        self.linear = nn.Linear(width, num_classes)
        initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, classes) for normalized images (N, C, H, W), both sides multiples of 8."""
        features = self.backbone(images)
        y = self.last_layer(F.relu_(features.low + self.down5(features.high)))
        return self.linear(y.mean((2, 3)))

    def key_map(self) -> dict[str, str]:
        """Return the published name of every entry of `state_dict()`."""
        return key_map(self)


CLASSIFIER = ("down5.", "last_layer.", "linear.")


def initialize(model: nn.Module) -> None:
    """Initialize convolutions with Kaiming normal weights (fan-out, ReLU), as published; biases keep the default."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def key_map(model: DDRNet | DDRNetClassifier) -> dict[str, str]:
    """Return the published name of every entry of `state_dict()`."""
    rounds = len(model.backbone.fusions) - 1  # of stage 3
    return {name: official_name(name, rounds) for name in model.state_dict()}


def _report(report: LoadReport, source: Source, dropped: tuple[str, ...] = ()) -> LoadReport:
    return replace(report, source=source.kind, dropped=(*report.dropped, *source.dropped, *dropped))
