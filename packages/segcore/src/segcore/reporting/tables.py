"""Results as text tables in the published format, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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

HEADINGS = {"steps": "By number of denoising steps", "timestep": "By timestep"}
WITHOUT_IGNORED = "mIoU without ignored"


def summary(results: Results, metrics: Sequence[str] = ("mIoU",)) -> str:
    """Return the table `| aAcc | mIoU | mAcc |` (percent, two decimals) of the configured output.

    Several step entries first get a table with one column each, and one with all means of a metric in one cell, as
    DDPS publishes them: `| mIoU 0,10,19 |` over `| 49.35,49.55,49.66 |`.
    """
    names = ["aAcc", *(f"m{column}" for column in _columns(metrics))]
    if WITHOUT_IGNORED in results.final:
        names.insert(names.index("mIoU") + 1 if "mIoU" in names else 1, WITHOUT_IGNORED)
    final = _table(names, [[_percent(results.final[name]) for name in names]])
    if results.skipped:
        final += (
            f"\n\n{len(results.skipped)} images could not be read and were left out; the first: {results.skipped[0]}"
        )
    if len(results.entries) == 1:
        return f"Summary:\n\n{final}"
    rows = [[name, *(_percent(entry[name]) for entry in results.entries.values())] for name in names]
    steps = _table(["Steps", *results.entries], rows)
    heads = {f"{row[0]} {','.join(results.entries)}": ",".join(row[1:]) for row in rows if row[0] in metrics}
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
    """Write `extra` and the results at full precision (fractions; NaN is null) to `path`, completely or not at all."""
    text = json.dumps({**(extra or {}), **results.to_json()}, indent=1, allow_nan=False)
    write(path, text + "\n")


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
