"""A small DDP for generated street scenes, which `ddp-seg demo` trains from scratch on a laptop's CPU."""

from dataclasses import replace

from ddp_seg.configs import DDPConfig
from segcore.config import toy
from segcore.config.schema import Experiment, OptimizerConfig

MODEL = DDPConfig(num_classes=19, backbone="resnet18", drop_path=0.0, width=64, decoder_layers=2, heads=4)


def ddp_resnet18_toy() -> Experiment:
    """ResNet-18, 64 channels, 2 decoder layers."""
    return Experiment(
        name="ddp_resnet18_toy",
        model=MODEL,
        data=toy.DATA,
        optimizer=OptimizerConfig("adamw", lr=1e-3, weight_decay=0.01, clip_norm=1.0),
        schedule=replace(toy.SCHEDULE, iterations=420, warmup_iterations=40),
        train=replace(toy.TRAIN, evaluate_every=420),
        evaluate=replace(toy.EVALUATE, steps=(1, 3, 10)),
    )
