"""`train --dry-run`, and the line that `train` prints first."""

import re
import shutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from segcore import distributed
from segcore.checkpoints import run_checkpoint
from segcore.cli.main import main
from segcore.cli.train import headline
from segcore.config.schema import (
    DataConfig,
    Experiment,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from segcore.data.batch import Batch
from segcore.errors import UserError
from segcore.testing.tiny import Tiny
from segcore.training import dry_run
from segcore.training.loop import train
from segcore.training.setup import init_state
from segcore.training.state import content_of, save_state

MOST = [0]
"""Images that a pass of the model may have before the device is out of memory; 0: any number."""
PASSES: list[tuple[int, list[torch.Tensor | None]]] = []
"""Images of each pass, and the tensors of the failed passes before it that were still in memory."""
FAILED: list[weakref.ref[torch.Tensor]] = []


LEAST = [0]
"""Images that a pass of the model must have."""


class Net(Tiny):
    """Has a large layer, so that its checkpoints are tensors for the most part."""

    def __init__(self) -> None:
        super().__init__(2)
        self.large = nn.Linear(100, 1000)

    def losses(self, images, labels, **options):
        PASSES.append((len(images), [tensor() for tensor in FAILED]))
        if len(images) < LEAST[0]:
            raise UserError("it trains on more images")
        if 0 < MOST[0] < len(images):
            activations = images + 1
            FAILED.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"loss": super().losses(images, labels, **options)["loss"] + self.large.weight.square().mean()}


@dataclass(frozen=True)
class TinyModel(ModelConfig):
    num_classes: int = 2

    def build(self) -> Net:
        return Net()


@pytest.fixture
def exp(tmp_path: Path) -> Experiment:
    rng = np.random.RandomState(0)
    for i in range(4):
        for folder, pixels in (("images", rng.randint(0, 256, (16, 24, 3))), ("masks", rng.randint(0, 2, (16, 24)))):
            path = tmp_path / "data" / folder / ("train" if i < 3 else "val") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    data = DataConfig("folder", tmp_path / "data", classes=("sea", "land"), crop=(16, 16), workers=0)
    steps = TrainConfig(batch_size=6, device_batch_size=2, evaluate_every=4, keep_last=1)
    return Experiment("tiny", TinyModel(), data, OptimizerConfig(), ScheduleConfig(iterations=10), train=steps)


@pytest.fixture(autouse=True)
def _memory():
    yield
    MOST[0] = 0
    PASSES.clear()
    FAILED.clear()


CPU = torch.device("cpu")


def test_it_prints_what_a_run_needs_and_keeps_a_picture_alone(exp: Experiment, tmp_path: Path, capsys) -> None:
    dry_run.dry_run(exp, tmp_path / "runs/mine", device=CPU)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mine.dry_run.png"]
    with Image.open(tmp_path / "runs/mine.dry_run.png") as picture:
        assert picture.width > 4 * 16
    text = capsys.readouterr().out
    assert "schedule=ScheduleConfig(iterations=10, kind=" in text
    for line in (
        r"device: cpu \(\d+ threads\)",
        r"loss: \d+\.\d{4}",
        r"peak memory: \d+\.\d [MG]iB",
        r"step: \d\.\d{3} s",
    ):
        assert re.search(rf"(?m)^ *{line}", text)
    assert re.search(r"whole run: about 0:00:\d\d: 0:00:\d\d for 10 steps, 0:00:\d\d for evaluations \(3\)", text)
    assert "device batch" not in text


