"""Runs that released versions have stored: later ones load them, resume them and answer as they did.

`python packages/segcore/tests/test_stored_runs.py VERSION` stores one more; those that are there never change.
"""

import json
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import segcore
from segcore.checkpoints import manifest, run_checkpoint
from segcore.config import registry
from segcore.config.record import flat_settings, settings_of
from segcore.config.schema import Experiment
from segcore.training.loop import train

HERE = Path(__file__).parent
STORED = sorted((HERE / "stored").iterdir())
KIND = "tiny_seg:TinyModel"
"""What the records name as the model's class: one of an installed method."""


def tiny() -> Experiment:
    return segcore.load_experiment(f"{HERE / 'runs' / 'tiny.py'}:tiny")


def write_data(root: Path) -> None:
    """Write two images for training and two others, whose brighter stripe is class 1."""
    rng = np.random.RandomState(0)
    for i in range(4):
        label = np.zeros((32, 64), np.uint8)
        label[:, 12 * i : 12 * i + 16] = 1
        image = (rng.randint(0, 100, (32, 64, 3)) + 120 * label[..., None]).astype(np.uint8)
        for folder, pixels in (("images", image), ("masks", label)):
            path = root / folder / ("train" if i < 2 else "val") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)


def answer(folder: Path) -> np.ndarray:
    """Return the probabilities (3, 32, 64) of a stored run's model for an image that is computed here."""
    y, x, channel = np.indices((32, 64, 3))
    return segcore.load_model(folder, device="cpu")(
        ((7 * x + 11 * y + 90 * channel) % 256).astype(np.uint8)
    ).probabilities


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tiny model be one of an installed method."""
    monkeypatch.setattr(registry, "model_configs", lambda: {KIND: type(tiny().model)})


@pytest.mark.parametrize("folder", STORED, ids=lambda folder: folder.name)
def test_a_stored_run_answers_as_it_did(folder: Path) -> None:
    with np.load(folder / "answer.npz") as expected:
        np.testing.assert_allclose(answer(folder)[:, ::4, ::8], expected["probabilities"], rtol=1e-5, atol=1e-6)
    stored = json.loads((folder / "experiment.json").read_text(encoding="utf-8"))["experiment"]
    read = flat_settings(settings_of(segcore.load_experiment(folder)))
    assert {name for name, value in flat_settings(stored).items() if read[name] != value} == {"model.class"}


@pytest.mark.parametrize("folder", STORED, ids=lambda folder: folder.name)
def test_a_stored_run_resumes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_data(tmp_path)
    run = shutil.copytree(folder, tmp_path / "run")
    exp, before = segcore.load_experiment(run), run_checkpoint.load(run / "checkpoints/iter_10")
    train(replace(exp, data=replace(exp.data, root=tmp_path)), run, resume=True)
    assert "resuming from iteration 10" in capsys.readouterr().out
    after = run_checkpoint.load(run / "checkpoints/iter_20")
    assert after.state["iteration"] == 20
    assert before.model.keys() == after.model.keys()
    assert not torch.equal(before.model["conv.weight"], after.model["conv.weight"])


def store(folder: Path) -> None:
    """Store iteration 10 of a run in a new folder, without what depends on the machine."""
    folder = folder.resolve()
    exp = tiny().with_overrides(
        ["data.root=data", "train.ema=0.5", "train.evaluate_every=10", "schedule.iterations=10"]
    )
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        write_data(Path("data"))
        train(exp, Path("run"))
        for record in Path("run").rglob("experiment.json"):
            text = json.loads(record.read_text())
            text["experiment"]["model"]["class"] = KIND
            text["experiment"]["schedule"]["iterations"] = 20
            kept = {name: text[name] for name in ("experiment", "versions")}
            record.write_text(json.dumps({**kept, "platform": "", "git": None}, indent=1) + "\n")
        checkpoint = Path("run/checkpoints/iter_10")
        files = [checkpoint / name for name in manifest.FILES]
        (checkpoint / manifest.MANIFEST).write_text(manifest.text_of(files))
        shutil.copytree(checkpoint, folder / "checkpoints/iter_10")
        for name in ("experiment.json", "best.json"):
            shutil.copy(Path("run", name), folder / name)
    registry.model_configs = lambda: {KIND: type(tiny().model)}
    np.savez_compressed(folder / "answer.npz", probabilities=answer(folder)[:, ::4, ::8])


if __name__ == "__main__":
    store(HERE / "stored" / sys.argv[1])
