"""Cityscapes: 1024x1024 crops, SGD with a poly schedule, whole-image testing at 1024x2048.

The authors published no training code. `recipe` is MMSegmentation's, whose batch size, crop and length match the paper;
its rows also appear under MMSegmentation's own names, with its figures and weights. `pyradd_recipe` is the recipe of
pyradd/DDRNet-pytorch.
"""

from pathlib import Path
from typing import Literal

from ddrnet_seg.configs import DDRNetConfig
from segcore.config.schema import (
    DataConfig,
    EvalConfig,
    Experiment,
    LossConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)

Variant = Literal["23_slim", "23", "39"]

# For the 19 classes in the order of their train ids, as in all published training code.
CLASS_WEIGHT = (
    *(0.8373, 0.918, 0.866, 1.0345, 1.0166, 0.9969, 0.9754, 1.0489, 0.8786, 1.0023),
    *(0.9539, 0.9843, 1.1116, 0.9037, 1.0865, 1.0955, 1.0865, 1.1529, 1.0507),
)


def recipe(variant: Variant, name: str | None = None) -> Experiment:
    """Return MMSegmentation's recipe: 120k iterations of 12 images; OHEM on both heads."""
    return Experiment(
        name=name or f"ddrnet_{variant}_cityscapes",
        model=DDRNetConfig(num_classes=19, variant=variant),
        data=DataConfig(
            "cityscapes",
            Path("data/cityscapes"),
            img_scale=(2048, 1024),
            ratio_range=(0.5, 2.0),
            crop=(1024, 1024),
            cat_max_ratio=0.75,
            flip=0.5,
            photometric=True,
        ),
        optimizer=OptimizerConfig("sgd", lr=0.01, momentum=0.9, weight_decay=5e-4),
        schedule=ScheduleConfig(120_000, "poly", power=0.9, warmup_iterations=0),
        loss=LossConfig("ohem", CLASS_WEIGHT, ohem_threshold=0.9, ohem_min_kept=131_072),
        train=TrainConfig(
            batch_size=12,
            device_batch_size=6,
            init_from=f"official:ddrnet_{variant}_imagenet",
            evaluate_every=12_000,
            save_every=12_000,
        ),
        evaluate=EvalConfig(img_scale=(2048, 1024), mode="whole"),
    )


def pyradd_recipe(variant: Variant) -> Experiment:
    """Return the recipe of pyradd/DDRNet-pytorch: 250 epochs of 595 iterations of 5 images, no auxiliary head."""
    return Experiment(
        name=f"ddrnet_{variant}_cityscapes_pyradd",
        model=DDRNetConfig(num_classes=19, variant=variant, auxiliary=False, align_corners=True),
        data=DataConfig(
            "cityscapes",
            Path("data/cityscapes"),
            img_scale=(2080, 1040),
            ratio_range=(0.5, 2.0),
            crop=(1024, 1024),
            flip=0.5,
            blur=0.5,
        ),
        optimizer=OptimizerConfig("sgd", lr=0.003, momentum=0.9, weight_decay=1e-4),
        schedule=ScheduleConfig(250 * 595, "poly", power=0.9, warmup_iterations=0),
        loss=LossConfig("ohem_pyradd", CLASS_WEIGHT, ohem_threshold=0.7, ohem_min_kept=100_000),
        train=TrainConfig(
            batch_size=5,
            device_batch_size=5,
            init_from=f"official:ddrnet_{variant}_imagenet",
            evaluate_every=595,
            save_every=595,
        ),
        evaluate=EvalConfig(img_scale=None, mode="whole"),
    )


def ddrnet_23_slim_cityscapes() -> Experiment:
    """DDRNet-23-slim."""
    return recipe("23_slim")


def ddrnet_23_cityscapes() -> Experiment:
    """DDRNet-23."""
    return recipe("23")


def ddrnet_39_cityscapes() -> Experiment:
    """DDRNet-39."""
    return recipe("39")


def ddrnet_23_slim_cityscapes_pyradd() -> Experiment:
    """DDRNet-23-slim with the recipe of pyradd/DDRNet-pytorch."""
    return pyradd_recipe("23_slim")


def ddrnet_23_cityscapes_pyradd() -> Experiment:
    """DDRNet-23 with the recipe of pyradd/DDRNet-pytorch."""
    return pyradd_recipe("23")


def ddrnet_39_cityscapes_pyradd() -> Experiment:
    """DDRNet-39 with the recipe of pyradd/DDRNet-pytorch."""
    return pyradd_recipe("39")


def ddrnet_23_slim_in1k_pre_2xb6_120k_cityscapes_1024x1024() -> Experiment:
    """DDRNet-23-slim as MMSegmentation trained it."""
    return recipe("23_slim", "ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024")


def ddrnet_23_in1k_pre_2xb6_120k_cityscapes_1024x1024() -> Experiment:
    """DDRNet-23 as MMSegmentation trained it."""
    return recipe("23", "ddrnet_23_in1k-pre_2xb6-120k_cityscapes-1024x1024")
