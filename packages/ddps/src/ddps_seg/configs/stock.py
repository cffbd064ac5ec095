"""The base models as MMSegmentation 0.30 trains them, the first stage of DDPS; its names, recipes and weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from ddps_seg.configs import Backbone, Base
from segcore.config.schema import (
    DataConfig,
    EvalConfig,
    Experiment,
    OptimizerConfig,
    ParamRule,
    ScheduleConfig,
    TrainConfig,
)

SetName = Literal["ade20k", "cityscapes"]
MIT: tuple[Backbone, ...] = ("mit_b0", "mit_b1", "mit_b2", "mit_b3", "mit_b4", "mit_b5")
DEEPLAB: dict[Backbone, str] = {"mobilenet_v2": "m-v2", "resnet50": "r50", "resnet101": "r101"}
"""Backbone of DeepLabV3+ -> its part of the names."""
IMAGENET = {
    "mobilenet_v2": "mobilenetv2_100.ra_in1k",
    "resnet50": "resnet50c.gluon_in1k",
    "resnet101": "resnet101c.gluon_in1k",
}
"""Start weights: timm's of the same architecture."""
# "head" wins over "norm", so norms in the head keep their decay, as published.
RULES = (ParamRule("pos_block", decay_mult=0.0), ParamRule("norm", decay_mult=0.0), ParamRule("head", lr_mult=10.0))


def data(dataset: SetName, crop: tuple[int, int], short: int | None = None, *, background: bool = False) -> DataConfig:
    """Return the published pipeline of a data set; `short` is the short side of the base size."""
    if dataset == "ade20k":
        root, scale = Path("data/ade/ADEChallengeData2016"), (2048, short or 512)
    else:
        root, scale = Path("data/cityscapes"), (2048, 1024)
    return DataConfig(dataset, root, img_scale=scale, crop=crop, add_background_class=background)


def segformer(backbone: Backbone, dataset: SetName, crop: int) -> Experiment:
    """Return SegFormer's recipe: 160k iterations; ADE20K tested whole, Cityscapes in windows."""
    ade, name = dataset == "ade20k", backbone.replace("_", "-")
    pipeline = data(dataset, (crop, crop), crop)
    size = f"{crop}x{crop}_160k_{dataset}"
    return Experiment(
        name=f"segformer_{name}_{size}" if ade else f"segformer_{name}_8x1_{size}",
        model=Base(num_classes=150 if ade else 19, backbone=backbone),
        data=pipeline,
        optimizer=OptimizerConfig("adamw", lr=6e-5, weight_decay=0.01, rules=RULES),
        schedule=ScheduleConfig(iterations=160_000, power=1.0, warmup_iterations=1500),
        train=TrainConfig(
            batch_size=16 if ade else 8, device_batch_size=2 if ade else 1, init_from=f"official:{backbone}_imagenet"
        ),
        evaluate=EvalConfig(pipeline.img_scale)
        if ade
        else EvalConfig(pipeline.img_scale, "slide", crop=(1024, 1024), stride=(768, 768)),
    )


def deeplab(backbone: Backbone, dataset: SetName) -> Experiment:
    """Return DeepLabV3+'s recipe at output stride 8: 160k iterations on ADE20K, 80k on Cityscapes; tested whole."""
    ade = dataset == "ade20k"
    size = "512x512_160k" if ade else "512x1024_80k"
    pipeline = data(dataset, (512, 512) if ade else (512, 1024))
    every = 16_000 if ade else 8_000
    return Experiment(
        name=f"deeplabv3plus_{DEEPLAB[backbone]}-d8_{size}_{dataset}",
        model=Base(num_classes=150 if ade else 19, backbone=backbone, auxiliary=True),
        data=pipeline,
        optimizer=OptimizerConfig("sgd", lr=0.01, momentum=0.9, weight_decay=5e-4),
        schedule=ScheduleConfig(iterations=160_000 if ade else 80_000, power=0.9, min_lr=1e-4, warmup_iterations=0),
        train=TrainConfig(
            batch_size=16 if ade else 8,
            device_batch_size=4 if ade else 2,
            init_from=IMAGENET[backbone],
            evaluate_every=every,
            save_every=every,
        ),
        evaluate=EvalConfig(pipeline.img_scale),
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
