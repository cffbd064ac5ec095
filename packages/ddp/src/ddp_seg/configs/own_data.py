"""DDP for own images and masks (docs/own_data.md)."""

from dataclasses import replace

from ddp_seg.configs import cityscapes, toy
from segcore.config import own_data
from segcore.config.schema import Experiment, OptimizerConfig


def ddp_resnet18_from_scratch() -> Experiment:
    """ResNet-18, 64 channels, 2 decoder layers, from random weights."""
    return Experiment(
        name="ddp_resnet18_from_scratch",
        model=toy.MODEL,
        data=own_data.DATA,
        optimizer=OptimizerConfig("adamw", lr=1e-3, weight_decay=0.05, clip_norm=1.0),
        schedule=own_data.FROM_SCRATCH,
        loss=own_data.LOSS,
        train=own_data.TRAIN,
        evaluate=own_data.EVALUATE,
    )


def ddp_convnext_t_fine_tuned() -> Experiment:
    """ConvNeXt-T, from the published Cityscapes weights."""
    published = cityscapes.ddp_convnext_t_4x4_512x1024_160k_cityscapes()
    return replace(
        published,
        name="ddp_convnext_t_fine_tuned",
        data=own_data.DATA,
        schedule=own_data.FINE_TUNED,
        loss=own_data.LOSS,
        train=replace(own_data.TRAIN, device_batch_size=4, init_from=f"official:{published.name}"),
        evaluate=own_data.EVALUATE,
    )
