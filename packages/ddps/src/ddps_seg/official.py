"""The published rows: figures and where the weights are hosted. Imports no torch.

Base models and ImageNet weights: MMSegmentation 0.x.
"""

from __future__ import annotations

from segcore.experiment import Published

_MMSEG = "https://download.openmmlab.com/mmsegmentation/v0.5"


def _stock(name: str, stamp: str, single: float, multi: float | None = None) -> tuple[str, Published]:
    folder = "mobilenet_v2" if "m-v2" in name else name.split("_")[0]
    figures = {"single scale": single} | ({} if multi is None else {"multi scale": multi})
    return name.replace("-", "_"), Published(figures, f"{_MMSEG}/{folder}/{name}/{name}_{stamp}.pth")


def _mit(name: str, stamp: str) -> tuple[str, Published]:
    url = f"{_MMSEG}/pretrain/segformer/{name}_{stamp}.pth"
    return f"{name}_imagenet", Published({}, url, note="ImageNet start weights, for --train.init")


STOCK = dict(
    [
        _stock("segformer_mit-b0_512x512_160k_ade20k", "20220617_162207-c00b9603", 37.85, 38.97),
        _stock("segformer_mit-b1_512x512_160k_ade20k", "20220620_112037-c3f39e00", 42.13, 43.74),
        _stock("segformer_mit-b2_512x512_160k_ade20k", "20220620_114047-64e4feca", 46.8, 48.12),
        _stock("segformer_mit-b3_512x512_160k_ade20k", "20220617_162254-3a4b7363", 48.25, 49.58),
        _stock("segformer_mit-b4_512x512_160k_ade20k", "20220620_112216-4fa4f58f", 49.09, 50.72),
        _stock("segformer_mit-b5_512x512_160k_ade20k", "20210726_145235-94cedf59", 49.13, 50.22),
        _stock("segformer_mit-b5_640x640_160k_ade20k", "20220617_203542-940a6bd8", 50.19, 51.41),
        _stock("segformer_mit-b0_8x1_1024x1024_160k_cityscapes", "20211208_101857-e7f88502", 76.54, 78.22),
        _stock("segformer_mit-b1_8x1_1024x1024_160k_cityscapes", "20211208_064213-655c7b3f", 78.56, 79.73),
        _stock("segformer_mit-b2_8x1_1024x1024_160k_cityscapes", "20211207_134205-6096669a", 81.08, 82.18),
        _stock("segformer_mit-b3_8x1_1024x1024_160k_cityscapes", "20211206_224823-a8f8a177", 81.94, 83.14),
        _stock("segformer_mit-b4_8x1_1024x1024_160k_cityscapes", "20211207_080709-07f6c333", 81.89, 83.38),
        _stock("segformer_mit-b5_8x1_1024x1024_160k_cityscapes", "20211206_072934-87a052ec", 82.25, 83.48),
        _stock("deeplabv3plus_r50-d8_512x1024_80k_cityscapes", "20200606_114049-f9fb496d", 80.09, 81.13),
        _stock("deeplabv3plus_r101-d8_512x1024_80k_cityscapes", "20200606_114143-068fcfe9", 80.97, 82.03),
        _stock("deeplabv3plus_r50-d8_512x512_160k_ade20k", "20200615_124504-6135c7e0", 43.95, 44.93),
        _stock("deeplabv3plus_r101-d8_512x512_160k_ade20k", "20200615_123232-38ed86bb", 45.47, 46.35),
        _stock("deeplabv3plus_m-v2-d8_512x1024_80k_cityscapes", "20200825_124836-d256dd4b", 75.2),
        _stock("deeplabv3plus_m-v2-d8_512x512_160k_ade20k", "20200825_223255-465a01d4", 34.02),
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
PUBLISHED = {**STOCK, **IMAGENET}
