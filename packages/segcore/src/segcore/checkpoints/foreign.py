"""Read weights files without executing anything: safetensors, and PyTorch files through a short allow-list."""

from __future__ import annotations

import contextlib
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from segcore.checkpoints.run_checkpoint import read_model_state
from segcore.errors import UserError

WRAPPERS = ("state_dict", "model", "module")
"""Entries of a training checkpoint that hold the weights, in the order of preference."""
ACCEPTED = (
    "give a .safetensors or .pth file, a checkpoint folder, a work_dir, `official` or `official:CONFIG`; "
    "start weights may also be a timm tag"
)


class NumpyValue:
    """Placeholder for numpy scalars and arrays in a checkpoint: it accepts any arguments and keeps nothing.

    OpenMMLab stores its best score as a numpy scalar and palettes as arrays. Nothing here reads them, and numpy's own
    functions would let a crafted file set a dtype's flags, which numpy does not check.
    """

    def __init__(self, *args: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


_MULTIARRAY = [f"{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")]
_ALLOWED: list[Any] = [(NumpyValue, f"numpy.{name}") for name in ("dtype", "ndarray", *_MULTIARRAY)]
"""The only names other than torch's that a PyTorch file may use. Numpy 1 has them in `core`, numpy 2 in `_core`."""


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the weights in a `.safetensors` file, a PyTorch file or one of our checkpoint folders, on the CPU.

    From a file it takes the `state_dict`, `model` or `module` entry, else everything, without a leading `module.` in
    names and without `ema_*` copies (ddp/SPEC.md section 5). Tensors may be backed by the file: do not write to them.
    Raises ValueError when the file is missing, damaged, requires code, or holds anything but dense tensors by name.
    """
    if path.is_dir():
        return read_model_state(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weights file (looked at {path.absolute()}); {ACCEPTED}")
    if kind := not_weights(path):
        raise UserError(f"{path}: this is {kind}, not weights; delete it and download the actual file")
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for key in WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
            break
    if not isinstance(state, Mapping) or not state:
        raise UserError(f"{path}: holds {_kind(state)} instead of tensors by name; give a file with a state dict")
    wrong = [f"{name!r} is {_kind(value)}" for name, value in state.items() if not _is_weight(name, value)]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"{path}: contains entries other than dense tensors by text name: {', '.join(wrong[:3])}{more}; "
            f"give a file that is a state dict or has one under {', '.join(WRAPPERS)}"
        )
    names = {name: str(name).removeprefix("module.") for name in state}
    return {names[name]: tensor for name, tensor in state.items() if not names[name].startswith("ema_")}


def not_weights(path: Path) -> str:
    """Return "a web page" or "a Git LFS pointer" if the file begins like one, else ""."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    text = re.match(rb"\s*<(!doctype|html|\?xml)|version https://git-lfs", head, re.IGNORECASE)
    return "" if text is None else "a web page" if text[1] else "a Git LFS pointer"


def _read_safetensors(path: Path) -> Any:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or not a safetensors file ({error}); download it again") from None


def _read_torch(path: Path) -> Any:
    """Return the content of a PyTorch file, through the allow-list; executes nothing in it."""
    damaged = f"{path}: damaged, truncated or not a PyTorch weights file; download it again"
    try:
        with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; the error suffices
            mmap = zipfile.is_zipfile(path) and _check_zip(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        if name := _refused(path, str(error)):
            raise UserError(
                f"{path}: refused, nothing was executed: it requires {name}, which weights do not need; "
                "download it again, or ask its authors for a plain state dict, best as safetensors"
            ) from None
        raise UserError(damaged) from None
    except Exception:  # a damaged pickle can fail in any way
        raise UserError(damaged) from None


def _check_zip(path: Path) -> bool:
    """Verify the checksums of a PyTorch zip file, which torch does not; return whether it can be mapped into memory."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        # torch.serialization.set_crc32_options(False) leaves them all 0
        if any(entry.CRC for entry in entries) and (bad := archive.testzip()):
            raise UserError(f"{path}: damaged ({bad!r} fails its checksum); download it again")
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)


def _refused(path: Path, message: str) -> str | None:
    """Return the function or class that the unpickler stopped at, None if it stopped for another reason."""
    if found := re.search(r"GLOBAL ([\w.]+)", message):
        return found[1]
    # Since protocol 4, functions are named by two strings on the stack; torch stops at the first one without naming it.
    strings = [""]
    with contextlib.suppress(Exception), contextlib.ExitStack() as stack:
        file: IO[bytes] = stack.enter_context(path.open("rb"))
        if zipfile.is_zipfile(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            file = stack.enter_context(archive.open(next(n for n in archive.namelist() if n.endswith("/data.pkl"))))
        while True:  # one pickle after the other, until the rest is not a pickle
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "STACK_GLOBAL":
                    return ".".join(strings[-2:])
                if isinstance(argument, str):
                    strings.append(argument)
    return None


def _is_weight(name: object, value: object) -> bool:
    """Return whether this is an ordinary tensor with a text name: dense, real, with data."""
    if not isinstance(name, str) or not isinstance(value, Tensor):
        return False
    return (
        value.layout == torch.strided and value.device.type == "cpu" and not (value.is_quantized or value.is_complex())
    )


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {'quantized' if value.is_quantized else value.layout} {value.dtype} tensor on {value.device}"
    return f"nothing ({type(value).__name__})" if isinstance(value, Mapping) and not value else type(value).__name__
