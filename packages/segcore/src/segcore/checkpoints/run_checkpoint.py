"""Checkpoints: folders `<work_dir>/checkpoints/iter_<N>/` after N finished iterations, each complete or absent.

A checkpoint holds model.safetensors (weights and buffers under the model's own names), state.pt (the rest of the state
that a run needs to continue), experiment.json (settings, versions and git hash) and manifest.json, by which damage to
the other three is found. `save` writes it under a temporary name, syncs it to disk with the manifest last, then renames
it. To save a checkpoint again, it first renames the old one; after a kill between the two renames, readers rename it
back. What is not certainly a checkpoint of this format, or could not be read, is never removed.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from segcore.checkpoints import manifest
from segcore.checkpoints.manifest import FILES, MANIFEST
from segcore.checkpoints.tensor_files import load_safetensors, load_torch
from segcore.errors import UnreadError, UserError
from segcore.files import read_json, sync, umask_permissions, write


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
        umask_permissions(temporary / FILES[0])
        torch.save(dict(state), temporary / FILES[1])
        (temporary / FILES[2]).write_text(json.dumps(experiment, indent=1) + "\n", encoding="utf-8")
        paths = [temporary / name for name in FILES]
        (temporary / MANIFEST).write_text(manifest.text_of(paths), encoding="utf-8")
        for path in (*paths, temporary / MANIFEST, temporary):
            sync(path)
        if os.path.lexists(folder):
            _put_aside(folder, replaced)
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
    model = read_model_state(folder)
    try:
        state, experiment = load_torch(folder / FILES[1]), read_json(folder / FILES[2])
    except UserError as error:
        raise UserError(f"{error}; {_instead(folder)}") from None
    if not isinstance(state, dict):
        raise UserError(f"{folder / FILES[1]}: holds {type(state).__name__}, not a run's state; {_instead(folder)}")
    return Checkpoint(model, state, experiment)


def read_model_state(folder: Path) -> dict[str, Tensor]:
    """Return the model's state dict of a checkpoint, on the CPU; raises UserError when any of its files is damaged."""
    _recover(folder.parent)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such checkpoint; {_instead(folder)}")
    if fault := manifest.damage(folder):
        raise UserError(f"{fault}; {_instead(folder)}")
    try:
        return load_safetensors(folder / FILES[0])
    except UserError as error:
        raise UserError(f"{error}; {_instead(folder)}") from None


def newest(work_dir: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None. Reports on stderr which damaged ones it skips."""
    _recover(work_dir / "checkpoints")
    for _, folder in _numbered(work_dir / "checkpoints"):
        if fault := manifest.damage(folder):
            print(f"{fault}; skipping this checkpoint", file=sys.stderr)
        else:
            return folder
    return None


def mark_best(work_dir: Path, iteration: int, figure: float) -> None:
    """Record in best.json that the checkpoint after `iteration` iterations is the best one, with its mIoU (0..1)."""
    write(work_dir / "best.json", json.dumps({"iteration": iteration, "mIoU": figure}) + "\n")


def best(work_dir: Path) -> Path | None:
    """Return the checkpoint recorded as the best, None when there is none or it was removed.

    Reports on stderr a record that is damaged.
    """
    _recover(work_dir / "checkpoints")
    try:
        folder, _ = _best(work_dir)
    except UserError as error:
        print(f"{error}; using the newest checkpoint, the next evaluation writes it again", file=sys.stderr)
        return None
    return folder if folder and folder.is_dir() else None


def standing(folder: Path) -> str:
    """Return a phrase for a checkpoint of a run: "the run's best" with its mIoU, or "the run's newest"."""
    with contextlib.suppress(UserError):
        found, figure = _best(folder.parents[1])
        if found == folder:
            return f"the run's best, mIoU {100 * figure:.2f}"
    return "the run's newest; no best recorded"


def _best(work_dir: Path) -> tuple[Path | None, float]:
    """Return the checkpoint that best.json names, which may have been removed, and its mIoU (0..1).

    Raises UserError when best.json cannot be read or is damaged.
    """
    path = work_dir / "best.json"
    try:
        record = read_json(path)
        iteration, figure = int(record["iteration"]), float(record["mIoU"])
        if 0 <= iteration < 1 << 63 and 0 <= figure <= 1:
            return folder_of(work_dir, iteration), figure
    except (FileNotFoundError, NotADirectoryError):
        return None, 0.0
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
    raise UserError(f"{path}: damaged (no iteration and mIoU)")


def prune(work_dir: Path, keep: int, iteration: int) -> str:
    """Remove all but the best checkpoint and the `keep` newest up to `iteration`, the one just saved.

    Later ones are removed only if damaged; leftovers of interrupted saves are also removed. Returns a line about those
    that are kept because they could not be read or may not be this program's, "" without any.
    """
    try:
        best_folder, _ = _best(work_dir)
    except UserError as error:
        return f"{error}; no checkpoint is removed before the next evaluation writes it again"
    counted, kept = 0, list[UserError]()
    for number, folder in _numbered(work_dir / "checkpoints"):
        foreign = manifest.foreign(folder)
        if number <= iteration and counted < keep and not foreign:
            counted += 1
        elif folder != best_folder:
            fault = foreign or manifest.damage(folder)
            if isinstance(fault, UnreadError):
                kept.append(fault)
            elif fault or number <= iteration:
                _remove(folder)
    for leftover in (work_dir / "checkpoints").glob(".iter_*.tmp"):
        if isinstance(fault := manifest.damage(leftover), UnreadError):
            kept.append(fault)
        else:
            shutil.rmtree(leftover, ignore_errors=True)
    more = f" and {len(kept) - 3} more" * (len(kept) > 3)
    what = "; ".join(map(str, kept[:3]))
    return f"{what}{more}: kept beyond train.keep_last; remove by hand what is not needed" if kept else ""


def _remove(folder: Path) -> None:
    """Remove a checkpoint, if the folder permits it. One whose removal is interrupted has a temporary name."""
    doomed = folder.with_name(f".{folder.name}.pruned.tmp")
    with contextlib.suppress(OSError):
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _put_aside(folder: Path, replaced: Path) -> None:
    """Rename what has the name of a new checkpoint, to `replaced`; to a name that stays if it may not be removed."""
    if foreign := manifest.foreign(folder):
        names = (folder.with_name(f"{folder.name}.kept{number or ''}") for number in itertools.count())
        replaced = next(path for path in names if not os.path.lexists(path))
        print(f"{foreign}; kept as {replaced}", file=sys.stderr)
    folder.rename(replaced)


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
            if not place.exists() and not manifest.damage(left):
                with contextlib.suppress(OSError):  # a read-only folder, or another process was faster
                    left.rename(place)


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """Return (iteration, checkpoint) of all checkpoints in the folder, newest first."""
    found = [(re.fullmatch(r"iter_(\d+)", path.name), path) for path in folder.glob("iter_*")]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def _instead(folder: Path) -> str:
    """Return the remedy: the newest other complete checkpoint in the folder of `folder`."""
    others = (path for _, path in _numbered(folder.parent) if path.name != folder.name and not manifest.damage(path))
    other = next(others, None)
    return f"use {other} instead" if other else "there is no other complete checkpoint: train again"
