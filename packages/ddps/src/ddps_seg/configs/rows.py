"""The twelve published rows of DDPS, the single-step variant that each starts from, and the three shipped recipes.

Two stages on a base model of `configs.stock`: the single-step variant for 80k iterations, then the multi-step prior for
160k. Labels are 151 and 20 classes: `background` in front. Which values are the authors' own and which are inferred
stands in the README.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from ddps_seg.configs import DDPS, Backbone
from ddps_seg.configs.stock import DEEPLAB, SetName, data, deeplab, segformer
from segcore.config.schema import EvalConfig, Experiment, OptimizerConfig, ScheduleConfig, TrainConfig


class Size(NamedTuple):
    """What a row's base model decides."""

    name: str
    width: int
    """Of the UNet."""


SIZES: dict[Backbone, Size] = {
    "mobilenet_v2": Size("deeplabv3plus_m-v2", 128),
    "mit_b0": Size("segformer_mit-b0", 128),
    "resnet50": Size("deeplabv3plus_r50", 128),
    "mit_b2": Size("segformer_mit-b2", 256),
    "resnet101": Size("deeplabv3plus_r101", 256),
    "mit_b5": Size("segformer_mit-b5", 256),
}
SETS: tuple[SetName, ...] = ("ade20k", "cityscapes")


def multistep(backbone: Backbone, dataset: SetName) -> Experiment:
    """Return the recipe of a published row: T = 100 on ADE20K, 20 on Cityscapes."""
    name, _ = SIZES[backbone]
    ade = dataset == "ade20k"
    classes, timesteps = (151, 100) if ade else (20, 20)
    start = singlestep(backbone, dataset)
    assert isinstance(start.model, DDPS)
    return replace(
        start,
        name=f"ddps_{name}_{dataset}{classes}_multistep",
        model=replace(start.model, single_step=False, num_train_timesteps=timesteps),
        schedule=replace(start.schedule, iterations=160_000, step=20_000),
        train=replace(
            start.train,
            init_from=f"runs/{start.name}",
            ema=0.99,
            ema_every=25,
            evaluate_every=16_000,
            save_every=16_000,
        ),
        evaluate=replace(start.evaluate, steps=(*range(0, 100, 10), 99) if ade else tuple(range(20))),
    )


def singlestep(backbone: Backbone, dataset: SetName) -> Experiment:
    """Return the recipe of the variant that a row starts from, which itself starts from the published base model."""
    name, width = SIZES[backbone]
    ade, dilated = dataset == "ade20k", backbone in DEEPLAB
    classes = 151 if ade else 20
    side = 512 if ade else 1024
    base = deeplab(backbone, dataset) if dilated else segformer(backbone, dataset, side)
    pipeline = data(dataset, (512, 1024) if dilated and not ade else (side, side), background=True)
    return Experiment(
        name=f"ddps_{name}_{dataset}{classes}_singlestep",
        model=DDPS(num_classes=classes, backbone=backbone, width=width, single_step=True),
        data=pipeline,
        optimizer=OptimizerConfig("adamw", lr=1.5e-4, betas=(0.9, 0.96), weight_decay=0.045),
        schedule=ScheduleConfig(
            iterations=80_000, kind="step", step=10_000, gamma=0.5, min_lr=1e-6, warmup_iterations=1000
        ),
        train=TrainConfig(
            batch_size=32 if ade else 16,
            device_batch_size=4 if ade else 2,
            init_from=f"official:{base.name}",
            evaluate_every=8_000,
            save_every=8_000,
        ),
        evaluate=EvalConfig(pipeline.img_scale, metrics=("mIoU", "mBIoU")),
    )


def segformer_b2_ade20k_singlestep() -> Experiment:
    """The shipped single-step recipe, with a UNet of width 128."""
    row = singlestep("mit_b2", "ade20k")
    assert isinstance(row.model, DDPS)
    return replace(row, name="segformer_b2_ade20k_singlestep", model=replace(row.model, width=128))


def segformer_b2_ade20k_multistep() -> Experiment:
    """The shipped multi-step recipe: T = 100, 400k iterations."""
    row = multistep("mit_b2", "ade20k")
    schedule = replace(row.schedule, iterations=400_000, step=50_000)
    return replace(row, name="segformer_b2_ade20k_multistep", schedule=schedule)


def segformer_b2_ade20k_multistep_inference() -> Experiment:
    """The shipped recipe with T = 20, three evaluations and guidance."""
    row = multistep("mit_b2", "ade20k")
    assert isinstance(row.model, DDPS)
    return replace(
        row,
        name="segformer_b2_ade20k_multistep_inference",
        model=replace(row.model, num_train_timesteps=20, num_inference_steps=2, guidance_scale=0.4),
        evaluate=replace(row.evaluate, steps=(0, 10, 19)),
    )


def rows() -> dict[str, Callable[[], Experiment]]:
    """Return the rows by name: the published ones first, then what they start from, then the shipped recipes."""
    builders: list[Callable[[], Experiment]] = [
        *(partial(multistep, backbone, dataset) for dataset in SETS for backbone in SIZES),
        *(partial(singlestep, backbone, dataset) for dataset in SETS for backbone in SIZES),
        segformer_b2_ade20k_singlestep,
        segformer_b2_ade20k_multistep,
        segformer_b2_ade20k_multistep_inference,
    ]
    return {build().name.replace("-", "_"): build for build in builders}
