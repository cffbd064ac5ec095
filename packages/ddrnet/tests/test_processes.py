"""Training on two processes equals one at the same global batch: plain cross entropy, frozen batch norms.

The two also compute their activations again in the backward pass, and part of the network is frozen.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from segcore.checkpoints import run_checkpoint as checkpoint
from segcore.demo.toy import generate

CONFIG = f"{Path(__file__).parent / 'runs' / 'frozen.py'}:frozen"


def test_two_processes_match_one(tmp_path):
    generate(tmp_path / "toy", train=6, val=3, height=64, width=128)
    losses, weights, figures = [], [], []
    for start in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]):
        folder = tmp_path / f"run{len(start)}"
        words = ["train", CONFIG, f"--data.root={tmp_path / 'toy'}", f"--work-dir={folder}", "--device=cpu"]
        words += ["--train.freeze", "backbone.conv1", f"--train.checkpoint-activations={bool(start)}"]
        command = [sys.executable, *start, "-m", "ddrnet_seg", *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if line["mode"] == "train"])
        weights.append(checkpoint.load(folder / "checkpoints" / "iter_3").model)
        figures.append(json.loads((folder / "results.json").read_text()))
    assert "2 processes on cpu" in done.stdout
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-7, atol=1e-9)
    assert figures[0]["entries"] == figures[1]["entries"]
