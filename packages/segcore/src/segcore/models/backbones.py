"""timm backbones: ConvNeXt and Swin compute exactly the features of the published systems, all others timm's own.

The parameters are timm's own, under timm's names in `net`; ConvNeXt and Swin have one LayerNorm per stage output in
`norms`, and their `key_map` gives the names of MMClassification / MMSegmentation 0.x, under which published weights
are stored.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import timm
import torch
from timm.layers import Format, LayerNorm2d
from timm.models import adapt_input_conv
from torch import Tensor, nn
from torch.nn import functional as F

from segcore.config.options import nearest
from segcore.errors import UserError
from segcore.models.key_map import Rules, rename
from segcore.models.layers import residual_blocks
from segcore.models.segmentor import RECOMPUTABLE, LoadReport, Segmentor

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
CLASSIFIER = ("head.", "fc.")
"""Prefixes of the classifier's names in the published files."""


def build_backbone(name: str, *, in_channels: int = 3, drop_path: float = 0.0, window: int = 7) -> Backbone:
    """Return the backbone `convnext_{t,s,b,l}`, `swin_{t,s,b,l}` or that timm model, with random weights.

    `drop_path` is the maximum rate, growing linearly over the blocks; `window` is Swin's window size. timm's own models
    ignore both. Raises UserError for a name that is unknown, and for a model that `TimmBackbone` cannot use.
    """
    if name in CONVNEXT:
        return ConvNeXt(CONVNEXT[name], in_channels, drop_path)
    if name in SWIN:
        return Swin(SWIN[name], in_channels, drop_path, window)
    return TimmBackbone(name, in_channels)


class Backbone(nn.Module, ABC):
    """Maps images (N, C, H, W) to four maps.

    Attributes:
        channels: channels of the four maps.
        strides: strides of the four maps.
        min_size: shortest image side in pixels.
        net: timm's network without its classifier.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...] = (4, 8, 16, 32)
    min_size: int = 1
    net: Any  # timm's modules have no declared types

    @abstractmethod
    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the four maps (N, C_i, H_i, W_i), finest first."""

    def recomputed_blocks(self) -> list[nn.Module]:
        """Return the modules that may run again in the backward pass; see `Segmentor.recomputed_blocks`."""
        return residual_blocks(self)

    def key_map(self) -> dict[str, str]:
        """Return the published name (without `backbone.`) of every entry of `state_dict()`."""
        return {name: name.removeprefix("net.") for name in self.state_dict()}

    def convert(self, name: str, tensor: Tensor) -> Tensor:
        """Return a published tensor in timm's layout; `name` is the published one without `backbone.`."""
        return tensor

    def timm_names(self, names: Iterable[str]) -> dict[str, str]:
        """Return our name of each of timm's names, without those of the layers behind the last map.

        timm takes features out of some networks by naming `stages.0` `stages_0`.
        """
        own = {_flat(name): name for name in self.state_dict() if name.startswith("net.")}
        parts = tuple(f"{_timm_name(name).partition('.')[0]}_" for name in own.values())
        return {n: own.get(_flat(n), f"net.{n}") for n in names if _flat(n) in own or _flat(n).startswith(parts)}

    def load_pretrained(self, state: Mapping[str, Tensor]) -> LoadReport:
        """Load ImageNet weights under timm's or the published names (with or without `backbone.`).

        Strict: raises ValueError and changes nothing when a tensor does not fit or one is missing. The stage output
        norms keep their initial values unless the file has them; what follows the last map is dropped. The stem is
        adapted to other channel counts.
        """
        official, own, timm_names = {v: k for k, v in self.key_map().items()}, self.state_dict(), self.timm_names(state)
        bare = {name: name.removeprefix("backbone.") for name in state if not name.startswith(CLASSIFIER)}
        if sum(name in official for name in bare.values()) > sum(name in own for name in timm_names.values()):
            names = {name: official.get(short, short) for name, short in bare.items()}
            new = {names[name]: self.convert(short, state[name]) for name, short in bare.items()}
        else:
            names = timm_names
            new = {own_name: state[name] for name, own_name in names.items()}
        ignored = tuple(n for n in new if n.endswith(RECOMPUTABLE) and n not in own)
        new = {n: self._fit(t, own.get(n)) for n, t in new.items() if n not in ignored}
        missing = [n for n in own if n not in new and not n.startswith("norms.") and not n.endswith(RECOMPUTABLE)]
        wrong = [n for n, t in new.items() if n not in own or own[n].shape != t.shape]
        if missing or wrong:
            raise UserError(
                f"the start weights do not fit this backbone: {len(missing)} tensors missing {missing[:2]}, "
                f"{len(wrong)} unknown or of another shape {wrong[:2]}; take the file of the same architecture"
            )
        self.load_state_dict(new, strict=False)
        return LoadReport(len(new), tuple(n for n in state if n not in names), ignored, len(new))

    def _fit(self, tensor: Tensor, own: Tensor | None) -> Tensor:
        """Adapt a stem convolution to our number of input channels."""
        if own is not None and tensor.ndim == own.ndim == 4 and tensor.shape[1] == 3 != own.shape[1]:
            return adapt_input_conv(own.shape[1], tensor)
        return tensor


