"""DDRNet: a low-resolution branch for context, a high-resolution one for detail (arXiv 2101.06085).

Every stage ends before its ReLU: the two branches exchange and add what is not yet rectified, and whoever reads such a
map rectifies it (section 3.2 of the paper, figure 4).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddrnet_seg.configs import VARIANTS, DDRNet, Variant
from ddrnet_seg.losses import ohem_pyradd
from ddrnet_seg.official import Source, official_name, recognize
from segcore.errors import UserError
from segcore.models.layers import ConvNorm, fused, resize
from segcore.models.losses import cross_entropy, ohem_cross_entropy
from segcore.models.segmentor import LoadReport, Segmentor

STRIDE = 8
"""Of the high-resolution branch and the logits; images are padded to a multiple of it."""


def unit(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, *, act: bool = True, bias: bool = False
) -> ConvNorm:
    """Return convolution, batch norm and, with `act`, ReLU."""
    relu = nn.ReLU(inplace=True) if act else None
    return ConvNorm(in_channels, out_channels, kernel, nn.BatchNorm2d, relu, stride=stride, bias=bias)


class Residual(nn.Module):
    """`body(x) + shortcut(x)`, rectified with `act`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, *units: ConvNorm, act: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(OrderedDict((f"conv{i}", x) for i, x in enumerate(units, 1)))
        plain = stride == 1 and in_channels == out_channels
        self.shortcut = None if plain else unit(in_channels, out_channels, 1, stride, act=False)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """Return a map (N, out_channels, H / stride, W / stride) for (N, in_channels, H, W)."""
        y = self.body(x).add_(x if self.shortcut is None else self.shortcut(x))
        return F.relu_(y) if self.act else y


def basic(in_channels: int, width: int, stride: int = 1, *, act: bool) -> Residual:
    """Return the basic residual block: two 3x3 convolutions."""
    units = unit(in_channels, width, 3, stride), unit(width, width, 3, act=False)
    return Residual(in_channels, width, stride, *units, act=act)


def bottleneck(in_channels: int, width: int, stride: int, *, act: bool) -> Residual:
    """Return the bottleneck residual block: 1x1, 3x3 and 1x1 convolutions, twice `width` channels out."""
    units = unit(in_channels, width, 1), unit(width, width, 3, stride), unit(width, 2 * width, 1, act=False)
    return Residual(in_channels, 2 * width, stride, *units, act=act)


def stage(in_channels: int, width: int, blocks: int, stride: int = 1) -> nn.Sequential:
    """Return basic blocks, the first with the stride; the last is not rectified."""
    first = basic(in_channels, width, stride, act=blocks > 1)
    return nn.Sequential(first, *(basic(width, width, act=i < blocks - 1) for i in range(1, blocks)))


