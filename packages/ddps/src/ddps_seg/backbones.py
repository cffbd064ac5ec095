"""The convolutional backbones of DeepLabV3+, from timm, with the published dilations (output stride 8)."""

from __future__ import annotations

import re

import timm
from torch import Tensor

from ddps_seg.mit import VARIANTS, MiT
from segcore.models.backbones import CONVNEXT, SWIN, Backbone, TimmBackbone, build_backbone

TIMM = {"resnet50": "resnet50c", "resnet101": "resnet101c"}
"""ResNetV1c, which replaces the 7x7 convolution by three 3x3 ones, under the name of its configurations."""


def build(name: str, *, in_channels: int = 3, drop_path: float = 0.1) -> Backbone:
    """Return the backbone with random weights; only MiT uses `drop_path`.

    `resnet18` and the ConvNeXt and Swin of `segcore.models.backbones` are plain, with maps at strides 4 to 32; every
    other model of timm is dilated. Raises UserError for a name that is unknown or of a model that cannot be used.
    """
    if name in VARIANTS:
        return MiT(name, in_channels, drop_path)
    if name in TIMM:
        return ResNetV1c(TIMM[name], in_channels)
    if name == "mobilenet_v2":
        return MobileNetV2(in_channels)
    if name in (*CONVNEXT, *SWIN, "resnet18"):
        return build_backbone(name, in_channels=in_channels)
    return TimmBackbone(name, in_channels, output_stride=8, others=(*VARIANTS, *TIMM, "mobilenet_v2"))


class ResNetV1c(Backbone):
    """ResNetV1c-50 or -101 at output stride 8: dilations 2 and 4 in the last stages, half that in their first block."""

    strides = (4, 8, 8, 8)

    def __init__(self, timm_name: str, in_channels: int = 3) -> None:
        super().__init__()
        self.net = timm.create_model(
            timm_name, features_only=True, output_stride=8, out_indices=(1, 2, 3, 4), in_chans=in_channels
        )
        self.channels = tuple(self.net.feature_info.channels())

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.net(images)

    def key_map(self) -> dict[str, str]:
        names = {name: name.removeprefix("net.") for name in self.state_dict()}
        return {name: re.sub(r"^bn1\.", "stem.7.", re.sub(r"^conv1\.", "stem.", own)) for name, own in names.items()}


class MobileNetV2(Backbone):
    """MobileNetV2 at output stride 8; as in MMSegmentation, only the first block of a group is dilated."""

    strides = (4, 8, 8, 8)

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        # timm's own output_stride=8 dilates the later blocks of a group instead, with other results.
        self.net = timm.create_model(
            "mobilenetv2_100", features_only=True, out_indices=(1, 2, 3, 4), in_chans=in_channels
        )
        for group, dilation in ((3, 2), (4, 2), (5, 4), (6, 4)):
            conv = self.net.blocks[group][0].conv_dw
            conv.stride, conv.dilation, conv.padding = (1, 1), (dilation, dilation), (dilation, dilation)
        self.channels = tuple(self.net.feature_info.channels())

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.net(images)

    def key_map(self) -> dict[str, str]:
        return {name: _mobilenet_name(name) for name in self.state_dict()}


_MOBILENET = {
    True: {"conv_dw": (0, "conv"), "bn1": (0, "bn"), "conv_pw": (1, "conv"), "bn2": (1, "bn")},
    False: {
        **{"conv_pw": (0, "conv"), "bn1": (0, "bn"), "conv_dw": (1, "conv"), "bn2": (1, "bn")},
        **{"conv_pwl": (2, "conv"), "bn3": (2, "bn")},
    },
}
"""timm's name inside a block, of the first group or another -> index and kind in the published names."""


def _mobilenet_name(name: str) -> str:
    name = name.removeprefix("net.").replace("conv_stem.", "conv1.conv.")
    found = re.match(r"blocks\.(\d)\.(\d)\.(\w+)\.(\w+)$", name)
    if not found:
        return re.sub(r"^bn1\.", "conv1.bn.", name)
    group, block, part, leaf = found.groups()
    index, kind = _MOBILENET[group == "0"][part]
    return f"layer{int(group) + 1}.{block}.conv.{index}.{kind}.{leaf}"
