"""DDRNet's own use of the commands on real files: train, resume, test, predict fused, export, bench."""

import json
import re
import shlex
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import segcore
from segcore.checkpoints.run_checkpoint import newest, read_model_state
from segcore.cli.main import main
from segcore.demo.toy import generate
from segcore.inference import load_model
from segcore.testing.commands import refused

CONFIG = "ddrnet_23_slim_toy"
SMALL = [
    "--device=cpu", "--train.precision=fp32", "--data.workers=0", "--train.batch-size=2", "--train.device-batch-size=2",
    "--data.crop", "64", "128", "--data.img-scale", "128", "64", "--evaluate.img-scale", "128", "64",
]  # fmt: skip
ITERATIONS = ["--schedule.iterations=3", "--train.save-every=1", "--train.evaluate-every=3", "--train.log-every=1"]
TRAIN = [*ITERATIONS, "--no-report"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    generate(root, train=3, val=2, height=64, width=128)
    return root


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory):
    """A finished training run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    main("ddrnet_seg", ["train", CONFIG, f"--data.root={toy}", f"--work-dir={folder}", *SMALL, *TRAIN])
    return folder


def test_train_logs_both_heads(run):
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    lines = [line for line in log if line["mode"] == "train"]
    assert [line["iteration"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["loss"] == pytest.approx(line["decode.loss_ce"] + line["aux.loss_ce"], rel=1e-5)
    settings = json.loads((newest(run) / "experiment.json").read_text())["experiment"]
    assert settings["data"]["mean"] == [123.675, 116.28, 103.53]
    assert settings["model"]["align_corners"] is False


def test_an_interrupted_run_resumes_to_the_same_weights(run, toy, tmp_path):
    """Momentum and running statistics are also restored."""
    shutil.copytree(run, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "iter_3")
    words = ["train", CONFIG, f"--data.root={toy}", f"--work-dir={tmp_path / 'cut'}", *SMALL, *TRAIN]
    main("ddrnet_seg", [*words, "--resume"])
    whole, resumed = read_model_state(newest(run)), read_model_state(newest(tmp_path / "cut"))
    assert newest(tmp_path / "cut").name == "iter_3"
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_inference_is_fused_and_channels_last(run):
    model = load_model(run, device="cpu").model
    assert not hasattr(model.backbone.conv1[0], "norm")
    assert model.auxiliary_head is None
    assert model.head.hidden.conv.weight.is_contiguous(memory_format=torch.channels_last)
    plain = segcore.load_experiment(CONFIG).model.build().eval()
    plain.load_checkpoint(read_model_state(newest(run)))
    images = torch.randn(2, 3, 50, 70, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(images), plain(images), atol=1e-4, rtol=1e-4)


def test_test_predict_and_export(run, toy, tmp_path, capsys):
    main("ddrnet_seg", ["test", str(run), f"--data.root={toy}", f"--json={tmp_path / 'out.json'}", "--device=cpu"])
    assert list(json.loads((tmp_path / "out.json").read_text())["entries"]) == ["final"]
    cv2.imwrite(str(tmp_path / "a.png"), np.random.RandomState(0).randint(0, 255, (70, 90, 3), np.uint8))
    main("ddrnet_seg", ["predict", str(run), str(tmp_path / "a.png"), str(tmp_path / "out"), "--device=cpu"])
    mask = np.array(Image.open(tmp_path / "out" / "a.png"))
    assert mask.shape == (70, 90)
    path = tmp_path / "model.pt2"
    capsys.readouterr()
    main("ddrnet_seg", ["export", str(run), str(path), "--size=64x128", "--dynamic"])
    text = capsys.readouterr().out
    assert "1x3x64x128: logits within" in text
    assert "2x3x72x136: logits within" in text
    assert str(path) in text


def test_reports(run, toy, tmp_path, capsys):
    """train ends with a report; later ones need no evaluation, and no data."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    words = ["train", str(folder), f"--data.root={toy}", "--device=cpu", "--resume"]
    main("ddrnet_seg", words)
    assert capsys.readouterr().out.splitlines()[-1] == f"{folder / 'report.html'}: open it in a browser"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<figcaption>overlay</figcaption>") == 2
    assert page.count("<figcaption>ground truth</figcaption>") == 2
    best = 100 * json.loads((folder / "best.json").read_text())["mIoU"]
    assert f"<title>{CONFIG}: {best:.2f} mIoU</title>" in page
    main("ddrnet_seg", ["report", str(folder), "--device=cpu", f"--output={tmp_path / 'again.html'}"])
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page, "the same images, predicted the same"

    main("ddrnet_seg", ["test", str(folder), f"--data.root={toy}", "--device=cpu", "--limit=1"])
    assert (folder / "report.limit_1.html").is_file()
    main("ddrnet_seg", ["test", str(folder), f"--data.root={toy}", "--device=cpu", "--calibration"])
    assert 'id="calibration"' not in page
    assert 'id="calibration"' in (folder / "report.html").read_text(encoding="utf-8")
    main("ddrnet_seg", ["report", str(folder), str(run), "--device=cpu"])
    assert "who is right" in (folder / "comparison.html").read_text(encoding="utf-8")

    capsys.readouterr()
    evaluation = json.loads((folder / "evaluation.json").read_text())
    evaluation["experiment"]["data"]["root"] = str(tmp_path / "moved")
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    main("ddrnet_seg", ["report", str(folder), "--device=cpu"])
    assert f"note: Without images: {tmp_path / 'moved'}: no such folder" in capsys.readouterr().out
    shutil.rmtree(folder / "checkpoints")
    main("ddrnet_seg", ["report", str(folder), "--device=cpu"])
    assert "note: Without images: " in (said := capsys.readouterr().out)
    assert "iter_3, which was evaluated, is not there any more" in said
    assert "Without images" in (folder / "report.html").read_text(encoding="utf-8")
    assert "no such run" in refused("ddrnet_seg", "report", tmp_path / "nothing")
    with pytest.raises(SystemExit) as end:
        main("ddrnet_seg", ["report", str(folder), str(folder)])
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith("a run is named twice; name different ones\n")


