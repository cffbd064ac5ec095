"""A DDP in float64 without batch norm, for processes that must agree: `train double.py:double --data.root TOY`."""

from dataclasses import dataclass
from pathlib import Path

from ddp_seg.configs import DDPConfig
from ddp_seg.model import DDP
from segcore.config.schema import DataConfig, EvalConfig, Experiment, OptimizerConfig, ScheduleConfig, TrainConfig


class Double(DDP):
    def encode(self, images):
        return super().encode(images.double())


@dataclass(frozen=True)
class DoubleDDP(DDPConfig):
    def build(self) -> DDP:
        return Double(**self.arguments()).double()


def double() -> Experiment:
    """Return 20 iterations of batch 4 at 64x64: ConvNeXt-T without the auxiliary head, which has a batch norm."""
    return Experiment(
        "double",
        DoubleDDP(drop_path=0.0, width=32, decoder_layers=1, heads=4, auxiliary=False),
        DataConfig(
            "toy",
            Path("data/toy"),
            img_scale=(128, 64),
            crop=(64, 64),
            ratio_range=(0.5, 2.0),
            cat_max_ratio=0.75,
            flip=0.5,
            photometric=True,
            workers=0,
        ),
        OptimizerConfig("sgd", lr=0.01, weight_decay=0.01, momentum=0.9, clip_norm=1.0),
        ScheduleConfig(iterations=20, warmup_iterations=5, warmup_ratio=1e-6, warmup="scheduled"),
        train=TrainConfig(batch_size=4, device_batch_size=1, log_every=1, evaluate_every=20, save_every=20),
        evaluate=EvalConfig(img_scale=(128, 64)),
    )
