"""`data.labels`: which values or colors of a mask mean which class, as rows `value=name` or in a CSV file."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from segcore.config.data_sets import DATA_SETS, OF_FILES, class_count
from segcore.config.user_code import Stored, is_reference
from segcore.errors import UserError
from segcore.files import expanded, regular_file

if TYPE_CHECKING:
    from segcore.config.schema import Experiment

IGNORED = "ignore"
"""Name of the pixels that loss and metrics leave out."""
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters that a terminal obeys: control characters, and those that turn the direction of the text."""
_KEY = re.compile(r"#[0-9a-f]{6}|\d{1,5}", re.IGNORECASE)


class LabelRow(NamedTuple):
    """A value of the mask files, and what it means."""

    key: int | str
    """The value, 0 to 65535, or a color as `#rrggbb`."""
    name: str
    """Name of the class, or `ignore`."""


def is_csv(text: str) -> bool:
    """Return whether a text is the name of a CSV file."""
    return text.lower().endswith(".csv")


def read_rows(labels: Sequence[str]) -> tuple[str, ...]:
    """Return `data.labels` as rows `value=name`; the name of a CSV file is replaced by the rows in it.

    Raises UserError naming the file and the line that is not `value,name`, and for a name that a run stores.
    """
    if len(labels) != 1 or not is_csv(labels[0]):
        return tuple(labels)
    if isinstance(labels[0], Stored):
        raise UserError(f"data.labels is {labels[0]!r}; stored settings hold rows value=name, and name no file")
    path, rows = expanded(labels[0]), list[str]()
    try:
        regular_file(path)
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, words in enumerate(csv.reader(file), 1):
                words = [word.strip() for word in words]
                if not any(words) or (number == 1 and words[:2] == ["value", "name"]):
                    continue
                if len(words) != 2 or not _KEY.fullmatch(words[0]) or not words[1]:
                    raise UserError(f"{path}, line {number}: is {','.join(words)!r}; write value,name or #rrggbb,name")
                rows.append("=".join(words))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "it is not a CSV file in UTF-8"
        raise UserError(f"{path}: cannot be read ({reason}); set data.labels to a file of value,name rows") from None
    return tuple(rows)


def parse_rows(labels: Sequence[str]) -> list[LabelRow]:
    """Return the rows of `data.labels`, see `read_rows`. Raises UserError for one that is wrong or there twice."""
    rows: dict[int | str, LabelRow] = {}
    for text in read_rows(labels):
        key, sign, name = text.partition("=")
        if not sign or not _KEY.fullmatch(key) or not name.strip() or (key.isdigit() and int(key) > 65535):
            raise UserError(
                f"data.labels has {text!r}; write value=name or #rrggbb=name, such as 1=road, or name a .csv file"
            )
        row = LabelRow(int(key) if key.isdigit() else key.lower(), name.strip())
        if row.key in rows:
            raise UserError(f"data.labels has {key} twice, for {rows[row.key].name!r} and {row.name!r}; keep one")
        rows[row.key] = row
    if len({type(key) for key in rows}) > 1:
        raise UserError("data.labels has both values and colors; give the one that the masks hold")
    return list(rows.values())


def class_names(labels: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the classes, in the order of their first rows."""
    return tuple(dict.fromkeys(row.name for row in parse_rows(labels) if row.name != IGNORED))


def check_classes(classes: Sequence[str], labels: Sequence[str]) -> None:
    """Raise UserError for wrong `data.labels`, other classes there than in `data.classes`, or control characters."""
    names = class_names(labels)
    for name in (*classes, *names):
        if CONTROLS.search(name):
            raise UserError(f"the class name {name!r} has control characters; write it without them")
    if classes and names and sorted(names) != sorted(classes):
        other = ", ".join(sorted({*names} ^ {*classes}))
        raise UserError(f"data.classes and data.labels do not name the same classes: {other}; leave out data.classes")


def with_class_count(exp: Experiment, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return changed settings by dotted name, completed: the number of classes follows from labels or the data set.

    A data set known by name, if it is a new one, also drops what describes the files and colors of the old one.
    """
    names = ("dataset", "add_background_class", "classes", "labels")
    new = {name: values.get(f"data.{name}", getattr(exp.data, name)) for name in names}
    dataset, reset = new["dataset"], dict[str, Any]()
    known = class_count(dataset)
    if known and dataset != exp.data.dataset:
        reset = {f"data.{name}": getattr(type(exp.data), name) for name in (*OF_FILES, "val_seed", "palette")}
        new |= {name: values.get(f"data.{name}", ()) for name in ("classes", "labels")}
    read = dataset == "folder" or dataset in DATA_SETS or is_reference(dataset)
    if not reset and not (read and {"data.classes", "data.labels"} & set(values)):
        return dict(values)
    new["labels"] = read_rows(new["labels"])
    if new["labels"] and "data.classes" not in values:
        new["classes"] = class_names(new["labels"])
    if values.get("data.labels") == () and not new["classes"] and "model.num_classes" not in values:
        raise UserError("data.labels is empty; quote colors, as in '#804080=road': a shell takes # for a comment")
    count = len(new["classes"]) if read and new["classes"] else known or 0
    completed = {"model.num_classes": count + new["add_background_class"], "data.classes": new["classes"]}
    return {**reset, **completed, **values, "data.labels": new["labels"]}
