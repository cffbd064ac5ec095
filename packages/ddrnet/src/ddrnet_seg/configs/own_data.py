"""DDRNet-23-slim for own images and masks (docs/own_data.md)."""

from dataclasses import replace

from ddrnet_seg.configs import DDRNetConfig
from segcore.config import own_data
from segcore.config.schema import Experiment, OptimizerConfig, ScheduleConfig


def ddrnet_23_slim_from_scratch() -> Experiment:
    """From random weights."""
    return _recipe("ddrnet_23_slim_from_scratch", own_data.FROM_SCRATCH, lr=4e-3, init_from=None)


def ddrnet_23_slim_fine_tuned() -> Experiment:
    """From the published Cityscapes weights."""
    return _recipe(
        "ddrnet_23_slim_fine_tuned", own_data.FINE_TUNED, lr=1e-3, init_from="official:ddrnet_23_slim_cityscapes"
    )


def _recipe(name: str, schedule: ScheduleConfig, lr: float, init_from: str | None) -> Experiment:
    return Experiment(
        name=name,
        model=DDRNetConfig(variant="23_slim"),
        data=own_data.DATA,
        optimizer=OptimizerConfig("adamw", lr=lr, weight_decay=0.05),
        schedule=schedule,
        loss=own_data.LOSS,
        train=replace(own_data.TRAIN, init_from=init_from),
        evaluate=own_data.EVALUATE,
    )
