"""The published rows: figures, where the weights are hosted, and the names of their tensors. Imports no torch.

Sources: the authors' repository (ydhongHIT/DDRNet), MMSegmentation's page of its DDRNet checkpoints, and
pyradd/DDRNet-pytorch, whose segmentation files have the authors' names without a prefix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from segcore.config.schema import Published
from segcore.models.key_map import Rules, rename

if TYPE_CHECKING:
    from torch import Tensor

_MMSEG = "https://download.openmmlab.com/mmsegmentation/v0.5/ddrnet"


def _drive(file: str, key: str, note: str, sha256: str | None = None, **figures: float) -> Published:
    """Return a row whose weights the authors keep on Google Drive, where addresses contain no file names."""
    miou = {name.replace("_", " "): value for name, value in figures.items()}
    return Published(miou, f"https://drive.google.com/uc?export=download&id={key}", note, file=file, sha256=sha256)


def _mmseg(name: str, single: float, multi: float, stamp: str) -> tuple[str, Published]:
    figures = {"single scale": single, "multi scale": multi}
    return name.replace("-", "_"), Published(
        figures, f"{_MMSEG}/{name}/{name}_{stamp}.pth", "trained by MMSegmentation"
    )


PUBLISHED = {
    "ddrnet_23_slim_cityscapes": _drive(
        "DDRNet23s_cityscapes.pth", "1d_K3Af5fKHYwxSo8HkxpnhiekhwovmiP", "77.4 on test", single_scale=77.8
    ),
    "ddrnet_23_cityscapes": _drive(
        "DDRNet23_cityscapes.pth", "16viDZhbmuc3y7OSsUo2vhA7V6kYO0KX6", "79.4 on test", single_scale=79.5
    ),
    "ddrnet_39_cityscapes": Published({}, note="80.4 on test, 81.9 multi-scale; no figure on val, no weights"),
    "ddrnet_23_cityscapes_pyradd": Published({"single scale": 77.382}, note="by pyradd/DDRNet-pytorch, no weights"),
    **dict(
        [
            _mmseg("ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024", 77.84, 80.15, "20230426_145312-6a5e5174"),
            _mmseg("ddrnet_23_in1k-pre_2xb6-120k_cityscapes-1024x1024", 79.99, 81.71, "20230425_162633-81601db0"),
        ]
    ),
    # ImageNet weights for initialization, for `train.init_from`: official:NAME
    "ddrnet_23_slim_imagenet": _drive(
        "DDRNet23s_imagenet.pth",
        "1mg5tMX7TJ9ZVcAiGSB4PEihPtrJyalB4",
        "top-1 error 29.8",
        # from a public Git LFS pointer to 30,406,472 bytes
        "f6d03fa29b80e2e648f89a7639eb0c6d6c088e8f70f2cba1b2872b314a5c54b6",
    ),
    "ddrnet_23_imagenet": _drive("DDRNet23_imagenet.pth", "1VoUsERBeuCaiuQJufu8PqpKKtGvCTdug", "top-1 error 24.1"),
    "ddrnet_39_imagenet": _drive("DDRNet39_imagenet.pth", "122CMx6DZBaRRf-dOHYwuDY9vG0_UQ10i", "top-1 error 22.7"),
}

# Our names -> the authors'. There, a convolution and its batch norm are members 0 and 1 of a Sequential (3 and 4 for
# the second pair), or `convI` and `bnI` of a block. DAPPM's units begin with the batch norm or a pooling before it.
_OURS: Rules = (
    (r"^backbone\.", ""),
    (r"^low5\.", "layer5.0."),
    (r"^high5\.", "layer5_.0."),
    (r"^stage(\w+)\.low\.", r"layer\1."),
    (r"^stage(\w+)\.high\.", r"layer\1_."),
    (r"^stage(\w+)\.down\.", r"down\1."),
    (r"^stage(\w+)\.compress\.", r"compression\1.0."),
    (r"^last_layer\.", "last_layer.0."),
    (r"^(conv1|down\w+|compression\w+|last_layer)\.(\d)\.(conv|norm)\.", lambda m: _pair(m[1], m[2], m[3])),
    (r"^(layer.*)\.body\.conv(\d)\.conv\.", r"\1.conv\2."),
    (r"^(layer.*)\.body\.conv(\d)\.norm\.", r"\1.bn\2."),
    (r"^(layer.*)\.shortcut\.conv\.", r"\1.downsample.0."),
    (r"^(layer.*)\.shortcut\.norm\.", r"\1.downsample.1."),
    (r"^context\.scales\.(\d)\.(conv|norm)\.", lambda m: _unit(f"spp.scale{m[1]}", m[2], m[1] != "0")),
    (r"^context\.processes\.(\d)\.(conv|norm)\.", lambda m: _unit(f"spp.process{int(m[1]) + 1}", m[2])),
    (r"^context\.(compression|shortcut)\.(conv|norm)\.", lambda m: _unit(f"spp.{m[1]}", m[2])),
    (r"^auxiliary_head\.", "seghead_extra."),
    (r"^head\.", "final_layer."),
    (r"^(final_layer|seghead_extra)\.norm\.", r"\1.bn1."),
    (r"^(final_layer|seghead_extra)\.hidden\.conv\.", r"\1.conv1."),
    (r"^(final_layer|seghead_extra)\.hidden\.norm\.", r"\1.bn2."),
    (r"^(final_layer|seghead_extra)\.classifier\.", r"\1.conv2."),
)

# MMSegmentation's names -> the authors', for 23-slim and 23; it has no DDRNet-39.
_MMSEG_NAMES: Rules = (
    (r"^backbone\.", ""),
    (r"^stem\.([01])\.(conv|bn)\.", lambda m: _pair("conv1", m[1], m[2])),
    (r"^stem\.2\.", "layer1."),
    (r"^stem\.4\.", "layer2."),
    (r"^context_branch_layers\.(\d)\.", lambda m: f"layer{int(m[1]) + 3}."),
    (r"^spatial_branch_layers\.(\d)\.", lambda m: f"layer{int(m[1]) + 3}_."),
    (r"^(layer.*\.conv\d)\.conv\.", r"\1."),
    (r"^(layer.*)\.conv(\d)\.bn\.", r"\1.bn\2."),
    (r"^down_1\.(conv|bn)\.", lambda m: _pair("down3", "0", m[1])),
    (r"^down_2\.(\d)\.(conv|bn)\.", lambda m: _pair("down4", m[1], m[2])),
    (r"^compression_(\d)\.(conv|bn)\.", lambda m: _pair(f"compression{int(m[1]) + 2}", "0", m[2])),
    (r"^spp\.scales\.0\.(conv|bn)\.", lambda m: _unit("spp.scale0", m[1])),
    (r"^spp\.scales\.(\d)\.1\.(conv|bn)\.", lambda m: _unit(f"spp.scale{m[1]}", m[2], True)),
    (r"^spp\.processes\.(\d)\.(conv|bn)\.", lambda m: _unit(f"spp.process{int(m[1]) + 1}", m[2])),
    (r"^spp\.(compression|shortcut)\.(conv|bn)\.", lambda m: _unit(f"spp.{m[1]}", m[2])),
    (r"^decode_head\.conv_seg\.", "final_layer.conv2."),
    (r"^decode_head\.aux_cls_seg\.", "seghead_extra.conv2."),
    (r"^decode_head\.head\.", "final_layer."),
    (r"^decode_head\.aux_head\.", "seghead_extra."),
    (r"^(final_layer|seghead_extra)\.0\.(conv|bn)\.", r"\1.\g<2>1."),
    (r"^(final_layer|seghead_extra)\.1\.", r"\1.bn2."),
)


def _pair(parent: str, index: str, kind: str) -> str:
    """Return `parent.N.` for the convolution (0, 3) or batch norm (1, 4) of a pair; a ReLU separates two pairs."""
    return f"{parent}.{3 * int(index) + (kind != 'conv')}."


def _unit(parent: str, kind: str, pooled: bool = False) -> str:
    """Return `parent.N.` for the batch norm (0) or convolution (2) of a DAPPM unit, plus one after a pooling."""
    return f"{parent}.{2 * (kind == 'conv') + pooled}."


def official_name(name: str, rounds: int) -> str:
    """Return the authors' name of one of our parameters in a network whose stage 3 has 1 or 2 `rounds`."""
    stages = [*(["3"] if rounds == 1 else ["3_1", "3_2"]), "4"]
    return rename(re.sub(r"^backbone\.fusions\.(\d)\.", lambda m: f"stage{stages[int(m[1])]}.", name), _OURS)


