"""A DDP in float64 without batch norm, for processes that must agree: `train double.py:double --data.root TOY`."""

from dataclasses import dataclass
from pathlib import Path

from ddp_seg.configs import DDP
from ddp_seg.model import DDPSegmentor
from segcore.config.schema import Data, Evaluate, Experiment, Optimizer, Schedule, Train


class Segmentor(DDPSegmentor):
    def losses(self, images, labels, seeds=None, draws=None):
        return super().losses(images.double(), labels, seeds, draws)

    def predict_steps(self, images, steps=None, seeds=None):
        return super().predict_steps(images.double(), steps, seeds)


@dataclass(frozen=True)
class DoubleDDP(DDP):
    def build(self) -> DDPSegmentor:
        return Segmentor(self).double()


def double() -> Experiment:
    """Return 20 iterations of batch 4 at 64x64: ConvNeXt-T without the auxiliary head, which has a batch norm."""
    return Experiment(
        "double",
        DoubleDDP(drop_path=0.0, width=32, decoder_layers=1, heads=4, auxiliary=False),
        Data("toy", Path("data/toy"), scale=(128, 64), crop=(64, 64), workers=0),
        Optimizer("sgd", lr=0.01, clip_norm=1.0),
        Schedule(iterations=20, warmup_iterations=5),
        Train(batch=4, max_per_device=1, log_every=1, evaluate_every=20, save_every=20),
        Evaluate(scale=(128, 64)),
    )
