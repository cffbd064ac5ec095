"""Checkpoints: saved state is restored exactly, and any damage is detected."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from segcore.checkpoints import run_checkpoint as checkpoint
from segcore.errors import UserError
from segcore.files import sha256

MODEL = {
    "conv.weight": torch.arange(24.0).reshape(2, 3, 2, 2).to(memory_format=torch.channels_last),
    "bn.num_batches_tracked": torch.tensor(7),
}
MODEL["tied"] = MODEL["conv.weight"]
EXPERIMENT = {"experiment": {"seed": 3, "name": "tiny"}, "git": None}


def state(iteration: int) -> dict[str, Any]:
    moments = {"step": torch.tensor(2.0), "exp_avg": torch.rand(3, generator=torch.Generator().manual_seed(1))}
    return {"iteration": iteration, "best_miou": 0.5, "optimizer": {"conv.weight": moments}, "scaler": {}}


def saved(work_dir: Path, *iterations: int) -> list[Path]:
    folders = [checkpoint.folder_of(work_dir, iteration) for iteration in iterations]
    for folder, iteration in zip(folders, iterations, strict=True):
        checkpoint.save(folder, MODEL, state(iteration), EXPERIMENT)
    return folders


def names(work_dir: Path) -> list[str]:
    return sorted(path.name for path in (work_dir / "checkpoints").iterdir())


def test_round_trip_is_exact(tmp_path: Path) -> None:
    (folder,) = saved(tmp_path, 4)
    assert folder == tmp_path / "checkpoints" / "iter_4"
    assert sorted(p.name for p in folder.iterdir()) == sorted((*checkpoint.FILES, "manifest.json"))
    found = checkpoint.load(folder)
    assert set(found.model) == set(MODEL)
    for read in (found.model, checkpoint.read_model_state(folder)):
        assert all(
            torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in MODEL.items()
        )
    assert found.experiment == EXPERIMENT
    assert found.state["iteration"] == 4
    moments = state(4)["optimizer"]["conv.weight"]
    assert all(torch.equal(found.state["optimizer"]["conv.weight"][key], moments[key]) for key in moments)
    saved(tmp_path, 4)  # again under the same name
    assert names(tmp_path) == ["iter_4"]


@pytest.mark.parametrize("name", [*checkpoint.FILES, checkpoint.MANIFEST])
@pytest.mark.parametrize("damage", ["first", "middle", "last", "cut", "empty", "gone"])
def test_damage_is_found_and_another_checkpoint_named(tmp_path: Path, capsys, name: str, damage: str) -> None:
    older, folder = saved(tmp_path, 9, 10)
    path = folder / name
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage in ("cut", "empty"):
        path.write_bytes(data[: len(data) // 2 if damage == "cut" else 0])
    else:
        data[{"first": 0, "middle": len(data) // 2, "last": -1}[damage]] ^= 1
        path.write_bytes(data)
    for read in (checkpoint.load, checkpoint.read_model_state):
        with pytest.raises(UserError) as caught:
            read(folder)
        text = str(caught.value)
        assert str(folder) in text
        assert f"use {older} instead" in text
        assert "\n" not in text
    assert checkpoint.newest(tmp_path) == older
    assert "skipping this checkpoint" in capsys.readouterr().err


def test_every_flipped_byte_of_the_manifest_is_found(tmp_path: Path) -> None:
    (folder,) = saved(tmp_path, 1)
    path = folder / checkpoint.MANIFEST
    data = path.read_bytes()
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ 4]) + data[i + 1 :])
        with pytest.raises(UserError, match=r"iter_1/(manifest.json|model.safetensors|state.pt|experiment.json): "):
            checkpoint.load(folder)


def test_without_another_checkpoint_it_says_so(tmp_path: Path) -> None:
    (folder,) = saved(tmp_path, 1)
    (folder / "state.pt").unlink()
    with pytest.raises(UserError, match=r"state.pt: missing; .* train again"):
        checkpoint.load(folder)
    with pytest.raises(UserError, match=r"iter_2: no such checkpoint; .* train again"):
        checkpoint.load(checkpoint.folder_of(tmp_path, 2))
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "nothing") is None


class Code:
    """Unpickling it would create a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_not_executed(tmp_path: Path) -> None:
    """An attacker creates a checkpoint with a valid manifest."""
    (folder,) = saved(tmp_path, 1)
    torch.save({"iteration": Code(tmp_path / "executed")}, folder / "state.pt", pickle_module=pickle)
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    digest = sha256(folder / "state.pt")
    manifest["files"]["state.pt"] = {"size": (folder / "state.pt").stat().st_size, "sha256": digest}
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    with pytest.raises(UserError, match=r"state.pt: refused, nothing was executed"):
        checkpoint.load(folder)
    assert not (tmp_path / "executed").exists()


def test_the_newest_checkpoint_is_found_by_number_not_by_name(tmp_path: Path) -> None:
    saved(tmp_path, 9, 10)
    (tmp_path / "checkpoints" / "iter_x").mkdir()
    shutil.copytree(tmp_path / "checkpoints" / "iter_9", tmp_path / "checkpoints" / ".iter_11.new.tmp")
    assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, 10)


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3, 4, 12)
    (tmp_path / "checkpoints" / ".iter_5.new.tmp").mkdir()
    assert checkpoint.best(tmp_path) is None
    checkpoint.mark_best(tmp_path, 2, 0.25)
    assert checkpoint.best(tmp_path) == checkpoint.folder_of(tmp_path, 2)
    checkpoint.prune(tmp_path, 1, 4)  # 12 precedes a resume from an older checkpoint
    assert names(tmp_path) == ["iter_2", "iter_4"]
    shutil.rmtree(checkpoint.folder_of(tmp_path, 2))
    assert checkpoint.best(tmp_path) is None
    (tmp_path / "best.json").write_text("[]")
    assert checkpoint.best(tmp_path) is None
