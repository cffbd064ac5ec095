"""Rules that turn a configuration of MMSegmentation into our settings, key by key.

A rule says for each key of a dict what its value means here. A key without a rule, a value that no rule knows and two
keys that contradict each other are refused by name, so that nothing is lost in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from segcore.config.mmseg_read import Table, shown
from segcore.config.schema import ModelConfig
from segcore.errors import UserError

REMEDIES = {
    "AmpOptimWrapper": "write OptimWrapper, and set train.precision afterwards",
    "fp16": "delete it, and set train.precision afterwards",
    "Fp16OptimizerHook": "delete it, and set train.precision afterwards",
    "accumulative_counts": "delete it, and give --batch-size",
    "GradientCumulativeOptimizerHook": "delete it, and give --batch-size",
    "EMAHook": "delete it, and set train.ema to 1 - momentum afterwards",
    "EarlyStoppingHook": "delete it, and set train.patience afterwards",
    "RepeatDataset": "name the data set in it alone, as training counts iterations",
    "ConcatDataset": "name one data set, and set data.also afterwards",
    **dict.fromkeys(
        ("CustomDataset", "BaseSegDataset", "metainfo", "classes"),
        "write it as a published data set, and set data.dataset, data.root and data.classes afterwards",
    ),
    "RandomRotFlip": "delete it, and set data.quarter_turns and data.flip afterwards",
    **dict.fromkeys(
        ("RandomRotate", "RandomCutOut", "CLAHE", "Albu", "RandomMosaic"),
        "delete it, and set data.augment to a function of yours afterwards",
    ),
}
"""What to do about a type or key that no rule knows, although there is an equal or another way here."""


class Is:
    """The value must be one of these: what our code computes, whatever else MMSegmentation has."""

    def __init__(self, *values: Any) -> None:
        self.values = values


class To(NamedTuple):
    """The value is that of a setting of ours (`section.field`); names with `_` in front are for later checks."""

    setting: str
    convert: Callable[[Any], Any] = lambda value: value
    """Returns our value, or NOTHING to leave the setting out; raises ValueError with what is wanted instead."""


class Choice(NamedTuple):
    """Each value that is known stands for some settings of ours."""

    settings: Mapping[Any, Mapping[str, Any]]


class By(NamedTuple):
    """The rules for a dict depend on its value of `key`."""

    key: str
    rules: Mapping[Any, Any]


class Steps(NamedTuple):
    """A list of dicts with a `type` each, in the order of `rules`; those of `needed` must be there."""

    rules: Mapping[str, Any]
    needed: tuple[str, ...] = ()


class Maybe(NamedTuple):
    """The key may be left out, or be None: `default` is then MMSegmentation's value, if the rule needs one."""

    rule: Any
    default: Any = None


class Skip:
    """The value has no influence on results."""


SKIP, NOTHING = Skip(), object()


class Found(NamedTuple):
    """What a method knows about a model's dict."""

    kind: type[ModelConfig]
    rules: Mapping[str, Any]
    settings: Mapping[str, Any] = {}


class Key(NamedTuple):
    """A key of the file."""

    name: str
    """Dotted."""
    where: str
    """`file:line`."""

    def of(self, table: Table, name: str) -> Key:
        dotted = name if name.isidentifier() else repr(name)
        return Key(f"{self.name}.{dotted}".lstrip("."), table.lines.get(name, self.where))

    def refuse(self, value: Any, why: str) -> NoReturn:
        known = (value if isinstance(value, str) else "", self.name.rpartition(".")[2])
        remedy = next((f"; {REMEDIES[name]}" for name in known if name in REMEDIES), "")
        raise UserError(f"{self.where}: {self.name} is {shown(value)}; {why}{remedy}")


