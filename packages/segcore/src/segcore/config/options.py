"""Settings by their dotted names, such as `train.batch_size`: list them, read their values, change them.

tyro reads the values by the annotations of the dataclasses, and prints the help; the messages are written here.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import inspect
import io
import math
import shlex
import textwrap
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Union, cast, get_args, get_origin, get_type_hints

from segcore.config.fields import allowed
from segcore.errors import UsageError

Flag = Annotated[bool, "flag"]
"""A switch of a command: `--resume`, without a value. Booleans of a configuration take `True` or `False`."""
Offered = Callable[[type, "dataclasses.Field[Any]"], bool]
"""Whether a command offers a field of a dataclass."""

OF_OTHER_TOOLS = {
    "eval": "metrics are chosen by --evaluate.metrics mIoU",
    "cfg_options": "every setting is an option of its own: --SECTION.FIELD VALUE, such as --optimizer.lr 1e-4",
    "epochs": "write --schedule.epochs",
    "model": "the configuration comes first, without an option: COMMAND CONFIG",
    "config": "the configuration comes first, without an option: COMMAND CONFIG",
    "checkpoint": "the checkpoint follows CONFIG, without an option: COMMAND CONFIG CHECKPOINT",
    "lr": "write --optimizer.lr",
    "batch_size": "write --train.batch-size (all devices together) or --evaluate.batch-size",
    "resume_from": "write --resume; the run's folder is --work-dir",
    "load_from": "write --train.init-from",
    "launcher": "write --gpus N, or start with torchrun",
    "amp": "write --train.precision auto",
    "no_validate": "write --train.evaluate-every 0",
    "deterministic": "a run is repeatable on a CPU without it; the seed is --seed",
    "aug_test": "write --multi-scale, with `test`",
    "tta": "write --multi-scale, with `test`",
    "show_dir": "write --save DIR, with `test`; its report shows images, too",
    "out": "write --save DIR, with `test`, or `predict CONFIG CHECKPOINT INPUT OUTPUT`",
    "format_only": "write --save DIR --label-ids, with `test`",
}
"""What to write instead of an option that other tools have."""


def settings(node: Any, offered: Offered = lambda owner, item: True, prefix: str = "") -> dict[str, Any]:
    """Return the dotted name of every setting below a dataclass instance, and its annotation."""
    found: dict[str, Any] = {}
    hints = get_type_hints(type(node), include_extras=True)
    for item in _fields(node, offered):
        name, value = prefix + item.name, getattr(node, item.name)
        if dataclasses.is_dataclass(value):
            found |= settings(value, offered, f"{name}.")
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for index, part in enumerate(value):
                found |= settings(part, offered, f"{name}.{index}.")
        else:
            found[name] = hints[item.name]
    return found


def _fields(node: Any, offered: Offered) -> list[dataclasses.Field[Any]]:
    return [item for item in dataclasses.fields(node) if offered(type(node), item)]


def change(node: Any, values: Mapping[str, Any]) -> Any:
    """Return a copy of a dataclass instance, or of a tuple of such, with other values by dotted name."""
    parts: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        head, _, rest = name.partition(".")
        parts.setdefault(head, {})[rest] = value
    if isinstance(node, tuple):
        return tuple(change(item, parts.get(str(index), {})) for index, item in enumerate(node))
    new = {head: part[""] if "" in part else change(getattr(node, head), part) for head, part in parts.items()}
    return dataclasses.replace(node, **new)


def read_overrides(default: Any, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the values of `name=value` changes to a dataclass instance, see `Experiment.with_overrides`."""
    known = settings(default)
    given: dict[str, list[str]] = {}
    for text in overrides:
        name, sign, value = text.partition("=")
        if not sign:
            raise UsageError(f"override {text!r} has no '='; write it as name=value")
        name = name.strip().replace("-", "_")
        if name not in known:
            raise UsageError(f"there is no setting {name!r}{nearest(name, known)}")
        given[name] = _parts(name, value, known[name])
    return read(given, known)


def split(
    words: Sequence[str], kinds: Mapping[str, Any], unread: Iterable[str] = ()
) -> tuple[list[str], dict[str, list[str]]]:
    """Return the words of a command line that belong to no option, and the words given to each option.

    `kinds` are the known options, name -> annotation; `unread` those of other commands and models. Raises UsageError
    about the first option that is not among the known ones.
    """
    free: list[str] = []
    given: dict[str, list[str]] = {}
    taking, left = free, math.inf
    for word in words:
        if word.startswith("--"):
            name, sign, value = word[2:].partition("=")
            name = name.replace("-", "_")
            if name not in kinds:
                if name in unread:
                    raise UsageError(f"{word} is not read by this command with this model; leave it out")
                raise unknown(name, kinds)
            taking = given[name] = _parts(name, value, kinds[name]) if sign else []
            left = 0 if sign else _count(kinds[name])
        elif left > 0:
            taking.append(word)
            left -= 1
        else:
            free.append(word)
    return free, given


