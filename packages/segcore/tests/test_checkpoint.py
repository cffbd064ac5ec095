"""Checkpoints: saved state is restored exactly, and any damage is detected."""

import errno
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from segcore.checkpoints import manifest
from segcore.checkpoints import run_checkpoint as checkpoint
from segcore.errors import UserError

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


def forge(folder: Path) -> None:
    """Write a valid manifest for what is in the folder, as an attacker can."""
    (folder / checkpoint.MANIFEST).write_text(manifest.text_of([folder / name for name in checkpoint.FILES]))


def test_code_in_a_checkpoint_is_not_executed(tmp_path: Path) -> None:
    (folder,) = saved(tmp_path, 1)
    torch.save({"iteration": Code(tmp_path / "executed")}, folder / "state.pt", pickle_module=pickle)
    forge(folder)
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
    (checkpoint.folder_of(tmp_path, 12) / "state.pt").write_bytes(b"")  # which is why the run resumed from an older one
    assert checkpoint.prune(tmp_path, 1, 4) == ""
    assert names(tmp_path) == ["iter_2", "iter_4"]
    shutil.rmtree(checkpoint.folder_of(tmp_path, 2))
    assert checkpoint.best(tmp_path) is None
    (tmp_path / "best.json").write_text("[]")
    assert checkpoint.best(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(
            ("state.pt", content)
            for content in (b"", b"not a pickle", b"\x80\x02]q\x00.", b"(" * 10_000, b"\x80\x04\x8c")
        ),
        *(("experiment.json", content) for content in (b"", b"[]", b"[" * 10_000, b'{"a": Infinity}', b"\xff")),
        *(("model.safetensors", content) for content in (b"", b"\xff" * 8, b"\x02" + 7 * b"\0" + b"{}")),
    ],
)
def test_damage_with_a_valid_manifest_is_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    older, folder = saved(tmp_path, 1, 2)
    (folder / name).write_bytes(content)
    forge(folder)
    if content == b"\x02" + 7 * b"\0" + b"{}":  # whole, but without a tensor
        assert checkpoint.load(folder).model == {}
        return
    with pytest.raises(UserError, match=rf"iter_2/{name}: .*; use {older} instead$") as caught:
        checkpoint.load(folder)
    assert "\n" not in str(caught.value)


MALFORMED = [
    b"", b"[]", b"3", b"null", b"[" * 100_000, b'{"format": NaN}', b'{"format": 1}', b'{"format": 1, "files": []}',
    b'{"format": 1, "files": {"state.pt": 3}}', b"\xff\xfe{}", b'{"format": 1e999}', b" " * (1 << 25),
]  # fmt: skip


@pytest.mark.parametrize("content", MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_manifest_is_one_line_and_pruned_by_nobody(tmp_path: Path, capsys, content: bytes) -> None:
    older, folder = saved(tmp_path, 2, 3)
    (folder / checkpoint.MANIFEST).write_bytes(content)
    assert checkpoint.newest(tmp_path) == older
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{folder / checkpoint.MANIFEST}: damaged")
    for read in (checkpoint.load, checkpoint.read_model_state):
        with pytest.raises(UserError, match=rf"manifest\.json: damaged.*; use {older} instead$"):
            read(folder)
    saved(tmp_path, 5)
    assert "manifest.json: damaged" in checkpoint.prune(tmp_path, 1, 5)
    assert names(tmp_path) == ["iter_3", "iter_5"]


RECORDS = [
    b"", b"[]", b"[" * 100_000, b"\xff", b"{}", b'{"iteration": 2}', b'{"iteration": Infinity, "mIoU": 0.5}',
    b'{"iteration": 2, "mIoU": NaN}', b'{"iteration": [2], "mIoU": 0.5}', b'{"iteration": "two", "mIoU": 0.5}',
    b'{"iteration": -2, "mIoU": 0.5}', b'{"iteration": 2, "mIoU": 50}', b'{"iteration": 9999999999999999999, "mIoU": 1}'
]  # fmt: skip


@pytest.mark.parametrize("content", RECORDS, ids=range(len(RECORDS)))
def test_a_malformed_record_of_the_best_is_one_line(tmp_path: Path, capsys, content: bytes) -> None:
    saved(tmp_path, 2, 3, 4)
    (tmp_path / "best.json").write_bytes(content)
    assert checkpoint.best(tmp_path) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path / 'best.json'}: damaged (")
    assert line.endswith("using the newest checkpoint, the next evaluation writes it again")
    assert "newest" in checkpoint.standing(checkpoint.folder_of(tmp_path, 4))
    assert "best.json: damaged" in checkpoint.prune(tmp_path, 1, 4)  # which one to keep is not known
    assert names(tmp_path) == ["iter_2", "iter_3", "iter_4"]
    checkpoint.mark_best(tmp_path, 3, 0.5)
    assert checkpoint.best(tmp_path) == checkpoint.folder_of(tmp_path, 3)
    assert checkpoint.prune(tmp_path, 1, 4) == ""
    assert names(tmp_path) == ["iter_3", "iter_4"]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_change_of_a_json_file_raises_anything_else(tmp_path: Path, data: st.DataObject) -> None:
    (folder,) = saved(tmp_path, 1) if not (tmp_path / "checkpoints").exists() else [checkpoint.folder_of(tmp_path, 1)]
    checkpoint.mark_best(tmp_path, 1, 0.5)
    path = data.draw(
        st.sampled_from([tmp_path / "best.json", folder / checkpoint.MANIFEST, folder / "experiment.json"])
    )
    whole = path.read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    path.write_bytes(whole[:start] + data.draw(st.binary(max_size=8) | st.sampled_from(MALFORMED[:-1])) + whole[stop:])
    try:
        assert checkpoint.best(tmp_path) in (folder, None)
        assert checkpoint.newest(tmp_path) in (folder, None)
        checkpoint.prune(tmp_path, 1, 1)
        assert folder.exists()
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", [*checkpoint.FILES, checkpoint.MANIFEST, ""])
@pytest.mark.parametrize("kind", ["FIFO", "device"])
def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path, capsys, name: str, kind: str) -> None:
    older, folder = saved(tmp_path, 1, 2)
    path = folder / name
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    assert checkpoint.newest(tmp_path) == older
    problem = f"is not a regular file (a {kind})" if name else "missing"
    assert f"{problem}; skipping this checkpoint" in capsys.readouterr().err
    with pytest.raises(UserError, match=f"use {older} instead"):
        checkpoint.load(folder)
    os.mkfifo(tmp_path / "best.json")
    assert checkpoint.best(tmp_path) is None


