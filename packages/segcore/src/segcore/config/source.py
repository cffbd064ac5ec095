"""An Experiment as a Python file to edit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from segcore.config.schema import Experiment


def source(exp: Experiment) -> str:
    """Return a Python file whose function `experiment` builds `exp`; fields that have their default are left out."""
    imports: dict[str, set[str]] = {}

    def text(value: Any, indent: str) -> str:
        """Return the expression; on one line where it fits."""
        if isinstance(value, Path):
            imports.setdefault("pathlib", set()).add("Path")
            return f"Path({value.as_posix()!r})"
        inner = indent + "    "
        if dataclasses.is_dataclass(value):
            name = type(value).__name__
            imports.setdefault(type(value).__module__, set()).add(name)
            changed = [f.name for f in dataclasses.fields(value) if getattr(value, f.name) != _default(f)]
            parts = [f"{field}={text(getattr(value, field), inner)}" for field in changed]
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            name, parts = "", [text(item, inner) for item in value]
            parts[-1] += "," if len(parts) == 1 else ""
        else:
            return repr(value)
        line = f"{name}({', '.join(parts)})"
        if len(indent + line) <= 100 and "\n" not in line:
            return line
        return f"{name}(\n" + "".join(f"{inner}{part},\n" for part in parts) + f"{indent})"

    body = text(exp, "    ")
    header = "\n".join(f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(imports.items()))
    return f"{header}\n\n\ndef experiment() -> Experiment:\n    return {body}\n"


def _default(item: dataclasses.Field[Any]) -> Any:
    return item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
