"""A run of seconds for tests of processes: `train tiny.py:tiny --data.root FOLDER`, under torchrun or alone.

The environment variable TINY_FAULT, `KIND:RANK:ITERATION`, lets one process fail: `nan` (its loss, three times with
`nan3`), `die`, `sleep` past its time, or `log` (a folder in place of the log). `memory:RANK:0` is out of GPU memory in
its evaluations. `kill::N` kills any process in front of its forward pass N of a prediction.
"""

import os
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from segcore.config.schema import (
    DataConfig,
    EvalConfig,
    Experiment,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from segcore.models.segmentor import Segmentor
from segcore.testing.tiny import Tiny

KIND, RANK, ITERATION = (os.environ.get("TINY_FAULT") or "none:0:-1").split(":")


class Net(Tiny):
    """A convolution, a group norm and seeded noise in float64; no batch norm: its statistics differ by process."""

    def __init__(self, num_classes: int, pause: float) -> None:
        super().__init__(num_classes, noise=0.1, norm=partial(nn.GroupNorm, 2))
        self.pause, self.losses_taken = pause, 0
        self.double()

    def logits(self, images, seeds=None):
        time.sleep(self.pause)
        if KIND == "memory" and os.environ.get("RANK", "0") == RANK and not self.training:
            raise torch.OutOfMemoryError
        if KIND == "kill" and len(self.calls) == int(ITERATION):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().logits(images, seeds)

    def losses(self, images, labels, **options):
        time.sleep(self.pause)
        losses = super().losses(images, labels, **options)
        return {"loss": losses["loss"] * self.fault()}

    def fault(self) -> float:
        """Return the factor of the loss, after the fault that TINY_FAULT requests."""
        self.losses_taken += 1
        late = self.losses_taken - 1 - int(ITERATION)
        if os.environ.get("RANK", "0") != RANK or not 0 <= late < (3 if KIND == "nan3" else 1):
            return 1.0
        if KIND == "die" and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
            os._exit(7)
        if KIND == "sleep":
            time.sleep(12)
        if KIND == "log":
            path = Path(sys.argv[sys.argv.index("--work-dir") + 1], "log.jsonl")
            path.rename(path.with_name("before.jsonl"))
            path.mkdir()
        return float("nan") if KIND.startswith("nan") else 1.0


@dataclass(frozen=True)
class TinyModel(ModelConfig):
    num_classes: int = 3
    pause: float = 0.0
    """Minimum seconds per step and per forward pass of an evaluation."""

    def build(self) -> Segmentor:
        return Net(self.num_classes, self.pause)


def tiny() -> Experiment:
    """Return 20 iterations of batch 4 on a folder of images of 32x64."""
    data = DataConfig(
        "folder",
        classes=("dark", "bright", "absent"),
        img_scale=(64, 32),
        crop=(32, 32),
        ratio_range=(0.5, 2.0),
        cat_max_ratio=0.75,
        flip=0.5,
        photometric=True,
        workers=0,
    )
    return Experiment(
        "tiny",
        TinyModel(),
        data,
        OptimizerConfig("sgd", lr=0.05, weight_decay=0.01, momentum=0.9, clip_norm=1.0),
        ScheduleConfig(iterations=20, warmup_iterations=2, warmup_ratio=1e-6, warmup="scheduled"),
        train=TrainConfig(batch_size=4, device_batch_size=1, log_every=1, evaluate_every=20, save_every=5, timeout=60),
        evaluate=EvalConfig(img_scale=(64, 32)),
    )
