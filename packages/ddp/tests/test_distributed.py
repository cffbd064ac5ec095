"""Training DDP on several processes equals training on one: same losses, same counts. Gloo on CPU, NCCL on GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from segcore.demo.toy import generate

CONFIG = f"{Path(__file__).parent / 'runs/double.py'}:double"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes") / "toy"
    generate(root, train=6, val=3, height=64, width=128)
    return root


def train(config: str, scenes: Path, work_dir: Path, *options: str) -> str:
    words = ["train", config, f"--data.root={scenes}", f"--work-dir={work_dir}", *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "ddp_seg", *words], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_losses_and_metrics_match_one_process(scenes: Path, tmp_path: Path) -> None:
    losses, results = [], []
    for processes in (1, 2):
        run = tmp_path / str(processes)
        train(CONFIG, scenes, run, "--device=cpu", f"--gpus={processes}")
        records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        losses.append([record["loss"] for record in records if record["mode"] == "train"])
        results.append(json.loads((run / "results.json").read_text()))
    assert len(losses[0]) == 20
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert results[1] == results[0]


@pytest.mark.gpu
@pytest.mark.parametrize("gpus", [1, 2])
def test_over_nccl(scenes: Path, tmp_path: Path, gpus: int) -> None:
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    sizes = ["--data.crop", "64", "128", "--data.img-scale", "128", "64", "--evaluate.img-scale", "128", "64"]
    text = train("ddp_resnet18_toy", scenes, tmp_path, f"--gpus={gpus}", "--schedule.iterations=3", *sizes,
                 "--train.device-batch-size=1")  # fmt: skip
    assert "batch norm stays local" not in text
    assert json.loads((tmp_path / "results.json").read_text())["images"] == 3
