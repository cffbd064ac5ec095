"""Killed, stopped and restarted runs: each resumes and ends with the weights of an uninterrupted run."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from segcore.checkpoints import run_checkpoint as checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc"),
]
TINY = Path(__file__).parent / "runs/tiny.py"
ITERATIONS = 60


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six noisy images with masks, for both training and validation."""
    root, rng = tmp_path_factory.mktemp("faults"), np.random.RandomState(0)
    for i in range(6):
        for folder, pixels in (("images", rng.randint(0, 256, (32, 64, 3))), ("masks", rng.randint(0, 3, (32, 64)))):
            for split in ("train", "val"):
                path = root / folder / split / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), pixels)
    return root


class Training:
    """A run of tiny.py; a mark in the environment of its processes identifies them."""

    def __init__(
        self, root: Path, work_dir: Path, *options: Any, processes: int = 1, torchrun: Any = (), fault: str = ""
    ):
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *torchrun]
        words = [
            "-m",
            "segcore",
            "train",
            f"{TINY}:tiny",
            "--data.root",
            root,
            "--work-dir",
            work_dir,
            "--device",
            "cpu",
        ]
        words += ["--schedule.iterations", ITERATIONS, "--train.evaluate-every", ITERATIONS, *options]
        command = [sys.executable, *(start if processes > 1 else []), *words]
        self.mark = f"{work_dir} {time.monotonic()}"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TINY_FAULT": fault, "TINY_MARK": self.mark}
        self.process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env,
            start_new_session=True,
        )  # fmt: skip

    def wait_for(self, what: Callable[[], bool]) -> None:
        """Return when `what` holds; fail if the run ends first."""
        end = time.monotonic() + 120
        while not what():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < end
            time.sleep(0.002)

    def processes(self) -> list[int]:
        """Return the living processes of this run, data workers included: those with its mark."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if f"TINY_MARK={self.mark}".encode() in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found

    def kill(self) -> None:
        for number in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        self.process.communicate(timeout=60)

    def end(self) -> str:
        """Wait for a successful end and return the printed text."""
        text, _ = self.process.communicate(timeout=240)
        assert self.process.returncode == 0, text
        return text


def weights(work_dir: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(checkpoint.folder_of(work_dir, ITERATIONS)).model


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize(("processes", "kills"), [(1, 16), (2, 4)])
def test_kill_at_any_moment(root: Path, tmp_path: Path, processes: int, kills: int) -> None:
    """Every other kill hits a save, the others any moment from the start; the run resumes after each."""
    options = ("--train.save-every", 2, "--resume")
    Training(root, tmp_path / "unbroken", *options, processes=processes).end()
    draw, work_dir, reached = random.Random(processes), tmp_path / "run", 0
    for number in range(kills):
        training = Training(root, work_dir, *options, "--model.pause", 0.15, processes=processes)
        if number % 2:
            training.wait_for(lambda: any((work_dir / "checkpoints").glob(".*.tmp")))
            time.sleep(draw.uniform(0, 0.005))
        else:
            folder = checkpoint.folder_of(work_dir, reached + 2)
            training.wait_for(folder.exists)
            time.sleep(draw.uniform(0, 0.6))
        training.kill()
        newest = checkpoint.newest(work_dir)
        assert newest is not None
        assert int(newest.name.removeprefix("iter_")) >= reached
        reached = int(newest.name.removeprefix("iter_"))
    assert 0 < reached < ITERATIONS
    text = Training(root, work_dir, *options, processes=processes).end()
    assert f"resuming from iteration {reached}" in text
    assert_equal(weights(work_dir), weights(tmp_path / "unbroken"))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_run_in_the_folder_is_refused(root: Path, tmp_path: Path, processes: int) -> None:
    first = Training(root, tmp_path, "--model.pause", 0.3, "--data.workers", 1, processes=processes)
    first.wait_for((tmp_path / "log.jsonl").exists)
    second = Training(root, tmp_path, "--resume", processes=processes)
    text, _ = second.process.communicate(timeout=120)
    assert second.process.returncode != 0
    assert [line for line in text.splitlines() if line.startswith("error: ")] == [
        line for line in text.splitlines() if "a run is training there (process " in line
    ]
    assert text.count("a run is training there") == 1
    assert first.process.poll() is None
    first.kill()
    assert "finished" in Training(root, tmp_path, "--resume", processes=processes).end()


def test_sigterm_under_torchrun(root: Path, tmp_path: Path) -> None:
    """A checkpoint within 10 seconds, no process left, and the run resumes."""
    options = ("--train.save-every", 100, "--data.workers", 1)
    training = Training(root, tmp_path / "run", *options, "--model.pause", 0.5, processes=2)
    training.wait_for(
        lambda: (tmp_path / "run/log.jsonl").exists() and '"mode": "train"' in (tmp_path / "run/log.jsonl").read_text()
    )
    told = time.time()
    training.process.send_signal(signal.SIGTERM)
    text, _ = training.process.communicate(timeout=60)
    assert training.process.returncode != 0
    saved = checkpoint.newest(tmp_path / "run")
    assert saved is not None, text
    assert (saved / "manifest.json").stat().st_mtime - told < 10
    assert f"stopped after iteration {saved.name.removeprefix('iter_')}" in text
    end = time.monotonic() + 20
    while training.processes() and time.monotonic() < end:  # data workers check for their parent every few seconds
        time.sleep(0.2)
    assert training.processes() == []
    Training(root, tmp_path / "run", *options, "--resume", processes=2).end()
    Training(root, tmp_path / "unbroken", *options, processes=2).end()
    assert_equal(weights(tmp_path / "run"), weights(tmp_path / "unbroken"))


def test_torchrun_restarts_after_a_process_died(root: Path, tmp_path: Path) -> None:
    training = Training(root, tmp_path, processes=2, torchrun=("--max-restarts=2",), fault="die:1:70")
    text = training.end()  # two passes per step, so in the 36th
    assert "iter_35: resuming from iteration 35" in text
    assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, ITERATIONS)
