"""A small DDP on CamVid from random weights, in 45 minutes on two CPU cores (benchmarks/camvid.py)."""

from dataclasses import replace

from ddp_seg.configs import toy
from segcore.config import camvid
from segcore.config.schema import Experiment, OptimizerConfig


def ddp_resnet18_camvid() -> Experiment:
    """ResNet-18, 64 channels, 2 decoder layers."""
    return Experiment(
        name="ddp_resnet18_camvid",
        model=replace(toy.MODEL, num_classes=11),
        data=camvid.DATA,
        optimizer=OptimizerConfig("adamw", lr=1e-3, weight_decay=0.05, clip_norm=1.0),
        schedule=replace(camvid.SCHEDULE, iterations=1900),
        loss=camvid.LOSS,
        train=replace(camvid.TRAIN, device_batch_size=8, evaluate_every=950),
        evaluate=replace(camvid.EVALUATE, steps=(1, 3, 10)),
    )
