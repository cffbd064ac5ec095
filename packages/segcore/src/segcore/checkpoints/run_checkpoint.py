"""Checkpoints: folders `<work_dir>/checkpoints/iter_<N>/` after N finished iterations, each complete or absent.

A checkpoint holds model.safetensors (weights and buffers under the model's own names), state.pt (the rest of the state
that a run needs to continue), experiment.json (settings, versions and git hash) and manifest.json (size and SHA-256 of
the other three). `save` writes it under a temporary name, syncs it to disk with the manifest last, then renames it. To
save a checkpoint again, it first renames the old one; after a kill between the two renames, readers rename it back.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from segcore.errors import UserError
from segcore.files import sha256, sync, utf8_path, write

FILES = ("model.safetensors", "state.pt", "experiment.json")
MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint folder, on the CPU."""

    model: dict[str, Tensor]
    """The model's state dict."""
    state: dict[str, Any]
    """The rest of the loop's state: iteration, optimizer, gradient scaler, best mIoU."""
    experiment: dict[str, Any]
    """Settings and versions of the run, see `segcore.config.record.describe`."""


def folder_of(work_dir: Path, iteration: int) -> Path:
    """Return the folder of the checkpoint after `iteration` finished iterations, which need not exist."""
    return work_dir / "checkpoints" / f"iter_{iteration}"


def save(folder: Path, model: Mapping[str, Tensor], state: Mapping[str, Any], experiment: Mapping[str, Any]) -> None:
    """Write a checkpoint, replacing one of the same name.

    `model` is a state dict; `state` is plain data and tensors. Raises UserError when it cannot be written (such
    as a full disk); earlier checkpoints stay unchanged.
    """
    temporary, replaced = _beside(folder)
    try:
        for leftover in (temporary, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(_separate(model), temporary / FILES[0])
        torch.save(dict(state), temporary / FILES[1])
        (temporary / FILES[2]).write_text(json.dumps(experiment, indent=1) + "\n", encoding="utf-8")
        paths = [temporary / name for name in FILES]
        files = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in paths}
        (temporary / MANIFEST).write_text(_text({"format": FORMAT, "files": files}), encoding="utf-8")
        for path in (*paths, temporary / MANIFEST, temporary):
            sync(path)
        if folder.exists():
            folder.rename(replaced)
        temporary.rename(folder)
        sync(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _recover(folder.parent)
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder}: cannot write the checkpoint ({reason}); free space there or make it "
            "writable, then start again with --resume: training continues from the last one"
        ) from None


def load(folder: Path) -> Checkpoint:
    """Return the contents of a checkpoint after verifying every file against the manifest; nothing in it is executed.

    Raises UserError that names the damaged file and the checkpoint to use instead.
    """
    _require_whole(folder)
    try:
        state = torch.load(folder / FILES[1], map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"{folder / FILES[1]}: refused, nothing was executed ({reason}); {_instead(folder)}") from None
    experiment = json.loads((folder / FILES[2]).read_text(encoding="utf-8"))
    return Checkpoint(_tensors(folder), state, experiment)


def read_model_state(folder: Path) -> dict[str, Tensor]:
    """Return the model's state dict of a checkpoint, on the CPU; raises UserError when any of its files is damaged."""
    _require_whole(folder)
    return _tensors(folder)


def _tensors(folder: Path) -> dict[str, Tensor]:
    with utf8_path(folder / FILES[0]) as path:
        return load_file(path)