def read(given: Mapping[str, Sequence[str]], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that the words given to each name stand for, by their annotations.

    Raises UsageError in one line: which option, the value that was given, what is expected.
    """
    values: dict[str, Any] = {name: True for name, words in given.items() if kinds[name] == Flag and not words}
    rest = {name: words for name, words in given.items() if name not in values}
    if not rest:
        return values  # without importing tyro
    import tyro

    fields, args = [], list[str]()
    for index, (name, words) in enumerate(rest.items()):
        option = "--" + name.replace("_", "-")
        fields.append((f"f{index}", Annotated[kinds[name], tyro.conf.arg(name=option[2:])]))
        args += [f"{option}={words[0]}"] if len(words) == 1 else [option, *words]  # a value may begin with a dash
    form = dataclasses.make_dataclass("Values", fields, kw_only=True)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # tyro's own answers are boxes of many lines
            found: Any = tyro.cli(form, args=args, config=(tyro.conf.FlagConversionOff,))
    except SystemExit:
        for name, words in rest.items() if len(rest) > 1 else ():
            read({name: words}, kinds)
        [(name, words), *_] = rest.items()
        wrong = " ".join(["--" + name.replace("_", "-"), *words])
        raise UsageError(f"{wrong}: expected {'no value' if kinds[name] == Flag else allowed(kinds[name])}") from None
    return values | {name: getattr(found, f"f{index}") for index, name in enumerate(rest)}


def _count(kind: Any) -> float:
    """Return how many words a value of an annotation has at most."""
    origin, args = get_origin(kind), get_args(kind)
    if kind == Flag:
        return 0
    if origin is Annotated:
        return _count(args[0])
    if origin in (Union, types.UnionType):
        return max(map(_count, args))
    if origin is tuple:
        return math.inf if Ellipsis in args else len(args)
    return 1


def _parts(name: str, value: str, kind: Any) -> list[str]:
    """Return the words of `name=value`: of a tuple's, parts are separated by commas or spaces."""
    if _count(kind) == 1:
        return [value]
    try:
        words = shlex.shlex(value, posix=True)
        words.whitespace, words.whitespace_split = ", \t\r\n", True
        words.escape = words.commenters = ""  # Windows writes paths with \\, and colors begin with #
        return list(words)
    except ValueError as error:
        raise UsageError(f"{name} cannot be read from {value!r}: {str(error).lower()}") from None


def unknown(name: str, kinds: Iterable[str]) -> UsageError:
    """Return the error about an option that is not among the known ones: what to write instead, or the nearest."""
    option = "--" + name.replace("_", "-")
    if name in OF_OTHER_TOOLS:
        return UsageError(f"there is no option {option}: {OF_OTHER_TOOLS[name]}; `--help` lists all")
    near = nearest(option[2:], (known.replace("_", "-") for known in kinds), "--")
    return UsageError(f"there is no option {option}{near}; `--help` lists all")


def nearest(name: str, known: Iterable[str], sign: str = "", cutoff: float = 0.5) -> str:
    """Return ` (did you mean …?)` with the most similar known name, `sign` in front of it, or nothing."""
    names = sorted(known)
    part = [other for other in names if other.endswith(f".{name}") or other.startswith(f"{name}_")]  # --lr …
    match = part or difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return f" (did you mean {sign}{match[0]}?)" if match else ""


def form(node: Any, offered: Offered = lambda owner, item: True) -> Any:
    """Return a dataclass of the offered fields of a dataclass instance, its values as defaults: tyro shows its help.

    Fields that are keyword-only have a place instead of an option. Fields that hold an `Experiment` add no prefix.
    """
    import tyro

    hints, texts, fields = get_type_hints(type(node), include_extras=True), help_texts(type(node)), list[Any]()
    for item in _fields(node, offered):
        kind, value = hints[item.name], getattr(node, item.name)
        default: Any = dataclasses.field(default=value)
        how: dict[str, Any] = {"help": texts.get(item.name)}
        if dataclasses.is_dataclass(value) and not settings(value, offered):
            continue
        if dataclasses.is_dataclass(value):
            kind, how = form(value, offered), {"name": ""} if item.name == "experiment" else {}
            default = dataclasses.field(default=kind())
        elif kind == Flag:
            kind = tyro.conf.FlagCreatePairsOff[bool]
        elif kind is bool:
            kind = tyro.conf.FlagConversionOff[bool]
        if item.kw_only:
            kind, how["metavar"] = cast(Any, tyro.conf.Positional)[kind], item.name.upper()
            default = default if item.default is not dataclasses.MISSING else dataclasses.field()
        fields.append((item.name, Annotated[kind, tyro.conf.arg(**how)], default))
    fields.sort(key=lambda entry: entry[2].default is not dataclasses.MISSING)
    namespace = {"__doc__": type(node).__doc__}
    return dataclasses.make_dataclass(type(node).__name__, fields, frozen=True, namespace=namespace)


def help_texts(kind: type[Any]) -> dict[str, str]:
    """Return the text below each field of a dataclass."""
    return dict(_help_texts(cast(Any, kind)))


@cache
def _help_texts(kind: type[Any]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        with contextlib.suppress(OSError, TypeError, SyntaxError):
            [node] = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            below: ast.AST | None = None
            for item in reversed(getattr(node, "body", [])):
                text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and below.value.value
                if isinstance(item, ast.AnnAssign) and text:
                    texts[ast.unparse(item.target)] = inspect.cleandoc(str(text)).replace("\n", " ")
                below = item
    return texts
