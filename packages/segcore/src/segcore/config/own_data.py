"""What the methods' configurations for own images and masks share: starting points, with `data.classes` left to say.

Those that end in `_from_scratch` start from random weights, those in `_fine_tuned` from published ones. The class
weights follow from what was measured on CamVid (docs/camvid.md); the folders are those of docs/own_data.md.
"""

from dataclasses import replace
from pathlib import Path

from segcore.config.schema import DataConfig, EvalConfig, LossConfig, ScheduleConfig, TrainConfig

DATA = DataConfig(
    "folder",
    Path("data/mine"),
    img_scale=(1024, 1024),  # the long side of any photo becomes 1024
    ratio_range=(0.75, 1.5),
    crop=(512, 512),
    flip=0.5,
    photometric=True,
)
FROM_SCRATCH = ScheduleConfig(8000, "poly", power=0.9, warmup_iterations=100, warmup_ratio=1e-6, warmup="scheduled")
FINE_TUNED = replace(FROM_SCRATCH, iterations=2000)
LOSS = LossConfig("cross_entropy", class_weight="auto_sqrt", avg_non_ignore=True)
TRAIN = TrainConfig(
    batch_size=8,
    device_batch_size=8,
    precision="auto",
    channels_last=True,
    evaluate_every=500,
    save_every=500,
)
EVALUATE = EvalConfig(img_scale=(1024, 1024))
