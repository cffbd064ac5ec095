"""What a setting may hold and which commands read it: metadata of its field, and one check for all dataclasses."""

from __future__ import annotations

import dataclasses
import math
import sys
import types
from collections.abc import Iterator
from functools import cache
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from segcore.errors import UserError

TRAIN = ("train", "demo", "configs")
"""Commands that read every setting."""
INFERENCE = ("test", "predict", "web", "export", "bench")
"""Commands that run a trained model."""
INPUT = (*INFERENCE, "check")
"""Commands that need to know what the images and the classes are."""
BUILD = ("bench",)
"""Commands that read what trained weights are bound to: a run brings it along, so only a new model needs it."""

MOST_CHANNELS = 65535
"""Channels of an image and classes at most: TIFF counts channels in 16 bits, and masks have values of 16 bits."""


def setting(
    default: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    nonempty: bool = False,
    stated: bool = False,
    stepwise: bool = False,
    commands: tuple[str, ...] | None = None,
) -> Any:
    """Return a dataclass field with bounds: least <= value <= most, or above < value < below, for every number in it.

    `nonempty` refuses an empty tuple. `stated` settings are written out by `segcore.config.source` even where they have
    their default. `stepwise` settings are for models that answer in steps. `commands` are the commands that read the
    setting in addition to `TRAIN`; None: those of its dataclass.
    """
    bounds = {"least": least, "above": above, "most": most, "below": below, "commands": commands}
    given: dict[str, Any] = {key: value for key, value in bounds.items() if value is not None}
    return dataclasses.field(
        default=default, metadata=given | {"nonempty": nonempty, "stated": stated, "stepwise": stepwise}
    )


class Section:
    """Base of the configuration dataclasses: whoever makes one has its values checked."""

    section: ClassVar[str] = ""
    """Dotted name of the section in messages and on the command line."""
    commands: ClassVar[tuple[str, ...]] = INFERENCE
    """Commands that read the section's settings in addition to `TRAIN`, unless a field says otherwise."""

    def __post_init__(self) -> None:
        check(self, self.section)


def reads(command: str, owner: type, item: dataclasses.Field[Any]) -> bool:
    """Return whether a command reads a field of the dataclass `owner`."""
    own = item.metadata.get("commands", getattr(owner, "commands", (command,)))
    return command in TRAIN or command in own


_hints = cache(get_type_hints)


def check(node: Any, name: str = "") -> None:
    """Check every field of a dataclass instance, nested ones too; `name` is the dotted name in front.

    Raises UserError naming the field, its value and what is allowed: another type, choice or length, a number out of
    its bounds, or one that is not finite.
    """
    kind: Any = type(node)
    hints = _hints(kind)
    for item in dataclasses.fields(node):
        value, field = getattr(node, item.name), f"{name}.{item.name}".lstrip(".")
        if not fits(value, hints[item.name]):
            raise UserError(f"{field} is {value!r}; it must be {allowed(hints[item.name])}")
        if item.metadata.get("nonempty") and value == ():
            raise UserError(f"{field} is empty; give at least one value")
        for number in _numbers(value):
            if not _inside(number, item.metadata):
                raise UserError(f"{field} is {number}; it must be {_bounds(number, item.metadata)}")
        for key, part in _parts(value):
            check(part, field + key)


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value is of an annotation; an int counts as a float, a bool as neither."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if kind is Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if kind is tuple:
        items = parts[:1] * len(value) if isinstance(value, tuple) and parts[-1] is ... else parts
        return isinstance(value, tuple) and len(value) == len(items) and all(map(fits, value, items))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return hint is Any or isinstance(value, kind or hint)


def allowed(hint: Any) -> str:
    """Return an annotation in words."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        if get_args(parts[1]) == (parts[0], ...):
            return f"one or more of {allowed(parts[0]).replace(' or ', ', ')}"
        return " or ".join(allowed(part) for part in parts)
    if kind is Literal:
        return " or ".join(filter(None, (", ".join(map(str, parts[:-1])), str(parts[-1]))))
    if kind is tuple:
        return f"a tuple of {allowed(parts[0])}, …" if parts[-1] is ... else f"({', '.join(map(allowed, parts))})"
    return _WORDS.get(hint) or f"a {getattr(kind or hint, '__name__', hint)}"


_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", type(None): "None"}


def _numbers(value: Any) -> Iterator[float]:
    """Yield the numbers of a value, those in tuples too."""
    if isinstance(value, tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the dataclass instances that a value is or holds, with what leads to each."""
    if dataclasses.is_dataclass(value):
        yield "", value
    elif isinstance(value, tuple):
        yield from ((f".{index}", item) for index, item in enumerate(value) if dataclasses.is_dataclass(item))


def _inside(number: float, bounds: Any) -> bool:
    return (
        abs(number) <= sys.float_info.max  # finite, and a whole number that becomes a float
        and number >= bounds.get("least", -math.inf)
        and number <= bounds.get("most", math.inf)
        and number > bounds.get("above", -math.inf)
        and number < bounds.get("below", math.inf)
    )


def _bounds(number: float, bounds: Any) -> str:
    """Return the bounds in words."""
    if {"least", "most"} <= set(bounds):
        return f"from {bounds['least']} to {bounds['most']}"
    names = {"least": "at least", "above": "above", "most": "at most", "below": "below"}
    words = [f"{name} {bounds[key]}" for key, name in names.items() if key in bounds]
    if isinstance(number, float) and not {"most", "below"} & set(bounds):
        words.append("finite")
    return " and ".join(words)
