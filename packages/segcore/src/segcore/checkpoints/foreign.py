"""Read weights files without executing anything: safetensors, and PyTorch files through a short allow-list."""

from __future__ import annotations

import re
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segcore.checkpoints.manifest import MANIFEST, WEIGHTS
from segcore.checkpoints.pickled import StandIn
from segcore.checkpoints.run_checkpoint import read_model_state
from segcore.checkpoints.tensor_files import load_safetensors, load_torch
from segcore.errors import UserError
from segcore.files import regular_file

WRAPPERS = (
    *("state_dict", "model", "module", "model_state_dict", "net", "network", "params"),
    *("ema", "model_ema", "state_dict_ema"),
)
"""Entries of a training checkpoint that hold the weights or hold such an entry, in the order of preference."""
PREFIXES = (r"((module|_orig_mod)\.)*", *(rf"((module|_orig_mod|model|net)\.){{{n}}}" for n in range(1, 5)))
"""What data parallelism, torch.compile and other programs' modules put before a tensor's name, by preference."""
ACCEPTED = (
    "give a .safetensors or .pth file, a checkpoint folder, a work_dir, `official`, `official:CONFIG` or "
    "hub:USER/REPO; start weights may also be a timm tag"
)


def read_state(path: Path, known: Set[str] = frozenset()) -> dict[str, Tensor]:
    """Return the weights in a `.safetensors` file, a PyTorch file, a checkpoint folder or a pushed one, on the CPU.

    From a file it takes the entry and removes the prefix that yield most of the names `known`, by default the first of
    `WRAPPERS`, or everything, without `module.` and `_orig_mod.`; `ema_*` copies are left out (ddp/SPEC.md section 5).
    Tensors may be backed by the file: do not write to them.
    Raises ValueError when the file is missing, damaged, requires code, or holds anything but dense tensors by name.
    """
    if is_shared(path):
        path /= WEIGHTS
    if path.is_dir():
        return read_model_state(path)
    if not path.exists():
        raise UserError(f"{path}: no such weights file (looked at {path.absolute()}); {ACCEPTED}")
    regular_file(path)
    if kind := _not_weights(path):
        raise UserError(f"{path}: this is {kind}, not weights; delete it and download the actual file")
    try:
        content = load_safetensors(path) if path.suffix == ".safetensors" else load_torch(path, mapped=True)
    except UserError as error:
        raise UserError(f"{error}; download it again, or have its state dict alone saved where it was made") from None
    candidates = (renamed for entry in _entries(content, set()) for renamed in _renamed(entry))
    state = max(candidates, key=lambda names: len(names.keys() & known), default=content)
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path}: holds {_kind(state):.80} instead of tensors by name; give a file with a state dict")
    wrong = [f"{name!r:.80} is {_kind(value)}" for name, value in state.items() if not _is_weight(name, value)]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"{path}: contains entries other than dense tensors by text name: {', '.join(wrong[:3])}{more}; "
            f"give a file that is a state dict or has one under {', '.join(WRAPPERS[:4])} …"
        )
    weights = {name: tensor for name, tensor in state.items() if not name.startswith("ema_")}
    if not weights:
        raise UserError(f"{path}: holds only ema_* copies; give a file with the weights themselves")
    return weights


def is_shared(folder: Path) -> bool:
    """Return whether this is a folder as `push` writes it, or as the hub holds models: with weights, and no run's."""
    others = (MANIFEST, "experiment.json")
    return (folder / WEIGHTS).is_file() and not any((folder / name).exists() for name in others)


def _entries(content: Any, seen: set[int], depth: int = 3) -> Iterator[dict[Any, Any]]:
    """Yield the dictionaries that may hold weights, each once, by preference: what is wrapped, then everything."""
    if isinstance(content, dict) and depth >= 0 and id(content) not in seen:
        seen.add(id(content))
        for wrapper in WRAPPERS:
            yield from _entries(content.get(wrapper), seen, depth - 1)
        yield content


def _renamed(entry: dict[Any, Any]) -> Iterator[dict[Any, Any]]:
    """Yield the entry without each of `PREFIXES` in turn, unchanged where two names would become one."""
    for prefix in PREFIXES:
        names = [re.sub(rf"^{prefix}|(?<=\.)_orig_mod\.", "", key) if isinstance(key, str) else key for key in entry]
        yield dict(zip(names, entry.values(), strict=True)) if len({*names}) == len(names) else entry


def _not_weights(path: Path) -> str:
    """Return what else the file is if that can be told from how it begins, else ""."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    beginnings = {
        "an empty file": rb"$",
        "a web page": rb"\s*<(!doctype|html|\?xml)",
        "a Git LFS pointer": rb"version https://git-lfs",
        "a JSON text": rb"\s*[\[{][\s -~]*$",
    }
    return next((kind for kind, text in beginnings.items() if re.match(text, head, re.IGNORECASE)), "")


def _is_weight(name: object, value: object) -> bool:
    """Return whether this is an ordinary tensor with a printable name: dense, real, with data."""
    if not isinstance(name, str) or not name.isprintable() or not isinstance(value, Tensor):
        return False
    return (
        value.layout == torch.strided and value.device.type == "cpu" and not (value.is_quantized or value.is_complex())
    )


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {'quantized' if value.is_quantized else value.layout} {value.dtype} tensor on {value.device}"
    if isinstance(value, StandIn):
        return value.name
    return f"nothing ({type(value).__name__})" if value == {} else type(value).__name__
