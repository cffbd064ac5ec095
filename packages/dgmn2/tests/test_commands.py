"""DGMN2's own use of the commands on real files: ImageNet weights, resuming, sliding windows, export."""

import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import segcore
from segcore.checkpoints.run_checkpoint import newest, read_model_state
from segcore.cli.main import main
from segcore.demo.toy import generate
from segcore.testing.commands import refused

CONFIG = "setr_mla_dgmn2_nano_toy"
SMALL = [
    "--device=cpu", "--train.precision=fp32", "--data.workers=0", "--train.batch-size=2", "--train.device-batch-size=1",
    "--data.crop", "65", "97", "--data.img-scale", "129", "65", "--evaluate.img-scale", "129", "65",
    "--evaluate.mode=slide", "--evaluate.crop", "65", "65", "--evaluate.stride", "43", "43",
]  # fmt: skip
ITERATIONS = ["--schedule.iterations=3", "--train.save-every=1", "--train.evaluate-every=3", "--train.log-every=1"]
TRAIN = [*ITERATIONS, "--no-report"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    generate(root, train=3, val=2, height=64, width=128)
    return root


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """Initial weights of the backbone, as classification training saves them."""
    model = segcore.load_experiment(CONFIG).model.build()
    names = model.key_map()
    state = {names[n].removeprefix("backbone."): t for n, t in model.state_dict().items() if n.startswith("backbone.")}
    path = tmp_path_factory.mktemp("weights") / "imagenet.pth"
    torch.save({"model": {**state, "head.weight": torch.zeros(9, 192)}, "epoch": 300}, path)
    return path


@pytest.fixture(scope="module")
def run(toy, imagenet, tmp_path_factory):
    """A finished training run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = ["train", CONFIG, f"--data.root={toy}", f"--work-dir={folder}", f"--train.init-from={imagenet}"]
    main("dgmn2_seg", [*words, *SMALL, *TRAIN])
    return folder


def test_an_interrupted_run_resumes_to_the_same_weights(run, toy, imagenet, tmp_path):
    """Dropout is on: its random state is also restored."""
    shutil.copytree(run, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "iter_3")
    words = ["train", CONFIG, f"--data.root={toy}", f"--work-dir={tmp_path / 'cut'}", f"--train.init-from={imagenet}"]
    main("dgmn2_seg", [*words, *SMALL, *TRAIN, "--resume"])
    whole, resumed = read_model_state(newest(run)), read_model_state(newest(tmp_path / "cut"))
    assert newest(tmp_path / "cut").name == "iter_3"
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_test_and_predict(run, toy, tmp_path):
    words = [f"--data.root={toy}", f"--json={tmp_path / 'out.json'}", "--multi-scale"]
    main("dgmn2_seg", ["test", str(run), *words, "--device=cpu"])
    assert list(json.loads((tmp_path / "out.json").read_text())["entries"]) == ["final"]
    cv2.imwrite(str(tmp_path / "a.png"), np.random.RandomState(0).randint(0, 255, (70, 90, 3), np.uint8))
    main("dgmn2_seg", ["predict", str(run), str(tmp_path / "a.png"), str(tmp_path / "out"), "--device=cpu"])
    assert np.array(Image.open(tmp_path / "out" / "a.png")).shape == (70, 90)


DYNAMIC = [(head, ".pt2", True) for head in ("fpn", "setr_naive", "setr_pup", "setr_mla")] + [("fpn", ".onnx", True)]


@pytest.mark.parametrize(
    ("head", "suffix", "dynamic"),
    [("setr_mla", ".pt2", False), *(pytest.param(*case, marks=pytest.mark.slow) for case in DYNAMIC)],
)
def test_export(head, suffix, dynamic, tmp_path, capsys):
    """Before writing, the command compares the file with the model, at two sizes for a dynamic export."""
    if suffix == ".onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name)
    weights, path = tmp_path / "weights.pth", tmp_path / f"model{suffix}"
    exp = segcore.load_experiment(CONFIG).with_overrides([f"model.head={head}"])
    torch.save(exp.model.build().state_dict(), weights)
    main("dgmn2_seg", ["configs", CONFIG, f"--model.head={head}", "--write", str(tmp_path / "my.py")])
    words = ["export", str(tmp_path / "my.py"), str(weights), str(path), "--size=64x96"]
    main("dgmn2_seg", [*words, *(["--dynamic"] if dynamic else [])])
    text = capsys.readouterr().out
    assert "1x3x64x96: logits within" in text
    assert ("2x3x96x128: logits within" in text) == dynamic
    assert path.exists()


def test_invalid_requests(run, tmp_path, monkeypatch):
    monkeypatch.setenv("SEGCORE_WEIGHTS", str(tmp_path))
    row = "setr_mla_dgmn2_tiny_4x2_769x769_40k_cityscapes"
    line = refused("dgmn2_seg", "test", row, "official", "--offline", "--device=cpu")
    assert str(tmp_path / f"{row}.pth") in line
    assert "1EpgGGDzRzwMslW07ML93fO0VgIKbqFWr" in line
    line = refused("dgmn2_seg", "train", row, "--offline", "--device=cpu", f"--work-dir={tmp_path / 'w'}")
    assert "dgmn2_tiny_imagenet.pth" in line or "data/cityscapes" in line
    line = refused("dgmn2_seg", "test", "fpn_dgmn2_tiny_4x2_769x769_40k_cityscapes", run, "--device=cpu")
    assert f"was trained with {CONFIG} --model.backbone nano --model.head setr_mla" in line


def test_bench_shows_the_fused_model(capsys):
    main("dgmn2_seg", ["bench", CONFIG, "--sizes=64x64", "--repeats=1", "--warmup=1", "--device=cpu"])
    assert "fused" in capsys.readouterr().out


def test_demo(toy, tmp_path):
    """It trains this configuration and shows the result next to the linear classifier's."""
    shutil.copytree(toy, tmp_path / "scenes")
    main("dgmn2_seg", ["demo", f"--work-dir={tmp_path}", *SMALL, *ITERATIONS])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures) == {"mIoU", "linear_mIoU", "iterations"}
    assert CONFIG in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
