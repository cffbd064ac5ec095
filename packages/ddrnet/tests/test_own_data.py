"""A user's own images and masks through the commands: fine-tuning to other classes, and more than a byte of classes."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ddrnet_seg.configs import DDRNetConfig
from segcore.checkpoints.other_classes import trained_classes
from segcore.checkpoints.run_checkpoint import newest, read_model_state
from segcore.cli.main import main
from segcore.config.schema import LossConfig

CONFIG = "ddrnet_23_slim_toy"
SMALL = [
    "--device=cpu", "--train.precision=fp32", "--data.workers=0", "--train.batch-size=2", "--train.device-batch-size=2",
    "--data.crop", "64", "64", "--data.img-scale", "96", "64", "--evaluate.img-scale", "96", "64",
    "--schedule.iterations=2", "--train.evaluate-every=2", "--train.log-every=1", "--data.dataset=folder",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Return a function that writes three images, with masks of stripes of the given values."""

    def make(values, dtype=np.uint8):
        random, root = np.random.default_rng(0), tmp_path / "data"
        for kind in ("images", "masks"):
            (root / kind / "train").mkdir(parents=True, exist_ok=True)
        for i in range(3):
            image = random.integers(0, 256, (64, 96, 3), dtype=np.uint8)
            Image.fromarray(image).save(root / f"images/train/{i}.png")
            stripes = np.repeat(np.array(values, dtype), -(-96 // len(values)))[:96]
            Image.fromarray(np.roll(stripes, 7 * i)[None].repeat(64, 0)).save(root / f"masks/train/{i}.png")
        return root

    return make


def train(root, run, *words):
    main("ddrnet_seg", ["train", CONFIG, f"--data.root={root}", f"--work-dir={run}", *SMALL, *words])


def test_fine_tuning_keeps_the_classes_of_the_same_name(folder, tmp_path, capfd):
    root = folder([0, 1, 2])
    share = ["--data.val-share", "0.3"]
    train(root, tmp_path / "first", *share, "--data.classes", "road", "tree", "sky")
    before = read_model_state(newest(tmp_path / "first"))
    capfd.readouterr()
    # A rate of 0: what the run starts from is what it saves.
    still = ["--optimizer.lr=0", "--optimizer.weight-decay=0", "--train.init-from", str(tmp_path / "first")]
    train(root, tmp_path / "second", *share, *still, "--data.labels", "0=Road", "1=car", "2=Road")
    assert "classifier: Road kept, 1 of 2 classes new" in capfd.readouterr().out
    after = read_model_state(newest(tmp_path / "second"))
    torch.testing.assert_close(after["head.classifier.weight"][0], before["head.classifier.weight"][0])
    torch.testing.assert_close(after["backbone.conv1.0.conv.weight"], before["backbone.conv1.0.conv.weight"])
    assert after["auxiliary_head.classifier.bias"].shape == (2,)


def test_three_hundred_classes(folder, tmp_path):
    root = folder([0, 255, 299, 65535], np.uint16)
    classes = ["--data.classes", *(f"class{i}" for i in range(300))]
    train(root, tmp_path / "run", "--data.val-share", "0.3", *classes)
    results = json.loads((tmp_path / "run/results.json").read_text())
    (entry,) = results["entries"].values()
    measured = [i for i, value in enumerate(entry["Acc"]) if value is not None]
    assert measured == [0, 255, 299], "65535 is ignored, and nothing else"
    image = root / "images/train/0.png"
    main("ddrnet_seg", ["predict", str(tmp_path / "run"), str(image), str(tmp_path / "out"), "--device=cpu"])
    with Image.open(tmp_path / "out/0.png") as mask:
        assert np.array(mask).dtype == np.uint16
        assert mask.size == (96, 64)


def test_the_loss_counts_class_255_of_three_hundred():
    torch.manual_seed(0)
    model = DDRNetConfig(num_classes=300).build().eval()
    images, labels = torch.randn(2, 3, 64, 64), torch.full((2, 64, 64), 65535)
    loss = LossConfig(avg_non_ignore=True)
    assert model.ignore_index == 65535
    assert model.losses(images, labels, loss=loss)["loss"] == 0
    labels[:, :32] = 255
    some = model.losses(images, labels, loss=loss)["decode.loss_ce"]
    logits = model(images)[:, :, :32].log_softmax(1)
    torch.testing.assert_close(some, -logits[:, 255].mean())


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such file names")
def test_file_names_that_are_not_utf8_and_classes_that_the_terminal_cannot_show(folder, tmp_path, monkeypatch):
    latin = os.fsdecode(b"caf\xe9")
    root = folder([0, 1]).rename(tmp_path / latin)
    for kind in ("images", "masks"):
        (root / kind / "train/0.png").rename(root / kind / f"train/{latin}.png")
    data = ["--data.val-share", "0.3", "--data.classes", "道路", latin]
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    command = [sys.executable, "-m", "ddrnet_seg", "check", CONFIG, "--data.dataset=folder", "--data.root", root]
    done = subprocess.run([*command, *data, "--json", root / "check.json"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert rb"\u9053\u8def" in done.stdout
    assert json.loads((root / "check.json").read_text())["train"]["problems"] == []
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), "cp1252"))
    run = root / "run"
    train(root, run, *data, "--loss.class-weight=auto")
    assert json.loads((run / "results.json").read_text())["classes"] == ["道路", latin]
    main("ddrnet_seg", ["predict", str(run), str(root / f"images/train/{latin}.png"), str(root), "--device=cpu"])
    assert (root / f"{latin}.png").is_file()
    assert rb"\u9053\u8def" in sys.stdout.buffer.getvalue()


@pytest.mark.parametrize("data", [None, [], "a.py:f", {}, {"dataset": "folder"}, {"dataset": "nothing"}])
def test_a_damaged_record_states_no_classes(tmp_path, data):
    (tmp_path / "experiment.json").write_text(json.dumps({"experiment": {"data": data}}))
    assert trained_classes(str(tmp_path), tmp_path, "mine") is None
