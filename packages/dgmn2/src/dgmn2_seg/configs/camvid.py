"""DGMN2-Tiny on CamVid from random weights, in 45 minutes on two CPU cores (benchmarks/camvid.py)."""

from dataclasses import replace

from dgmn2_seg.configs import DGMN2Config
from segcore.config import camvid
from segcore.config.schema import Experiment, OptimizerConfig


def fpn_dgmn2_tiny_camvid() -> Experiment:
    """Semantic FPN, DGMN2-Tiny."""
    return Experiment(
        name="fpn_dgmn2_tiny_camvid",
        model=DGMN2Config(num_classes=11, backbone="tiny", head="fpn"),
        data=replace(camvid.DATA, ratio_range=(0.6, 1.6), crop=(192, 256)),
        optimizer=OptimizerConfig("adamw", lr=7e-4, weight_decay=0.05, clip_norm=1.0),
        schedule=replace(camvid.SCHEDULE, iterations=2800),
        loss=camvid.LOSS,
        train=replace(camvid.TRAIN, batch_size=4, device_batch_size=2, evaluate_every=1400),
        evaluate=camvid.EVALUATE,
    )
