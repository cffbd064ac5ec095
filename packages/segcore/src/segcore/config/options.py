"""Words of a command line, or `name=value` texts, to dataclasses; what is wrong with them is told in one line.

tyro reads the words by the dataclass's annotations. Its own answers are boxes of many lines: they are read here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Any
from unittest import mock

import tyro

from segcore.errors import UsageError

MISSING: Any = tyro.MISSING
"""Stands for a value that the words must give."""


def read(kind: type[Any], words: Sequence[str], order: str = "", **how: Any) -> Any:
    """Return the dataclass that the words describe; `how` goes to `tyro.cli`, which prints and exits for `--help`.

    Raises UsageError in one line: which option, the value that was given, what is expected. `order` is what it says to
    somebody whose words lack one that has its place.
    """
    said = io.StringIO()
    help_is_wanted = {"-h", "--help"} & set(words)
    wide = {} if help_is_wanted else {"COLUMNS": "10000"}  # what tyro says must not be broken into lines
    try:
        with contextlib.redirect_stderr(said), mock.patch.dict(os.environ, wide):
            return tyro.cli(kind, args=words, **how)
    except SystemExit as end:
        if not end.code:
            raise
    raise UsageError(_in_a_line(said.getvalue(), words, order))


def _in_a_line(box: str, words: Sequence[str], order: str) -> str:
    """Return what a box of tyro's says about the words."""
    lines = [line.strip("│| ") for line in box.splitlines()[1:]]  # without the title
    lines = [line for line in lines if not set(line) <= set("╰╯─-+'")]
    text = " ".join(lines).split(" For full helptext")[0].split(" Got errors:")[0]
    if found := re.search(r"Error parsing (--\S+): (.*?)( Argument helptext:|$)", text):
        option = found[1]
        usage = next((line for line in lines if line.startswith(f"{option} ")), "").removeprefix(option)
        return f"{_given(option, words)}: {f'expected {_expected(usage)}' if usage else found[2]}"
    if found := re.search(r"Error parsing [\w.]+: (.*)", text):  # a dataclass refused its values
        return found[1]
    if found := re.search(r"invalid choice .* for argument '(--\S+)'. Expected one of \((.*)\)", text):
        choices = found[2].replace("'", "").strip(",")
        return f"{_given(found[1], words)}: expected one of {choices}"
    if found := re.search(r"Missing value for argument '(--\S+)'. Expected (\d+) value", text):
        count = "a value" if found[2] == "1" else f"{found[2]} values"
        return f"{_given(found[1], words)}: expected {count}"
    if text.startswith("Missing from "):
        missing = [line for line in lines if re.fullmatch(r"[A-Z]+", line)]
        return f"missing: {', '.join(missing) or text}; {order}"
    if found := re.match(r"Unrecognized options: (.*)", text):
        extra = found[1].replace(",", "")
        return f"{extra!r} is not expected there; `--help` shows what can be given"
    return text


def _given(option: str, words: Sequence[str]) -> str:
    """Return the option with its values as they were given."""
    name, given = option.replace("_", "-"), list[str]()
    for word in words:
        start, sign, value = word.partition("=")
        if start.replace("_", "-") == name:
            given = [f"{option} {value}"] if sign else [option]
        elif word.startswith("--"):
            if given:
                break
        elif given:
            given.append(word)
    return " ".join(given) or option


def _expected(usage: str) -> str:
    """Return `None or two INT` for tyro's `{None}|{INT INT}`."""
    kinds = re.sub(r"\[(\S+) \[.*?\.\.\.\]\]", r"\1 …", usage.strip()).split("|")
    return " or ".join(kind.strip("{}").replace(",", " or ") for kind in kinds)


def check_names(words: Sequence[str], known: Iterable[str]) -> None:
    """Raise UsageError about the first option in the words that is not among the known names, with the nearest one."""
    names = {name.replace("_", "-") for name in known} | {"help"}
    for word in words:
        name = word.partition("=")[0].removeprefix("--").replace("_", "-")
        if word.startswith("--") and name not in names:
            raise UsageError(f"there is no option --{name}{nearest(name, names, '--')}; `--help` lists all")


def settings(node: Any, prefix: str = "") -> dict[str, bool]:
    """Return the dotted name of every setting below a dataclass instance, and whether it takes several values."""
    found: dict[str, bool] = {}
    for item in dataclasses.fields(node):
        name, value = prefix + item.name, getattr(node, item.name)
        if dataclasses.is_dataclass(value):
            found |= settings(value, f"{name}.")
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for index, rule in enumerate(value):
                found |= settings(rule, f"{name}.{index}.")
        else:
            found[name] = "tuple" in str(item.type)  # the value may be None, so only the annotation tells
    return found


def override(default: Any, overrides: Sequence[str]) -> Any:
    """Return a copy of a dataclass instance with `name=value` changes, see `Experiment.with_overrides`."""
    known = settings(default)
    words: list[str] = []
    for text in overrides:
        name, sign, value = text.partition("=")
        if not sign:
            raise UsageError(f"override {text!r} has no '='; write it as name=value")
        name = name.strip().replace("-", "_")
        if name not in known:
            raise UsageError(f"there is no setting {name!r}{nearest(name, known)}")
        words += _words(name, value, several=known[name])
    return read(type(default), words, default=default, config=(tyro.conf.FlagConversionOff,))


def _words(name: str, value: str, several: bool) -> list[str]:
    """Return the command-line words that set one setting."""
    if not several:
        return [f"--{name}={value}"]  # one word: the value may begin with a dash
    try:
        return [f"--{name}", *shlex.split(value.replace(",", " "))]
    except ValueError as error:
        raise UsageError(f"{name} cannot be read from {value!r}: {str(error).lower()}") from None


def nearest(name: str, known: Iterable[str], sign: str = "", cutoff: float = 0.5) -> str:
    """Return ` (did you mean …?)` with the most similar known name, `sign` in front of it, or nothing."""
    names = sorted(known)
    part = [other for other in names if other.endswith(f".{name}") or other.startswith(f"{name}_")]  # --lr …
    match = part or difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return f" (did you mean {sign}{match[0]}?)" if match else ""
