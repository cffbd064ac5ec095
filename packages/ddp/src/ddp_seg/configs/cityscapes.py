"""The published Cityscapes rows: 512x1024 crops, 16 images per iteration, whole-image testing at 1024x2048."""

from pathlib import Path
from typing import Any

from ddp_seg.configs import DDPConfig
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

# Matched against published names: "head" overrides "norm", so norms inside the heads keep weight decay, as published.
DECAY_RULES = (ParamRule("pos_block", decay_mult=0.0), ParamRule("norm", decay_mult=0.0), ParamRule("head"))

# ImageNet weights for initialization: the timm tags of the weights that the published configurations name.
INIT = {
    "convnext_t": "convnext_tiny.fb_in1k",
    "convnext_s": "convnext_small.fb_in1k",
    "convnext_b": "convnext_base.fb_in1k",
    "convnext_l": "convnext_large.fb_in22k",
    "swin_t": "swin_tiny_patch4_window7_224.ms_in1k",
    "swin_s": "swin_small_patch4_window7_224.ms_in1k",
    "swin_b": "swin_base_patch4_window7_224.ms_in1k",
    "swin_l": "swin_large_patch4_window12_384.ms_in22k",
}


DATA = DataConfig(
    "cityscapes",
    Path("data/cityscapes"),
    img_scale=(2048, 1024),
    ratio_range=(0.5, 2.0),
    crop=(512, 1024),
    cat_max_ratio=0.75,
    flip=0.5,
    photometric=True,
)


def recipe(backbone: str, **model: Any) -> Experiment:
    """Return the 160k recipe for a backbone; `model` holds further fields of `DDP`."""
    return Experiment(
        name=f"ddp_{backbone}_4x4_512x1024_160k_cityscapes",
        model=DDPConfig(num_classes=19, backbone=backbone, **model),
        data=DATA,
        optimizer=OptimizerConfig("adamw", lr=6e-5, weight_decay=0.01, betas=(0.9, 0.999), rules=DECAY_RULES),
        schedule=ScheduleConfig(
            160_000, "poly", power=1.0, warmup_iterations=1500, warmup_ratio=1e-6, warmup="scheduled"
        ),
        loss=LossConfig("cross_entropy"),
        train=TrainConfig(
            batch_size=16,
            device_batch_size=4,
            init_from=INIT[backbone],
            evaluate_every=16_000,
            save_every=16_000,
        ),
        evaluate=EvalConfig(img_scale=(2048, 1024), mode="whole"),
    )


def aligned(backbone: str, **model: Any) -> Experiment:
    """Return the self-aligned fine-tuning of a trained row: 5k iterations, a tenth of the learning rate, 10 steps."""
    return Experiment(
        name=f"ddp_{backbone}_4x4_512x1024_5k_cityscapes_aligned",
        model=DDPConfig(num_classes=19, backbone=backbone, self_aligned=True, num_inference_steps=10, **model),
        data=DATA,
        optimizer=OptimizerConfig("adamw", lr=6e-6, weight_decay=0.01, betas=(0.9, 0.999), rules=DECAY_RULES),
        schedule=ScheduleConfig(
            5_000, "poly", power=1.0, warmup_iterations=1500, warmup_ratio=1e-6, warmup="scheduled"
        ),
        loss=LossConfig("cross_entropy"),
        train=TrainConfig(
            batch_size=16,
            device_batch_size=4,
            init_from=f"official:ddp_{backbone}_4x4_512x1024_160k_cityscapes",
            evaluate_every=500,
            save_every=500,
        ),
        evaluate=EvalConfig(img_scale=(2048, 1024), mode="whole"),
    )


def ddp_convnext_t_4x4_512x1024_160k_cityscapes() -> Experiment:
    """ConvNeXt-T."""
    return recipe("convnext_t", drop_path=0.4)


def ddp_convnext_s_4x4_512x1024_160k_cityscapes() -> Experiment:
    """ConvNeXt-S."""
    return recipe("convnext_s", drop_path=0.3)


def ddp_convnext_b_4x4_512x1024_160k_cityscapes() -> Experiment:
    """ConvNeXt-B."""
    return recipe("convnext_b", drop_path=0.4)


def ddp_convnext_l_4x4_512x1024_160k_cityscapes() -> Experiment:
    """ConvNeXt-L."""
    return recipe("convnext_l", drop_path=0.4)


def ddp_swin_t_4x4_512x1024_160k_cityscapes() -> Experiment:
    """Swin-T."""
    return recipe("swin_t", drop_path=0.3)


def ddp_swin_s_4x4_512x1024_160k_cityscapes() -> Experiment:
    """Swin-S."""
    return recipe("swin_s", drop_path=0.3)


def ddp_swin_b_4x4_512x1024_160k_cityscapes() -> Experiment:
    """Swin-B."""
    return recipe("swin_b", drop_path=0.3, window=7)


def ddp_swin_l_4x4_512x1024_160k_cityscapes() -> Experiment:
    """Swin-L."""
    return recipe("swin_l", drop_path=0.3, window=12)


def ddp_convnext_t_4x4_512x1024_5k_cityscapes_aligned() -> Experiment:
    """ConvNeXt-T, self-aligned denoising fine-tuned from the 160k row."""
    return aligned("convnext_t", drop_path=0.4)


def ddp_convnext_l_4x4_512x1024_5k_cityscapes_aligned() -> Experiment:
    """ConvNeXt-L, self-aligned denoising fine-tuned from the 160k row."""
    return aligned("convnext_l", drop_path=0.4)
