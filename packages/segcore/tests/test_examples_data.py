"""The examples of data sets and augmentation, as their texts say to run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

EXAMPLES = Path(__file__).parents[3] / "examples"
SIZES = ["--data.crop", "48", "64", "--data.img-scale", "64", "48", "--evaluate.img-scale", "64", "48"]
SMALL = [*SIZES, "--train.batch-size", "2", "--train.device-batch-size", "2", "--schedule.iterations", "2"]


def segcore(*words: str, folder: Path) -> str:
    """Return what a command prints."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "segcore", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_pairs_and_torchvision_are_trained_and_the_run_predicts_without_them(tmp_path: Path) -> None:
    files = ("dataset_pairs.py", "augment_torchvision.py")
    for name in files:
        (tmp_path / name).write_bytes((EXAMPLES / name).read_bytes())
    options = ("--data.dataset", "dataset_pairs.py:open_split", "--model.num-classes", "3")
    options += ("--data.augment", "augment_torchvision.py:augment", "--device", "cpu")
    assert "|  disk  |" in segcore("train", "ddrnet_23_slim_toy", *options, *SMALL, folder=tmp_path)
    for name in files:
        (tmp_path / name).unlink()
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    segcore("predict", "runs/ddrnet_23_slim_toy", "a.png", "out", "--device", "cpu", folder=tmp_path)
    with Image.open(tmp_path / "out/a.png") as mask:
        assert mask.getpalette()[:9] == [110, 110, 110, 220, 60, 40, 40, 90, 220]


def test_a_list_of_files_with_a_table_of_values(tmp_path: Path) -> None:
    rng = np.random.RandomState(0)
    for split in ("train", "val"):
        names = [(f"{split}{i}.png", f"{split}{i}_mask.png") for i in range(2)]
        for image, mask in names:
            Image.fromarray(rng.randint(0, 256, (20, 30, 3)).astype(np.uint8)).save(tmp_path / image)
            Image.fromarray(rng.choice([0, 100, 200], (20, 30)).astype(np.uint8)).save(tmp_path / mask)
        (tmp_path / f"{split}.csv").write_text("".join(",".join(pair) + "\n" for pair in names))
    own = ("--data.dataset", f"{EXAMPLES / 'dataset_files.py'}:open_split", "--data.root", ".")
    printed = segcore("check", "ddrnet_23_slim_toy", *own, "--model.num-classes", "2", folder=tmp_path)
    assert "problems: none" in printed
    assert "crack" in printed
