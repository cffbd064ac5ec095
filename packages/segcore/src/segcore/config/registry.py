"""Find a configuration: by name, in a Python file, or in the folder of a run."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from segcore.config.data import WITHOUT_FILES
from segcore.config.data_sets import OF_FILES
from segcore.config.exported import read_exported
from segcore.config.options import nearest
from segcore.config.record import SETTINGS, VersionError, from_plain, record_of, settings_of
from segcore.config.schema import Experiment, ModelConfig, Published
from segcore.config.user_code import FROM_FILE, cannot_run, find_function, is_reference, split_reference
from segcore.errors import UnnamedFileError, UserError
from segcore.files import MAX_RECORD, expanded, read_json


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
            found = stored_json(point.value, "verified.json").get(_key(name))
            return replace(rows[_key(name)], sha256=found["sha256"]) if found else rows[_key(name)]
    return None


def is_row(name: str, settings: Mapping[str, Any]) -> bool:
    """Return whether the model and the data set in `settings_of` an experiment are those of the configuration `name`.

    Options change them and keep the name; published figures are those of the row as it is.
    """
    build = experiments().get(_key(name))
    if build is None:
        return False
    row = settings_of(build())
    return bool(settings["model"] == row["model"] and settings["data"]["dataset"] == row["data"]["dataset"])


def stored_json(package: str, name: str) -> dict[str, Any]:
    """Return the object in a JSON file of a method's package, empty where there is none."""
    file = files(package) / name
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def published_files() -> dict[str, str]:
    """Return the row of each published weights file, by the file's name."""
    found: dict[str, str] = {}
    for point in entry_points(group="segcore.methods"):
        rows: dict[str, Published] = importlib.import_module(f"{point.value}.official").PUBLISHED
        for name, row in rows.items():
            file = row.file or (row.url or "").rpartition("/")[2]
            if file:
                found.setdefault(file, name)
    return found


def load_experiment(config: str | Path, package: str | None = None) -> Experiment:
    """Return the configuration that `config` names.

    It is a name, spelled with `-` or `_`, or a part that only one name has; the path of a published configuration, as
    the papers' READMEs write it (`configs/cityscapes/NAME.py`); `file.py:function`, a file of your own, which is
    imported; the folder of a run or checkpoint, or one that `push` wrote, whose settings are read and nothing imported
    for it; or an exported model (.onnx), likewise. `package` is the import package of the method whose names count,
    None for all.
    Raises ValueError naming the nearest configuration when there is none.
    """
    return find_experiment(config, package)[0]


def find_experiment(config: str | Path, package: str | None = None) -> tuple[Experiment, Path | None]:
    """Return what `load_experiment` does, and `config` if it is a run's or checkpoint's folder or an exported file."""
    known, name, path = experiments(package), str(config), expanded(config)
    if _key(name) in known:
        return known[_key(name)](), None
    if path.suffix == ".onnx":
        return read_exported(path)[0], path
    if _is_run(path, known):
        return read_experiment(path, record_of(path).name), path
    if is_reference(name):
        file, function = split_reference(name)
        name = Path(file).stem  # of a published configuration, as the papers have it
        if Path(file).is_file() or _key(name) not in known:
            return _from_file(file, function), None
    matches = [_key(name)] if _key(name) in known else _with_part(name, known)
    if len(matches) != 1:
        raise _unknown(name, matches, known, package)
    return known[matches[0]](), None


def is_config(word: str, package: str | None = None) -> bool:
    """Return whether a word names one configuration in full, or is the folder of a run or an exported model."""
    known, path = experiments(package), expanded(word)
    return _key(word) in known or path.suffix == ".onnx" or _is_run(path, known)


def _is_run(path: Path, known: Iterable[str]) -> bool:
    """Return whether a folder is meant: any but one without settings that has a part of a name, as `cityscapes`."""
    return path.is_dir() and (record_of(path).is_file() or not _with_part(str(path), known))


def _with_part(name: str, known: Iterable[str]) -> list[str]:
    return [row for row in known if _key(name) in row]


def _unknown(name: str, matches: list[str], known: Iterable[str], package: str | None) -> UserError:
    lists = f"`{program(package)} configs` lists all"
    if matches:
        some = ", ".join(sorted(matches, key=len)[:4])
        return UserError(f"{len(matches)} configurations have {name!r} in their names: {some} …; {lists}")
    if "/" in name or os.sep in name:
        return UserError(f"{name}: no such run, checkpoint or configuration file; {lists}")
    where = "" if known else " (no method package is installed)"
    near = nearest(_key(name), known, cutoff=0.3)  # the published names are long
    return UserError(f"there is no configuration {name!r}{where}{near}; {lists}")


