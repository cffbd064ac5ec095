"""The page of one run or of several: self-contained HTML from the template `page.html`.

Names of classes, files and folders are untrusted: the template escapes them, and the page's security policy allows the
style and the script of this package and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from segcore.config.registry import is_row, program, published
from segcore.reporting.charts import Line, Panel, calibration_svg, panels_svg
from segcore.reporting.figures import colormap, step_title
from segcore.reporting.run_record import Evaluation, Run, confusions, different_settings, normalized, not_neutral
from segcore.reporting.samples import Picture, data_uris

HERE = Path(__file__).parent
WIDTHS = {"wide": 1060, "narrow": 340}
"""Widths of a chart on a screen and on a phone."""
MATRIX = 24
"""Classes of a confusion matrix; of more, those with the largest confusions."""

RAMP = [f"#{bytes(color).hex()}" for color in colormap(np.linspace(0, 1, 9)[None])[0].tolist()]
"""Colors of confidence 0 to 1."""


@dataclass(frozen=True)
class Card:
    """An image of the page with its panels."""

    name: str
    facts: str
    panels: Mapping[str, Picture]


@dataclass(frozen=True)
class Group:
    """Some images of the page below a heading."""

    title: str
    text: str
    cards: Sequence[Card]
    legend: Sequence[tuple[str, str]] = field(default=())
    """Color and meaning of what the panels mark in addition to the classes."""


def render(runs: Sequence[Run], groups: Sequence[Group], notes: Sequence[str] = (), missing: Sequence[str] = ()) -> str:
    """Return the page of one run, or the page that compares several.

    `notes` are sentences with results, and `missing` those about what the page lacks, on top of the runs' own; both
    without final periods.
    """
    style, script = (Markup((HERE / f"page.{kind}").read_text(encoding="utf-8")) for kind in ("css", "js"))
    uris = iter(data_uris([picture for group in groups for card in group.cards for picture in card.panels.values()]))
    images = [
        (
            group,
            [(card, [(name, picture, next(uris)) for name, picture in card.panels.items()]) for card in group.cards],
        )
        for group in groups
    ]
    several, classes = len(runs) > 1, class_rows(runs)
    return template().render(
        style=style,
        script=script,
        policy=f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'",
        runs=[view(run, number, label) for number, (run, label) in enumerate(zip(runs, labels(runs), strict=True))],
        several=several,
        notes=notes,
        missing=[*(note for run in runs for note in run.notes), *missing],
        charts={name: curves(runs, width) for name, width in WIDTHS.items() if any(r.train or r.val for r in runs)},
        classes=classes,
        changed=different_settings(list(runs)) if several else {},
        other_classes=other_classes(runs),
        images=images,
        commands=commands(runs),
        largest=max((abs(delta) for *_, delta in classes if delta is not None), default=0) or 1,
        ramp=RAMP,
    )


@cache
def template() -> Template:
    """Return the page's template, which escapes what it is given."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "points": points, "value": value_text}
    return environment.get_template("page.html")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def percent(value: float | None, digits: int = 1) -> str:
    """Return a fraction in percent, a dash for None."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def points(value: float | None) -> str:
    """Return a difference of fractions in percentage points, with its sign."""
    return "–" if value is None else f"{100 * value:+.2f}".replace("-", "\N{MINUS SIGN}")


def value_text(value: Any) -> str:
    """Return a setting's value as the command line takes it."""
    if isinstance(value, list):
        return " ".join(map(value_text, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {value_text(item)}" for key, item in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def view(run: Run, number: int, label: str) -> dict[str, Any]:
    """Return what the template shows of a run on its own."""
    found, settings, versions = run.evaluation, run.record["experiment"], run.record.get("versions")
    best = max(run.val, key=lambda record: record["mIoU"], default=None)
    row = published(run.name) if is_row(run.name, settings) else None
    return {
        "name": run.name,
        "label": label,
        "number": number,
        "folder": run.folder and str(run.folder),
        "evaluation": found,
        "where": f"at {step_title(found.main, found.step_unit)}" if found and found.step_unit else "",
        "entries": [(step_title(entry.name, found.step_unit), entry) for entry in found.entries] if found else [],
        "best": best,
        "published": row.miou if row and not label else {},
        "iterations": settings["schedule"].get("iterations"),
        "batch": settings["train"].get("batch_size"),
        "dataset": settings["data"].get("dataset"),
        "facts": facts(run),
        "settings": not_neutral(run),
        "versions": {k: v for k, v in versions.items() if v} if isinstance(versions, dict) else {},
        "sentences": confusions(found) if found else [],
        "matrix": matrix(found) if found and found.confusion else None,
        "calibration": calibration(found) if found and found.calibration else None,
    }


def facts(run: Run) -> dict[str, str]:
    """Return how a run was made, from its record and log, as texts by name."""
    record, found = run.record, {}
    if isinstance(record.get("command"), str):
        found["Command"] = record["command"]
    if isinstance(record.get("device"), str):
        found["Device"] = record["device"]
    rates = [r["images_per_second"] for r in run.train if isinstance(r.get("images_per_second"), float)]
    if rates:
        found["Speed"] = f"{np.median(rates):.1f} images/s (median of the log)"
    before, seconds = 0, 0.0
    for r in run.train:
        seconds += (r["iteration"] - before) * (r["seconds"] if isinstance(r.get("seconds"), float) else 0)
        before = r["iteration"]
    if seconds:
        found["Training time"] = f"{duration(seconds)}, without evaluations"
    memory = [r["memory_mb"] for r in run.train if isinstance(r.get("memory_mb"), float)]
    if memory:
        found["GPU memory"] = f"{max(memory) / 1024:.1f} GiB at most"
    for name, key in (("Code", "git"), ("Platform", "platform")):
        if isinstance(record.get(key), str):
            found[name] = record[key]
    return found


def duration(seconds: float) -> str:
    """Return a time as people say it."""
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def curves(runs: Sequence[Run], width: int) -> Markup:
    """Return the loss and the validation mIoU of the runs over the iterations."""
    panels = []
    for title, mode, key, factor in (("Training loss", "train", "loss", 1), ("Validation mIoU, %", "val", "mIoU", 100)):
        series = [[(r["iteration"], factor * r[key]) for r in getattr(run, mode)] for run in runs]
        lines = [Line(number, points, dots=mode == "val") for number, points in enumerate(series) if points]
        panels += [Panel(title, lines)] if lines else []
    ends = [[(line.points[0][1], line.points[-1][1]) for line in panel.lines] for panel in panels]
    said = ["; ".join(f"from {first:.3g} to {last:.3g}" for first, last in pairs) for pairs in ends]
    label = ". ".join(f"{panel.title}: {text}" for panel, text in zip(panels, said, strict=True))
    return Markup(panels_svg(panels, "iteration", label, width=width))


class ClassRow(NamedTuple):
    """IoU of a class, 0..1; None where it is undefined."""

    name: str
    color: str
    values: list[list[float | None]]
    """By run, of every entry; of several runs, of the main one."""
    delta: float | None
    """The last run's difference to the first."""


def class_rows(runs: Sequence[Run]) -> list[ClassRow]:
    """Return the classes that occur in an evaluation."""
    found = [run.evaluation for run in runs]
    colors: dict[str, str] = {}
    for run in reversed(runs):
        colors |= dict(zip(run.evaluation.classes if run.evaluation else (), run.colors(), strict=False))
    rows = []
    for name in dict.fromkeys(name for evaluation in found if evaluation for name in evaluation.classes):
        values = [_of_class(evaluation, name, several=len(runs) > 1) for evaluation in found]
        if any(value is not None for part in values for value in part):
            first, last = (part[0] if part else None for part in (values[0], values[-1]))
            delta = None if first is None or last is None else last - first
            rows.append(ClassRow(name, colors.get(name, ""), values, delta))
    return rows


def _of_class(found: Evaluation | None, name: str, several: bool) -> list[float | None]:
    """Return a class's IoU by entry, or of the main one alone."""
    if found is None or name not in found.classes:
        return [None] if several else []
    k = found.classes.index(name)
    return [found.final.iou[k]] if several else [entry.iou[k] for entry in found.entries]


def other_classes(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return, where the runs have other classes, those that only some have, by the label of the runs' page."""
    sets = [run.evaluation.classes if run.evaluation else () for run in runs]
    common = set(sets[0]).intersection(*sets[1:])
    found = [[name for name in names if name not in common] for names in sets]
    return [(label, names) for label, names in zip(labels(runs), found, strict=True) if names]


def matrix(found: Evaluation) -> dict[str, Any]:
    """Return the row-normalized confusion matrix of the classes that occur, at most MATRIX: names and rows of cells.

    A cell is (share, level 0..10).
    """
    shares = normalized(found)[:, : len(found.classes)]
    present = np.flatnonzero(shares.sum(1) > 0)
    if len(present) > MATRIX:
        off = shares * (1 - np.eye(len(shares)))
        top = np.argsort(-np.maximum(off.max(1), off.max(0)), kind="stable")
        present = np.sort([k for k in top if k in set(present)][:MATRIX])
    rows = [[(float(shares[g, p]), round(10 * shares[g, p])) for p in present] for g in present]
    left_out = int((normalized(found).sum(1) > 0).sum()) - len(present)
    return {"names": [found.classes[k] for k in present], "rows": rows, "left_out": left_out}


def calibration(found: Evaluation) -> dict[str, Any]:
    """Return the calibration's chart and figures."""
    bins = found.calibration
    assert bins is not None
    total = max(sum(bins.counts), 1)
    confidence, accuracy = (
        sum(n * x for n, x in zip(bins.counts, values, strict=True) if x is not None) / total
        for values in (bins.confidence, bins.accuracy)
    )
    label = f"Accuracy over confidence in {len(bins.counts)} bins; expected calibration error {percent(bins.ece)} %"
    chart = Markup(calibration_svg(bins.counts, bins.confidence, bins.accuracy, label))
    bins_of = zip(bins.counts, bins.confidence, bins.accuracy, strict=True)
    rows = [(n / len(bins.counts), count / total, *means) for n, (count, *means) in enumerate(bins_of)]
    return {"chart": chart, "ece": bins.ece, "confidence": confidence, "accuracy": accuracy, "rows": rows}


def commands(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return what to do next: a purpose and a command line each."""
    found = []
    for label, run in zip(labels(runs), runs, strict=True):
        if run.folder is None:
            continue
        folder, of = shlex.quote(str(run.folder)), f" {label}" if label else ""
        file = run.user_file  # without which a run of a user's own model cannot be used
        own = shlex.quote(f"{file}:FUNCTION")
        config, work_dir = (f"{own} {folder}", f"{own} --work-dir {folder}") if file else (folder,) * 2
        prog = program(run.package)
        found.append((f"Evaluate{of} with calibration", f"{prog} test {config} --calibration"))
        found.append((f"Segment your own photos{' with' * bool(of)}{of}", f"{prog} predict {config} PHOTOS masks"))
        schedule = run.record["experiment"]["schedule"]
        unit = "epochs" if schedule.get("epochs") else "iterations"
        if isinstance(schedule.get(unit), int) and len(runs) == 1:
            longer = f"{prog} train {work_dir} --resume --schedule.{unit} {2 * schedule[unit]}"
            found.append(("Train twice as long, from where it stopped", longer))
            found.append(("Export for ONNX Runtime", f"{prog} export {config} model.onnx"))
            found.append(("Compare with another run", f"{prog} report {folder} OTHER_RUN"))
    return found


def labels(runs: Sequence[Run]) -> list[str]:
    """Return what the page calls each of several runs: A, B, …; nothing for one alone."""
    return [chr(65 + number) for number in range(len(runs))] if len(runs) > 1 else [""]
