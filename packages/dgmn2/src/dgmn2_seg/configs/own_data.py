"""DGMN2-Tiny with the FPN head for own images and masks (docs/own_data.md)."""

from dataclasses import replace

from dgmn2_seg.configs import cityscapes
from segcore.config import own_data
from segcore.config.schema import Experiment, OptimizerConfig, ScheduleConfig


def fpn_dgmn2_tiny_from_scratch() -> Experiment:
    """From random weights."""
    return _recipe("fpn_dgmn2_tiny_from_scratch", own_data.FROM_SCRATCH, lr=1e-3, init_from=None)


def fpn_dgmn2_tiny_fine_tuned() -> Experiment:
    """From the published Cityscapes weights."""
    published = cityscapes.fpn_dgmn2_tiny_4x2_769x769_40k_cityscapes().name
    return _recipe("fpn_dgmn2_tiny_fine_tuned", own_data.FINE_TUNED, lr=1e-4, init_from=f"official:{published}")


def _recipe(name: str, schedule: ScheduleConfig, lr: float, init_from: str | None) -> Experiment:
    return Experiment(
        name=name,
        model=cityscapes.fpn_dgmn2_tiny_4x2_769x769_40k_cityscapes().model,
        data=own_data.DATA,
        optimizer=OptimizerConfig("adamw", lr=lr, weight_decay=0.05, clip_norm=1.0),
        schedule=schedule,
        loss=own_data.LOSS,
        train=replace(own_data.TRAIN, device_batch_size=4, init_from=init_from),
        evaluate=own_data.EVALUATE,
    )
