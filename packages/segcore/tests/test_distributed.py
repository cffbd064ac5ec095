"""Several gloo processes on the CPU give the results of one; when one is missing, the others name it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from segcore import distributed
from segcore.checkpoints import run_checkpoint as checkpoint
from segcore.cli.main import main
from segcore.config.registry import load_experiment
from segcore.errors import UserError
from segcore.training.setup import batch_shares

RUNS = Path(__file__).parent / "runs"
CONFIG = f"{RUNS / 'tiny.py'}:tiny"


SINK = """
import os
from pathlib import Path

def _add(*words):
    with Path(__file__).with_name("sunk.txt").open("a") as file:
        print(*words, file=file)

_add("import", os.environ.get("RANK", "0"))

class Sink:
    def __init__(self, run):
        _add("sink", os.environ.get("RANK", "0"))
    def log(self, iteration, values):
        "val/mIoU" in values and _add("log", iteration)
    def image(self, iteration, image):
        assert image.shape[2] == 3
    def finish(self, results):
        _add("finish", results["images"] + 1)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight training images whose brighter stripe is class 1, and seven others for validation."""
    root, rng = tmp_path_factory.mktemp("tiny"), np.random.RandomState(0)
    for i in range(15):
        label = np.zeros((32, 64), np.uint8)
        label[:, 4 * i : 4 * i + 16] = 1
        image = (rng.randint(0, 100, (32, 64, 3)) + 120 * label[..., None]).astype(np.uint8)
        label[image.max(2) < 20] = 255
        for folder, pixels in (("images", image), ("masks", label)):
            path = root / folder / ("train" if i < 8 else "val") / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), pixels)
    return root


def run(
    *words: Any, processes: int = 1, fault: str = "", cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run `python -m segcore …`, or a script, alone or under torchrun."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    module = [] if str(words[0]).endswith(".py") else ["-m", "segcore"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TINY_FAULT": fault, **variables}
    command = [sys.executable, *start, *module, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, timeout=240)


def train(root: Path, work_dir: Path, *options: Any, **how: Any) -> subprocess.CompletedProcess[str]:
    return run("train", CONFIG, "--data.root", root, "--work-dir", work_dir, "--device", "cpu", *options, **how)


def records(work_dir: Path, mode: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (work_dir / "log.jsonl").read_text().splitlines()]
    return [record for record in found if record["mode"] == mode]


@pytest.fixture(scope="module")
def alone(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The single-process run that the tests compare others with."""
    work_dir = tmp_path_factory.mktemp("alone") / "run"
    main(None, ["train", CONFIG, "--data.root", str(root), "--work-dir", str(work_dir), "--device", "cpu"])
    return work_dir


