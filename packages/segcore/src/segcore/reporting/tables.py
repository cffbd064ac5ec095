"""Results as text tables in the published format, and as JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from segcore.evaluation.calibration import BINS
from segcore.evaluation.evaluate import Results
from segcore.files import write
from segcore.reporting.figures import step_title

COLUMNS = {
    "mIoU": ("IoU", "Acc"),
    "mDice": ("Dice", "Acc"),
    "mFscore": ("Fscore", "Precision", "Recall"),
    "mBIoU": ("BIoU",),
}
"""Name in `evaluate.metrics` -> its columns; aAcc is always reported."""

MAX_CONFUSION = 1000
"""Classes up to which a confusion matrix is written: a million numbers."""
HEADINGS = {"steps": "By number of denoising steps", "timestep": "By timestep"}
WITHOUT_IGNORED = "mIoU without ignored"


def summary(results: Results, metrics: Sequence[str] = ("mIoU",), published: Mapping[str, float] | None = None) -> str:
    """Return the table `| aAcc | mIoU | mAcc |` (percent, two decimals) of the configured output.

    Several step entries first get a table with one column each, and one with all means of a metric in one cell, as
    DDPS publishes them: `| mIoU 0,10,19 |` over `| 49.35,49.55,49.66 |`. `published` holds the authors' mIoU in percent
    by `step_title`; where it has an entry's, the tables show it too.
    """
    names = ["aAcc", *(f"m{column}" for column in _columns(metrics))]
    if WITHOUT_IGNORED in results.final:
        names.insert(names.index("mIoU") + 1 if "mIoU" in names else 1, WITHOUT_IGNORED)
    final = _table(names, [[_percent(results.final[name]) for name in names]])
    if results.skipped:
        final += (
            f"\n\n{len(results.skipped)} images could not be read and were left out; the first: {results.skipped[0]}"
        )
    if results.calibration:
        final += f"\n\nexpected calibration error: {_percent(results.calibration.ece)} % ({BINS} bins)"
    if len(results.entries) == 1:
        return f"Summary:\n\n{final}"
    rows = [[name, *(_percent(entry[name]) for entry in results.entries.values())] for name in names]
    theirs = [(published or {}).get(step_title(name, results.by)) for name in results.entries]
    if any(theirs):
        rows.append(["published mIoU", *("" if value is None else f"{value:.2f}" for value in theirs)])
    shown = {*metrics, "published mIoU"}
    steps = _table(["Steps", *results.entries], rows)
    heads = {f"{row[0]} {','.join(results.entries)}": ",".join(row[1:]) for row in rows if row[0] in shown}
    steps += f"\n\n{_table(list(heads), [list(heads.values())])}"
    if results.steps_taken:
        steps += f"\n\n{list(results.entries)[-1]}: denoising took {results.steps_taken:.2f} steps on average"
    return f"{HEADINGS.get(results.by, 'By entry')}:\n\n{steps}\n\nSummary ({_which(results)}):\n\n{final}"


def _which(results: Results) -> str:
    """Return the title of the entry that counts, with a remark if it is not the configured one."""
    entry, configured = (step_title(name, results.by) for name in (results.final_step, results.configured))
    return entry if configured in (entry, "") else f"{entry}; the model's configured {configured} not evaluated"


def per_class(results: Results, metrics: Sequence[str] = ("mIoU",)) -> str:
    """Return the table `| Class | IoU | Acc |` (percent, two decimals); several step entries get a column each."""
    several = len(results.entries) > 1
    header, columns = ["Class"], [list(results.classes)]
    for name in _columns(metrics):
        for step, entry in results.entries.items():
            header.append(f"{name} {step}" if several else name)
            columns.append([_percent(value) for value in entry[name]])
    return f"per class results:\n\n{_table(header, list(zip(*columns, strict=True)))}"


def write_json(path: Path, results: Results, extra: Mapping[str, Any] | None = None) -> None:
    """Write `extra` and the results at full precision (fractions; NaN is null) to `path`, completely or not at all.

    `confusion` holds, by entry, the numbers of pixels: a row per class of the label, a column per predicted one; it is
    left out above MAX_CONFUSION classes.
    """
    found = {**(extra or {}), **results.to_json()}
    if len(results.classes) <= MAX_CONFUSION:
        found["confusion"] = confusion(results)
    if results.calibration:
        found["calibration"] = results.calibration.to_json()
    text = json.dumps(found, indent=1, allow_nan=False)
    write(path, _NUMBERS.sub(lambda match: " ".join(match[0].split()), text) + "\n")


_NUMBERS = re.compile(r"\[\n[-\d.eE\s,nul]+\]")
"""A list of numbers in indented JSON; a text in it has no line break."""


def confusion(results: Results) -> dict[str, list[list[int]]]:
    """Return the confusion matrices by entry: K rows, labels, of K columns, predictions.

    A single class has two of each, for 0 and 1, see `ConfusionMatrix.compute`.
    """
    count = max(len(results.classes), 2)
    return {entry: matrix[:count, :count].tolist() for entry, matrix in results.confusion.items()}


def write_per_image(path: Path, results: Results) -> None:
    """Write a CSV file with a row per image, completely or not at all: fractions 0..1, and nothing for NaN.

    Columns: name, width, height, pixels (labeled ones), mIoU, aAcc, with early exit steps, and `IoU NAME` of every
    class. All are those of the configured output.
    """
    file, early = io.StringIO(), results.steps_taken is not None
    rows = csv.writer(file, lineterminator="\n")
    columns = ["name", "width", "height", "pixels", "mIoU", "aAcc", *["steps"] * early]
    rows.writerow(columns + [f"IoU {name}" for name in results.classes])
    for image in results.per_image:
        size = [image.name, image.width, image.height, image.pixels]
        figures = [image.miou, image.aacc, *[image.steps_used or math.nan] * early, *image.iou]
        rows.writerow(size + ["" if math.isnan(value) else value for value in figures])
    write(path, file.getvalue())


def _columns(metrics: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(column for metric in metrics for column in COLUMNS[metric]))


def _percent(fraction: Any) -> str:
    """Return 61.5 for 0.615, nan for NaN: the published tables do not pad with zeros."""
    return str(round(float(fraction) * 100, 2))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an ASCII table with centered cells."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = "+-" + "-+-".join("-" * width for width in widths) + "-+"
    head, *body = ("| " + " | ".join(map(str.center, row, widths)) + " |" for row in (header, *rows))
    return "\n".join([rule, head, rule, *body, rule])
