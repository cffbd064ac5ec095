"""Print the reference of all commands, written from the code: `python scripts/commands.py > docs/commands.md`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, get_args, get_type_hints

from segcore.cli.common import Command
from segcore.cli.demo import Demo
from segcore.cli.main import COMMANDS, NOT_READ
from segcore.config.fields import INFERENCE, TRAIN, allowed, reads
from segcore.config.options import Flag, help_texts
from segcore.config.registry import experiments
from segcore.config.schema import Experiment

INTRO = """\
# Commands

`segcore` knows the configurations of all installed methods; `ddp-seg`, `ddps-seg`, `ddrnet-seg` and `dgmn2-seg`
have the same commands and know those of their own. `COMMAND CONFIG --help` shows the options of a configuration with
its values, which are not always the defaults below.

CONFIG is a name (`segcore configs` lists them) or a unique part of one, the path of a published configuration, your own
`file.py:function`, or what has its own weights, so that CHECKPOINT is left out: the folder of a run or checkpoint,
`hub:USER/REPO`, or an exported file `.onnx`. `segcore --version` prints the version, `segcore --tyro-print-completion
bash` (or zsh, fish) the shell's completion.

`None` is written as it stands. Booleans of a configuration take `True` or `False`; options without a value are
switches. Of several values for one option, the last counts. Exit status: 0, 1 for what has to be mended, 2 for a wrong
command line, 130 after Ctrl-C.

This page is written by `python scripts/commands.py > docs/commands.md`; a test compares it with the code."""
ALL = "all with a model"
SETTINGS = f"""\
## Settings

`train`, `demo` and `configs` read all of them. The last column names the other commands that read a setting; those with
a model are {", ".join(INFERENCE)}. N is the number of one of the configuration's rules, from 0. Outside of the
sections, `--seed` is the number that every random draw of a run follows from."""


def table(*rows: tuple[str, ...]) -> str:
    """Return a table in Markdown; the first row is its head."""
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in (lines[0], " | ".join(["---"] * len(rows[0])), *lines[1:]))


def literal(value: Any) -> str:
    """Return a default value as it is written on the command line, on any system."""
    if isinstance(value, tuple):
        return " ".join(map(literal, value))
    return value.as_posix() if isinstance(value, Path) else str(value)


def row(kind: type[Any], item: dataclasses.Field[Any], prefix: str = "") -> tuple[str, ...]:
    """Return the row of a field: the option or place, what it takes, its default and its text."""
    hint, default = get_type_hints(kind, include_extras=True)[item.name], ""
    if item.default not in (dataclasses.MISSING, (), "") and hint != Flag:
        default = f"`{literal(item.default)}`"
    takes = "" if hint == Flag else allowed(hint).replace("a tuple of ", "").replace("a Path", "a path")
    name = item.name.upper() if item.kw_only else f"--{prefix}{item.name}".replace("_", "-")
    return f"`{name}`", takes, default, help_texts(kind).get(item.name, "").replace("<", "\\<")


def command(name: str, kind: type[Any]) -> Iterator[str]:
    """Yield the paragraphs about a command."""
    hidden = (*("experiment", "folder") * issubclass(kind, Command), *NOT_READ.get(name, ()))
    items = sorted((i for i in dataclasses.fields(kind) if i.name not in hidden), key=lambda item: not item.kw_only)
    configured = issubclass(kind, Command) and kind is not Demo
    places = ["CONFIG"] * configured
    for item in items:
        if item.kw_only:
            required = item.default is dataclasses.MISSING and not (configured and item.name == "checkpoint")
            places.append(item.name.upper() if required else f"[{item.name.upper()}]")
    yield f"## {name}"
    yield f"```text\n{' '.join(['segcore', name, *places, '[OPTIONS]'])}\n```"
    yield inspect.cleandoc(str(kind.__doc__))
    if items:
        yield table((" ", "takes", "default", "meaning"), *(row(kind, item) for item in items))
    if issubclass(kind, Command):
        yield "And the [settings](#settings) that it reads."


def settings(kind: type[Any], prefix: str) -> Iterator[tuple[str, ...]]:
    """Yield the rows of a section's table."""
    hints = get_type_hints(kind)
    for item in dataclasses.fields(kind):
        parts = [part for part in get_args(hints[item.name]) if dataclasses.is_dataclass(part)]
        if parts:
            yield from settings(parts[0], f"{prefix}{item.name}.N.")
            continue
        readers = {name for name in COMMANDS if name not in TRAIN and reads(name, kind, item)}
        words = [ALL] * (readers >= {*INFERENCE}) or [name for name in INFERENCE if name in readers]
        yield *row(kind, item, prefix), ", ".join([*words, *sorted(readers.difference(INFERENCE))])


def sections() -> Iterator[str]:
    """Yield the paragraphs about the settings: sections that all methods share, and the models' own settings."""
    head = ("", "takes", "default", "meaning", "also read by")
    for item in dataclasses.fields(Experiment):
        kind = get_type_hints(Experiment)[item.name]
        if dataclasses.is_dataclass(kind):
            yield f"### {item.name}"
            yield inspect.cleandoc(str(kind.__doc__))
            yield table(head, *settings(kind, f"{item.name}."))
        if item.name == "model":
            for point in sorted(entry_points(group="segcore.methods"), key=lambda point: point.name):
                for own in dict.fromkeys(type(build().model) for build in experiments(point.value).values()):
                    rows = [line for line in settings(own, "model.") if line not in settings(kind, "model.")]
                    yield f"### model: {own.__name__.removesuffix('Config')} of {point.name}-seg"
                    yield inspect.cleandoc(str(own.__doc__))
                    yield table(head, *rows)


def page() -> str:
    """Return the page."""
    paragraphs = [INTRO, *(text for name, kind in COMMANDS.items() for text in command(name, kind)), SETTINGS]
    return "\n\n".join([*paragraphs, *sections()]) + "\n"


if __name__ == "__main__":
    print(page(), end="")
