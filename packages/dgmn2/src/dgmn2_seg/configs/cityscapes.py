"""The published Cityscapes rows: crops of 769x769, 8 images per iteration, sliding windows over 1025x2049."""

from pathlib import Path

from dgmn2_seg.configs import DGMN2Config, Head, Size
from segcore.config.schema import (
    DataConfig,
    EvalConfig,
    Experiment,
    LossConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)


def recipe(head: Head, size: Size) -> Experiment:
    """Return the 40k recipe: one learning rate and weight decay for all parameters, no warm-up, no stochastic depth."""
    return Experiment(
        name=f"{head}_dgmn2_{size}_4x2_769x769_40k_cityscapes",
        model=DGMN2Config(backbone=size, head=head),
        data=DataConfig(
            "cityscapes",
            Path("data/cityscapes"),
            img_scale=(2049, 1025),
            ratio_range=(0.5, 2.0),
            crop=(769, 769),
            cat_max_ratio=0.75,
            flip=0.5,
            photometric=True,
        ),
        optimizer=OptimizerConfig("adamw", lr=1e-4, weight_decay=1e-4, betas=(0.9, 0.999)),
        schedule=ScheduleConfig(40_000, "poly", power=0.9, warmup_iterations=0),
        loss=LossConfig("cross_entropy", avg_non_ignore=False),
        train=TrainConfig(
            batch_size=8,
            device_batch_size=2,
            init_from=f"official:dgmn2_{size}_imagenet",
            evaluate_every=4_000,
            save_every=4_000,
        ),
        evaluate=EvalConfig(img_scale=(2049, 1025), mode="slide", crop=(769, 769), stride=(513, 513)),
    )


def fpn_dgmn2_tiny_4x2_769x769_40k_cityscapes() -> Experiment:
    """Semantic FPN, DGMN2-Tiny."""
    return recipe("fpn", "tiny")


def fpn_dgmn2_small_4x2_769x769_40k_cityscapes() -> Experiment:
    """Semantic FPN, DGMN2-Small."""
    return recipe("fpn", "small")


def fpn_dgmn2_medium_4x2_769x769_40k_cityscapes() -> Experiment:
    """Semantic FPN, DGMN2-Medium."""
    return recipe("fpn", "medium")


def fpn_dgmn2_large_4x2_769x769_40k_cityscapes() -> Experiment:
    """Semantic FPN, DGMN2-Large."""
    return recipe("fpn", "large")


def setr_naive_dgmn2_tiny_4x2_769x769_40k_cityscapes() -> Experiment:
    """SETR-Naive, DGMN2-Tiny."""
    return recipe("setr_naive", "tiny")


def setr_naive_dgmn2_small_4x2_769x769_40k_cityscapes() -> Experiment:
    """SETR-Naive, DGMN2-Small."""
    return recipe("setr_naive", "small")


def setr_naive_dgmn2_medium_4x2_769x769_40k_cityscapes() -> Experiment:
    """SETR-Naive, DGMN2-Medium."""
    return recipe("setr_naive", "medium")


def setr_naive_dgmn2_large_4x2_769x769_40k_cityscapes() -> Experiment:
    """SETR-Naive, DGMN2-Large."""
    return recipe("setr_naive", "large")


def setr_pup_dgmn2_tiny_4x2_769x769_40k_cityscapes() -> Experiment:
    """SETR-PUP, DGMN2-Tiny."""
    return recipe("setr_pup", "tiny")


def setr_pup_dgmn2_small_4x2_769x769_40k_cityscapes() -> Experiment:
    """SETR-PUP, DGMN2-Small."""
    return recipe("setr_pup", "small")


def setr_pup_dgmn2_medium_4x2_769x769_40k_cityscapes() -> Experiment:
    """SETR-PUP, DGMN2-Medium."""
    return recipe("setr_pup", "medium")


def setr_pup_dgmn2_large_4x2_769x769_40k_cityscapes() -> Experiment:
    """SETR-PUP, DGMN2-Large."""
    return recipe("setr_pup", "large")


def setr_mla_dgmn2_tiny_4x2_769x769_40k_cityscapes() -> Experiment:
    """SETR-MLA, DGMN2-Tiny."""
    return recipe("setr_mla", "tiny")


def setr_mla_dgmn2_small_4x2_769x769_40k_cityscapes() -> Experiment:
    """SETR-MLA, DGMN2-Small."""
    return recipe("setr_mla", "small")


def setr_mla_dgmn2_medium_4x2_769x769_40k_cityscapes() -> Experiment:
    """SETR-MLA, DGMN2-Medium."""
    return recipe("setr_mla", "medium")


def setr_mla_dgmn2_large_4x2_769x769_40k_cityscapes() -> Experiment:
    """SETR-MLA, DGMN2-Large."""
    return recipe("setr_mla", "large")