def newest(work_dir: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None. Reports on stderr which damaged ones it skips."""
    _recover(work_dir / "checkpoints")
    for _, folder in _numbered(work_dir / "checkpoints"):
        if damage := _damage(folder):
            print(f"{damage}; skipping this checkpoint", file=sys.stderr)
        else:
            return folder
    return None


def mark_best(work_dir: Path, iteration: int, figure: float) -> None:
    """Record in best.json that the checkpoint after `iteration` iterations is the best one, with its mIoU (0..1)."""
    write(work_dir / "best.json", json.dumps({"iteration": iteration, "mIoU": figure}) + "\n")


def best(work_dir: Path) -> Path | None:
    """Return the checkpoint recorded as the best, None when there is none or it was removed."""
    _recover(work_dir / "checkpoints")
    folder, _ = _best(work_dir)
    return folder if folder and folder.is_dir() else None


def standing(folder: Path) -> str:
    """Return a phrase for a checkpoint of a run: "the run's best" with its mIoU, or "the run's newest"."""
    found, figure = _best(folder.parents[1])
    return f"the run's best, mIoU {100 * figure:.2f}" if found == folder else "the run's newest; no best recorded"


def _best(work_dir: Path) -> tuple[Path | None, float]:
    """Return the checkpoint that best.json names, which may have been removed, and its mIoU (0..1)."""
    try:
        record = json.loads((work_dir / "best.json").read_text(encoding="utf-8"))
        return folder_of(work_dir, int(record["iteration"])), float(record["mIoU"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, 0.0


def prune(work_dir: Path, keep: int, iteration: int) -> None:
    """Remove all but the best checkpoint and the `keep` newest up to `iteration`, the one just saved.

    Later ones are removed because resume found them damaged; leftovers of interrupted saves are also removed.
    """
    folders = _numbered(work_dir / "checkpoints")
    kept = [folder for number, folder in folders if number <= iteration][:keep]
    extra = [folder for _, folder in folders if folder not in kept and folder != best(work_dir)]
    for folder in (*extra, *(work_dir / "checkpoints").glob(".*.tmp")):
        with contextlib.suppress(OSError):  # an interrupted removal leaves nothing that looks complete
            (folder / MANIFEST).unlink()
        shutil.rmtree(folder, ignore_errors=True)


def _separate(model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, contiguous, without shared memory, as safetensors requires."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.items():
        tensor = tensor.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return tensors


def _beside(folder: Path) -> tuple[Path, Path]:
    """Return the temporary names of the checkpoint being written and of the one it replaces."""
    return folder.with_name(f".{folder.name}.new.tmp"), folder.with_name(f".{folder.name}.old.tmp")


def _recover(folder: Path) -> None:
    """Restore the names of checkpoints in a folder after `save` was killed between its renames."""
    for path in folder.glob(".iter_*.old.tmp"):
        place = folder / path.name.removeprefix(".").removesuffix(".old.tmp")
        for left in _beside(place):
            if not place.exists() and not _damage(left):
                with contextlib.suppress(OSError):  # a read-only folder, or another process was faster
                    left.rename(place)


def _text(manifest: Any) -> str:
    return json.dumps(manifest, indent=1) + "\n"


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """Return (iteration, checkpoint) of all checkpoints in the folder, newest first."""
    found = [(re.fullmatch(r"iter_(\d+)", path.name), path) for path in folder.glob("iter_*")]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def _damage(folder: Path) -> str | None:
    """Return the fault of a checkpoint, naming the file, or None when it is complete."""
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text)
        if text != _text(manifest):
            return f"{path}: damaged"
        if manifest["format"] != FORMAT:
            return f"{path}: format {manifest['format']!r} instead of {FORMAT}"
        for name in FILES:
            path = folder / name
            listed = manifest["files"][name]
            if path.stat().st_size != listed["size"]:
                return f"{path}: has {path.stat().st_size} bytes instead of {listed['size']}"
            if sha256(path) != listed["sha256"]:
                return f"{path}: damaged, its SHA-256 is not the one in {MANIFEST}"
    except FileNotFoundError:
        return f"{path}: missing"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError):
        return f"{folder / MANIFEST}: damaged"
    return None


def _require_whole(folder: Path) -> None:
    _recover(folder.parent)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such checkpoint; {_instead(folder)}")
    if damage := _damage(folder):
        raise UserError(f"{damage}; {_instead(folder)}")


def _instead(folder: Path) -> str:
    """Return the remedy: the newest other complete checkpoint in the folder of `folder`."""
    others = (path for _, path in _numbered(folder.parent) if path.name != folder.name and not _damage(path))
    other = next(others, None)
    return f"use {other} instead" if other else "there is no other complete checkpoint: train again"
