"""A small DDRNet run on generated street scenes, which `ddrnet-seg demo` trains from scratch on a laptop's CPU."""

from dataclasses import replace

from ddrnet_seg.configs import DDRNetConfig
from segcore.config import toy
from segcore.config.schema import Experiment, LossConfig, OptimizerConfig


def ddrnet_23_slim_toy() -> Experiment:
    """DDRNet-23-slim."""
    return Experiment(
        name="ddrnet_23_slim_toy",
        model=DDRNetConfig(variant="23_slim"),
        data=toy.DATA,
        optimizer=OptimizerConfig("adamw", lr=2e-3, weight_decay=0.01),
        schedule=replace(toy.SCHEDULE, iterations=420, power=0.9, warmup_iterations=20),
        loss=LossConfig("ohem", ohem_threshold=0.9, ohem_min_kept=100_000),
        train=replace(toy.TRAIN, batch_size=4, device_batch_size=4, evaluate_every=420),
        evaluate=toy.EVALUATE,
    )
