"""A small base model and its mask prior on generated street scenes: what `ddps-seg demo` trains, on a laptop's CPU."""

from dataclasses import replace
from pathlib import Path

from ddps_seg.configs import DDPS, Base
from segcore.config.schema import DataConfig, EvalConfig, Experiment, OptimizerConfig, ScheduleConfig, TrainConfig


def ddps_segformer_b0_base_toy() -> Experiment:
    """The first stage: SegFormer on MiT-B0 with a narrow head."""
    return Experiment(
        name="ddps_segformer_b0_base_toy",
        model=Base(num_classes=19, backbone="mit_b0", drop_path=0.0, condition_width=64),
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
        schedule=ScheduleConfig(iterations=400, warmup_iterations=30),
        train=TrainConfig(
            batch_size=2,
            device_batch_size=2,
            precision="bf16",
            channels_last=True,
            log_every=10,
            evaluate_every=400,
            save_every=100,
        ),
        evaluate=EvalConfig(img_scale=(512, 256), batch_size=2),
    )


def ddps_segformer_b0_toy() -> Experiment:
    """The second stage: a narrow UNet, T = 20, three evaluations. After so few iterations the base trains along."""
    base = ddps_segformer_b0_base_toy()
    return replace(
        base,
        name="ddps_segformer_b0_toy",
        model=DDPS(
            num_classes=20,
            backbone="mit_b0",
            drop_path=0.0,
            condition_width=64,
            width=48,
            output_width=64,
            num_train_timesteps=20,
            num_inference_steps=2,
            freeze="none",
        ),
        data=replace(base.data, add_background_class=True),
        schedule=replace(base.schedule, iterations=240),
        train=replace(base.train, init_from=f"runs/{base.name}", evaluate_every=240),
        evaluate=replace(base.evaluate, steps=(0, 10, 19)),
    )
