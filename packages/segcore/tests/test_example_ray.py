"""The example for Ray Data runs on a local Ray, beside our torch, and gives the masks of `predict`."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import segcore
from segcore.cli.main import main

pytestmark = pytest.mark.oracle
EXAMPLE = Path(__file__).parents[3] / "examples" / "ray_predict.py"
CONFIG = f"{Path(__file__).parent / 'runs' / 'tiny.py'}:tiny"


def test_masks_are_those_of_predict(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    torch.manual_seed(0)
    weights, photos = tmp_path / "model.safetensors", tmp_path / "photos"
    save_file(segcore.load_experiment(CONFIG).model.build().state_dict(), weights)
    (photos / "below").mkdir(parents=True)
    for n in range(5):
        pixels = np.random.RandomState(n).randint(0, 256, (32, 64, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(photos / ("below" if n > 2 else "") / f"{n}.png")
    main(None, ["predict", CONFIG, str(weights), str(photos), str(tmp_path / "ours"), "--device", "cpu"])
    (photos / "bad.png").write_bytes(b"")
    words = [CONFIG, weights, photos, tmp_path / "theirs", "--models", 2, "--batch-size", 2]
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *map(str, words)],
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said, bad = done.stdout.splitlines()[-2:]
    assert said == f"5 of 6 images written below {tmp_path / 'theirs'}"
    assert bad.startswith(f"{photos / 'bad.png'}: cannot be read as an image")
    masks = sorted(path.relative_to(tmp_path / "ours") for path in (tmp_path / "ours").rglob("?.png"))
    assert len(masks) == 5
    assert all((tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes() for name in masks)