@pytest.mark.parametrize("name", [*checkpoint.FILES, checkpoint.MANIFEST])
@pytest.mark.parametrize("at", [2, 4])
def test_pruning_keeps_what_it_cannot_read(tmp_path: Path, monkeypatch, name: str, at: int) -> None:
    """A checkpoint that a disk error hides for a while, older or newer than the one just saved."""
    saved(tmp_path, 1, 2, 3, 4)
    broken, opened = checkpoint.folder_of(tmp_path, at) / name, Path.open

    def fails(path: Path, *args: Any, **options: Any) -> Any:
        if path == broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fails)
        kept = checkpoint.prune(tmp_path, 1, 3)
    assert kept.startswith(f"{broken}: cannot be read (Input/output error): kept beyond train.keep_last")
    assert "\n" not in kept
    assert names(tmp_path) == sorted({"iter_3", "iter_4", f"iter_{at}"})  # a later one that is whole also stays
    checkpoint.load(checkpoint.folder_of(tmp_path, at))
    saved(tmp_path, 5)
    assert checkpoint.prune(tmp_path, 1, 5) == ""
    assert names(tmp_path) == ["iter_5"]


def test_pruning_keeps_what_it_did_not_make(tmp_path: Path, capsys) -> None:
    saved(tmp_path, 1, 2, 3, 4, 5)
    folder = tmp_path / "checkpoints"
    newer = folder / "iter_1" / checkpoint.MANIFEST
    newer.write_text(newer.read_text().replace('"format": 1', '"format": 99'))
    (folder / "iter_2" / "notes.txt").touch()
    (folder / "iter_3").rename(tmp_path / "elsewhere")
    (folder / "iter_3").symlink_to(tmp_path / "elsewhere")
    (folder / "iter_6").mkdir()
    (folder / "iter_7").write_text("not a folder")
    (folder / "iter_8").symlink_to("nowhere")
    before, left = names(tmp_path), [path.name for path in (tmp_path / "elsewhere").iterdir()]
    kept = checkpoint.prune(tmp_path, 1, 5)
    assert "and 3 more: kept" in kept
    assert "\n" not in kept
    assert names(tmp_path) == [name for name in before if name != "iter_4"]
    for iteration in (1, 2, 3, 6, 7, 8):  # nor does a save replace one of them
        saved(tmp_path, iteration)
        assert f"kept as {folder}/iter_{iteration}.kept" in capsys.readouterr().err
        checkpoint.load(folder / f"iter_{iteration}")
    assert '"format": 99' in (folder / "iter_1.kept" / checkpoint.MANIFEST).read_text()
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == left
    assert checkpoint.load(tmp_path / "elsewhere").state["iteration"] == 3
