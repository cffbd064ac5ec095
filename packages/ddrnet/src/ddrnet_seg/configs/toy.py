"""A small DDRNet run on generated street scenes: what `ddrnet-seg demo` trains, on a laptop's CPU, from scratch."""

from pathlib import Path

from ddrnet_seg.configs import DDRNet
from segcore.config.schema import DataConfig, EvalConfig, Experiment, OptimizerConfig, ScheduleConfig, TrainConfig


def ddrnet_23_slim_toy() -> Experiment:
    """DDRNet-23-slim."""
    return Experiment(
        name="ddrnet_23_slim_toy",
        model=DDRNet(variant="23_slim", ohem_min_kept=100_000),
        data=DataConfig(
            "toy",
            Path("data/toy"),
            img_scale=(512, 256),
            ratio_range=(0.8, 1.25),
            crop=(256, 512),
            photometric=False,  # the scenes' colors vary enough, and the few iterations are better spent without
            workers=0,
        ),
        optimizer=OptimizerConfig("adamw", lr=2e-3, weight_decay=0.01),
        schedule=ScheduleConfig(iterations=420, power=0.9, warmup_iterations=20),
        train=TrainConfig(
            batch_size=4,
            device_batch_size=4,
            precision="bf16",
            channels_last=True,
            log_every=10,
            evaluate_every=420,
            save_every=100,
        ),
        evaluate=EvalConfig(img_scale=(512, 256), batch_size=2),
    )
