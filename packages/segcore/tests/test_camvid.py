"""The benchmark on CamVid: from a data folder to its tables, on images as small as possible; and its stored results."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from segcore.demo.toy import generate

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
STORED = BENCHMARKS / "results/camvid"
SMALL = (
    "schedule.iterations=3", "schedule.warmup_iterations=1", "train.evaluate_every=3", "train.batch_size=2",
    "train.device_batch_size=2", "train.log_every=1", "data.img_scale=64 48", "evaluate.img_scale=64 48",
    "data.crop=32 32",
)  # fmt: skip
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks are not beside the tests")


@pytest.fixture
def camvid(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("camvid")


@pytest.fixture
def data(tmp_path) -> Path:
    """A folder like CamVid, whose classes are told by their gray value."""
    for split, count in (("train", 4), ("val", 2), ("test", 3)):
        for number in range(count):
            label = np.repeat(np.roll(np.arange(12, dtype=np.uint8), number), 5)[None].repeat(48, 0)
            for folder, pixels in ((split, (label * 20)[..., None].repeat(3, 2)), (f"{split}annot", label)):
                (tmp_path / "CamVid" / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(tmp_path / "CamVid" / folder / f"{number}.png")
    return tmp_path / "CamVid"


def run(camvid, monkeypatch, data, *words) -> Path:
    """Run the command; return the folder of its results."""
    results = data.parent / "results"
    places = (f"--data={data}", f"--runs={data.parent / 'runs'}", f"--results={results}")
    monkeypatch.setattr(sys, "argv", ["camvid.py", *words, *places])
    camvid.main()
    return results


@pytest.mark.parametrize(
    ("row", "lines", "runs"),
    [
        ("ddrnet_23_slim_camvid", ["`ddrnet_23_slim_camvid`"], 1),
        pytest.param(
            "ddps_segformer_b0_camvid",
            [
                "base model of `ddps_segformer_b0_camvid`",
                *(f"`ddps_segformer_b0_camvid`, timestep {step}" for step in (0, 10, 19)),
            ],
            2,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_row(camvid, monkeypatch, data, capfd, row, lines, runs):
    words = (f"--row={row}", *SMALL)
    results = run(camvid, monkeypatch, data, *words)
    table = (results / "table.md").read_text()
    assert capfd.readouterr().out.endswith(table)
    names = [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2 : 4 + len(lines)]]
    assert names == [*lines, *camvid.BASELINES.values()]
    figures = json.loads((results / f"{row}.json").read_text())
    assert (figures["iterations"], figures["val"]["images"], figures["test"]["images"]) == ([3] * runs, 2, 3)
    assert figures["baselines"]["linear"]["test"] > 0.99, "the colors tell the classes"
    assert figures["baselines"]["majority"]["test"] == pytest.approx(1 / 11 / 11)
    assert (results / "curves.svg").read_text().count('class="line') == 2 * runs, "loss and mIoU of each"

    def run_again(*_, **__):
        raise AssertionError("a finished run is trained again")

    monkeypatch.setattr(camvid.subprocess, "run", run_again)
    before = (results / "table.md").read_text()
    run(camvid, monkeypatch, data, *words)
    assert (results / "table.md").read_text() == before
    with pytest.raises(SystemExit, match=r"_camvid was trained with other settings; move it away"):
        run(camvid, monkeypatch, data, *words, "optimizer.lr=0.5")


@pytest.mark.parametrize(
    ("words", "said"),
    [((), "none: no such folder; set data.root to"), (("optimizer.lrr=1",), "did you mean optimizer.lr?")],
)
def test_wrong_input_is_one_line(tmp_path, words, said):
    places = ("--data=none", f"--runs={tmp_path / 'runs'}", f"--results={tmp_path / 'results'}")
    command = [sys.executable, BENCHMARKS / "camvid.py", "--row=ddrnet_23_slim_camvid", *places, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_an_ablation_and_start_weights_by_class_name(camvid, monkeypatch, data, capfd):
    monkeypatch.chdir(data.parent)
    toy = camvid.segcore.load_experiment(camvid.SOURCE)
    small = [*SMALL[:6], "data.img_scale=64 32", "evaluate.img_scale=64 32", SMALL[-1]]
    rows = {camvid.SOURCE: toy.with_overrides(small)}
    load = camvid.segcore.load_experiment
    monkeypatch.setattr(camvid.segcore, "load_experiment", lambda name, *rest: rows.get(name) or load(name, *rest))
    generate(toy.data.root, train=4, val=2, height=32, width=64)
    last = len(camvid.ABLATIONS) - 1
    run(camvid, monkeypatch, data, "--ablation=0", *SMALL)
    results = run(camvid, monkeypatch, data, f"--ablation={last}", *SMALL)
    assert "5 of 11 classes new" in capfd.readouterr().out
    lines = (results / "ablations.md").read_text().splitlines()
    assert lines[0].startswith("| 3 iterations, images scaled to 540x720 |")
    assert [lines[i].split(" | ")[0].strip("| ") for i in (2, 6)] == [camvid.ABLATIONS[i][0] for i in (0, last)]


def test_an_ablation_is_compared_with_the_basis_of_its_precision(camvid, tmp_path):
    def store(number, precision, miou, bfloat16=True):
        split = {"main": "mIoU", "entries": {"mIoU": {"mIoU": miou}}}
        machine = {"processor": "a CPU", "cores": 2, "precision": precision, "bfloat16": bfloat16, "torch": "2"}
        figures = {**machine, "iterations": 9, "seconds": 0.5, "val": split, "test": split}
        (tmp_path / f"ablation_{number:02}.json").write_text(json.dumps(figures))

    titles = [title for title, _ in camvid.ABLATIONS]
    in_float32, augmentation = titles.index("in float32"), titles.index("crops and flips only")
    store(in_float32 - 1, "bf16", 0.5)
    store(in_float32, "fp32", 0.52, bfloat16=False)
    store(augmentation, "fp32", 0.55, bfloat16=False)
    lines = camvid.ablation_table(tmp_path).splitlines()
    assert lines[2:5] == [
        "| baseline | 0.50 | 50.00 | | 50.00 | |",
        "| in float32 | | 52.00 | +2.00 | 52.00 | +2.00 |",
        "| crops and flips only, fp32 | | 55.00 | +3.00 | 55.00 | +3.00 |",
    ]
    slow = "a CPU (no instructions for bfloat16), 2 cores, fp32, torch 2"
    assert lines[6:] == ["a CPU, 2 cores, bf16, torch 2", slow]


def test_stored_tables_are_made_of_the_stored_figures(camvid):
    assert (STORED / "table.md").read_text() == camvid.table(STORED)
    assert (STORED / "ablations.md").read_text() == camvid.ablation_table(STORED)
    assert (STORED / "curves.svg").read_text() == camvid.curves(STORED)
