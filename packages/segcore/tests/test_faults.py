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
ITERATIONS = 100


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
        self.log = work_dir / "log.jsonl"
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

    def trains(self) -> bool:
        """Return whether the first iteration is over."""
        return self.log.exists() and '"mode": "train"' in self.log.read_text()

    def processes(self, *words: str) -> list[int]:
        """Return the living processes of this run with these arguments and variables, data workers included."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                own = ((path / "environ").read_bytes() + (path / "cmdline").read_bytes()).split(b"\0")
                if all(word.encode() in own for word in (f"TINY_MARK={self.mark}", *words)):
                    found.append(int(path.name))
        return found

    def kill(self, victims: list[int]) -> str:
        """Kill some of the processes and return what was printed when all have ended."""
        assert victims
        for number in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        text, _ = self.process.communicate(timeout=60)  # all hold this pipe
        end = time.monotonic() + 20
        while self.processes() and time.monotonic() < end:
            time.sleep(0.1)
        assert self.processes() == []
        return text

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


@pytest.mark.parametrize(("processes", "kills"), [(1, 16), (2, 20)])
def test_kill_at_any_moment(root: Path, tmp_path: Path, processes: int, kills: int) -> None:
    """Every other kill hits a save, the others any moment from the start; the run resumes after each.

    With two processes, two of three kills hit only torchrun or one process, and the others end by themselves.
    """
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
        alone = {1: [training.process.pid], 2: training.processes("RANK=1", "train")}.get(number % 3)
        training.kill(alone if processes > 1 and alone else training.processes())
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
    first.kill(first.processes())
    assert "finished" in Training(root, tmp_path, "--resume", processes=processes).end()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_data_worker_ends_the_run_saved(root: Path, tmp_path: Path, processes: int) -> None:
    options = ("--train.save-every", 100, "--data.workers", 2)
    training = Training(root, tmp_path / "run", *options, "--model.pause", 0.1, processes=processes)
    training.wait_for(training.trains)
    text = training.kill(training.processes("--multiprocessing-fork")[:1])
    assert training.process.returncode == 1
    before, *after = text.split("error: a data-loading process was ended by SIGKILL; if memory ran out, lower data.")
    assert len(after) == 1
    assert "Traceback" not in before  # torchrun prints one
    saved = checkpoint.newest(tmp_path / "run")
    assert saved is not None, text
    assert f"stopped after iteration {saved.name.removeprefix('iter_')}" in text
    Training(root, tmp_path / "run", *options, "--resume", processes=processes).end()
    Training(root, tmp_path / "unbroken", *options, processes=processes).end()
    assert_equal(weights(tmp_path / "run"), weights(tmp_path / "unbroken"))


def test_a_stopped_process_is_named(root: Path, tmp_path: Path) -> None:
    training = Training(root, tmp_path, "--model.pause", 0.1, "--train.timeout", 5, processes=2)
    training.wait_for(training.trains)
    os.kill(*training.processes("RANK=1", "train"), signal.SIGSTOP)
    assert training.process.stdout is not None
    told = time.monotonic()
    assert any(line.startswith("error: process 1 of 0-1 did not respond") for line in training.process.stdout)
    assert time.monotonic() - told < 20
    training.kill(training.processes())


def test_sigterm_under_torchrun(root: Path, tmp_path: Path) -> None:
    """A checkpoint within 10 seconds, no process left, and the run resumes."""
    options = ("--train.save-every", 100, "--data.workers", 1)
    training = Training(root, tmp_path / "run", *options, "--model.pause", 0.5, processes=2)
    training.wait_for(training.trains)
    told = time.time()
    training.process.send_signal(signal.SIGTERM)
    text, _ = training.process.communicate(timeout=60)
    assert training.process.returncode != 0
    saved = checkpoint.newest(tmp_path / "run")
    assert saved is not None, text
    assert (saved / "manifest.json").stat().st_mtime - told < 10
    assert f"stopped after iteration {saved.name.removeprefix('iter_')}" in text
    end = time.monotonic() + 20
    while training.processes() and time.monotonic() < end:  # data workers need a moment
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
