"""DDRNet-23-slim on CamVid from random weights, in 45 minutes on two CPU cores (benchmarks/camvid.py)."""

from dataclasses import replace

from ddrnet_seg.configs import DDRNetConfig
from segcore.config import camvid
from segcore.config.schema import Experiment, OptimizerConfig


def ddrnet_23_slim_camvid() -> Experiment:
    """DDRNet-23-slim."""
    return Experiment(
        name="ddrnet_23_slim_camvid",
        model=DDRNetConfig(num_classes=11, variant="23_slim"),
        data=replace(camvid.DATA, img_scale=(720, 540), ratio_range=(0.75, 1.5), crop=(320, 448)),
        optimizer=OptimizerConfig("adamw", lr=4e-3, weight_decay=0.05),
        schedule=replace(camvid.SCHEDULE, iterations=6000),
        loss=camvid.LOSS,
        train=replace(camvid.TRAIN, evaluate_every=2000),
        evaluate=replace(camvid.EVALUATE, img_scale=(720, 540)),
    )