@dataclass(frozen=True)
class Source:
    """A published checkpoint, under the authors' names."""

    kind: str
    tensors: dict[str, Tensor]
    dropped: tuple[str, ...]
    """Tensors, under the file's names, that are not part of a network."""


def recognize(state: Mapping[str, Tensor]) -> Source:
    """Return the source of checkpoint `state`, recognized by its names, and its tensors under the authors' names.

    | names | source |
    |---|---|
    | `model.…`, optionally with `loss.…` for the class weights | the authors' Cityscapes files |
    | the authors' names, with a head | pyradd/DDRNet-pytorch |
    | the authors' names, with `linear.…` | ImageNet |
    | `backbone.stem.…`, `decode_head.…` or `stem.…` | MMSegmentation |

    MMSegmentation's first two convolutions have no bias: the biases are set to zero, which is exact. Other names, for
    example our own, are unchanged.
    """
    names = {name: re.sub(r"^((module|model)\.)+", "", name) for name in state}
    tensors = {own: state[name] for name, own in names.items() if not own.startswith("loss.")}
    dropped = tuple(name for name, own in names.items() if own.startswith("loss."))
    if any(name.startswith(("backbone.stem.", "stem.", "decode_head.")) for name in tensors):
        tensors = {rename(name, _MMSEG_NAMES): tensor for name, tensor in tensors.items()}
        for convolution, norm in (("conv1.0", "conv1.1"), ("conv1.3", "conv1.4")):
            if f"{norm}.bias" in tensors:
                tensors.setdefault(
                    f"{convolution}.bias", tensors[f"{norm}.bias"].new_zeros(tensors[f"{norm}.bias"].shape)
                )
        return Source("MMSegmentation", tensors, dropped)
    if any(name.startswith("linear.") for name in tensors):
        return Source("ImageNet", tensors, dropped)
    return Source("official" if tensors.keys() != state.keys() else "official or pyradd", tensors, dropped)
