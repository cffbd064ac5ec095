"""Standard error holds our lines and nobody else's."""

from __future__ import annotations

import io
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segcore.demo import toy

OURS = re.compile(r"(checking that|evaluating|predicting|counting|warning: segcore|error: |runs/.*: loaded |note: ).*")

NOISY = """
import logging, warnings
from dataclasses import dataclass
from segcore.config.schema import DataConfig, Experiment, ModelConfig, ScheduleConfig, TrainConfig
from segcore.testing.tiny import Tiny

warnings.warn("noise of an import")

class Net(Tiny):
    def losses(self, *args, **kwargs):
        warnings.warn("noise of a library", FutureWarning)
        warnings.warn("segcore: a message of ours")
        logging.getLogger("library").warning("noise of a logger")
        return super().losses(*args, **kwargs)

@dataclass(frozen=True)
class Model(ModelConfig):
    num_classes: int = 3
    def build(self):
        return Net()

def noisy():
    data = DataConfig("folder", classes=("a", "b", "c"), crop=(32, 32), workers=1, on_error="skip")
    train = TrainConfig(batch_size=2, device_batch_size=2, evaluate_every=2)
    return Experiment("noisy", Model(), data, schedule=ScheduleConfig(iterations=2), train=train)
"""


def run(*words: str, folder: Path, module: str = "segcore", **variables: str) -> list[str]:
    """Return the lines that a command writes to standard error."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"} | variables
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


def with_bad_profile(image: np.ndarray) -> bytes:
    """Return a PNG about whose color profile libpng warns."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    profile = b"iCCPx\0\0no profile"
    chunk = struct.pack(">I", len(profile) - 4) + profile + struct.pack(">I", zlib.crc32(profile))
    return buffer.getvalue()[:33] + chunk + buffer.getvalue()[33:]


def test_training_and_prediction_show_only_our_lines(tmp_path: Path) -> None:
    rng = np.random.RandomState(0)
    for split in ("train", "val"):
        for kind, depth in (("images", 3), ("masks", 1)):
            (tmp_path / "data" / kind / split).mkdir(parents=True)
            for number in range(2):
                pixels = rng.randint(0, 3, (40, 40, depth)).astype(np.uint8).squeeze()
                (tmp_path / f"data/{kind}/{split}/{number}.png").write_bytes(with_bad_profile(pixels))
    (tmp_path / "noisy.py").write_text(NOISY)
    lines = run("train", "noisy.py:noisy", "--device", "cpu", folder=tmp_path)
    assert not [line for line in lines if not OURS.fullmatch(line)]
    assert lines.count("warning: segcore: a message of ours") == 1
    lines = run("predict", "noisy.py:noisy", "runs/noisy", "data/images/val", "out", "--device", "cpu", folder=tmp_path)
    assert len(lines) == 2
    assert not [line for line in lines if not OURS.fullmatch(line)]
    text = "\n".join(run("configs", "noisy.py:noisy", folder=tmp_path, PYTHONWARNINGS="default"))
    assert "noise of an import" in text  # whoever asks for them sees them


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "name", "options"),
    [
        ("ddp", "ddp_resnet18_toy", ("--train.precision", "bf16", "--train.channels-last", "False")),
        ("ddps", "ddps_segformer_b0_base_toy", ("--train.channels-last", "True")),
        ("ddrnet", "ddrnet_23_slim_toy", ("--train.compile", "True")),
        ("dgmn2", "setr_mla_dgmn2_nano_toy", ("--train.channels-last", "True")),
    ],
)
def test_two_processes_of_every_method(tmp_path: Path, method: str, name: str, options: tuple[str, ...]) -> None:
    """Torch warns about strides of gradients with the first two of these settings."""
    toy.generate(tmp_path / "toy", train=4, val=2, height=64, width=128)
    settings = "data.crop 64 128,data.img-scale 128 64,evaluate.img-scale 128 64,schedule.iterations 2,data.root toy"
    words = [word for setting in settings.split(",") for word in f"--{setting}".split()]
    lines = run(
        "train", name, *words, *options, "--gpus", "2", "--device", "cpu", folder=tmp_path, module=f"{method}_seg"
    )
    assert not [line for line in lines if not OURS.fullmatch(line)]
    run_dir = f"runs/{name}"
    lines = run("test", run_dir, "--device", "cpu", folder=tmp_path, module=f"{method}_seg")
    assert not [line for line in lines if not OURS.fullmatch(line)]
