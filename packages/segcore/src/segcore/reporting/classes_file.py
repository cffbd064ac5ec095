"""The file beside masks that says what their values mean."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from segcore.errors import UnreadError, UserError
from segcore.files import reading, regular_file, write

KEYS = {"value", "name", "color"}


def write_classes(path: Path, names: Sequence[str], palette: np.ndarray, ignored: int | None = None) -> None:
    """Write what the values of masks mean: a JSON list of {value, name, color}, the color as [r, g, b] in 0..255.

    `palette` is (K, 3) uint8 in the order of `names`. `ignored` is the value of pixels without a class, if the masks
    can have any; it is listed last, black. A file that is the same already is not touched; another list is replaced
    with a note on stderr. Raises UserError for a file that is no such list, and for one that cannot be read or written.
    """
    rows = [{"value": k, "name": name, "color": palette[k].tolist()} for k, name in enumerate(names)]
    rows += [] if ignored is None else [{"value": ignored, "name": "ignored", "color": [0, 0, 0]}]
    text = "[\n " + ",\n ".join(json.dumps(row) for row in rows) + "\n]\n"
    try:
        with reading(path):  # a file that cannot be read could still be replaced: that takes the folder's permission
            regular_file(path)
            before = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        before = text.encode()
        write(path, text)
    except UnreadError as error:
        raise UnreadError(f"{error}; choose another output folder") from None
    if before == text.encode():
        return
    if not _is_list_of_classes(before):
        raise UserError(f"{path}: is no list of classes and would be overwritten; choose another output folder")
    write(path, text)
    print(f"note: {path} listed other classes; masks from before keep their values", file=sys.stderr)


def _is_list_of_classes(data: bytes) -> bool:
    try:
        rows = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(rows, list) and all(isinstance(row, dict) and row.keys() == KEYS for row in rows)
