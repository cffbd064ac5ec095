"""What the methods' CamVid configurations share: 367 street photographs, learned from random weights on a CPU."""

from pathlib import Path

from segcore.config.schema import DataConfig, EvalConfig, LossConfig, ScheduleConfig, TrainConfig

DATA = DataConfig(
    "camvid",
    Path("data/CamVid"),
    img_scale=(480, 360),
    ratio_range=(0.75, 2.0),
    crop=(288, 384),
    cat_max_ratio=1.0,
    flip=0.5,
    photometric=True,
    workers=0,
)
SCHEDULE = ScheduleConfig(kind="poly", power=0.9, warmup_iterations=100, warmup_ratio=1e-6, warmup="scheduled")
# The square roots of `auto`, rescaled: `auto` paints rare classes too widely here.
CLASS_WEIGHT = (0.96, 0.84, 2.34, 0.74, 1.59, 1.19, 2.27, 2.28, 1.45, 2.49, 2.68)
LOSS = LossConfig("cross_entropy", class_weight=CLASS_WEIGHT)
TRAIN = TrainConfig(
    batch_size=8, device_batch_size=4, precision="auto", channels_last=True, log_every=50, save_every=200
)
EVALUATE = EvalConfig(img_scale=(480, 360), batch_size=1)