def test_a_run_in_the_folder_stays_as_it_is(exp: Experiment, tmp_path: Path, capsys) -> None:
    train(replace(exp, schedule=ScheduleConfig(iterations=1)), tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    dry_run.dry_run(exp, tmp_path / "run", device=CPU)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert "run: is not empty; to train there, add --resume, or choose another --work-dir" in capsys.readouterr().out


def test_the_size_of_a_checkpoint_is_that_of_its_files(exp: Experiment, tmp_path: Path) -> None:
    exp = exp.with_overrides(["train.ema=0.9"])
    state = init_state(exp, CPU)
    state.losses(torch.rand(1, 3, 16, 16), torch.zeros(1, 16, 16, dtype=torch.int64), [0])["loss"].backward()
    state.optimizer.step()
    save_state(exp, state, tmp_path)
    files = [path.stat().st_size for path in run_checkpoint.folder_of(tmp_path, 0).iterdir()]
    assert dry_run.tensor_bytes(content_of(state)) == pytest.approx(sum(files), rel=0.02)


@pytest.mark.parametrize(
    ("least", "most", "largest"),
    [(1, 0, 6), (1, 6, 6), (1, 5, 3), (1, 2, 2), (1, 1, 1), (2, 5, 3), (2, 2, 2), (4, 3, 0)],
)
def test_the_largest_device_batch_is_a_part_of_the_batch_that_fits(
    exp: Experiment, least: int, most: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = init_state(exp, CPU)
    MOST[0] = most
    monkeypatch.setattr(f"{__name__}.LEAST", [least])
    batch = Batch(torch.rand(2, 3, 16, 16), torch.zeros(2, 16, 16, dtype=torch.int64), [0, 1], 0)
    assert dry_run.largest_device_batch(exp, state, batch) == largest


def on_cuda(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Return the CPU as a device that says that it is CUDA."""

    class Fake:
        type = "cuda"

    real: Callable[..., object] = dry_run.setup
    monkeypatch.setattr(dry_run, "setup", lambda exp, folder, device, **how: real(exp, folder, CPU, **how))
    monkeypatch.setattr(dry_run, "device_name", lambda device: "cuda:0 (fake)")
    return Fake()


def test_on_cuda_it_suggests_a_device_batch(exp: Experiment, tmp_path: Path, monkeypatch, capsys) -> None:
    MOST[0] = 5
    dry_run.dry_run(exp, tmp_path / "run", device=on_cuda(monkeypatch))
    assert "device batch: 2 as set, at most 3 (train.device_batch_size)" in capsys.readouterr().out


def test_on_cuda_a_device_batch_that_is_too_large_is_one_line(exp: Experiment, tmp_path: Path, monkeypatch) -> None:
    MOST[0] = 1
    with pytest.raises(UserError, match=r"out of GPU memory: lower train.device_batch_size \(2\).+; 1 fit"):
        dry_run.dry_run(exp, tmp_path / "run", device=on_cuda(monkeypatch))
    assert PASSES == [(2, []), (1, [None]), (2, [None])], "the failed pass would take memory from the search"


def test_the_folder_may_be_the_current_one(exp: Experiment, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    dry_run.dry_run(exp, Path(), device=CPU)
    assert f"first images: {tmp_path / 'here.dry_run.png'}\n" in capsys.readouterr().out
    assert (tmp_path / "here.dry_run.png").is_file()


def test_other_processes_end_when_the_first_fails_at_the_end(exp: Experiment, tmp_path: Path, monkeypatch) -> None:
    """Rank 1 calls what rank 0 runs, and so learns that it failed instead of waiting at the end."""

    def failed(function: Callable[[], object]) -> None:
        raise distributed.PeerError

    def setup(*args, **how):
        found = real(*args, **how)
        monkeypatch.setattr(distributed, "on_main_process", failed)
        monkeypatch.setattr(distributed, "rank", lambda: 1)
        return found

    real: Callable[..., object] = dry_run.setup
    monkeypatch.setattr(dry_run, "setup", setup)
    monkeypatch.setattr(dry_run, "batches_of_rank", lambda *_: batches)
    monkeypatch.setattr(dry_run, "measure", lambda *_: None)
    batches = (batch for batch in [[None]])
    with pytest.raises(distributed.PeerError):
        dry_run.dry_run(exp, tmp_path / "run", device=CPU)
    assert not list(tmp_path.glob("*.png"))


def test_a_full_disk_is_one_line(exp: Experiment, tmp_path: Path, monkeypatch, capsys) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError) as caught:
        dry_run.dry_run(exp, tmp_path / "runs/mine", device=CPU)
    assert str(caught.value) == (
        f"{tmp_path / 'runs'}: 2.0 MiB are free, but the checkpoints need 3.5 MiB; free space, lower "
        "train.keep_last, or choose another --work-dir"
    )
    assert "disk: 3.5 MiB at most: train.keep_last 1, the best and a new checkpoint of 1.2 MiB each" in (
        capsys.readouterr().out
    )


def test_it_starts_no_old_run(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(None, ["train", "ddrnet_23_slim_toy", "--dry-run", "--resume"])
    assert end.value.code == 2
    assert capsys.readouterr() == ("", "error: --dry-run takes the first steps of a new run; leave --resume out\n")


def test_the_first_line_says_what_is_known(exp: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "tiny: 10 iterations of batch 6 = 1 device x 2 images x 3 passes, device auto, folder runs/tiny"
    assert headline(exp, Path("runs/tiny"), "auto") == line
    monkeypatch.setenv("WORLD_SIZE", "3")
    line = headline(exp.with_overrides(["schedule.epochs=2"]), Path("runs/tiny"), "cuda")
    assert line == "tiny: 2 epochs of batch 6 = 3 devices x 2 images, device cuda, folder runs/tiny"
