"""What the methods' toy configurations share: a few hundred iterations on generated street scenes."""

from pathlib import Path

from segcore.config.schema import DataConfig, EvalConfig, ScheduleConfig, TrainConfig

DATA = DataConfig(
    "toy",
    Path("data/toy"),
    img_scale=(512, 256),
    ratio_range=(0.8, 1.25),
    crop=(256, 512),
    cat_max_ratio=0.75,
    flip=0.5,
    photometric=False,  # the scenes' colors vary enough, and the few iterations are better spent without
    workers=0,
)
SCHEDULE = ScheduleConfig(kind="poly", warmup_ratio=1e-6, warmup="scheduled")
TRAIN = TrainConfig(
    batch_size=2, device_batch_size=2, precision="auto", channels_last=True, log_every=10, save_every=100
)
EVALUATE = EvalConfig(img_scale=(512, 256), batch_size=2)
