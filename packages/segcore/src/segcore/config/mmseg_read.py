"""Read a configuration file of MMSegmentation, 0.x or 1.x, as data: its text is parsed, and nothing in it executes.

Understood are literals, `dict(…)`, names bound before, arithmetic, lists made of lists and `range`, and `_base_` with
the rules of MMCV and MMEngine, by which a file's dicts are merged into those of its bases (`_delete_` replaces them).
"""

from __future__ import annotations

import ast
import math
import operator
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from segcore.errors import UserError
from segcore.files import reading, regular_file

MAX_BYTES, MAX_DEPTH, MAX_VALUES, MAX_FILES = 1 << 17, 50, 100_000, 64
"""Bytes of a file, levels of nesting, values and files of a configuration; published ones stay far below."""
_NUMBERS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
FLAT = "write its value, or import the copy without bases that MMSegmentation writes to work_dir"
"""What to do about what is no data."""


class Table(dict[str, Any]):
    """A dict of the file, and where each of its keys is written. Lists are tuples."""

    def __init__(self, items: Mapping[str, Any] | None = None, lines: Mapping[str, str] | None = None) -> None:
        super().__init__(items or {})
        self.lines = dict(lines or {})
        """`file:line` of each key."""


def read_config(path: Path) -> tuple[Table, set[str]]:
    """Return the settings of a file and its bases, and the names that are variables: expressions mention them.

    Raises UserError naming file, line and reason for what is more than data, damaged, or too large.
    """
    reader = Reader()
    try:
        return reader.read(path), reader.used
    except RecursionError:
        raise UserError(f"{path}: nested too deeply") from None


