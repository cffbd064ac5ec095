"""The log of a run: its file for programs, its output for people, and its content after a resume."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from segcore import files
from segcore.config.record import describe, differences
from segcore.config.schema import DataConfig, Experiment, ModelConfig
from segcore.errors import UserError
from segcore.training.logger import Logger

VALUES = {"loss": 4.0426, "loss_ce": 2.8875, "grad_norm": 1.3938}
VALUES |= {"images_per_second": 3.5, "seconds": 0.586, "data_seconds": 0.01}


def records(work_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work_dir / "log.jsonl").read_text().splitlines()]


def write(work_dir: Path, iterations: tuple[int, ...], *, start: int = 0, terminal: bool = False) -> str:
    """Log some iterations of 160000 and return the shown text."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    with Logger(work_dir, 160_000, {"git": None}, start=start, console=console) as log:
        for iteration in iterations:
            log.advance(iteration)
            log.train(iteration, {"lr": 1.96e-6 / 3, **VALUES})
        log.evaluating(1, 2)
        log.line("best [so far]")
        log.val(iterations[-1], {"mIoU": float("nan"), "classes": ["road"]}, "| aAcc | mIoU | mAcc |")
    return console.file.getvalue()


def test_file_has_full_precision_and_no_bare_nan(tmp_path: Path) -> None:
    write(tmp_path, (50, 100))
    meta, first, second, val = records(tmp_path)
    assert meta == {"mode": "meta", "iteration": 0, "git": None}
    assert first == {"mode": "train", "iteration": 50, "lr": 1.96e-6 / 3, **VALUES}
    assert second["iteration"] == 100
    assert val == {"mode": "val", "iteration": 100, "mIoU": None, "classes": ["road"]}


def test_plain_lines_without_a_terminal(tmp_path: Path) -> None:
    line, best, val, table = write(tmp_path, (50,)).splitlines()
    assert line.startswith("Iter [50/160000]  lr: 6.533e-07, eta: ")
    assert line.endswith(
        "time: 0.586, data_time: 0.010, images/s: 3.5, loss: 4.0426, loss_ce: 2.8875, grad_norm: 1.3938"
    )
    assert (best, val, table) == ("best [so far]", "Iter(val) [50]", "| aAcc | mIoU | mAcc |")


def test_bar_on_a_terminal(tmp_path: Path) -> None:
    shown = write(tmp_path, (50,), terminal=True)
    for text in ("50/160000", "loss 4.0426", "3.5 images/s", "eta ", "1/2", "best [so far]", "| aAcc | mIoU | mAcc |"):
        assert text in shown
    assert "Iter [" not in shown


def test_bar_has_what_fits_into_the_terminal(tmp_path: Path) -> None:
    def shown(width: int) -> str:
        console = Console(file=io.StringIO(), force_terminal=True, width=width)
        with Logger(tmp_path / str(width), 9, {}, best=0.4567, console=console) as log:
            log.train(1, {"lr": 0.01, **VALUES, "memory_mb": 2048.0})
        return console.file.getvalue()

    for folder in ("60", "130"):
        (tmp_path / folder).mkdir()
    wide, narrow = shown(130), shown(60)
    assert "loss 4.0426  eta 0:0" in wide
    assert "  best mIoU 45.67  lr 1.00e-02  2.0 GiB  3.5 images/s" in wide
    assert "loss 4.0426" in narrow
    assert "lr" not in narrow


def test_bar_has_the_best_evaluation(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Logger(tmp_path, 9, {}, console=console) as log:
        for miou in (0.25, 0.5, float("nan"), 0.3):
            log.val(1, {"mIoU": miou, "classes": []}, "")
        log.train(2, {"lr": 0.01, **VALUES})
    assert "best mIoU 50.00" in console.file.getvalue()


def test_resume_drops_later_log_entries(tmp_path: Path) -> None:
    write(tmp_path, (50, 100, 150))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write(f"{100_000 * '['}\n")
        file.write('{"mode": "train", "itera')  # truncated
    write(tmp_path, (150,), start=100)
    assert [(r["mode"], r["iteration"]) for r in records(tmp_path)] == [
        ("meta", 0),
        ("train", 50),
        ("train", 100),
        ("meta", 100),
        ("train", 150),
        ("val", 150),
    ]


def test_a_log_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log.jsonl")
    with pytest.raises(UserError, match=r"log\.jsonl: is not a regular file \(a FIFO\)"):
        write(tmp_path, (50,))


def test_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on the file size makes writing fail like a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Logger(tmp_path, 9, {}, console=Console(file=io.StringIO())) as log:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))
        try:
            with pytest.raises(UserError, match=r"log.jsonl: cannot be written \(.+\); free space") as caught:
                log.val(1, {"classes": ["road"] * 9}, "")
            with pytest.raises(UserError, match=r"best.json: cannot be written \(.+\); free space"):
                files.write(tmp_path / "best.json", "x" * 99)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.glob("*.json*")] == ["log.jsonl"]
    with pytest.raises(UserError, match=r"below.json: cannot be written \(.+\); .* another folder"):
        files.write(tmp_path / "log.jsonl" / "below.json", "")


class Tiny(ModelConfig):
    def build(self):
        raise NotImplementedError


@pytest.fixture
def exp(tmp_path: Path) -> Experiment:
    return Experiment("tiny", Tiny(num_classes=3), DataConfig(root=tmp_path))


def test_description_is_plain_and_complete(exp: Experiment, tmp_path: Path) -> None:
    described = describe(exp)
    assert json.loads(json.dumps(described, allow_nan=False)) == described
    settings = described["experiment"]
    assert settings["model"] == {"class": f"{Tiny.__module__}:Tiny", "num_classes": 3, "in_channels": 3}
    assert settings["data"]["root"] == str(tmp_path)
    assert settings["data"]["crop"] == [512, 512]
    assert settings["seed"] == 0
    assert all(described["versions"][name] for name in ("python", "torch", "segcore"))
    assert described["git"] is None or len(described["git"].removesuffix("-dirty")) == 40


def test_differences_name_the_setting(exp: Experiment) -> None:
    before = describe(exp)["experiment"]
    after = describe(exp.with_overrides(["train.batch_size=4", "seed=1"]))["experiment"]
    assert sorted(differences(before, after)) == ["seed: 0 -> 1", "train.batch_size: 8 -> 4"]
    assert differences(before, before) == []
