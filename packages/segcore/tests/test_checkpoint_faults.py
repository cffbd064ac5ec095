"""Faults while a checkpoint is written, and damage afterwards: earlier checkpoints stay usable; the error is one line.

Every write step of `save` fails once in every way below. The tests inject faults into the functions that write, as
filling a disk or mounting it read-only takes rights that a test does not have.
"""

import errno
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from segcore import files
from segcore.checkpoints import manifest
from segcore.checkpoints import run_checkpoint as checkpoint
from segcore.errors import UserError

STEPS = 16
"""Write steps of a `save` that replaces a checkpoint; one fewer if there is none."""


class Killed(BaseException):
    """Ends a save like a kill: `save` does not catch it."""


def full() -> BaseException:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_only() -> BaseException:
    return OSError(errno.EROFS, os.strerror(errno.EROFS))


def save(work_dir: Path, iteration: int, value: float) -> Path:
    folder = checkpoint.folder_of(work_dir, iteration)
    state = {"iteration": iteration, "optimizer": {"moment": torch.full((40,), value)}}
    model = {"weight": torch.full((30, 3), value), "bias": torch.zeros(5)}
    checkpoint.save(folder, model, state, {"experiment": {"name": 100 * "tiny"}})
    return folder


def value(folder: Path) -> float:
    """Return the value that a checkpoint was saved with, after reading all of it."""
    found = checkpoint.load(folder)
    assert torch.equal(found.state["optimizer"]["moment"][:3], found.model["weight"][0])
    return found.model["weight"][0, 0].item()


def names(work_dir: Path) -> list[str]:
    return sorted(path.name for path in (work_dir / "checkpoints").iterdir())


