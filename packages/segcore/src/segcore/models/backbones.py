"""timm backbones, adapted to compute exactly the same features as the published systems.

The parameters are timm's own, under timm's names in `net`, plus one LayerNorm per stage output in `norms` (not in
`ResNet`). `key_map` gives the names of MMClassification / MMSegmentation 0.x, under which published weights are
stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.layers import LayerNorm2d
from timm.models import adapt_input_conv
from torch import Tensor, nn
from torch.nn import functional as F

from segcore.errors import UserError
from segcore.models.key_map import Rules, rename
from segcore.models.segmentor import RECOMPUTABLE, LoadReport

# Families and sizes as the published configurations name them.
CONVNEXT = {
    "convnext_t": "convnext_tiny",
    "convnext_s": "convnext_small",
    "convnext_b": "convnext_base",
    "convnext_l": "convnext_large",
}
SWIN = {
    "swin_t": "swin_tiny_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "swin_b": "swin_base_patch4_window7_224",
    "swin_l": "swin_large_patch4_window7_224",
}
RESNET = ("resnet18", "resnet34", "resnet50", "resnet101")


def build_backbone(name: str, *, in_channels: int = 3, drop_path: float = 0.0, window: int = 7) -> Backbone:
    """Return the backbone `convnext_{t,s,b,l}`, `swin_{t,s,b,l}` or `resnet{18,34,50,101}` with random weights.

    `drop_path` is the maximum rate, growing linearly over the blocks; `window` is Swin's window size. Other families
    ignore both.
    """
    if name in CONVNEXT:
        return ConvNeXt(CONVNEXT[name], in_channels, drop_path)
    if name in SWIN:
        return Swin(SWIN[name], in_channels, drop_path, window)
    if name in RESNET:
        return ResNet(name, in_channels)
    raise UserError(f"there is no backbone {name!r}; known are {', '.join((*CONVNEXT, *SWIN, *RESNET))}")


class Backbone(nn.Module, ABC):
    """Maps images (N, C, H, W) to four maps with strides 4, 8, 16, 32.

    Attributes:
        channels: channels of the four maps.
        min_size: shortest image side in pixels.
        net: timm's network without its classifier.
    """

    channels: tuple[int, ...]
    min_size: int = 1
    net: Any  # timm's modules have no declared types

    @abstractmethod
    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the four maps (N, C_i, H_i, W_i), finest first."""

    def key_map(self) -> dict[str, str]:
        """Return the published name (without `backbone.`) of every entry of `state_dict()`."""
        return {name: name.removeprefix("net.") for name in self.state_dict()}

    def convert(self, name: str, tensor: Tensor) -> Tensor:
        """Return a published tensor in timm's layout; `name` is the published one without `backbone.`."""
        return tensor

    def from_timm(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return timm's ImageNet weights under this project's names, without the classifier."""
        return {f"net.{name}": t for name, t in state.items() if not name.startswith(("head.", "fc.", "norm."))}

    def load_pretrained(self, state: Mapping[str, Tensor]) -> LoadReport:
        """Load ImageNet weights under timm's or the published names (with or without `backbone.`).

        Strict: raises ValueError and changes nothing when a tensor does not fit or one of `net` is missing. The stage
        output norms keep their initial values unless the file has them. The stem is adapted to other channel counts.
        """
        official = {official: name for name, official in self.key_map().items()}
        bare = {name.removeprefix("backbone."): t for name, t in state.items() if not name.startswith(("head.", "fc."))}
        if any(name.startswith("backbone.") for name in state) or sum(n in official for n in bare) > len(bare) / 2:
            new = {official.get(n, n): self.convert(n, t) for n, t in bare.items()}
        else:
            new = self.from_timm(state)
        own = self.state_dict()
        ignored = tuple(n for n in new if n.endswith(RECOMPUTABLE) and n not in own)
        new = {n: self._fit(t, own.get(n)) for n, t in new.items() if n not in ignored}
        missing = [n for n in own if n.startswith("net.") and n not in new and not n.endswith(RECOMPUTABLE)]
        wrong = [n for n, t in new.items() if n not in own or own[n].shape != t.shape]
        if missing or wrong:
            raise UserError(
                f"the start weights do not fit this backbone: {len(missing)} tensors missing {missing[:2]}, "
                f"{len(wrong)} unknown or of another shape {wrong[:2]}; take the file of the same architecture"
            )
        self.load_state_dict(new, strict=False)
        dropped = tuple(n for n in state if n.startswith(("head.", "fc.", "norm.")) and f"norms.3.{n[10:]}" not in new)
        return LoadReport(len(new), dropped, ignored, len(new))

    def _fit(self, tensor: Tensor, own: Tensor | None) -> Tensor:
        """Adapt a stem convolution to our number of input channels."""
        if own is not None and tensor.ndim == own.ndim == 4 and tensor.shape[1] == 3 != own.shape[1]:
            return adapt_input_conv(own.shape[1], tensor)
        return tensor


class ConvNeXt(Backbone):
    """ConvNeXt (Liu et al. 2022) with a LayerNorm on each stage output; pixels that do not fill a patch are dropped."""

    min_size = 32

    def __init__(self, timm_name: str, in_channels: int = 3, drop_path: float = 0.0) -> None:
        super().__init__()
        options: dict[str, Any] = {"in_chans": in_channels, "drop_path_rate": drop_path, "ls_init_value": 1.0}
        self.net = timm.create_model(timm_name, pretrained=False, num_classes=0, **options)
        self.net.head = nn.Identity()
        for stage in self.net.stages[1:]:
            stage.downsample[0].eps = 1e-5  # as published; every other norm has 1e-6
        self.channels = tuple(info["num_chs"] for info in self.net.feature_info)
        self.norms = nn.ModuleList(LayerNorm2d(c, eps=1e-6) for c in self.channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.net.stem(images)
        maps = []
        for stage, norm in zip(self.net.stages, self.norms, strict=True):
            x = stage(x)
            maps.append(norm(x))
        return maps

    def key_map(self) -> dict[str, str]:
        rules: Rules = (
            (r"^net\.stem\.", "downsample_layers.0."),
            (r"^net\.stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
            (r"^net\.stages\.(\d+)\.blocks\.(\d+)\.", r"stages.\1.\2."),
            (r"\.conv_dw\.", ".depthwise_conv."),
            (r"\.mlp\.fc([12])\.", r".pointwise_conv\1."),
            (r"^norms\.", "norm"),
        )
        return {name: rename(name, rules) for name in self.state_dict()}

    def from_timm(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # The classifier's norm becomes the norm of the last stage output.
        norm = {f"norms.3.{n.removeprefix('head.norm.')}": t for n, t in state.items() if n.startswith("head.norm.")}
        return super().from_timm(state) | norm


class Swin(Backbone):
    """Swin Transformer (Liu et al. 2021) with a LayerNorm on each stage output, for any image size.

    Uses timm's parameters but not its forward: the published system pads a map to whole windows *before* it shifts
    them, and neither shrinks the window nor drops the shift on small maps.
    """

    def __init__(self, timm_name: str, in_channels: int = 3, drop_path: float = 0.0, window: int = 7) -> None:
        super().__init__()
        self.window = window
        # With the nominal size at 32 windows the last stage is one window, so timm shrinks none of them.
        options: dict[str, Any] = {"img_size": 32 * window, "window_size": window, "drop_path_rate": drop_path}
        self.net = timm.create_model(
            timm_name, pretrained=False, num_classes=0, in_chans=in_channels, strict_img_size=False, **options
        )
        self.net.norm = nn.Identity()
        self.net.patch_embed.dynamic_img_pad = True
        self.channels = tuple(info["num_chs"] for info in self.net.feature_info)
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.net.patch_embed(images)  # (N, H, W, C)
        maps = []
        for stage, norm in zip(self.net.layers, self.norms, strict=True):
            x = stage.downsample(x)
            mask = shifted_window_mask(x.shape[1], x.shape[2], self.window, device=x.device)
            for i, block in enumerate(stage.blocks):
                shifted = i % 2 == 1
                attended = window_attention(block.attn, block.norm1(x), self.window, mask if shifted else None)
                x = x + block.drop_path1(attended)
                x = x + block.drop_path2(block.mlp(block.norm2(x)))
            maps.append(norm(x).permute(0, 3, 1, 2).contiguous())
        return maps

    def key_map(self) -> dict[str, str]:
        rules: Rules = (
            (r"^net\.patch_embed\.proj\.", "patch_embed.projection."),
            # timm merges patches at the start of the next stage, the published system at the end of the previous one.
            (r"^net\.layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) - 1}.downsample."),
            (r"^net\.layers\.", "stages."),
            (r"\.attn\.", ".attn.w_msa."),
            (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
            (r"\.mlp\.fc2\.", ".ffn.layers.1."),
            (r"^net\.", ""),
            (r"^norms\.", "norm"),
        )
        return {name: rename(name, rules) for name in self.state_dict()}

    def convert(self, name: str, tensor: Tensor) -> Tensor:
        if ".downsample." not in name:
            return tensor
        # 2x2 neighbors (row kh, column kw) of a channel are stacked as (C, kh, kw) upstream, in timm as (kw, kh, C).
        parts = tensor.reshape(*tensor.shape[:-1], -1, 2, 2)
        return parts.movedim((-1, -2, -3), (-3, -2, -1)).reshape(tensor.shape)

    def _fit(self, tensor: Tensor, own: Tensor | None) -> Tensor:
        if own is not None and tensor.ndim == own.ndim == 2 and tensor.shape[1] == own.shape[1]:
            before, after = round(tensor.shape[0] ** 0.5), round(own.shape[0] ** 0.5)
            if before != after and (before**2, after**2) == (tensor.shape[0], own.shape[0]):
                # A position table of another window size, resized per head as the published loader does.
                table = tensor.T.reshape(1, -1, before, before)
                table = F.interpolate(table, size=(after, after), mode="bicubic", align_corners=False)
                return table.reshape(-1, after**2).T
        return super()._fit(tensor, own)


def window_attention(attention: nn.Module, x: Tensor, window: int, mask: Tensor | None) -> Tensor:
    """Return windowed self-attention of a map (N, H, W, C); a `mask` (windows, window^2, window^2) implies shifted
    windows.

    Order of the published system: zero-pad to whole windows, shift by window // 2, attend, shift back, crop.
    """
    n, h, w, c = x.shape
    shift = 0 if mask is None else window // 2
    x = F.pad(x, (0, 0, 0, -w % window, 0, -h % window))
    rows, columns = x.shape[1] // window, x.shape[2] // window
    if shift:
        x = x.roll((-shift, -shift), (1, 2))
    x = x.reshape(n, rows, window, columns, window, c).transpose(2, 3).reshape(-1, window * window, c)
    x = attention(x, None if mask is None else mask.to(x.dtype))
    x = x.reshape(n, rows, columns, window, window, c).transpose(2, 3).reshape(n, rows * window, columns * window, c)
    if shift:
        x = x.roll((shift, shift), (1, 2))
    return x[:, :h, :w]


def shifted_window_mask(height: int, width: int, window: int, device: torch.device) -> Tensor:
    """Return the additive mask (windows, window^2, window^2) of shifted windows: -100 between regions, else 0."""
    shift = window // 2

    def regions(size: int) -> Tensor:
        position = torch.arange(size + -size % window, device=device)
        return (position >= len(position) - window).int() + (position >= len(position) - shift).int()

    region = regions(height)[:, None] * 3 + regions(width)[None]
    rows, columns = region.shape[0] // window, region.shape[1] // window
    region = region.reshape(rows, window, columns, window).transpose(1, 2).reshape(-1, window * window)
    return (region[:, None] != region[:, :, None]).float() * -100.0


class ResNet(Backbone):
    """ResNet (He et al. 2016), plain timm: small and quick to train from scratch."""

    def __init__(self, timm_name: str, in_channels: int = 3) -> None:
        super().__init__()
        self.net = timm.create_model(
            timm_name, pretrained=False, features_only=True, out_indices=(1, 2, 3, 4), in_chans=in_channels
        )
        self.channels = tuple(self.net.feature_info.channels())

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.net(images)