class Exchange(nn.Module):
    """A stage of both branches, then bilateral fusion: each branch gets what the other had before it.

    `down` leads from the high branch to the low one, `compress` back.
    """

    def __init__(self, low_in: int, low: int, high: int, blocks: int, stride: int, down: Sequence[int]) -> None:
        super().__init__()
        self.low = stage(low_in, low, blocks, stride)
        self.high = stage(high, high, blocks)
        widths = (high, *down)
        self.down = nn.Sequential(*(unit(a, b, 3, 2, act=b != low) for a, b in zip(widths, down, strict=False)))
        self.compress = unit(low, high, 1, act=False)

    def forward(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return both maps after stage and fusion, not rectified."""
        low, high = self.low(F.relu(low)), self.high(F.relu(high))
        return low + self.down(F.relu(high)), high + resize(self.compress(F.relu(low)), high.shape[-2:])


class Features(NamedTuple):
    """What the backbone gives for images (N, C, H, W); p is the variant's `planes`."""

    low: Tensor
    """(N, 16p, H/64, W/64), or H/32 in the classifier."""
    high: Tensor
    """(N, 4p, H/8, W/8)."""
    middle: Tensor
    """(N, 2p, H/8, W/8), the high branch before stage 4, which the auxiliary head reads."""


class Backbone(nn.Module):
    """Both branches. With `classifier` in the form that is trained on ImageNet: other strides and ReLUs in stage 5."""

    def __init__(self, variant: Variant, in_channels: int = 3, *, classifier: bool = False) -> None:
        super().__init__()
        p, (first, second, *third, fourth) = variant.planes, variant.blocks
        self.conv1 = nn.Sequential(unit(in_channels, p, 3, 2, bias=True), unit(p, p, 3, 2, bias=True))
        self.layer1 = stage(p, p, first)
        self.layer2 = stage(p, 2 * p, second, 2)
        self.exchanges = nn.ModuleList(
            Exchange((4 if i else 2) * p, 4 * p, 2 * p, blocks, 1 if i else 2, [4 * p])
            for i, blocks in enumerate(third)
        )
        self.exchanges.append(Exchange(4 * p, 8 * p, 2 * p, fourth, 2, [4 * p, 8 * p]))
        self.low5 = bottleneck(8 * p, 8 * p, 1 if classifier else 2, act=classifier)
        self.high5 = bottleneck(2 * p, 2 * p, 1, act=classifier)

    def forward(self, images: Tensor) -> Features:
        """Return the features of images (N, C, H, W), both sides multiples of 8."""
        low = high = self.layer2(F.relu_(self.layer1(self.conv1(images))))
        for exchange in self.exchanges:
            middle = high
            low, high = exchange(low, high)
        return Features(self.low5(F.relu_(low)), self.high5(F.relu_(high)), middle)


class NormConv(nn.Sequential):
    """Batch norm, ReLU and a convolution without bias, in this order: `norm`, `act`, `conv`."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.act = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)


class DAPPM(nn.Module):
    """Deep aggregation pyramid pooling: five scales of context, each refined by the one before (section 3.3)."""

    def __init__(self, in_channels: int, width: int, out_channels: int) -> None:
        super().__init__()
        self.scales = nn.ModuleList(NormConv(in_channels, width, 1) for _ in range(5))
        self.processes = nn.ModuleList(NormConv(width, width, 3) for _ in range(4))
        self.compression = NormConv(5 * width, out_channels, 1)
        self.shortcut = NormConv(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map (N, out_channels, H, W) for (N, in_channels, H, W), neither rectified."""
        pooled = [F.avg_pool2d(x, 2 * stride + 1, stride, stride) for stride in (2, 4, 8)]  # counts the padding
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
        self.hidden = unit(in_channels, width, 3)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, K, H, W) for a map (N, in_channels, H, W)."""
        return self.classifier(self.hidden(F.relu_(self.norm(x))))


class DDRNetSegmentor(Segmentor):
    """DDRNet-23-slim, -23 and -39. Built by `DDRNet.build`. Images of any size are padded to a multiple of 8 inside."""

    auxiliary_names = ("auxiliary_head.", "seghead_extra.")
    size_divisor = STRIDE

    def __init__(self, config: DDRNet) -> None:
        super().__init__()
        self.config = config
        self.num_classes = config.num_classes
        self.align_corners = config.align_corners
        variant = VARIANTS[config.variant]
        p = variant.planes
        self.backbone = Backbone(variant, config.in_channels)
        self.context = DAPPM(16 * p, 128, 4 * p)
        self.head = Head(4 * p, variant.head, config.num_classes)
        self.auxiliary_head = Head(2 * p, variant.head, config.num_classes) if config.auxiliary else None
        initialize(self)

    def predict_steps(
        self, images: Tensor, steps: Sequence[int] | None = None, seeds: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Return the one entry "final"; `steps` and `seeds` change nothing. See `Segmentor`."""
        self.check_size(images)
        return {"final": self._full_size(self._logits(self.backbone(_padded(images))), images.shape[-2:])}

    def losses(
        self,
        images: Tensor,
        labels: Tensor,
        seeds: Sequence[int] | None = None,
        draws: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return the losses of one training step; nothing is drawn. See `Segmentor`.

        Both heads get the configured loss, the auxiliary one times `auxiliary_weight`. Raises UserError for a single
        image while batch norm is in training mode: the global branch of DAPPM has one value per channel and image.
        """
        if len(images) == 1 and isinstance(n := self.context.scales[-1].norm, nn.BatchNorm2d) and n.training:
            raise UserError("DDRNet trains on 2 images per forward pass or more; raise train.device_batch_size (1)")
        features = self.backbone(_padded(images))
        logits = {"decode": (self._logits(features), 1.0)}
        if self.auxiliary_head is not None:
            logits["aux"] = self.auxiliary_head(features.middle), self.config.auxiliary_weight
        losses: dict[str, Tensor] = {}
        for name, (x, weight) in logits.items():
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            loss, accuracy = self._criterion(self._full_size(x, labels.shape[-2:]), labels)
            losses |= {f"{name}.loss_ce": weight * loss, f"{name}.acc_seg": accuracy}
        losses["loss"] = torch.stack([value for name, value in losses.items() if "loss" in name]).sum()
        return losses

    def fuse(self) -> DDRNetSegmentor:
        """Return a copy for inference: batch norms folded into the convolutions before them, no auxiliary head."""
        copied = fused(self)
        copied.auxiliary_head = None
        return copied

    def _logits(self, features: Features) -> Tensor:
        """Return the main logits (N, K, H/8, W/8)."""
        return self.head(resize(self.context(features.low), features.high.shape[-2:]) + features.high)

    def _criterion(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the configured loss and the accuracy for logits (N, K, H, W) and labels (N, H, W)."""
        config = self.config
        if config.loss == "cross_entropy":
            return cross_entropy(logits, labels, ignore_index=self.ignore_index, class_weight=self.class_weight)
        return (ohem_pyradd if config.loss == "ohem_pyradd" else ohem_cross_entropy)(
            logits,
            labels,
            ignore_index=self.ignore_index,
            threshold=config.ohem_threshold,
            min_kept=config.ohem_min_kept,
            class_weight=self.class_weight,
        )

    def _full_size(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        """Return logits (N, K, H, W) at `size`, for logits of the padded image at 1/8 of its size."""
        padded = [STRIDE * side for side in logits.shape[-2:]]
        return resize(logits, padded, align_corners=self.align_corners)[..., : size[0], : size[1]]

    # Weights

    def key_map(self) -> dict[str, str]:
        """Return the authors' name of every entry of `state_dict()`."""
        return key_map(self)

    def load_official(self, state: Mapping[str, Tensor]) -> LoadReport:
        """Load a segmentation checkpoint of the authors, the seed project or MMSegmentation, told apart by its names.

        See `Segmentor.load_official`, and `official.recognize` for what the four kinds look like.
        """
        source = recognize(state)
        return _report(self._load(source.tensors, self.key_map(), self.convert), source)

    def is_full_checkpoint(self, state: Mapping[str, Tensor]) -> bool:
        """Return whether the names are those of a whole segmentation model; an ImageNet file has no head."""
        return any(name.startswith(("head.", "final_layer.")) for name in recognize(state).tensors)

    def load_backbone(self, state: Mapping[str, Tensor]) -> LoadReport:
        """Load ImageNet weights, the authors' or MMSegmentation's: all of the backbone. The classifier is dropped."""
        source = recognize(state)
        rest = tuple(name for name in source.tensors if name.startswith(CLASSIFIER))
        tensors = {name: tensor for name, tensor in source.tensors.items() if name not in rest}
        context = any(name.startswith("spp.") for name in tensors)  # MMSegmentation counts it to the backbone
        parts = ("backbone.", "context.") if context else ("backbone.",)
        names = {name: official for name, official in self.key_map().items() if name.startswith(parts)}
        return _report(self._load(tensors, names, self.convert), source, rest)


class DDRNetClassifier(nn.Module):
    """The form that is trained on ImageNet (section 4.2), so that its weights can be made and checked here."""

    def __init__(self, variant: str = "23_slim", num_classes: int = 1000, in_channels: int = 3) -> None:
        super().__init__()
        p, width = VARIANTS[variant].planes, VARIANTS[variant].classifier
        self.backbone = Backbone(VARIANTS[variant], in_channels, classifier=True)
        self.down5 = nn.Sequential(unit(4 * p, 8 * p, 3, 2), unit(8 * p, 16 * p, 3, 2, act=False))
        self.last_layer = unit(16 * p, width, 1)
        self.linear = nn.Linear(width, num_classes)
        initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, classes) for normalized images (N, C, H, W)."""
        features = self.backbone(_padded(images))
        y = self.last_layer(F.relu_(features.low + self.down5(features.high)))
        return self.linear(y.mean((2, 3)))

    def key_map(self) -> dict[str, str]:
        """Return the published name of every entry of `state_dict()`."""
        return key_map(self)


CLASSIFIER = ("down5.", "last_layer.", "linear.")


def initialize(model: nn.Module) -> None:
    """Give every convolution Kaiming normal weights (fan-out, ReLU), as published; biases keep PyTorch's default."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def key_map(model: DDRNetSegmentor | DDRNetClassifier) -> dict[str, str]:
    """Return the published name of every entry of `state_dict()`."""
    rounds = len(model.backbone.exchanges) - 1  # of stage 3
    return {name: official_name(name, rounds) for name in model.state_dict()}


def _report(report: LoadReport, source: Source, dropped: tuple[str, ...] = ()) -> LoadReport:
    return replace(report, source=source.kind, dropped=(*report.dropped, *source.dropped, *dropped))


def _padded(images: Tensor) -> Tensor:
    """Return images with zeros, the mean color, to the right and below, up to multiples of 8."""
    below, right = (-side % STRIDE for side in images.shape[-2:])
    return F.pad(images, (0, right, 0, below)) if below or right else images