def test_export_as_onnx(run, tmp_path):
    """ONNX Runtime matches the model at any size, or the command fails."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "model.onnx"
    main("ddrnet_seg", ["export", str(run), str(path), "--size=64x128", "--dynamic"])
    plain = segcore.load_experiment(CONFIG).model.build().eval()
    plain.load_checkpoint(read_model_state(newest(run)))
    images = torch.randn(3, 3, 136, 72, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = plain(images).numpy()
    assert np.abs(logits - expected).max() <= 1e-3
    assert (logits.argmax(1) == expected.argmax(1)).mean() >= 0.999


def test_predict_a_video(run, tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "in.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = 64, 128, "yuv420p"
        frame = np.random.RandomState(0).randint(0, 255, (64, 128, 3), np.uint8)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    main("ddrnet_seg", ["predict", str(run), str(tmp_path / "in.mp4"), str(tmp_path / "out"), "--device=cpu"])
    with av.open(str(tmp_path / "out" / "in_overlay.mp4")) as container:
        assert len(list(container.decode(video=0))) == 3


def test_invalid_requests(run, tmp_path, capsys):
    words = ["export", run]
    assert "multiples of 8" in refused("ddrnet_seg", *words, tmp_path / "a.pt2", "--size=60x128", "--dynamic")
    assert ".onnx (ONNX) or .pt2" in refused("ddrnet_seg", *words, tmp_path / "a.pth")
    (tmp_path / "b.pt2").mkdir()
    assert "b.pt2: is a folder" in refused("ddrnet_seg", "export", CONFIG, "none.pth", tmp_path / "b.pt2")
    assert "b.pt2: --int8 is for ONNX" in refused(
        "ddrnet_seg", "export", CONFIG, "none.pth", tmp_path / "b.pt2", "--int8"
    )
    for option in ("--max-drop", "--calibrate"):
        assert f"{option} 2.5 is for --int8" in refused("ddrnet_seg", *words, tmp_path / "a.onnx", option, "2.5")
    assert "not for videos" in refused("ddrnet_seg", "predict", run, "a.mp4", tmp_path, "--ensemble", run)
    assert "no such video" in refused("ddrnet_seg", "predict", run, tmp_path / "a.mp4", tmp_path)
    with pytest.raises(SystemExit):
        main("ddrnet_seg", ["predict", str(run), "a.mp4", str(tmp_path), "--steps"])
    assert "--steps is not read by" in capsys.readouterr().err, "only stepwise models take steps"
    assert "ddrnet_39_cityscapes" in refused("ddrnet_seg", "test", "ddrnet_39_cityscapes", "official", "--device=cpu")


def test_official_weights_without_a_network(tmp_path, monkeypatch):
    """Google Drive addresses contain no file names, so the rows give them."""
    monkeypatch.setenv("SEGCORE_WEIGHTS", str(tmp_path))
    line = refused("ddrnet_seg", "test", "ddrnet_23_slim_cityscapes", "official", "--offline", "--device=cpu")
    assert str(tmp_path / "DDRNet23s_cityscapes.pth") in line
    assert "drive.google.com" in line


def test_bench_shows_the_fused_model(capsys):
    main("ddrnet_seg", ["bench", CONFIG, "--sizes=64x64", "--repeats=1", "--warmup=1", "--device=cpu"])
    text = capsys.readouterr().out
    assert "fused" in text


def blocks(page, kind):
    return [text for found, text in re.findall(r"^```(\w*)\n(.*?)^```", page, re.M | re.S) if found == kind]


@pytest.mark.slow
def test_the_page_on_exported_models(run, toy, tmp_path, capsys, monkeypatch):
    """The commands and the Python code of docs/deploy.md run as they stand, and the file has the run's table."""
    for name in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[3] / "docs/deploy.md").read_text(encoding="utf-8")
    shutil.copytree(run, "runs/mine")
    Path("photos").mkdir()
    cv2.imwrite("photos/a.png", np.random.RandomState(0).randint(0, 255, (64, 128, 3), np.uint8))
    lines = [line for block in blocks(page, "") for line in block.splitlines() if line.startswith("ddrnet-seg ")]
    assert len(lines) == 8
    for line in sorted(lines, key=lambda line: "export" not in line):
        main("ddrnet_seg", [*shlex.split(line, comments=True)[1:], *(["--max-drop=100"] if "int8" in line else [])])
    assert "points lost" in (said := capsys.readouterr().out)
    assert said.count("ONNX Runtime") == said.count("OpenVINO") + 1 == 2
    for code in blocks(page, "python"):
        exec(code, {})  # ours
    tables = []
    for name in ("runs/mine", "model.onnx"):
        capsys.readouterr()
        main("ddrnet_seg", ["test", name, "--device=cpu", "--no-report"])
        tables.append([line for line in capsys.readouterr().out.splitlines() if line.startswith(("|", "+"))])
    assert len(tables[0]) > 20
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    "words", [["test", CONFIG, "missing.pth"], ["export", CONFIG, "missing.pth", "a.onnx", "--int8"]]
)
def test_no_scenes_are_generated_for_weights_that_are_not_there(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    assert "missing.pth: no such file" in refused("ddrnet_seg", *words, "--data.root=toy")
    assert list(tmp_path.iterdir()) == []