def read_experiment(folder: Path, file: str = "experiment.json") -> Experiment:
    """Return the experiment of a run's or checkpoint's folder from its experiment.json, as data.

    Nothing is imported for it: the model's class must be one of an installed method. Raises UserError when the file is
    missing, damaged or of another version, or the model was defined in a user's own file.
    """
    path = folder / file
    try:
        stored = _stored(path)
    except FileNotFoundError:
        raise UserError(f"{folder}: no run or checkpoint (it has no experiment.json); give one, or a name") from None
    except UserError as error:
        if file == SETTINGS:
            raise UserError(f"{error}; name a configuration, and give hub:USER/REPO or the folder as weights") from None
        copy = _intact_copy(folder)
        remedy = f"give {copy}, whose copy is intact, or name the configuration" if copy else "name the configuration"
        raise UserError(f"{error}; {remedy} instead") from None
    name, model = stored["name"], dict(stored["model"])
    kind = model.pop("class")
    module, _, title = kind.partition(":")
    if module.startswith(FROM_FILE):
        file = f"{module.removeprefix(FROM_FILE)}.py"
        config = shlex.join([f"{file}:FUNCTION", str(folder)])
        raise UnnamedFileError(
            f"{path}: its model {title} is defined in a file of yours, which is not imported unless you name it: "
            f"write `{config}` instead of {folder}, with the path of {file}"
        )
    known = model_configs()
    if kind not in known:
        raise UserError(f"{path}: its model {kind} is of no installed method; install it, or name a configuration")
    try:
        if Path(name).name != name or name in ("", "..") or not name.isprintable():  # files are named by it
            raise VersionError(f"name is {name!r}")
        typed, data = from_plain(known[kind], model, "model"), dict(stored["data"])
        if data.get("dataset") in WITHOUT_FILES:  # earlier versions took these settings, and did not read them
            data = {key: value for key, value in data.items() if key not in OF_FILES}
        return cast(Experiment, from_plain(Experiment, {**stored, "data": data, "model": typed}))
    except VersionError as error:
        raise UserError(
            f"{path}: {error}, as in no run of this version; train again, or name a configuration"
        ) from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _stored(path: Path) -> dict[str, Any]:
    """Return the settings in an experiment.json; raises UserError without a remedy when there are none in it."""
    settings: Any = read_json(path, MAX_RECORD).get("experiment")
    match settings:
        case {"name": str(), "model": {"class": str(kind)}, "data": {}} if kind.isprintable():
            return dict(settings)
    what = "damaged (without the settings of a run)" if path.name != SETTINGS else "settings of another program"
    raise UserError(f"{path}: {what}")


def _intact_copy(folder: Path) -> Path | None:
    """Return the newest other checkpoint of the run that has a readable experiment.json."""
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    for copy in sorted(run.glob("checkpoints/iter_*"), key=lambda path: (len(path.name), path.name), reverse=True):
        with contextlib.suppress(OSError, UserError):
            if copy != folder and _stored(copy / "experiment.json"):
                return copy
    return None


def method_packages() -> set[str]:
    """Return the import packages of the installed methods."""
    return {point.value for point in entry_points(group="segcore.methods")}


def model_configs() -> dict[str, type[ModelConfig]]:
    """Return the model dataclasses of the installed methods by `module:name`."""
    experiments()  # imports their configurations
    packages = method_packages()
    found: dict[str, type[ModelConfig]] = {}
    left: list[type[ModelConfig]] = ModelConfig.__subclasses__()
    while left:
        kind = left.pop()
        left += kind.__subclasses__()
        if kind.__module__.partition(".")[0] in packages:
            found[f"{kind.__module__}:{kind.__qualname__}"] = kind
    return found


def program(package: str | None) -> str:
    """Return what the command line of a method's import package is called; None stands for all methods together."""
    return f"{package.removesuffix('_seg')}-seg" if package else "segcore"


def _from_file(path: str, function: str) -> Experiment:
    """Return what a function of a user's file builds; the file is imported."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such configuration file")
    function, build = find_function(path, function, "the configuration")
    try:
        experiment = build()
    except Exception as error:
        raise cannot_run(path, error) from None
    if not isinstance(experiment, Experiment):
        raise UserError(f"{path}:{function}: {function} returned {type(experiment).__name__}, not an Experiment")
    return experiment


def _key(name: str) -> str:
    return name.replace("-", "_")
