"""A small base model and its mask prior on generated street scenes: what `ddps-seg demo` trains, on a laptop's CPU."""

from dataclasses import replace
from pathlib import Path

from ddps_seg.configs import DDPS, Base
from segcore.experiment import Data, Evaluate, Experiment, Optimizer, Schedule, Train


def ddps_resnet18_base_toy() -> Experiment:
    """The first stage: ResNet-18 with a feature pyramid."""
    return Experiment(
        name="ddps_resnet18_base_toy",
        model=Base(num_classes=19, backbone="resnet18"),
        data=Data(
            "toy",
            Path("data/toy"),
            scale=(512, 256),
            ratio_range=(0.8, 1.25),
            crop=(256, 512),
            photometric=False,  # the scenes' colours vary enough, and the few iterations are better spent without
            workers=0,
        ),
        optimizer=Optimizer("adamw", lr=1.5e-3, weight_decay=0.01, clip_norm=1.0),
        schedule=Schedule(iterations=400, warmup_iterations=30),
        train=Train(
            batch=2,
            max_per_device=2,
            precision="bf16",
            channels_last=True,
            log_every=10,
            evaluate_every=400,
            save_every=100,
        ),
        evaluate=Evaluate(scale=(512, 256), batch=2),
    )


def ddps_resnet18_toy() -> Experiment:
    """The second stage: a narrow UNet, T = 20, three evaluations."""
    base = ddps_resnet18_base_toy()
    return replace(
        base,
        name="ddps_resnet18_toy",
        model=DDPS(
            num_classes=20,
            backbone="resnet18",
            width=32,
            output_width=64,
            timesteps=20,
            inference_timesteps=2,
            freeze="eval",
        ),
        data=replace(base.data, background=True),
        schedule=replace(base.schedule, iterations=240),
        train=replace(base.train, init=f"runs/{base.name}", evaluate_every=240),
        evaluate=replace(base.evaluate, steps=(0, 10, 19)),
    )
