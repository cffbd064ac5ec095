"""DDRNet with frozen batch norms for a test of processes: `train frozen.py:frozen --data.root FOLDER`."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ddrnet_seg.configs import DDRNetConfig
from ddrnet_seg.model import DDRNet
from segcore.config.schema import (
    DataConfig,
    EvalConfig,
    Experiment,
    LossConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)


class Net(DDRNet):
    """Batch norms keep their statistics, which would differ by process; float64, so that sums agree closely."""

    def __init__(self, **arguments) -> None:
        super().__init__(**arguments)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim == 4:  # by fan-in: maps would grow with fixed statistics
                    parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
        self.double()

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def pad(self, images):
        return super().pad(images.double())


@dataclass(frozen=True)
class Frozen(DDRNetConfig):
    def build(self):
        return Net(**self.arguments())


def frozen() -> Experiment:
    """Return 3 iterations of batch 4 with the plain cross entropy and weighted classes on images of 64x64."""
    return Experiment(
        "frozen",
        Frozen(),
        DataConfig(
            "toy",
            Path("data/toy"),
            img_scale=(128, 64),
            ratio_range=(0.5, 2.0),
            crop=(64, 64),
            cat_max_ratio=0.75,
            flip=0.5,
            workers=0,
        ),
        OptimizerConfig("sgd", lr=0.01, momentum=0.9, weight_decay=5e-4),
        ScheduleConfig(iterations=3, power=0.9, warmup_iterations=0),
        LossConfig(class_weight="auto"),
        TrainConfig(
            batch_size=4,
            device_batch_size=2,
            log_every=1,
            evaluate_every=3,
            save_every=3,
            timeout=120,
        ),
        EvalConfig(img_scale=(128, 64)),
    )
