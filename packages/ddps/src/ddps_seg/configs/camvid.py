"""A small base model and its mask prior on CamVid from random weights, in 45 minutes on two CPU cores together."""

from dataclasses import replace

from ddps_seg.configs import toy
from segcore.config import camvid
from segcore.config.schema import Experiment, OptimizerConfig

OPTIMIZER = OptimizerConfig("adamw", lr=1e-3, weight_decay=0.05, clip_norm=1.0)


def ddps_segformer_b0_base_camvid() -> Experiment:
    """The first stage: SegFormer on MiT-B0 with a narrow head."""
    return Experiment(
        name="ddps_segformer_b0_base_camvid",
        model=replace(toy.BASE, num_classes=11),
        data=camvid.DATA,
        optimizer=OPTIMIZER,
        schedule=replace(camvid.SCHEDULE, iterations=2400),
        loss=camvid.LOSS,
        train=replace(camvid.TRAIN, evaluate_every=1200),
        evaluate=camvid.EVALUATE,
    )


def ddps_segformer_b0_camvid() -> Experiment:
    """The second stage: a narrow UNet, T = 20, three evaluations; the base model's weights stay."""
    return Experiment(
        name="ddps_segformer_b0_camvid",
        model=replace(toy.PRIOR, num_classes=12),
        data=replace(camvid.DATA, add_background_class=True),
        optimizer=OPTIMIZER,
        schedule=replace(camvid.SCHEDULE, iterations=800),
        loss=replace(camvid.LOSS, class_weight=(1.0, *camvid.CLASS_WEIGHT)),
        train=replace(camvid.TRAIN, init_from="runs/ddps_segformer_b0_base_camvid", evaluate_every=400),
        evaluate=replace(camvid.EVALUATE, steps=(0, 10, 19)),
    )
