"""The published rows: figures and where the weights are hosted; HuggingFace's names. Imports no torch.

DDPS: the results table of the authors' repository (OpenGVLab/DDPS), which links to folders of their model repository;
the file names in these folders are unknown. Base models and ImageNet weights: MMSegmentation 0.x.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from segcore.config.schema import Published
from segcore.models.key_map import Rules, rename

if TYPE_CHECKING:
    from torch import Tensor

_MMSEG = "https://download.openmmlab.com/mmsegmentation/v0.5"
_DDPS = "https://huggingface.co/aaronb/DDPS-all/tree/main"


def _row(name: str, millions: float, figures: tuple[float, float, float], folder: str | None) -> tuple[str, Published]:
    single, multi, mbiou = figures
    note = f"mBIoU {mbiou:.2f}; its parameters are published as {millions} M"
    page = f"{_DDPS}/{folder}" if folder else None
    name = f"ddps_{name}_multistep".replace("-", "_")
    return name, Published({"single scale": single, "multi scale": multi}, note=note, page=page)


def _base(name: str, stamp: str, single: float, multi: float | None = None) -> tuple[str, Published]:
    folder = "mobilenet_v2" if "m-v2" in name else name.split("_")[0]
    figures = {"single scale": single} | ({} if multi is None else {"multi scale": multi})
    file, known = f"{_MMSEG}/{folder}/{name}/{name}_", "m-v2" not in name and not stamp.startswith("2022")
    log = f"{file}{stamp.rpartition('-')[0]}.log.json" if known else None
    return name.replace("-", "_"), Published(figures, f"{file}{stamp}.pth", log=log)


def _mit(name: str, stamp: str) -> tuple[str, Published]:
    url = f"{_MMSEG}/pretrain/segformer/{name}_{stamp}.pth"
    return f"{name}_imagenet", Published({}, url, note="ImageNet start weights, for --train.init-from")


ROWS = dict(
    [
        _row("deeplabv3plus_m-v2_ade20k151", 27.9, (38.07, 39.07, 23.47), None),
        _row("segformer_mit-b0_ade20k151", 15.1, (41.67, 41.95, 26.77), None),
        _row("deeplabv3plus_r50_ade20k151", 54.2, (45.26, 46.01, 30.39), "deeplabv3plus_r50_multistep"),
        _row("segformer_mit-b2_ade20k151", 65.5, (49.73, 49.96, 33.95), "segformer_b2_multistep"),
        _row("deeplabv3plus_r101_ade20k151", 104.3, (46.32, 46.99, 31.82), "deeplabv3plus_r101_multistep"),
        _row("segformer_mit-b5_ade20k151", 122.8, (51.11, 51.71, 35.66), None),
        _row("deeplabv3plus_m-v2_cityscapes20", 27.9, (78.11, 79.73, 61.14), None),
        _row(
            "segformer_mit-b0_cityscapes20",
            15.1,
            (78.19, 79.62, 64.07),
            "cityscapes/segformer_b0_multistep",
        ),
        _row(
            "deeplabv3plus_r50_cityscapes20",
            54.2,
            (81.39, 82.27, 65.76),
            "cityscapes/deeplabv3plus_r50_multistep",
        ),
        _row(
            "segformer_mit-b2_cityscapes20",
            65.5,
            (81.77, 82.22, 67.75),
            "cityscapes/segformer_b2_multistep",
        ),
        _row(
            "deeplabv3plus_r101_cityscapes20",
            104.3,
            (81.68, 82.51, 65.96),
            "cityscapes/deeplabv3plus_r101_multistep",
        ),
        _row("segformer_mit-b5_cityscapes20", 122.8, (82.42, 82.94, 66.45), None),
    ]
)
INFERENCE = {
    "segformer_b2_ade20k_multistep_inference": Published(
        {"timestep 0": 49.35, "timestep 10": 49.55, "timestep 19": 49.66},
        note="T = 20; one run, evaluated at three of its timesteps",
    )
}
BASE_MODELS = dict(
    [
        _base("segformer_mit-b0_512x512_160k_ade20k", "20220617_162207-c00b9603", 37.85, 38.97),
        _base("segformer_mit-b1_512x512_160k_ade20k", "20220620_112037-c3f39e00", 42.13, 43.74),
        _base("segformer_mit-b2_512x512_160k_ade20k", "20220620_114047-64e4feca", 46.8, 48.12),
        _base("segformer_mit-b3_512x512_160k_ade20k", "20220617_162254-3a4b7363", 48.25, 49.58),
        _base("segformer_mit-b4_512x512_160k_ade20k", "20220620_112216-4fa4f58f", 49.09, 50.72),
        _base("segformer_mit-b5_512x512_160k_ade20k", "20210726_145235-94cedf59", 49.13, 50.22),
        _base("segformer_mit-b5_640x640_160k_ade20k", "20220617_203542-940a6bd8", 50.19, 51.41),
        _base("segformer_mit-b0_8x1_1024x1024_160k_cityscapes", "20211208_101857-e7f88502", 76.54, 78.22),
        _base("segformer_mit-b1_8x1_1024x1024_160k_cityscapes", "20211208_064213-655c7b3f", 78.56, 79.73),
        _base("segformer_mit-b2_8x1_1024x1024_160k_cityscapes", "20211207_134205-6096669a", 81.08, 82.18),
        _base("segformer_mit-b3_8x1_1024x1024_160k_cityscapes", "20211206_224823-a8f8a177", 81.94, 83.14),
        _base("segformer_mit-b4_8x1_1024x1024_160k_cityscapes", "20211207_080709-07f6c333", 81.89, 83.38),
        _base("segformer_mit-b5_8x1_1024x1024_160k_cityscapes", "20211206_072934-87a052ec", 82.25, 83.48),
        _base("deeplabv3plus_r50-d8_512x1024_80k_cityscapes", "20200606_114049-f9fb496d", 80.09, 81.13),
        _base("deeplabv3plus_r101-d8_512x1024_80k_cityscapes", "20200606_114143-068fcfe9", 80.97, 82.03),
        _base("deeplabv3plus_r50-d8_512x512_160k_ade20k", "20200615_124504-6135c7e0", 43.95, 44.93),
        _base("deeplabv3plus_r101-d8_512x512_160k_ade20k", "20200615_123232-38ed86bb", 45.47, 46.35),
        _base("deeplabv3plus_m-v2-d8_512x1024_80k_cityscapes", "20200825_124836-d256dd4b", 75.2),
        _base("deeplabv3plus_m-v2-d8_512x512_160k_ade20k", "20200825_223255-465a01d4", 34.02),
    ]
)
IMAGENET = dict(
    [
        _mit("mit_b0", "20220624-7e0fe6dd"),
        _mit("mit_b1", "20220624-02e5a6a1"),
        _mit("mit_b2", "20220624-66e8bf70"),
        _mit("mit_b3", "20220624-13b1141c"),
        _mit("mit_b4", "20220624-d588d980"),
        _mit("mit_b5", "20220624-658746d9"),
    ]
)
PUBLISHED = {**ROWS, **INFERENCE, **BASE_MODELS, **IMAGENET}

# The names of HuggingFace's SegFormer and MobileNetV2 encoders -> the published ones. The heads are other networks:
# SegFormer's projects its maps without norm and ReLU, MobileNetV2's has one branch and no refinement.
_SEGFORMER: Rules = (
    (r"^segformer\.encoder\.", "backbone."),
    (r"^backbone\.patch_embeddings\.(\d)\.proj\.", r"backbone.layers.\1.0.projection."),
    (r"^backbone\.patch_embeddings\.(\d)\.layer_norm\.", r"backbone.layers.\1.0.norm."),
    (r"^backbone\.block\.(\d)\.", r"backbone.layers.\1.1."),
    (r"^backbone\.layer_norm\.(\d)\.", r"backbone.layers.\1.2."),
    (r"\.layer_norm_(\d)\.", r".norm\1."),
    (r"\.attention\.self\.(query|key|value)\.", r".attn.attn.in_proj_\1_"),
    (r"\.attention\.self\.sr\.", ".attn.sr."),
    (r"\.attention\.self\.layer_norm\.", ".attn.norm."),
    (r"\.attention\.output\.dense\.", ".attn.attn.out_proj."),
    (r"\.mlp\.dense1\.", ".ffn.layers.0."),
    (r"\.mlp\.dwconv\.dwconv\.", ".ffn.layers.1."),
    (r"\.mlp\.dense2\.", ".ffn.layers.4."),
)
_BLOCKS = [f"layer{group}.{block}" for group, blocks in enumerate((2, 3, 4, 3, 3, 1), 2) for block in range(blocks)]
_MOBILENET: Rules = (
    (r"^mobilenet_v2\.conv_stem\.first_conv\.", "backbone.conv1."),
    (r"^mobilenet_v2\.conv_stem\.conv_3x3\.", "backbone.layer1.0.conv.0."),
    (r"^mobilenet_v2\.conv_stem\.reduce_1x1\.", "backbone.layer1.0.conv.1."),
    (r"^mobilenet_v2\.layer\.(\d|1[0-5])\.", lambda m: f"backbone.{_BLOCKS[int(m[1])]}.conv."),
    (r"\.expand_1x1\.", ".0."),
    (r"\.conv_3x3\.", ".1."),
    (r"\.reduce_1x1\.", ".2."),
    (r"\.convolution\.", ".conv."),
    (r"\.normalization\.", ".bn."),
)
_EPS = 1e-3 - 1e-5
"""How much larger the batch norms' epsilon is there; their variances take it over."""


