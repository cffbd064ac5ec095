"""Both stages on real files: train, resume, test, predict, demo; and the commands' messages for bad input."""

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
from segcore.testing.stored import filled

BASE, PRIOR = "ddps_segformer_b0_base_toy", "ddps_segformer_b0_toy"
SMALL = [
    "--device=cpu", "--train.precision=fp32", "--train.log-every=1", "--data.crop", "64", "128",
    "--data.img-scale", "128", "64", "--evaluate.img-scale", "128", "64",
]  # fmt: skip
NARROW = ["--model.width=8", "--model.output-width=16"]
CPU = "--device=cpu"
ITERATIONS = ["--schedule.iterations=3", "--train.save-every=1", "--train.evaluate-every=3"]
TRAIN = [*ITERATIONS, "--no-report"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    generate(root, train=3, val=2, height=64, width=128)
    return root


@pytest.fixture(scope="module")
def base(toy, tmp_path_factory):
    """A finished run of the first stage."""
    folder = tmp_path_factory.mktemp("runs") / "base"
    main("ddps_seg", ["train", BASE, f"--data.root={toy}", f"--work-dir={folder}", *SMALL, *TRAIN])
    return folder


def second_stage(toy, base, folder, *words):
    main("ddps_seg", ["train", PRIOR, f"--data.root={toy}", f"--work-dir={folder}", f"--train.init-from={base}",
                      "--train.ema=0.5", "--train.ema-every=2", "--model.freeze=eval",
                      *SMALL, *NARROW, *TRAIN, *words])  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def run(toy, base, tmp_path_factory):
    """A finished run of the second stage, with averaged weights."""
    return second_stage(toy, base, tmp_path_factory.mktemp("runs") / "prior")


def test_the_second_stage_starts_from_the_first_and_keeps_it(base, run):
    first, second = read_model_state(newest(base)), read_model_state(newest(run))
    kept = [name for name in first if name.startswith(("backbone.", "head."))]
    assert kept
    assert all(torch.equal(first[name], second[name]) for name in kept)
    assert second["log_cumprod_bt"].isinf().sum() == 1


def test_an_interrupted_run_resumes_to_the_same_weights(toy, base, run, tmp_path):
    shutil.copytree(run, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "iter_3")
    second_stage(toy, base, tmp_path / "cut", "--resume")
    whole, resumed = read_model_state(newest(run)), read_model_state(newest(tmp_path / "cut"))
    assert newest(tmp_path / "cut").name == "iter_3"
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_test_prints_a_column_per_timestep(run, toy, tmp_path, capsys):
    main("ddps_seg", ["test", str(run), f"--data.root={toy}", f"--json={tmp_path / 'out.json'}", CPU,
                      "--evaluate.steps", "0", "10", "--evaluate.metrics", "mIoU", "mBIoU"])  # fmt: skip
    text = capsys.readouterr().out
    for words in ("mIoU 0,10,19", "mBIoU 0,10,19", "mIoU without ignored", "background"):
        assert words in text
    entries = json.loads((tmp_path / "out.json").read_text())["entries"]
    assert list(entries) == ["0", "10", "19"]
    assert len(entries["19"]["BIoU"]) == 20
    assert entries["19"]["BIoU"][0] is None


SHRUNK = """
from dataclasses import replace
from segcore import load_experiment
def row():
    exp = load_experiment("segformer_b2_ade20k_multistep_inference")
    return replace(exp, model=replace(exp.model, backbone="mit_b0", width=8, output_width=16))
"""


@pytest.mark.parametrize("size", ["small", pytest.param("full", marks=pytest.mark.slow)])
def test_the_published_row_has_its_figures_beside_a_column_per_timestep(tmp_path, capsys, monkeypatch, size):
    """On one small image, and if slow with the row's own model; weights of T = 100 are refused with what to set."""
    row = "segformer_b2_ade20k_multistep_inference"
    if size == "small":
        (tmp_path / "my.py").write_text(SHRUNK)
        row = f"{tmp_path / 'my.py'}:row"
        monkeypatch.setattr("segcore.cli.test.is_row", lambda exp: True)
    rng = np.random.RandomState(0)
    for folder, end, shape in (("images", "jpg", (48, 64, 3)), ("annotations", "png", (48, 64))):
        (tmp_path / folder / "validation").mkdir(parents=True)
        pixels = rng.randint(0, 151, shape, np.uint8)
        cv2.imwrite(str(tmp_path / folder / "validation" / f"ADE_val_00000001.{end}"), pixels)
    model = filled(segcore.load_experiment(row).model.build())
    state = {theirs: model.state_dict()[ours] for ours, theirs in model.key_map().items()}
    torch.save({"state_dict": state}, tmp_path / "weights.pth")
    words = [f"--data.root={tmp_path}", "--evaluate.img-scale", "64", "48", "--evaluate.metrics=mIoU", CPU]
    words += [f"--json={tmp_path / 'out.json'}", f"--save={tmp_path / 'masks'}", "--label-ids", "--data.workers=0"]
    main("ddps_seg", ["test", row, str(tmp_path / "weights.pth"), *words])
    tables = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    miou = [entry["mIoU"] for entry in json.loads((tmp_path / "out.json").read_text())["entries"].values()]
    shown = [str(round(100 * value, 2)) for value in miou]
    assert ["Steps", "0", "10", "19"] in tables
    assert ["mIoU", *shown] in tables
    assert ["published mIoU", "49.35", "49.55", "49.66"] in tables
    assert [",".join(shown), "49.35,49.55,49.66"] in tables
    mask, ids = (np.array(Image.open(tmp_path / "masks" / f / "ADE_val_00000001.png")) for f in (".", "label_ids"))
    assert np.array_equal(ids, np.where(mask == 255, 0, mask + 1)), "background is the server's 0"
    legend = json.loads((tmp_path / "masks" / "classes.json").read_text())
    assert (legend[0]["name"], legend[-1]) == ("wall", {"value": 255, "name": "ignored", "color": [0, 0, 0]})
    for name in [name for name in state if ".log_" in name or name.startswith("log_")]:
        state[name] = torch.zeros(100 + len(state[name]) - 20)
    torch.save({"state_dict": state}, tmp_path / "weights.pth")
    line = refused("ddps_seg", "test", row, tmp_path / "weights.pth", *words)
    assert "trained with 100 timesteps, but the model has 20; set model.num_train_timesteps 100" in line


def test_predict_omits_background_and_draws_the_steps(run, tmp_path):
    image = np.random.RandomState(0).randint(0, 255, (50, 70, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    words = ["predict", str(run), str(tmp_path / "a.png"), str(tmp_path / "out"), CPU]
    main("ddps_seg", [*words, "--steps", "--animate", "--uncertainty"])
    mask = np.array(Image.open(tmp_path / "out" / "a.png"))
    assert mask.shape == (50, 70)
    assert set(np.unique(mask)) <= {*range(19), 255}
    with Image.open(tmp_path / "out" / "a_animation.gif") as film:
        assert film.n_frames == 5  # input, three timesteps, answer
    assert (tmp_path / "out" / "a_steps.png").exists()
    assert (tmp_path / "out" / "a_uncertainty.png").exists()
    # From a given map: the result differs, and the strip has one more panel.
    start = np.full((50, 70), 255, np.uint8)
    start[10:40] = 3
    cv2.imwrite(str(tmp_path / "start.png"), start)
    words[3] = str(tmp_path / "from")
    main("ddps_seg", [*words, f"--start-mask={tmp_path / 'start.png'}", "--animate", "--probabilities"])
    with Image.open(tmp_path / "from" / "a_animation.gif") as film:
        assert film.n_frames == 6
    with np.load(tmp_path / "from" / "a_probabilities.npz", allow_pickle=False) as stored:
        highest = stored["values"][stored["probabilities"].argmax(0)]
    mask = np.array(Image.open(tmp_path / "from" / "a.png"))
    assert (highest == mask).mean() > 0.99, "the probabilities are those of another run"
    assert (mask != np.array(Image.open(tmp_path / "out" / "a.png"))).mean() > 0.05
    # Folders: every image has the mask at the same relative path.
    for name, shift in (("a", 3), ("b", 7)):
        for folder, data in (("photos", image), ("masks", start + np.uint8(shift) * (start == 3))):
            (tmp_path / folder / name).mkdir(parents=True)
            cv2.imwrite(str(tmp_path / folder / name / "1.png"), data)
    words[2:4] = [str(tmp_path / "photos"), str(tmp_path / "many")]
    main("ddps_seg", [*words, f"--start-mask={tmp_path / 'masks'}"])
    one, other = (np.array(Image.open(tmp_path / "many" / name / "1.png")) for name in "ab")
    assert (one != other).any()


def test_predict_accumulates_as_test_does(run, tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.random.RandomState(0).randint(0, 255, (50, 70, 3), np.uint8))
    words = ["predict", str(run), str(tmp_path / "a.png")]
    steps = ["--evaluate.steps", "0", "10", "19"]
    for folder, added in (("last", []), ("mean", ["--evaluate.ensemble-steps", "True"])):
        main("ddps_seg", [*words, str(tmp_path / folder), CPU, *steps, *added])
    last, mean = (np.array(Image.open(tmp_path / folder / "a.png")) for folder in ("last", "mean"))
    assert (last != mean).any()


def test_the_base_model_joins_the_ensemble(run, base, toy, tmp_path, capsys):
    """As published for the ensemble: the base model lacks the background, and the entries add up."""
    image = np.random.RandomState(0).randint(0, 255, (50, 70, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    small = [CPU, "--evaluate.steps", "0", "10", "--evaluate.ensemble-steps", "True"]
    both = [*small, "--ensemble", str(base)]
    for words, folder in ((small, "alone"), (both, "both")):
        main("ddps_seg", ["predict", str(run), str(tmp_path / "a.png"), str(tmp_path / folder), *words])
    alone, together = (np.array(Image.open(tmp_path / folder / "a.png")) for folder in ("alone", "both"))
    assert (alone != together).any()
    main("ddps_seg", ["test", str(run), f"--data.root={toy}", f"--json={tmp_path / 'out.json'}", *both])
    assert list(json.loads((tmp_path / "out.json").read_text())["entries"]) == ["0", "10", "19"]
    capsys.readouterr()
    line = refused("ddps_seg", "test", run, f"--data.root={toy}", *small, "--ensemble", PRIOR, tmp_path / "none")
    assert "none" in line
    line = refused("ddps_seg", "test", base, f"--data.root={toy}", CPU, "--ensemble", "ddps_nothing", base)
    assert "ddps_nothing" in line


@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=pytest.mark.slow)])
def test_export(tmp_path, capsys, suffix):
    """The whole run with its draws; the command compares it with the model before writing it."""
    if suffix == ".onnx":
        for name in ("onnxruntime", "onnxscript"):
            pytest.importorskip(name)
    weights, path = tmp_path / "weights.pth", tmp_path / f"model{suffix}"
    exp = segcore.load_experiment(PRIOR).with_overrides([word.removeprefix("--") for word in NARROW])
    torch.save(exp.model.build().state_dict(), weights)
    main("ddps_seg", ["configs", PRIOR, *NARROW, "--write", str(tmp_path / "narrow.py")])
    words = ["export", str(tmp_path / "narrow.py"), str(weights), str(path), "--size=64x96"]
    main("ddps_seg", words)
    assert "1x3x64x96: logits within" in capsys.readouterr().out
    assert path.exists()
    assert "leave out --dynamic" in refused("ddps_seg", *words, "--dynamic")


def test_bad_input_gives_a_one_line_error(run, base, toy, tmp_path, capsys):
    small = [f"--data.root={toy}", *SMALL, *NARROW]
    assert "has 7, but the run evaluates the timesteps 0, 10, 19" in refused(
        "ddps_seg", "test", run, f"--data.root={toy}", CPU, "--evaluate.steps", "7"
    )
    training = ["train", PRIOR, *small, *TRAIN, "--evaluate.steps", "7", f"--work-dir={tmp_path / 'never'}"]
    line = refused("ddps_seg", *training, "--train.init-from", str(tmp_path / "no_base"))
    assert f"{tmp_path / 'no_base'}: no such file or folder" in line, "before the images are read"
    line = refused("ddps_seg", *training, "--train.init-from", "None")
    assert "has 7, but" in line, "at once, not at the first evaluation"
    assert not (tmp_path / "never").exists()
    line = refused("ddps_seg", "test", PRIOR, base, f"--data.root={toy}", CPU)
    assert f"was trained with {BASE}; give this folder" in line
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((50, 70, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "start.png"), np.full((50, 60), 3, np.uint8))
    predict = ["predict", run, tmp_path / "a.png", tmp_path / "out", CPU]
    assert "60x50" in refused("ddps_seg", *predict, f"--start-mask={tmp_path / 'start.png'}")
    cv2.imwrite(str(tmp_path / "start.png"), np.full((50, 70), 30, np.uint8))
    line = refused("ddps_seg", *predict, f"--start-mask={tmp_path / 'start.png'}")
    assert "start.png: has the value 30; give 0 to 18, or 255 for no class" in line
    cv2.imwrite(str(tmp_path / "start.png"), np.full((50, 70), 3, np.uint8))
    assert "leave out --ensemble" in refused(
        "ddps_seg", *predict, f"--start-mask={tmp_path / 'start.png'}", "--evaluate.early-exit-threshold=1"
    )
    with pytest.raises(SystemExit):
        main(
            "ddps_seg", ["predict", str(base), "a.png", str(tmp_path / "out"), f"--start-mask={tmp_path / 'start.png'}"]
        )
    assert f"--start-mask={tmp_path / 'start.png'} is not read by" in capsys.readouterr().err, (
        "the base model takes no steps"
    )


def test_demo(toy, base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("segcore.cli.main.demo_experiment", lambda package: segcore.load_experiment(PRIOR))
    folder = tmp_path / "demo"
    shutil.copytree(toy, folder / "scenes")
    shutil.copytree(base, folder / "base")  # an existing first stage is kept
    main(None, ["demo", f"--work-dir={folder}", *SMALL, *NARROW, *ITERATIONS])
    figures = json.loads((folder / "figures.json").read_text())
    assert list(figures["by_step"]) == ["0", "10", "19"]
    for name in ("base_mIoU", "changed", "corrupted", "refined"):
        assert 0 <= figures[name] <= 1
    text = capsys.readouterr().out
    assert f"the base model alone has mIoU {figures['base_mIoU']:.1%}" in text
    assert "rectangles of random classes" in (folder / "run" / "report.html").read_text(encoding="utf-8")
