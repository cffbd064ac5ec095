"""The example for Ray Data runs on a local Ray, beside our torch, and gives the masks of `predict`."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import segcore
from segcore.cli.main import main

EXAMPLE = Path(__file__).parents[3] / "examples" / "ray_predict.py"
CONFIG = f"{Path(__file__).parent / 'runs' / 'tiny.py'}:tiny"


@pytest.mark.parametrize(
    ("target", "line"), [("photos", "is the folder of the images"), ("out", "results of two images of .* rename one")]
)
def test_no_file_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], target: str, line: str
) -> None:
    """Neither an image by its mask, nor a mask by that of an image with another suffix."""
    (tmp_path / "photos").mkdir()
    for name in ("a.jpg", "a.png"):
        (tmp_path / "photos" / name).touch()
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    words = ["ray_predict.py", CONFIG, "none", str(tmp_path / "photos"), str(tmp_path / target)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert re.search(line, capsys.readouterr().err)


@pytest.mark.oracle
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