def from_hugging_face(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return HuggingFace's SegFormer or MobileNetV2 with its encoder under the published names; others unchanged.

    MobileNetV2's published weights expect TensorFlow's padding, one pixel aside at stride 2, which is not ours.
    """
    if any(name.startswith("mobilenet_v2.") for name in state):
        rest = ("mobilenet_v2.conv_1x1.", "segmentation_head.", "classifier.")
        names = {name: name if name.startswith(rest) else rename(name, _MOBILENET) for name in state}
        return {new: state[name] + _EPS * name.endswith("running_var") for name, new in names.items()}
    if not any(name.startswith("segformer.encoder.") for name in state):
        return state
    import torch

    names = {name: rename(name, _SEGFORMER) if name.startswith("segformer.") else name for name in state}
    linear = (".dense1.weight", ".dense2.weight")  # there a linear layer, here a convolution
    tensors = {n: state[name][..., None, None] if name.endswith(linear) else state[name] for name, n in names.items()}
    for query in [name for name in tensors if "in_proj_query_" in name]:
        parts = [name for part in ("query", "key", "value") if (name := query.replace("query", part)) in tensors]
        with contextlib.suppress(RuntimeError):  # shapes that do not fit are refused under these names
            tensors[query.replace("query_", "")] = torch.cat([tensors[name] for name in parts])
            tensors = {name: tensor for name, tensor in tensors.items() if name not in parts}
    return tensors
