"""A small DGMN2 on generated street scenes: what `dgmn2-seg demo` trains, on a laptop's CPU, from scratch."""

from pathlib import Path

from dgmn2_seg.configs import DGMN2
from segcore.config.schema import DataConfig, EvalConfig, Experiment, OptimizerConfig, ScheduleConfig, TrainConfig


def setr_mla_dgmn2_nano_toy() -> Experiment:
    """SETR-MLA on a narrow backbone with one block per stage; its maps keep the images' shape."""
    return Experiment(
        name="setr_mla_dgmn2_nano_toy",
        model=DGMN2(backbone="nano", head="setr_mla", img_size=None),
        data=DataConfig(
            "toy",
            Path("data/toy"),
            img_scale=(512, 256),
            ratio_range=(0.8, 1.25),
            crop=(256, 512),
            photometric=False,  # the scenes' colors vary enough, and the few iterations are better spent without
            workers=0,
        ),
        optimizer=OptimizerConfig("adamw", lr=1e-3, weight_decay=0.01, clip_norm=1.0),
        schedule=ScheduleConfig(iterations=500, power=0.9, warmup_iterations=40),
        train=TrainConfig(
            batch_size=2,
            device_batch_size=2,
            precision="bf16",
            log_every=10,
            evaluate_every=500,
            save_every=100,
        ),
        evaluate=EvalConfig(img_scale=(512, 256), batch_size=2),
    )
