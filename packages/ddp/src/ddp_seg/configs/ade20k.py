"""The published ADE20K rows: 512x512 crops, 16 images per iteration, accumulated steps, whole-image testing."""

from pathlib import Path

from ddp_seg.configs import DDPConfig
from ddp_seg.configs.cityscapes import DECAY_RULES, INIT
from segcore.config.schema import (
    DataConfig,
    EvalConfig,
    Experiment,
    LossConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)


def recipe(backbone: str, window: int = 7) -> Experiment:
    """Return the 160k recipe for a Swin backbone."""
    return Experiment(
        name=f"ddp_{backbone}_2x8_512x512_160k_ade20k",
        model=DDPConfig(num_classes=150, backbone=backbone, drop_path=0.3, window=window, accumulation=True),
        data=DataConfig(
            "ade20k",
            Path("data/ade/ADEChallengeData2016"),
            img_scale=(2048, 512),
            ratio_range=(0.5, 2.0),
            crop=(512, 512),
            cat_max_ratio=0.75,
            flip=0.5,
            photometric=True,
        ),
        optimizer=OptimizerConfig(
            "adamw", lr=6e-5, weight_decay=0.01, betas=(0.9, 0.999), clip_norm=0.1, rules=DECAY_RULES
        ),
        schedule=ScheduleConfig(
            160_000, "poly", power=1.0, warmup_iterations=1500, warmup_ratio=1e-6, warmup="scheduled"
        ),
        loss=LossConfig("cross_entropy"),
        train=TrainConfig(
            batch_size=16,
            device_batch_size=2,
            init_from=INIT[backbone],
            evaluate_every=16_000,
            save_every=16_000,
        ),
        evaluate=EvalConfig(img_scale=(2048, 512), mode="whole"),
    )


def ddp_swin_t_2x8_512x512_160k_ade20k() -> Experiment:
    """Swin-T."""
    return recipe("swin_t")


def ddp_swin_s_2x8_512x512_160k_ade20k() -> Experiment:
    """Swin-S."""
    return recipe("swin_s")


def ddp_swin_b_2x8_512x512_160k_ade20k() -> Experiment:
    """Swin-B with window 12, initialized from ImageNet weights with window 7."""
    return recipe("swin_b", window=12)


def ddp_swin_l_2x8_512x512_160k_ade20k() -> Experiment:
    """Swin-L."""
    return recipe("swin_l", window=12)