class Reader:
    """Reads one file and its bases."""

    def __init__(self) -> None:
        self.used: set[str] = set()
        self.values = self.files = 0
        self.path = Path()
        self.names: dict[str, Any] = {}

    def read(self, path: Path, inside: tuple[Path, ...] = ()) -> Table:
        """Return the file's settings with its bases below; `inside` are the files whose base it is."""
        self.files += 1
        real = Path(os.path.realpath(path))
        if real in inside or self.files > MAX_FILES:
            why = f"leads to more than {MAX_FILES} files" if real not in inside else "is a base of itself"
            raise UserError(f"{path}: {why} by _base_")
        own = self._statements(path)
        bases = own.pop("_base_", ())
        merged = Table()
        for base in (bases,) if isinstance(bases, str) else bases or ():
            if not isinstance(base, str) or not base.endswith(".py") or "://" in base or Path(base).is_absolute():
                raise UserError(f"{own.lines['_base_']}: _base_ is {shown(base)}; give relative paths of .py files")
            below = self.read(Path(os.path.normpath(path.parent / base)), (*inside, real))
            for key in below:
                if key in merged:
                    raise UserError(f"{below.lines[key]}: {key} is in another base too ({merged.lines[key]})")
            merged |= below
            merged.lines |= below.lines
        return self._merge(own, merged)

    def _statements(self, path: Path) -> Table:
        """Return what the assignments of a file bind."""
        self.path, self.names = path, {}
        found = Table()
        for node in parse(path).body:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    self.names[name] = found[name] = self._value(value, 0)
                    found.lines[name] = self._at(node)
                case ast.Expr(value=ast.Constant(value=str())):
                    pass  # a docstring
                case ast.With() | ast.Import() | ast.ImportFrom():
                    self._refuse(
                        node,
                        "imports and `with read_base()`, the new style, are code, which is not executed; "
                        "write plain values and _base_",
                    )
                case _:
                    self._refuse(node, f"only `name = value` is read, and nothing is executed; {FLAT}")
        return found

    def _value(self, node: ast.expr, depth: int) -> Any:
        """Return the value of an expression that is data."""
        self._count(node, 1, depth)
        match node:
            case ast.Constant(value=str() as value) if "{{" in value:
                self._refuse(node, f"{shown(value)} is filled in by MMCV or MMEngine; write the value")
            case ast.Constant(value=bool() | str() | None as value):
                return value
            case ast.Constant(value=int() | float() as value):
                return self._number(node, value)
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return tuple(self._value(item, depth + 1) for item in items)
            case ast.Name(id=name) if name in self.names:
                self.used.add(name)
                return self._copy(node, self.names[name], depth)
            case ast.Dict():
                return self._table(node, zip(node.keys, node.values, strict=True), depth)
            case ast.Call(func=ast.Name(id="dict"), args=[]):
                return self._table(node, [(item.arg, item.value) for item in node.keywords], depth)
            case ast.Call(func=ast.Name(id="range"), keywords=[]) if 1 <= len(node.args) <= 3:
                return self._range(node, [self._value(item, depth + 1) for item in node.args])
            case ast.ListComp(generators=[ast.comprehension(target=ast.Name(id=name), ifs=[], is_async=0) as loop]):
                return self._loop(node, name, self._value(loop.iter, depth + 1), depth)
            case ast.UnaryOp(op=ast.USub()):
                value = self._value(node.operand, depth + 1)
                return -value if _is_number(value) else self._not_data(node)
            case ast.BinOp():
                return self._arithmetic(node, self._value(node.left, depth + 1), self._value(node.right, depth + 1))
        return self._not_data(node)

    def _table(self, node: ast.expr, items: Any, depth: int) -> Table:
        """Return a dict; a key of None stands for `**value`."""
        table = Table()
        for key, part in items:
            value = self._value(part, depth + 1)
            if isinstance(key, ast.expr):
                key = self._value(key, depth + 1)
                key = key if isinstance(key, str) else self._not_data(node)
            new = Table({key: value}, {key: self._at(part)}) if key is not None else value
            if not isinstance(new, Table) or (isinstance(node, ast.Call) and table.keys() & new.keys()):
                self._not_data(part)
            table |= new
            table.lines |= new.lines
        return table

    def _range(self, node: ast.expr, limits: list[Any]) -> tuple[int, ...]:
        if limits[2:] == [0] or not all(type(item) is int and abs(item) < MAX_VALUES for item in limits):
            self._not_data(node)
        self._count(node, len(range(*limits)), 0)
        return tuple(range(*limits))

    def _loop(self, node: ast.ListComp, name: str, items: Any, depth: int) -> tuple[Any, ...]:
        if not isinstance(items, tuple):
            self._not_data(node)
        outer, found = {name: self.names[name]} if name in self.names else {}, []
        for self.names[name] in items:
            found.append(self._value(node.elt, depth + 1))
        self.names.pop(name, None)
        self.names |= outer
        return tuple(found)

    def _arithmetic(self, node: ast.BinOp, left: Any, right: Any) -> Any:
        """Return the result of an operator on two numbers, or of + on two texts or lists."""
        if isinstance(node.op, ast.Add) and type(left) is type(right) and isinstance(left, str | tuple):
            self._count(node, len(left) + len(right), 0)
            return left + right
        if type(node.op) not in _NUMBERS or not (_is_number(left) and _is_number(right)):
            self._not_data(node)
        try:
            return self._number(node, _NUMBERS[type(node.op)](left, right))
        except ArithmeticError as error:
            self._refuse(node, str(error))

    def _number(self, node: ast.expr, value: Any) -> Any:
        if not math.isfinite(value) if isinstance(value, float) else abs(value) >= 1 << 63:
            self._refuse(node, "the number is too large")
        return value

    def _copy(self, node: ast.expr, value: Any, depth: int) -> Any:
        """Return a copy of a value, so that whoever mentions a name has its own, and pays for its size."""
        self._count(node, 1 + (len(value) >> 6 if isinstance(value, str) else 0), depth)
        if isinstance(value, Table):
            return Table({key: self._copy(node, item, depth + 1) for key, item in value.items()}, value.lines)
        return tuple(self._copy(node, item, depth + 1) for item in value) if isinstance(value, tuple) else value

    def _merge(self, own: Table, base: Table) -> Table:
        """Return `base` with the keys of `own`: dicts are merged unless they say `_delete_`, all else replaced."""
        for key, value in own.items():
            replaces = isinstance(value, Table) and key in base and value.pop("_delete_", False)
            if isinstance(value, Table) and key in base and not replaces:
                if not isinstance(base[key], Table):
                    raise UserError(
                        f"{own.lines[key]}: {key} is a dict, but {shown(base[key])} in the base "
                        f"({base.lines[key]}); write _delete_=True in it to replace that"
                    )
                value = self._merge(value, base[key])
            base[key] = value
            base.lines[key] = own.lines[key]
        return base

    def _count(self, node: ast.AST, values: int, depth: int) -> None:
        self.values += values
        if self.values > MAX_VALUES or depth > MAX_DEPTH:
            self._refuse(node, f"more than {MAX_VALUES} values or {MAX_DEPTH} levels of nesting")

    def _at(self, node: ast.AST) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}"

    def _not_data(self, node: ast.AST) -> NoReturn:
        text = ast.unparse(node)
        self._refuse(node, f"`{shown(text)[1:-1]}` is no literal, and nothing is executed; {FLAT}")

    def _refuse(self, node: ast.AST, why: str) -> NoReturn:
        raise UserError(f"{self._at(node)}: {why}")


def parse(path: Path) -> ast.Module:
    """Return the syntax tree of a file of at most MAX_BYTES; raises UserError in one line for anything else."""
    try:
        with reading(path):
            regular_file(path)
            with path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such configuration file") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: larger than {MAX_BYTES >> 10} KiB, as no configuration is")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an invalid escape in a text
            return ast.parse(data.decode("utf-8-sig"))
    except UnicodeError:
        raise UserError(f"{path}: not UTF-8") from None
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno or 1}: not Python ({error.msg})") from None
    except (ValueError, MemoryError, RecursionError):
        raise UserError(f"{path}: not Python, or nested too deeply") from None


def shown(value: Any) -> str:
    """Return a value for a message, in one line and shortened."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} …{text[-1]}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
