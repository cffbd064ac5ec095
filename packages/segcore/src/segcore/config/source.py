"""An Experiment as a Python file to edit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from segcore.config.options import help_texts
from segcore.config.schema import Experiment

WIDTH = 120


def source(exp: Experiment, *, comments: bool = False) -> str:
    """Return a Python file whose function `experiment` builds `exp`, its settings grouped by section.

    Settings that have their neutral default are left out, but for those that a reader looks for (`stated`, see
    `segcore.config.fields.setting`). `comments` adds the first sentence about each setting where it fits.
    """
    imports: dict[str, set[str]] = {}

    def text(value: Any, indent: str) -> str:
        """Return the expression: on one line where it fits, but a section with comments with a setting per line."""
        inner, name, notes = indent + "    ", "", dict[str, str]()
        if dataclasses.is_dataclass(value):
            name = type(value).__name__
            module = type(value).__module__
            if module.startswith("segcore.config."):
                module = Experiment.__module__  # has all of ours
            imports.setdefault(module, set()).add(name)
            shown = [item.name for item in dataclasses.fields(value) if _is_shown(item, getattr(value, item.name))]
            parts = [f"{field}={text(getattr(value, field), inner)}" for field in shown]
            about = help_texts(type(value)) if comments and len(parts) > 1 else {}
            notes = {part: about.get(field, "") for part, field in zip(parts, shown, strict=True)}
        elif isinstance(value, tuple):
            parts = [text(item, inner) for item in value]
        elif isinstance(value, Path):
            imports.setdefault("pathlib", set()).add("Path")
            return f"Path({_literal(value.as_posix())})"
        else:
            return _literal(value)
        line = f"{name}({', '.join(parts)}{',' * (not name and len(parts) == 1)})"
        if len(indent + line) <= 100 and "\n" not in line and not any(notes.values()):
            return line
        return f"{name}(\n" + "".join(_line(f"{inner}{part},", notes.get(part, "")) for part in parts) + f"{indent})"

    body = text(exp, "    ")
    standard = "from pathlib import Path\n\n" if imports.pop("pathlib", None) else ""
    header = "\n".join(_import(module, sorted(names)) for module, names in sorted(imports.items()))
    return f"{standard}{header}\n\n\ndef experiment() -> Experiment:\n    return {body}\n"


def _literal(value: Any) -> str:
    text = repr(value)
    if isinstance(value, str) and '"' not in text:
        return f'"{text[1:-1]}"'
    return f"{value:_}" if isinstance(value, int) and abs(value) >= 10_000 else text


def _import(module: str, names: list[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    return line if len(line) <= WIDTH else f"from {module} import (\n" + "".join(f"    {n},\n" for n in names) + ")"


def _line(code: str, note: str) -> str:
    commented = f"{code}  # {note.partition('. ')[0].removesuffix('.')}"
    return f"{commented if note and len(commented) <= WIDTH and chr(10) not in code else code}\n"


def _is_shown(item: dataclasses.Field[Any], value: Any) -> bool:
    """Return whether a setting is written: it differs from its default, is a section, or is looked for."""
    return item.default_factory is not dataclasses.MISSING or value != item.default or bool(item.metadata.get("stated"))
