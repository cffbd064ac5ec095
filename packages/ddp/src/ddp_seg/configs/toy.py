"""A small DDP on generated street scenes: what `ddp-seg demo` trains, on a laptop's CPU, from scratch."""

from pathlib import Path

from ddp_seg.configs import DDP
from segcore.config.schema import DataConfig, EvalConfig, Experiment, OptimizerConfig, ScheduleConfig, TrainConfig


def ddp_resnet18_toy() -> Experiment:
    """ResNet-18, 64 channels, 2 decoder layers."""
    return Experiment(
        name="ddp_resnet18_toy",
        model=DDP(num_classes=19, backbone="resnet18", drop_path=0.0, width=64, decoder_layers=2, heads=4),
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
        schedule=ScheduleConfig(iterations=420, warmup_iterations=40),
        train=TrainConfig(
            batch_size=2,
            device_batch_size=2,
            precision="bf16",
            channels_last=True,
            log_every=10,
            evaluate_every=420,
            save_every=100,
        ),
        evaluate=EvalConfig(img_scale=(512, 256), batch_size=2, steps=(1, 3, 10)),
    )