class BackboneSegmentor(Segmentor):
    """A Segmentor whose `backbone` is a `Backbone`, which knows its own names, layout and start weights."""

    backbone: Backbone

    @abstractmethod
    def published_name(self, name: str) -> str:
        """Return the published name of an entry of `state_dict()` outside the backbone."""

    def key_map(self) -> dict[str, str]:
        backbone = {f"backbone.{name}": f"backbone.{value}" for name, value in self.backbone.key_map().items()}
        return {name: backbone.get(name) or self.published_name(name) for name in self.state_dict()}

    def convert(self, name: str, tensor: Tensor) -> Tensor:
        if name.startswith("backbone."):
            return self.backbone.convert(name.removeprefix("backbone."), tensor)
        return tensor

    def load_backbone(self, state: Mapping[str, Tensor]) -> LoadReport:
        """Load ImageNet weights under timm's or the published names; see `Backbone.load_pretrained`."""
        return self.backbone.load_pretrained(state)


def _timm_name(name: str) -> str:
    return name.removeprefix("net.").removeprefix("model.")


def _flat(name: str) -> str:
    return _timm_name(name).replace(".", "_")


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

    def timm_names(self, names: Iterable[str]) -> dict[str, str]:
        # The classifier's norm becomes the norm of the last stage output.
        norm = {n: f"norms.3.{n.removeprefix('head.norm.')}" for n in names if n.startswith("head.norm.")}
        return super().timm_names(names) | norm


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

    def recomputed_blocks(self) -> list[nn.Module]:
        # `forward` does not call the blocks themselves.
        return [block.get_submodule(name) for block in residual_blocks(self) for name in ("attn", "mlp")]

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
        if ".downsample." not in name or tensor.ndim == 0 or tensor.shape[-1] % 4:  # such a shape is refused later
            return tensor
        # 2x2 neighbors (row kh, column kw) of a channel are stacked as (C, kh, kw) upstream, in timm as (kw, kh, C).
        parts = tensor.unflatten(-1, (tensor.shape[-1] // 4, 2, 2))
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


class TimmBackbone(Backbone):
    """A model of timm as it is (`features_only=True`), for images of any size.

    Images are padded at the right and bottom with zeros to multiples of 32 where the model needs it, and the maps are
    cropped to the image's side / stride, rounded up. With `output_stride` 8 the model is dilated: strides 4, 8, 8, 8.

    Raises UserError for a name that neither timm nor `others` has, and for a model without such maps, or for images of
    one size only.
    """

    def __init__(
        self, timm_name: str, in_channels: int = 3, output_stride: int = 32, others: Iterable[str] = ()
    ) -> None:
        super().__init__()
        if timm_name not in (models := timm.list_models()):  # timm would look for others on the hub
            known = (*others, *CONVNEXT, *SWIN)
            raise UserError(
                f"there is no backbone {timm_name!r}{nearest(timm_name, [*known, *models])}; "
                f"known are {', '.join(known)} and the models of timm (in Python: timm.list_models())"
            )
        self.strides = tuple(min(stride, output_stride) for stride in self.strides)
        options: dict[str, Any] = {"features_only": True, "out_indices": (-4, -3, -2, -1), "in_chans": in_channels}
        options |= {"output_stride": output_stride} if output_stride < 32 else {}
        try:
            try:
                self.net = timm.create_model(timm_name, strict_img_size=False, **options)  # Swin, for other sizes
            except TypeError:
                self.net = timm.create_model(timm_name, **options)
            self.channels, found = tuple(self.net.feature_info.channels()), tuple(self.net.feature_info.reduction())
        except Exception:  # each family raises its own
            found = ()
        if found != self.strides or not self._takes_any_size(in_channels):
            strides, others = (", ".join(map(str, numbers)) for numbers in (self.strides, found))
            but = f" (its strides are {others})" if found and found != self.strides else ""
            raise UserError(
                f"timm's {timm_name} has no maps at strides {strides} for images of any size{but}; "
                "choose another model.backbone"
            )

    @torch.no_grad()
    def _takes_any_size(self, in_channels: int) -> bool:
        """Set `pad_to` and return whether one was found, by trying: timm does not state it for all its models."""
        self.net.eval()
        for self.pad_to, height, width in ((1, 51, 70), (32, 64, 96)):
            with contextlib.suppress(Exception):  # each family raises its own
                shapes = [tuple(x.shape[1:]) for x in self(torch.zeros(1, in_channels, height, width))]
                if shapes == [(c, *sizes) for c, sizes in zip(self.channels, self._sizes(height, width), strict=True)]:
                    self.net.train()
                    return True
        return False

    def _sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        return [(-(-height // stride), -(-width // stride)) for stride in self.strides]

    def forward(self, images: Tensor) -> list[Tensor]:
        height, width = images.shape[-2:]
        if self.pad_to > 1:
            images = F.pad(images, (0, -width % self.pad_to, 0, -height % self.pad_to))
        maps = self.net(images)
        if getattr(self.net, "output_fmt", None) == Format.NHWC:
            maps = [x.permute(0, 3, 1, 2).contiguous() for x in maps]
        if self.pad_to == 1:
            return maps
        return [x[..., :h, :w] for x, (h, w) in zip(maps, self._sizes(height, width), strict=True)]
