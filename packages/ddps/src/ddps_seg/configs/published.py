"""The twelve published rows of DDPS, the single-step variant that each starts from, and the three shipped recipes.

There are two stages after a base model of `configs.base_models`: the single-step variant for 80k iterations, then the
multi-step prior for 160k. There are 151 and 20 classes: `background` comes first. The README lists the values that are
the authors' own and those that are inferred.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from ddps_seg.configs import DDPSConfig
from ddps_seg.configs.base_models import DEEPLAB, Dataset, data, name_of
from segcore.config.schema import (
    DataConfig,
    EvalConfig,
    Experiment,
    LossConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)


class Size(NamedTuple):
    """The settings that depend on a row's base model."""

    name: str
    width: int
    """Width of the UNet."""


SIZES: dict[str, Size] = {
    "mobilenet_v2": Size("deeplabv3plus_m-v2", 128),
    "mit_b0": Size("segformer_mit-b0", 128),
    "resnet50": Size("deeplabv3plus_r50", 128),
    "mit_b2": Size("segformer_mit-b2", 256),
    "resnet101": Size("deeplabv3plus_r101", 256),
    "mit_b5": Size("segformer_mit-b5", 256),
}


class Setting(NamedTuple):
    """The settings that depend on a row's data set."""

    classes: int
    """Number of classes, including the leading background."""
    img_scale: tuple[int, int]
    timesteps: int
    """T of the multi-step prior."""
    steps: tuple[int, ...]
    """Timesteps to report."""
    batch_size: int
    device_batch_size: int


SETS: dict[Dataset, Setting] = {
    "ade20k": Setting(151, (2048, 512), 100, (*range(0, 100, 10), 99), 32, 4),
    "cityscapes": Setting(20, (2048, 1024), 20, tuple(range(20)), 16, 2),
}
OPTIMIZER = OptimizerConfig("adamw", lr=1.5e-4, betas=(0.9, 0.96), weight_decay=0.045)


def pipeline(backbone: str, dataset: Dataset) -> DataConfig:
    """Return the base model's augmentations, with the background class."""
    city = (512, 1024) if backbone in DEEPLAB else (1024, 1024)
    crop = {"ade20k": (512, 512), "cityscapes": city}[dataset]
    return data(dataset, crop, SETS[dataset].img_scale, background=True)


def singlestep(backbone: str, dataset: Dataset, name: str | None = None, width: int | None = None) -> Experiment:
    """Return the recipe of a row's single-step variant, which is initialized from the published base model."""
    values, size = SETS[dataset], SIZES[backbone]
    return Experiment(
        name=name or f"ddps_{size.name}_{dataset}{values.classes}_singlestep",
        model=DDPSConfig(num_classes=values.classes, backbone=backbone, width=width or size.width, single_step=True),
        data=pipeline(backbone, dataset),
        optimizer=OPTIMIZER,
        schedule=ScheduleConfig(
            80_000, "step", step=10_000, gamma=0.5, min_lr=1e-6,
            warmup_iterations=1000, warmup_ratio=1e-6, warmup="scheduled",
        ),
        loss=LossConfig("cross_entropy"),
        train=TrainConfig(
            batch_size=values.batch_size,
            device_batch_size=values.device_batch_size,
            init_from=f"official:{name_of(backbone, dataset)}",
            evaluate_every=8_000,
            save_every=8_000,
        ),
        evaluate=EvalConfig(values.img_scale, mode="whole", metrics=("mIoU", "mBIoU")),
    )  # fmt: skip


def multistep(
    backbone: str,
    dataset: Dataset,
    name: str | None = None,
    *,
    iterations: int = 160_000,
    step: int = 20_000,
    steps: tuple[int, ...] | None = None,
    **model: Any,
) -> Experiment:
    """Return the recipe of a published row; `model` holds further fields of `DDPS`, `steps` timesteps to report."""
    values, size = SETS[dataset], SIZES[backbone]
    model = {"num_train_timesteps": values.timesteps, **model}
    return Experiment(
        name=name or f"ddps_{size.name}_{dataset}{values.classes}_multistep",
        model=DDPSConfig(num_classes=values.classes, backbone=backbone, width=size.width, **model),
        data=pipeline(backbone, dataset),
        optimizer=OPTIMIZER,
        schedule=ScheduleConfig(
            iterations, "step", step=step, gamma=0.5, min_lr=1e-6,
            warmup_iterations=1000, warmup_ratio=1e-6, warmup="scheduled",
        ),
        loss=LossConfig("cross_entropy"),
        train=TrainConfig(
            batch_size=values.batch_size,
            device_batch_size=values.device_batch_size,
            init_from=f"runs/ddps_{size.name}_{dataset}{values.classes}_singlestep",
            ema=0.99,
            ema_every=25,
            evaluate_every=16_000,
            save_every=16_000,
        ),
        evaluate=EvalConfig(values.img_scale, mode="whole", steps=steps or values.steps, metrics=("mIoU", "mBIoU")),
    )  # fmt: skip


def segformer_b2_ade20k_singlestep() -> Experiment:
    """The shipped single-step recipe, with a UNet of width 128."""
    return singlestep("mit_b2", "ade20k", "segformer_b2_ade20k_singlestep", width=128)


def segformer_b2_ade20k_multistep() -> Experiment:
    """The shipped multi-step recipe: T = 100, 400k iterations."""
    return multistep("mit_b2", "ade20k", "segformer_b2_ade20k_multistep", iterations=400_000, step=50_000)


def segformer_b2_ade20k_multistep_inference() -> Experiment:
    """The shipped recipe with T = 20, three evaluations and guidance."""
    return multistep(
        "mit_b2",
        "ade20k",
        "segformer_b2_ade20k_multistep_inference",
        num_train_timesteps=20,
        num_inference_steps=2,
        guidance_scale=0.4,
        steps=(0, 10, 19),
    )


def rows() -> dict[str, Callable[[], Experiment]]:
    """Return the rows by name: the published ones, then the ones that initialize them, then the shipped recipes."""
    builders: list[Callable[[], Experiment]] = [
        *(partial(multistep, backbone, dataset) for dataset in SETS for backbone in SIZES),
        *(partial(singlestep, backbone, dataset) for dataset in SETS for backbone in SIZES),
        segformer_b2_ade20k_singlestep,
        segformer_b2_ade20k_multistep,
        segformer_b2_ade20k_multistep_inference,
    ]
    return {build().name.replace("-", "_"): build for build in builders}
