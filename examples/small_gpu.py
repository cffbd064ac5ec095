"""DDRNet on your own images with a small GPU: `segcore train examples/small_gpu.py:small_gpu`.

It starts from ImageNet weights, whose first layers stay as they are, and computes activations twice instead of storing
them.
"""

from dataclasses import replace
from pathlib import Path

from segcore import load_experiment
from segcore.config.schema import DataConfig, EvalConfig, Experiment, OptimizerConfig, ScheduleConfig

CLASSES = ("background", "crack")


def small_gpu() -> Experiment:
    """Images in data/mine/images/{train,val}, masks of the same names in data/mine/masks/{train,val}."""
    published = load_experiment("ddrnet_23_slim_cityscapes")
    return replace(
        published,
        name="small_gpu",
        model=replace(published.model, num_classes=len(CLASSES)),
        data=DataConfig(
            "folder", Path("data/mine"), classes=CLASSES, crop=(512, 512), ratio_range=(0.5, 2.0), flip=0.5
        ),
        optimizer=OptimizerConfig(
            "adamw",
            lr=1e-3,
            weight_decay=0.01,
            lr_mult=(("backbone", 0.1),),  # the rest starts from random weights
        ),
        schedule=ScheduleConfig(kind="cosine", epochs=100, warmup_iterations=100),
        loss=replace(published.loss, class_weight=None),
        train=replace(
            published.train,
            freeze=("backbone.conv1", "backbone.layer1", "backbone.layer2"),
            checkpoint_activations=True,
            precision="auto",
            batch_size=8,
            device_batch_size=4,  # gradients are accumulated over two passes
            evaluate_every=200,
            save_every=200,
            patience=5,
        ),
        evaluate=EvalConfig(),
    )