class Faults:
    """Make write step number `at` fail, and with `dead` all later ones; a file being written is truncated."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, fault: Callable[[], BaseException], dead: bool) -> None:
        self.patch, self.at, self.fault, self.dead, self.steps = patch, at, fault, dead, 0
        for owner, name in (
            (Path, "mkdir"), (checkpoint, "save_file"), (torch, "save"), (Path, "write_text"), (manifest, "sha256"),
            (checkpoint, "sync"), (Path, "rename"),
        ):  # fmt: skip
            patch.setattr(owner, name, self.failing(getattr(owner, name)))

    def failing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            step, self.steps = self.steps, self.steps + 1
            if step < self.at or (step > self.at and not self.dead):
                return original(*args, **options)
            path = next((arg for arg in reversed(args) if isinstance(arg, Path)), None)
            if original.__name__ in ("save_file", "save", "write_text") and path is not None:
                original(*args, **options)
                os.truncate(path, path.stat().st_size // 2)
            raise self.fault()

        return call


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch):
    """Run something with a fault in it; return the exception and the number of write steps."""

    def run(
        call: Callable[[], Any], at: int, fault: Callable[[], BaseException] = full, dead: bool = False
    ) -> tuple[BaseException | None, int]:
        with monkeypatch.context() as patch:
            faults = Faults(patch, at, fault, dead)
            try:
                call()
            except (UserError, Killed) as error:
                return error, faults.steps
            return None, faults.steps

    return run


@pytest.mark.parametrize("replaces", [True, False])
def test_the_faults_reach_every_step(tmp_path: Path, faulty, replaces: bool) -> None:
    save(tmp_path, 2 if replaces else 1, 1.0)
    assert faulty(lambda: save(tmp_path, 2, 2.0), at=99) == (None, STEPS - (not replaces))


@pytest.mark.parametrize("dead", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("fault", [full, read_only])
@pytest.mark.parametrize("at", range(STEPS))
def test_a_failing_save_keeps_earlier_checkpoints(tmp_path: Path, faulty, at: int, fault, dead: bool) -> None:
    older, again = save(tmp_path, 1, 1.0), save(tmp_path, 2, 2.0)
    for iteration in (3, 2):  # a new checkpoint, then an existing one again
        error, _ = faulty(lambda iteration=iteration: save(tmp_path, iteration, 9.0), at, fault, dead)
        if error is None:
            assert (at, iteration) == (STEPS - 1, 3)  # it has one step fewer
            continue
        text = str(error)
        assert "\n" not in text
        assert f"iter_{iteration}: cannot write the checkpoint (" in text
        assert ("No space left" in text) == (fault is full)
        assert checkpoint.newest(tmp_path) in (again, checkpoint.folder_of(tmp_path, 3))
        assert value(older) == 1.0
        assert value(again) in (2.0, 9.0)
    assert save(tmp_path, 4, 4.0) == checkpoint.newest(tmp_path)
    checkpoint.prune(tmp_path, 3, 4)
    assert all(name.startswith("iter_") for name in names(tmp_path))


@pytest.mark.parametrize("at", range(STEPS))
def test_a_killed_save_keeps_the_earlier_checkpoint_or_the_new_one(tmp_path: Path, faulty, at: int) -> None:
    """Also between the two renames of a checkpoint that is saved again."""
    folder = save(tmp_path, 2, 1.0)
    error, _ = faulty(lambda: save(tmp_path, 2, 2.0), at, Killed, dead=True)
    assert isinstance(error, Killed)
    shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}_best"))
    assert checkpoint.newest(tmp_path) == folder
    assert value(folder) == (1.0 if at < STEPS - 2 else 2.0)
    copy = tmp_path.with_name(f"{tmp_path.name}_best")
    checkpoint.mark_best(copy, 2, 0.5)
    assert checkpoint.best(copy) == checkpoint.folder_of(copy, 2)
    save(tmp_path, 2, 3.0)
    checkpoint.prune(tmp_path, 1, 2)
    assert names(tmp_path) == ["iter_2"]


def test_a_checkpoint_between_two_renames_is_restored(tmp_path: Path, faulty) -> None:
    folder = save(tmp_path, 2, 1.0)
    faulty(lambda: save(tmp_path, 2, 2.0), STEPS - 2, Killed)
    assert not folder.exists()
    (tmp_path / "checkpoints" / ".iter_2.new.tmp" / "state.pt").write_bytes(b"")  # the disk lost more than the kill did
    assert value(folder) == 1.0


def test_a_full_disk(tmp_path: Path) -> None:
    """A limit on the file size makes writing fail like a full disk, also inside the libraries."""
    resource = pytest.importorskip("resource")
    previous = save(tmp_path, 1, 1.0)
    largest = max(path.stat().st_size for path in previous.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in range(0, largest, largest // 16):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            for iteration in (2, 1):
                with pytest.raises(UserError, match=rf"iter_{iteration}: cannot write the checkpoint \(.+\)") as caught:
                    save(tmp_path, iteration, 2.0)
                assert "\n" not in str(caught.value)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert names(tmp_path) == ["iter_1"]
        assert value(previous) == 1.0


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="permissions do not hold for root")
def test_a_read_only_folder(tmp_path: Path) -> None:
    older, previous = save(tmp_path, 1, 1.0), save(tmp_path, 2, 2.0)
    previous.parent.chmod(0o500)
    try:
        for iteration in (3, 2):
            with pytest.raises(UserError, match=rf"iter_{iteration}: cannot write the checkpoint \(.*denied"):
                save(tmp_path, iteration, 9.0)
        assert (value(older), value(previous)) == (1.0, 2.0)
        checkpoint.prune(tmp_path, 1, 2)  # cannot remove the older one, which is no reason to stop
        assert checkpoint.newest(tmp_path) == previous
        assert value(previous) == 2.0
    finally:
        previous.parent.chmod(0o700)


def test_failed_writes_of_small_files_are_one_line_errors(tmp_path: Path, monkeypatch) -> None:
    checkpoint.mark_best(tmp_path, 3, 0.25)
    before = (tmp_path / "best.json").read_text()
    for name in ("sync", "write_bytes"):
        with monkeypatch.context() as patch:
            owner = files if name == "sync" else Path

            def fails(*_: Any) -> None:
                raise full()

            patch.setattr(owner, name, fails)
            with pytest.raises(UserError, match=r"best.json: cannot be written \(No space left") as caught:
                checkpoint.mark_best(tmp_path, 4, 0.5)
        assert "\n" not in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["best.json"]
        assert (tmp_path / "best.json").read_text() == before


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_damage_at_100_places_is_refused_100_times(tmp_path: Path, capsys, damage: str) -> None:
    """Places are drawn over all files, in proportion to their sizes; the previous checkpoint takes over."""
    older, folder = save(tmp_path, 1, 1.0), save(tmp_path, 2, 2.0)
    contents = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    assert len(contents) == 4
    places = [(path, offset) for path, content in contents.items() for offset in range(len(content))]
    draw, hit = random.Random(0), set[Path]()
    for path, offset in draw.sample(places, 100):
        content, mask = contents[path], draw.randrange(1, 256)
        flipped = content[:offset] + bytes([content[offset] ^ mask]) + content[offset + 1 :]
        path.write_bytes(flipped if damage == "flipped" else content[:offset])
        hit.add(path)
        for read in (checkpoint.load, checkpoint.read_model_state):
            with pytest.raises(UserError, match=f"use {older} instead") as caught:
                read(folder)
            assert str(folder) in str(caught.value)
            assert "\n" not in str(caught.value)
        assert checkpoint.newest(tmp_path) == older
        assert "skipping this checkpoint" in capsys.readouterr().err
        path.write_bytes(content)
    assert hit == set(contents)
    assert value(folder) == 2.0