@dataclass
class Translation:
    """The settings that were found, with the key that each comes from."""

    settings: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, Key] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    """Names of the keys without influence on results."""
    faults: list[str] = field(default_factory=list)
    """What `read` refused in dicts and lists that it then read on."""

    @contextmanager
    def keep_fault(self) -> Iterator[None]:
        """Note a UserError in `faults`, so that all of a file's are found in one go."""
        try:
            yield
        except UserError as error:
            self.faults.append(str(error))

    def set(self, setting: str, value: Any, key: Key, given: Any) -> None:
        """Note a setting; raises UserError if another key says something else."""
        if setting in self.settings and not same(self.settings[setting], value):
            other = self.keys[setting]
            key.refuse(given, f"it contradicts {other.name} ({other.where})")
        self.settings[setting], self.keys[setting] = value, key

    def read(self, rule: Any, value: Any, key: Key) -> None:
        """Apply a rule to the value of a key. What it does not know is in `faults`, or raises UserError."""
        match rule:
            case Skip():
                self.skipped.append(key.name)
            case Is(values=values):
                if not any(same(value, one) for one in values):
                    key.refuse(value, f"known here: {', '.join(map(shown, values))}")
            case To(setting, convert):
                try:
                    ours = convert(value)
                except (ValueError, TypeError, AttributeError, LookupError) as error:
                    wanted = str(error) if isinstance(error, ValueError) else f"it has no counterpart in {setting}"
                    key.refuse(value, wanted)
                if ours is not NOTHING:
                    self.set(setting, ours, key, value)
            case Choice(settings):
                for setting, ours in _pick(settings, value, key).items():
                    self.set(setting, ours, key, value)
            case By(name, rules):
                table = table_of(value, key)
                part = _pick(rules, table.get(name), key.of(table, name))
                self.read({name: SELECTED, **part} if isinstance(part, Mapping) else part, table, key)
            case Steps():
                self._steps(rule, value, key)
            case Mapping():
                self._dict(rule, table_of(value, key), key)
            case tuple():
                if not isinstance(value, tuple) or len(value) != len(rule):
                    key.refuse(value, f"a list of {len(rule)} is known here")
                for index, (one, item) in enumerate(zip(rule, value, strict=True)):
                    self.read(one, item, Key(f"{key.name}[{index}]", key.where))

    def _dict(self, rules: Mapping[str, Any], table: Table, key: Key) -> None:
        for name in sorted({**table, **rules}, key=lambda name: (name != "type", name in rules)):
            with self.keep_fault():
                self._item(rules, table, name, key.of(table, name))

    def _item(self, rules: Mapping[str, Any], table: Table, name: str, here: Key) -> None:
        rule = rules.get(name)
        if name not in rules:
            here.refuse(table[name], "this key is not understood")
        optional = isinstance(rule, Maybe)
        inner, default = rule if isinstance(rule, Maybe) else (rule, None)
        given = table.get(name) is not None or isinstance(inner, Is | Choice | Skip) or not optional
        if name in table and given:
            self.read(inner, table[name], here)
        elif default is not None:
            self.read(inner, default, here)
        elif not optional and not isinstance(inner, Skip | _Selected):
            raise UserError(f"{here.where}: {here.name} is missing; state it")

    def _steps(self, steps: Steps, value: Any, key: Key) -> None:
        order, last, kinds, before = list(steps.rules), -1, set[Any](), len(self.faults)
        for index, item in enumerate(value if isinstance(value, tuple) else key.refuse(value, "a list is known here")):
            with self.keep_fault():
                here = Key(f"{key.name}[{index}]", getattr(item, "lines", {}).get("type", key.where))
                kind: Any = table_of(item, here).get("type")
                part = _pick(steps.rules, kind, Key(f"{here.name}.type", here.where))
                kinds.add(kind)
                if order.index(kind) <= last:
                    here.refuse(kind, f"it may only come before {order[last]}, and once")
                last = order.index(kind)
                self.read({"type": SELECTED, **part}, item, here)
        for name in steps.needed:
            if name not in kinds and len(self.faults) == before:
                raise UserError(f"{key.where}: {key.name} lacks {name}; without it there is no equal configuration")


class _Selected:
    """A key that has chosen the rules it is among."""


SELECTED = _Selected()


def _pick(options: Mapping[Any, Any], value: Any, key: Key) -> Any:
    """Return the option that a value names."""
    for option, found in options.items():
        if same(option, value):
            return found
    return key.refuse(value, f"known here: {', '.join(map(shown, options))}")


def table_of(value: Any, key: Key) -> Table:
    return value if isinstance(value, Table) else key.refuse(value, "a dict is known here")


def same(one: Any, other: Any) -> bool:
    return bool(one == other) and isinstance(one, bool) is isinstance(other, bool)
