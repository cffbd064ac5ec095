"""Functions in a user's own file, `file.py:function`. The file is imported only where the user names it."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from segcore.errors import UnnamedFileError, UserError

FROM_FILE = "segcore_config_"
"""How the module name of an imported file begins."""
_REFERENCE = re.compile(r".+\.py(:\w+)?")


class Stored(str):
    """A `file.py:function`, or the name of a CSV file, that a run or checkpoint stores. It is text: no file is read."""


def is_reference(text: str) -> bool:
    """Return whether a setting is a `file.py:function`."""
    return _REFERENCE.fullmatch(text) is not None


def check_reference(setting: str, value: str | None, names: Iterable[str] = ()) -> None:
    """Raise UserError unless the value of a setting is None, one of `names` or a `file.py:function`."""
    if value is not None and value not in names and not is_reference(value):
        choices = [*filter(None, [", ".join(names)]), "file.py:function"]
        raise UserError(f"{setting} is {value!r}; it must be {' or '.join(choices)}")


def load_function(setting: str, reference: str) -> Callable[..., Any]:
    """Return the function that a setting names; its file is imported. What it raises becomes a UserError.

    Raises UserError when the reference comes from a stored run, the file cannot be run or lacks the function.
    """
    if isinstance(reference, Stored):
        raise UnnamedFileError(
            f"{setting} {reference} is stored in the run, and a file of yours is imported only if you name it: "
            f"add --{setting} {shlex.quote(reference)}"
        )
    path, name = split_reference(reference)
    if not Path(path).is_file():
        raise UserError(f"{setting} {reference}: there is no file {path}; correct the path")
    name, function = find_function(path, name)

    def call(*args: Any) -> Any:
        try:
            return function(*args)
        except Exception as error:
            raise cannot_run(path, error) from None

    return call


def split_reference(reference: str) -> tuple[str, str]:
    """Return the path and the name of the function, empty if none is named."""
    stem, _, name = reference.rpartition(".py")
    return f"{stem}.py", name.removeprefix(":")


def find_function(path: str, name: str, what: str = "the function") -> tuple[str, Callable[..., Any]]:
    """Return a function that a user's file defines, and its name; without a name the only one. The file is imported.

    Raises UserError, in which the function is called `what`, when there is none of that name.
    """
    module = _import(path, Path(path).stat().st_mtime_ns)
    own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    if not name and len(own) == 1:
        name = own[0]
    if name not in own:
        if not own and (hasattr(module, "_base_") or isinstance(getattr(module, "model", None), dict)):
            raise UserError(f"{path}: is a configuration of MMSegmentation; `segcore import-config` makes one of ours")
        choice = f"{path}:FUNCTION with FUNCTION one of {', '.join(own)}" if own else "a function that the file defines"
        raise UserError(f"{path}{':' * bool(name)}{name}: name {what} as {choice}")
    return name, getattr(module, name)


@lru_cache
def _import(path: str, modified: int) -> ModuleType:
    """Return the module of a file as it was when it was modified."""
    # Of a name that hides no installed module, and registered because dataclasses look their annotations up there.
    spec = importlib.util.spec_from_file_location(f"{FROM_FILE}{Path(path).stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        raise cannot_run(path, error) from None
    return module


def cannot_run(path: str, error: Exception) -> UserError:
    """Return the error about what a user's file raised, naming the innermost of its lines that had a part in it."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == Path(path).resolve()]
    line = lines[-1] if lines else getattr(error, "lineno", "unknown")
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return UserError(f"{path}: cannot be run, line {line}: {kind}{' '.join(str(error).split())}")
