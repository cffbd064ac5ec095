"""A small base model and its mask prior for generated street scenes; `ddps-seg demo` trains them on a laptop's CPU."""

from dataclasses import replace

from ddps_seg.configs import BaseModelConfig, DDPSConfig
from segcore.config import toy
from segcore.config.schema import Experiment, OptimizerConfig

BASE = BaseModelConfig(num_classes=19, backbone="mit_b0", drop_path=0.0, condition_width=64)
PRIOR = DDPSConfig(
    num_classes=20,
    backbone="mit_b0",
    drop_path=0.0,
    condition_width=64,
    width=48,
    output_width=64,
    num_train_timesteps=20,
    num_inference_steps=2,
)
OPTIMIZER = OptimizerConfig("adamw", lr=1e-3, weight_decay=0.01, clip_norm=1.0)


def ddps_segformer_b0_base_toy() -> Experiment:
    """The first stage: SegFormer on MiT-B0 with a narrow head."""
    return Experiment(
        name="ddps_segformer_b0_base_toy",
        model=BASE,
        data=toy.DATA,
        optimizer=OPTIMIZER,
        schedule=replace(toy.SCHEDULE, iterations=400, warmup_iterations=30),
        train=replace(toy.TRAIN, evaluate_every=400),
        evaluate=toy.EVALUATE,
    )


def ddps_segformer_b0_toy() -> Experiment:
    """The second stage: a narrow UNet, T = 20, three evaluations. After a short first stage the base trains, too."""
    return Experiment(
        name="ddps_segformer_b0_toy",
        model=replace(PRIOR, freeze="none"),
        data=replace(toy.DATA, add_background_class=True),
        optimizer=OPTIMIZER,
        schedule=replace(toy.SCHEDULE, iterations=240, warmup_iterations=30),
        train=replace(toy.TRAIN, init_from="runs/ddps_segformer_b0_base_toy", evaluate_every=240),
        evaluate=replace(toy.EVALUATE, steps=(0, 10, 19)),
    )