def test_patience_ends_both_processes(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And a frozen part is not waited for: the optimizer's state is that of one process. Rank 0 alone has a tracker."""
    options = ["--train.patience", "1", "--train.evaluate-every", "4", "--optimizer.lr", "0", "--train.freeze", "conv"]
    (tmp_path / "sink.py").write_text(SINK)
    options += ["--train.log", f"{tmp_path / 'sink.py'}:Sink"]
    done = train(root, tmp_path / "2", *options, processes=2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sunk.txt").read_text() == "import 0\nsink 0\nlog 4\nlog 8\nfinish 8\n"
    words = ["--data.root", str(root), "--work-dir", str(tmp_path / "1"), "--device", "cpu"]
    main(None, ["train", CONFIG, *words, *options])
    for shown in (done.stdout, capsys.readouterr().out):
        assert shown.count("finished at iteration 8 of 20, no better mIoU in 1 evaluation (train.patience)") == 1
    one, two = (checkpoint.load(tmp_path / processes / "checkpoints/iter_8").state["optimizer"] for processes in "12")
    assert set(one) == set(two) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    for name, moments in one.items():
        torch.testing.assert_close(two[name]["momentum_buffer"], moments["momentum_buffer"], rtol=1e-9, atol=1e-12)
    results = [json.loads((tmp_path / processes / "results.json").read_text()) for processes in "12"]
    assert results[0] == results[1]


FOUR = pytest.param(4, marks=pytest.mark.slow)


@pytest.mark.parametrize("processes", [2, FOUR])
def test_training_equals_that_of_one_process(root: Path, alone: Path, tmp_path: Path, processes: int) -> None:
    done = train(root, tmp_path / "run", processes=processes)
    assert done.returncode == 0, done.stderr
    assert f"{processes} processes on cpu\n" in done.stdout
    assert done.stdout.count("Summary:") == 1
    ours, theirs = ([record["loss"] for record in records(path, "train")] for path in (tmp_path / "run", alone))
    assert len(ours) == 20
    assert ours == pytest.approx(theirs, rel=1e-5)
    weights = [checkpoint.load(path / "checkpoints/iter_20").model for path in (tmp_path / "run", alone)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-9, atol=1e-12)
    figures = [json.loads((path / "results.json").read_text()) for path in (tmp_path / "run", alone)]
    assert figures[0] == figures[1]
    assert figures[0]["images"] == 7


@pytest.mark.parametrize("processes", [2, FOUR])
def test_counts_are_equal_when_the_set_does_not_divide(root: Path, tmp_path: Path, processes: int) -> None:
    found = []
    for world in (1, processes):
        done = run(RUNS / "count.py", root, tmp_path / f"world_{world}", processes=world)
        assert done.returncode == 0, done.stderr
        found.append(torch.load(tmp_path / f"world_{world}"))
    one, several = found
    assert one["images"] == several["images"] == 7
    assert one["matrix"].sum() > 0
    assert torch.equal(one["matrix"], several["matrix"])
    assert one["calibration"] == several["calibration"]
    tables = [(tmp_path / f"world_{world}.csv").read_text().splitlines() for world in (1, processes)]
    assert tables[0] == tables[1]
    assert [line.split(",")[:3] for line in tables[0][1:]] == [[f"{i:02}", "64", "32"] for i in range(8, 15)]


@pytest.mark.slow
def test_gpus_option_starts_the_processes(root: Path, alone: Path, tmp_path: Path) -> None:
    """Training and testing; a wrong setting is one line, not one per process. No process imports from its folder."""
    for name in ("torch", "cv2", "h2"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the current folder is imported')")
    options = ("--gpus", 2, "--data.workers", 1, "--schedule.iterations", 3)
    path = os.environ.get("PYTHONPATH", "").strip(os.pathsep)  # an empty part is the current folder, too
    done = train(root, tmp_path / "run", *options, cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert "2 processes on cpu\n" in done.stdout
    assert len(records(tmp_path / "run", "train")) == 3
    json_file = tmp_path / "test.json"
    words = ("test", CONFIG, tmp_path / "run", "--data.root", root, "--device", "cpu", "--json", json_file)
    masks, images, archive = tmp_path / "masks", tmp_path / "images.csv", tmp_path / "masks.zip"
    done = run(*words, "--gpus=2", "--save", masks, "--per-image", images, "--zip", archive)
    assert done.returncode == 0, done.stderr
    assert f"7 masks written below {masks}\n" in done.stdout
    names = [f"{i:02}.png" for i in range(8, 15)]
    assert sorted(path.name for path in masks.iterdir()) == [*names, "classes.json"]
    assert zipfile.ZipFile(archive).namelist() == [*names, "classes.json"]
    assert len(images.read_text().splitlines()) == 8
    assert "evaluating: 7/7" in done.stderr, "the images of both ranks"
    assert done.stdout.count("Summary:") == 1
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert json.loads(json_file.read_text())["entries"] == results["entries"]
    assert json_file.with_suffix(".report.html").is_file()
    assert (tmp_path / "run" / "report.html").is_file()
    done = train(root, tmp_path / "other", "--gpus", 3)
    assert (done.returncode, len(done.stdout.splitlines())) == (1, 1)
    assert done.stdout.startswith("tiny: 20 iterations of batch 4, device cpu, folder ")
    assert done.stderr == (
        "error: train.batch_size 4 on 3 devices does not divide into passes of train.device_batch_size 1; "
        "make train.batch_size a multiple, or change the number of devices\n"
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for other processes")
def test_ctrl_c_with_gpus_is_two_lines(root: Path, tmp_path: Path) -> None:
    """torchrun's log lines about signals are hidden; a terminal sends the signal to all processes."""
    words = ["train", CONFIG, "--data.root", root, "--work-dir", tmp_path / "run", "--device", "cpu", "--gpus", 2]
    long = ["--schedule.iterations", 100_000, "--train.evaluate-every", 0, "--model.pause", 0.1]
    command = [sys.executable, "-m", "segcore", *map(str, [*words, *long])]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    while "Iter [" not in process.stdout.readline():
        assert process.poll() is None, process.stderr
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err.splitlines()[-1]) == (130, "interrupted")
    assert "signal" not in err
    assert "--resume" in out


@pytest.mark.skipif(torch.cuda.device_count() > 7, reason="has eight GPUs")
def test_more_processes_than_gpus_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(None, ["train", CONFIG, "--gpus", "8"])
    assert "error: --gpus 8: torch sees" in capsys.readouterr().err


@pytest.fixture(scope="module")
def masks(root: Path, alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a single process predicts for all images, one after the other."""
    out = tmp_path_factory.mktemp("masks") / "out"
    main(None, ["predict", CONFIG, str(alone), str(root / "images"), str(out), "--device", "cpu"])
    return out


def predict(root: Path, run: Path, out: Path, *options: Any) -> list[str]:
    return ["predict", CONFIG, *map(str, (run, root / "images", out, *options)), "--device", "cpu"]


def assert_same_results(out: Path, masks: Path) -> None:
    """Compare files byte by byte, and the lines of results.csv but for the seconds."""
    written = sorted(path.relative_to(masks) for path in masks.rglob("*.png"))
    assert len(written) == 30
    assert sorted(path.relative_to(out) for path in out.rglob("*.png")) == written
    assert all((out / name).read_bytes() == (masks / name).read_bytes() for name in written)
    lines = [[line.split(",")[:3] for line in (x / "results.csv").read_text().splitlines()] for x in (out, masks)]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 16


def test_two_processes_predict_what_one_does(root: Path, alone: Path, masks: Path, tmp_path: Path) -> None:
    done = run(*predict(root, alone, tmp_path / "out", "--gpus", 2))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("15 of 15 images written below") == 1
    assert_same_results(tmp_path / "out", masks)


def two_machines(words: list[str], fault: str = "") -> list[tuple[int, str, str]]:
    """Run torchrun twice, as on two machines with one process each; the second has the fault.

    Return status, standard output and error of each.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    agents = []
    for first in (True, False):
        meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-conf", f"is_host={first:d}"]
        start = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *meet, "-m", "segcore"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TINY_FAULT": "" if first else fault}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
        agents.append(subprocess.Popen([sys.executable, *start, *words], **pipes))
    ends = [agent.communicate(timeout=240) for agent in agents]
    return [(agent.returncode, *said) for agent, said in zip(agents, ends, strict=True)]


@pytest.mark.slow
def test_two_machines_predict_what_one_does(root: Path, alone: Path, masks: Path, tmp_path: Path) -> None:
    """Even where a process is killed: the others end after the image that they are at, and `--resume` goes on."""
    out = tmp_path / "out"
    (status, _, said), _ = two_machines(predict(root, alone, out, "--model.pause", 2), "kill::1")
    done = [len(part.read_text().splitlines()) for part in out.glob("results.csv.part?")]
    assert min(done) == 1
    assert max(done) < 7, "its share: it did not go on alone to the end"
    assert status != 0
    assert re.search(r"error: process \d of 0-1 did not respond .*--resume\n", said), said
    ends = two_machines(predict(root, alone, out, "--resume", "--model.pause", 2))
    assert [status for status, *_ in ends] == [0, 0], ends
    assert_same_results(out, masks)
    assert re.search(r"15 of 15 images .*, \d+ of them by an earlier run", "".join(shown for _, shown, _ in ends))


@pytest.mark.slow
def test_a_missing_process_is_named(root: Path, tmp_path: Path) -> None:
    done = train(root, tmp_path, "--train.timeout", 3, processes=2, fault="sleep:1:6")
    assert done.returncode != 0
    assert done.stderr.count("error: process 1 of 0-1 did not respond ") == 1
    assert "Traceback" not in done.stderr.split("error: process 1")[0]


def test_nan_in_one_of_two_processes_is_skipped_by_both(root: Path, tmp_path: Path) -> None:
    done = train(root, tmp_path, "--schedule.iterations", 6, processes=2, fault="nan:1:5")
    assert done.returncode == 0, done.stderr  # two passes each per step: the second of the third step
    assert [record.get("skipped", 0) for record in records(tmp_path, "train")] == [0, 0, 1, 0, 0, 0]
    model = checkpoint.load(tmp_path / "checkpoints/iter_6").model
    assert all(tensor.isfinite().all() for tensor in model.values())


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (
            "memory:1:0",
            "error: out of GPU memory in the evaluation: lower evaluate.batch_size (1), or",
        ),
        pytest.param("log:0:13", "log.jsonl: cannot be written (Is a directory)", marks=pytest.mark.slow),
    ],
)
def test_an_error_of_one_process_costs_no_progress(root: Path, tmp_path: Path, fault: str, words: str) -> None:
    done = train(root, tmp_path, "--train.evaluate-every", 7, processes=2, fault=fault)
    assert done.returncode != 0
    assert done.stderr.count(words) == 1
    assert "stopped after iteration 7; continue with" in done.stdout
    assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, 7)


@pytest.mark.slow
def test_three_nans_in_one_of_two_processes_stop_both(root: Path, tmp_path: Path) -> None:
    options = ("--train.device-batch-size", 2, "--train.save-every", 2)
    done = train(root, tmp_path, *options, processes=2, fault="nan3:1:5")
    assert done.returncode != 0
    line = "not finite 3 times in a row, at iteration 8; lower optimizer.lr or set optimizer.clip_norm; "
    assert done.stderr.count(f"{line}last good checkpoint: {tmp_path / 'checkpoints/iter_6'}") == 1


@pytest.mark.slow
def test_unreadable_images_are_skipped_and_counted_by_all(root: Path, tmp_path: Path) -> None:
    """One training and one validation image are truncated: the run stops and names it, or continues and counts."""
    broken = tmp_path / "data"
    for path in root.rglob("*.png"):
        (broken / path.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes()
        bad = path.parent.parent.name == "images" and path.name in ("03.png", "09.png")
        (broken / path.relative_to(root)).write_bytes(content[:-40] if bad else content)
    done = train(broken, tmp_path / "a", processes=2)
    assert done.returncode != 0
    assert done.stderr.count(f"error: {broken}/images/train/03.png: cannot be read") == 1
    counts = []
    for processes in (1, 2):
        work_dir = tmp_path / f"run_{processes}"
        done = train(broken, work_dir, "--data.on-error", "skip", processes=processes)
        assert done.returncode == 0, done.stderr
        assert f"skipped: {broken}/images/train/03.png: cannot be read" in done.stderr
        results = json.loads((work_dir / "results.json").read_text())
        counts.append((results["skipped_training_samples"], results["images"], results["skipped"]))
        assert f"{counts[-1][0]} training samples could not be read and were skipped" in done.stdout
        assert "1 images could not be read" in done.stdout
    assert counts[0] == counts[1]
    assert counts[0][0] == 10  # 20 iterations of 4 are 10 epochs of 8
    assert counts[0][1] == 6
    assert counts[0][2][0].startswith(f"{broken}/images/val/09.png: cannot be read")


def test_processes_do_not_share_a_named_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(UserError, match="--device cuda:0: several processes would share it; leave --device out"):
        distributed.find_device("cuda:0")
    assert distributed.find_device("cpu") == torch.device("cpu")


def test_processes_share_a_batch_in_equal_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    exp = load_experiment("ddrnet_23_slim_toy").with_overrides(["train.batch_size=12", "train.device_batch_size=8"])
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    assert batch_shares(exp) == (4, 4)
    monkeypatch.setattr(distributed, "world_size", lambda: 1)
    with pytest.raises(UserError, match=r"train\.batch_size 12 on 1 devices does not divide into passes of"):
        batch_shares(exp)


def test_a_process_that_is_done_still_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[tuple[int, ...]] = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "_start_sync_status", lambda *_: (lambda: False, lambda: [0, 0]))
    monkeypatch.setattr(distributed, "sync_status", lambda _, *counts: left.append(counts) or [9, 2])
    with distributed.each_at_its_pace() as total:
        total(3)
        total(5)
    assert left == [(5, 1)]
