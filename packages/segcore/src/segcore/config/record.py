"""The record of a run, experiment.json: its settings, versions and git hash, and how two records differ."""

from __future__ import annotations

import dataclasses
import json
import platform
import shlex
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Union, cast, get_args, get_origin, get_type_hints

from segcore.config.label_rows import is_csv
from segcore.config.schema import Experiment, ModelConfig
from segcore.config.user_code import Stored, is_reference
from segcore.environment import git_hash, versions
from segcore.files import read_json


def describe(exp: Experiment) -> dict[str, Any]:
    """Return the resolved settings of a run, the versions of what it runs on and the code's git hash, as plain data."""
    known = {"versions": versions(), "platform": platform.platform(), "git": git_hash()}
    return {"experiment": settings_of(exp), **known}


def settings_of(exp: Experiment) -> dict[str, Any]:
    """Return the settings as plain data, and with the model's the class that they are of."""
    settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(exp), default=str))
    settings["model"] = {"class": f"{type(exp.model).__module__}:{type(exp.model).__qualname__}", **settings["model"]}
    return settings


def flat_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as plain data, see `settings_of`, by their dotted names, `train.batch_size`."""
    flat: dict[str, Any] = {}
    for part, found in settings.items():
        for key, value in flat_settings(found).items() if isinstance(found, dict) else [("", found)]:
            flat[f"{part}.{key}".rstrip(".")] = value
    return flat


def changed_settings(settings: Mapping[str, Any], model: Any = ModelConfig) -> dict[str, Any]:
    """Return those of `flat_settings` that differ from the neutral defaults, or have none; `model`: the model class."""
    neutral = flat_settings(json.loads(json.dumps(_defaults(Experiment) | {"model": _defaults(model)}, default=str)))
    flat = flat_settings(settings)
    return {name: value for name, value in flat.items() if name not in neutral or value != neutral[name]}


def _defaults(kind: Any) -> dict[str, Any]:
    """Return the defaults of a dataclass, also of those in it; a setting without one is left out."""
    found: dict[str, Any] = {}
    for item in dataclasses.fields(kind):
        make: Any = item.default_factory
        value = item.default if make is dataclasses.MISSING else make()
        if value is not dataclasses.MISSING:
            found[item.name] = dataclasses.asdict(cast(Any, value)) if dataclasses.is_dataclass(value) else value
    return found


SETTINGS = "config.json"
"""The file with the settings in a folder that `push` writes."""


def record_of(folder: Path) -> Path:
    """Return the file with the settings in a folder: experiment.json of a run, or config.json as `push` writes it."""
    own, pushed = folder / "experiment.json", folder / SETTINGS
    return pushed if pushed.is_file() and not own.exists() else own


class VersionError(ValueError):
    """A stored setting that is not what this version stores."""


def from_plain(kind: Any, value: Any, name: str = "") -> Any:
    """Return what `settings_of` turned into plain data, by its annotation; the dataclasses check the values themselves.

    A setting that was stored before it existed has its default. Raises VersionError naming one that is unknown, or
    missing without a default.
    """
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints, prefix = get_type_hints(kind), f"{name}." if name else ""
        known = {item.name: item for item in dataclasses.fields(kind)}
        for key in (*known, *value):
            if key not in known:
                raise VersionError(f"{prefix}{key} is unknown")
            if key not in value and known[key].default is known[key].default_factory is dataclasses.MISSING:
                raise VersionError(f"{prefix}{key} is missing")
        return cast(Any, kind)(**{key: from_plain(hints[key], value[key], prefix + key) for key in value})
    for option in get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,):
        if isinstance(value, list) and get_origin(option) is tuple:
            parts = get_args(option)
            parts = parts[:1] * len(value) if Ellipsis in parts else parts
            if len(parts) == len(value):
                return tuple(from_plain(part, item, name) for part, item in zip(parts, value, strict=True))
        if isinstance(value, str) and option is Path:
            return Path(value)
        if isinstance(value, dict) and option is not kind and dataclasses.is_dataclass(option):
            return from_plain(option, value, name)
    is_file = isinstance(value, str) and (is_reference(value) or is_csv(value))
    return Stored(value) if is_file else value


def with_defaults(settings: Mapping[str, Any], exp: Experiment) -> dict[str, Any]:
    """Return stored settings with the defaults of those that they lack because they came later."""
    found = dict(settings)
    for part in dataclasses.fields(exp):
        section, stored = getattr(exp, part.name), settings.get(part.name, {})
        if dataclasses.is_dataclass(section) and isinstance(stored, dict):
            defaults = {item.name: item.default for item in dataclasses.fields(section)}
            known = {name: value for name, value in defaults.items() if value is not dataclasses.MISSING}
            found[part.name] = json.loads(json.dumps(known, default=str)) | stored
    return found


class ConfigDiff(NamedTuple):
    """How the settings that weights depend on differ between the record of a training and a configuration."""

    name: str = ""
    """The configuration of the training, if it is another one."""
    options: str = ""
    """What to write on the command line to have the settings of the training, if they are others."""

    @classmethod
    def of(cls, folder: Path, exp: Experiment) -> ConfigDiff:
        """Compare with the record in a checkpoint's or pushed folder; no difference is known where there is none."""
        try:
            then = with_defaults(read_json(record_of(folder))["experiment"], exp)
            now = settings_of(exp)
            name = "" if then["name"] == now["name"] else str(then["name"])
            if then["model"]["class"] != now["model"]["class"]:
                return cls(name)
            keys = [("model", key) for key in now["model"]] + [("data", key) for key in OF_THE_WEIGHTS]
            if is_reference(now["data"]["dataset"]) and not now["data"]["classes"]:  # those that the function states
                keys.remove(("data", "classes"))
            other = [(part, key) for part, key in keys if then[part][key] != now[part][key]]
            return cls(name, " ".join(_option(f"{part}.{key}", then[part][key]) for part, key in other))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or damaged
            return cls()

    @property
    def remedy(self) -> str:
        """What to do about it, for a message."""
        ways = [f"name the configuration {self.name}" * bool(self.name), f"add {self.options}" * bool(self.options)]
        return ", or ".join(filter(None, ways))

    def notes(self, path: Path) -> list[str]:
        """Return a line about weights that fit the model although some settings differ."""
        return [f"note: {path} was trained with {self.options}"] * bool(self.options)


OF_THE_WEIGHTS = ("dataset", "classes", "add_background_class", "channels", "bit_depth", "mean", "std")
"""Settings of the data that weights are trained for, as they are for all settings of the model."""


def _option(name: str, value: Any) -> str:
    values = value if isinstance(value, list) else [value]
    return " ".join([f"--{name.replace('_', '-')}", *(shlex.quote(str(item)) for item in values)])


def differences(before: Any, after: Any, name: str = "") -> list[str]:
    """Return `name: old -> new` for every setting in which two `describe(…)["experiment"]` differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = dict.fromkeys([*before, *after])
        parts = (differences(before.get(key), after.get(key), f"{name}.{key}".lstrip(".")) for key in keys)
        return [line for part in parts for line in part]
    return [] if before == after else [f"{name}: {before} -> {after}"]
