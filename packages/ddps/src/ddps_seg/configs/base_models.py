"""The base models as trained by MMSegmentation 0.30, the first stage of DDPS; its names, recipes and weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from ddps_seg.configs import BaseModelConfig
from segcore.config.schema import (
    DataConfig,
    EvalConfig,
    Experiment,
    LossConfig,
    OptimizerConfig,
    ParamRule,
    ScheduleConfig,
    TrainConfig,
)

Dataset = Literal["ade20k", "cityscapes"]
MIT: tuple[str, ...] = ("mit_b0", "mit_b1", "mit_b2", "mit_b3", "mit_b4", "mit_b5")
DEEPLAB: dict[str, str] = {"mobilenet_v2": "m-v2", "resnet50": "r50", "resnet101": "r101"}
"""Backbone of DeepLabV3+ -> its part of the configuration names."""
IMAGENET = {
    "mobilenet_v2": "mobilenetv2_100.ra_in1k",
    "resnet50": "resnet50c.gluon_in1k",
    "resnet101": "resnet101c.gluon_in1k",
}
"""Initial weights: timm's of the same architecture."""
# "head" overrides "norm", so norms in the head keep weight decay, as published.
RULES = (ParamRule("pos_block", decay_mult=0.0), ParamRule("norm", decay_mult=0.0), ParamRule("head", lr_mult=10.0))
ROOT = {"ade20k": Path("data/ade/ADEChallengeData2016"), "cityscapes": Path("data/cityscapes")}
CLASSES = {"ade20k": 150, "cityscapes": 19}


def data(
    dataset: Dataset, crop: tuple[int, int], img_scale: tuple[int, int], *, background: bool = False
) -> DataConfig:
    """Return the published augmentations of a data set for a crop (height, width)."""
    return DataConfig(
        dataset,
        ROOT[dataset],
        add_background_class=background,
        img_scale=img_scale,
        ratio_range=(0.5, 2.0),
        crop=crop,
        cat_max_ratio=0.75,
        flip=0.5,
        photometric=True,
    )


def name_of(backbone: str, dataset: Dataset, side: int | None = None) -> str:
    """Return the published name of a base model; `side` is the side of SegFormer's crop, None: the usual one."""
    side = side or {"ade20k": 512, "cityscapes": 1024}[dataset]
    if backbone in DEEPLAB:
        size = {"ade20k": "512x512_160k", "cityscapes": "512x1024_80k"}[dataset]
        return f"deeplabv3plus_{DEEPLAB[backbone]}-d8_{size}_{dataset}"
    batch = {"ade20k": "", "cityscapes": "8x1_"}[dataset]
    return f"segformer_{backbone.replace('_', '-')}_{batch}{side}x{side}_160k_{dataset}"


def segformer(backbone: str, dataset: Dataset, side: int) -> Experiment:
    """Return SegFormer's recipe: 160k iterations; whole-image testing on ADE20K, sliding windows on Cityscapes."""
    img_scale = {"ade20k": (2048, side), "cityscapes": (2048, 1024)}[dataset]
    batch, device_batch = {"ade20k": (16, 2), "cityscapes": (8, 1)}[dataset]
    return Experiment(
        name=name_of(backbone, dataset, side),
        model=BaseModelConfig(num_classes=CLASSES[dataset], backbone=backbone),
        data=data(dataset, (side, side), img_scale),
        optimizer=OptimizerConfig("adamw", lr=6e-5, weight_decay=0.01, betas=(0.9, 0.999), rules=RULES),
        schedule=ScheduleConfig(
            160_000, "poly", power=1.0, warmup_iterations=1500, warmup_ratio=1e-6, warmup="scheduled"
        ),
        loss=LossConfig("cross_entropy"),
        train=TrainConfig(
            batch_size=batch,
            device_batch_size=device_batch,
            init_from=f"official:{backbone}_imagenet",
            evaluate_every=16_000,
            save_every=16_000,
        ),
        evaluate={
            "ade20k": EvalConfig(img_scale, mode="whole"),
            "cityscapes": EvalConfig(img_scale, mode="slide", crop=(1024, 1024), stride=(768, 768)),
        }[dataset],
    )


def deeplab(backbone: str, dataset: Dataset) -> Experiment:
    """Return DeepLabV3+'s recipe, output stride 8, tested whole: 160k iterations on ADE20K, 80k on Cityscapes."""
    crop, img_scale = {"ade20k": ((512, 512), (2048, 512)), "cityscapes": ((512, 1024), (2048, 1024))}[dataset]
    batch, device_batch = {"ade20k": (16, 4), "cityscapes": (8, 2)}[dataset]
    iterations, every = {"ade20k": (160_000, 16_000), "cityscapes": (80_000, 8_000)}[dataset]
    return Experiment(
        name=name_of(backbone, dataset),
        model=BaseModelConfig(num_classes=CLASSES[dataset], backbone=backbone, auxiliary=True),
        data=data(dataset, crop, img_scale),
        optimizer=OptimizerConfig("sgd", lr=0.01, momentum=0.9, weight_decay=5e-4),
        schedule=ScheduleConfig(iterations, "poly", power=0.9, min_lr=1e-4, warmup_iterations=0),
        loss=LossConfig("cross_entropy"),
        train=TrainConfig(
            batch_size=batch,
            device_batch_size=device_batch,
            init_from=IMAGENET[backbone],
            evaluate_every=every,
            save_every=every,
        ),
        evaluate=EvalConfig(img_scale, mode="whole"),
    )


def rows() -> dict[str, Callable[[], Experiment]]:
    """Return the recipes of all base models by name."""
    builders = [
        *(partial(segformer, backbone, "ade20k", 512) for backbone in MIT),
        partial(segformer, "mit_b5", "ade20k", 640),
        *(partial(segformer, backbone, "cityscapes", 1024) for backbone in MIT),
        *(partial(deeplab, backbone, dataset) for dataset in ("ade20k", "cityscapes") for backbone in DEEPLAB),
    ]
    return {build().name.replace("-", "_"): build for build in builders}
