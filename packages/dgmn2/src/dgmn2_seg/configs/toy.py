"""A small DGMN2 for generated street scenes, which `dgmn2-seg demo` trains from scratch on a laptop's CPU."""

from dataclasses import replace

from dgmn2_seg.configs import DGMN2Config
from segcore.config import toy
from segcore.config.schema import Experiment, OptimizerConfig


def setr_mla_dgmn2_nano_toy() -> Experiment:
    """SETR-MLA on a narrow backbone with one block per stage; its maps keep the images' shape."""
    return Experiment(
        name="setr_mla_dgmn2_nano_toy",
        model=DGMN2Config(backbone="nano", head="setr_mla", img_size=None),
        data=toy.DATA,
        optimizer=OptimizerConfig("adamw", lr=1e-3, weight_decay=0.01, clip_norm=1.0),
        schedule=replace(toy.SCHEDULE, iterations=500, power=0.9, warmup_iterations=40),
        train=replace(toy.TRAIN, channels_last=False, evaluate_every=500),
        evaluate=toy.EVALUATE,
    )
