"""The manifest of a checkpoint, manifest.json: the size and SHA-256 of its files, by which damage is found.

It also proves that a folder is a checkpoint of this format.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segcore.errors import UnreadError, UserError
from segcore.files import read_json, reading, regular_file, sha256

WEIGHTS = "model.safetensors"
FILES = (WEIGHTS, "state.pt", "experiment.json")
MANIFEST = "manifest.json"
FORMAT = 1


def text_of(paths: Sequence[Path]) -> str:
    """Return the manifest of the written files."""
    return _text({"format": FORMAT, "files": {p.name: {"size": p.stat().st_size, "sha256": sha256(p)} for p in paths}})


def damage(folder: Path) -> UserError | None:
    """Return the fault of a checkpoint, naming the file, or None when it is complete; UnreadError if it may be."""
    path = folder
    try:
        listed = _read(folder)
        for name in FILES:
            path = folder / name
            with reading(path):
                regular_file(path)
                if path.stat().st_size != listed[name]["size"]:
                    return UserError(f"{path}: has {path.stat().st_size} bytes instead of {listed[name]['size']}")
                if sha256(path) != listed[name]["sha256"]:
                    return UserError(f"{path}: damaged, its SHA-256 is not the one in {MANIFEST}")
    except FileNotFoundError:
        return UserError(f"{path}: missing")
    except UserError as error:
        return error
    return None


def foreign(path: Path) -> UnreadError | None:
    """Return why what has the name of a checkpoint must stay, None if its manifest and names prove it to be ours."""
    if path.is_symlink():
        return UnreadError(f"{path}: is a link")
    try:
        _read(path)
        with reading(path):
            others = {file.name for file in path.iterdir() if not file.name.startswith(".")} - {*FILES, MANIFEST}
    except UserError as error:
        return UnreadError(str(error))
    return UnreadError(f"{path / min(others)}: is no file of a checkpoint") if others else None


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the size and SHA-256 of each of FILES; raises UserError naming the fault of the manifest."""
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
        if (form := manifest.get("format")) != FORMAT:
            raise UnreadError(f"{path}: format {str(form)[:20]} instead of {FORMAT}, written by another version")
        listed = {name: {key: manifest["files"][name][key] for key in ("size", "sha256")} for name in FILES}
        if path.read_text(encoding="utf-8") == _text(manifest):
            return listed
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: missing") from None
    except (KeyError, TypeError):
        pass
    raise UserError(f"{path}: damaged")


def _text(manifest: Any) -> str:
    return json.dumps(manifest, indent=1) + "\n"
