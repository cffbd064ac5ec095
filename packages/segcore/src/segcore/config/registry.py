"""Finding a configuration: by name, or in a Python file."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

from segcore.config.options import nearest
from segcore.config.schema import Experiment, Published
from segcore.errors import UserError


def experiments(package: str | None = None) -> dict[str, Callable[[], Experiment]]:
    """Return every named configuration of the installed methods, or of one method's import package only.

    A method announces itself through the entry-point group `segcore.methods`; its module `<package>.configs` has a
    function `experiments()` that maps names to the functions that build them.
    """
    found: dict[str, Callable[[], Experiment]] = {}
    for point in sorted(entry_points(group="segcore.methods"), key=lambda point: point.name):
        if package in (None, point.value):
            found |= importlib.import_module(f"{point.value}.configs").experiments()
    return found


def published(name: str) -> Published | None:
    """Return the published figures and weights of a row, None for a configuration that is not a published one."""
    for point in entry_points(group="segcore.methods"):
        rows: dict[str, Published] = importlib.import_module(f"{point.value}.official").PUBLISHED
        if _key(name) in rows:
            return rows[_key(name)]
    return None


def load_experiment(name: str, package: str | None = None) -> Experiment:
    """Return the configuration of that name, or the one that `file.py:function` builds.

    `name` may be spelled with `-` or `_`. Raises ValueError naming the nearest configuration when there is none.
    """
    if ".py" in name:
        return _from_file(name)
    known = experiments(package)
    if _key(name) not in known:
        where = "" if known else " (no method package is installed)"
        near = nearest(_key(name), known, cutoff=0.3)  # the published names are long
        raise UserError(f"there is no configuration {name!r}{where}{near}; `{program(package)} configs` lists all")
    return known[_key(name)]()


def program(package: str | None) -> str:
    """Return what the command line of a method's import package is called; None stands for all methods together."""
    return f"{package.removesuffix('_seg')}-seg" if package else "segcore"


def _from_file(spec: str) -> Experiment:
    stem, _, function = spec.rpartition(".py")
    path, function = f"{stem}.py", function.removeprefix(":")
    if not Path(path).is_file():
        raise UserError(f"{path}: no such configuration file")
    # Of a name that hides no installed module, and registered because dataclasses look their annotations up there.
    module_spec = importlib.util.spec_from_file_location(f"segcore_config_{Path(path).stem}", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module.__name__] = module
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        raise _cannot_run(path, error) from None
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    if not function and len(own) == 1:
        function = own[0]
    if function not in own:
        choice = (
            f"{path}:FUNCTION with FUNCTION one of {', '.join(own)}" if own else "a function that returns an Experiment"
        )
        raise UserError(f"{spec}: name the configuration as {choice}")
    try:
        experiment = getattr(module, function)()
    except Exception as error:
        raise _cannot_run(path, error) from None
    if not isinstance(experiment, Experiment):
        raise UserError(f"{spec}: {function} returned {type(experiment).__name__}, not an Experiment")
    return experiment


def _cannot_run(path: str, error: Exception) -> UserError:
    """Return the error about what a user's file raised, naming the innermost of its lines that had a part in it."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == Path(path).resolve()]
    line = lines[-1] if lines else getattr(error, "lineno", "unknown")
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return UserError(f"{path}: cannot be run, line {line}: {kind}{' '.join(str(error).split())}")


def _key(name: str) -> str:
    return name.replace("-", "_")
