"""The table of configurations: figures, sizes and weights, as text, JSON or docs/model_zoo.md.

`python -m segcore.config.model_zoo > docs/model_zoo.md` writes the latter.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

from segcore.config.registry import experiments, published, stored_json
from segcore.config.schema import Published

HEADER = """# Model zoo

All published configurations, with mIoU in percent on the validation set as their authors publish it: single scale, and
six scales each also flipped (`--multi-scale`). "Measured by us" and the whole SHA-256 of the weights are what `segcore
verify CONFIG` finds with the data set ([hub.md](hub.md#verify-published-weights)); until then, only the start of the
hash is known that a file's name or page states. Parameters are those that training builds, auxiliary heads included;
crop is height x width. `official` weights are downloaded at the first use. Small models that we trained and measured
ourselves: [CamVid](camvid.md).

This page is made by `python -m segcore.config.model_zoo > docs/model_zoo.md`.
"""


@dataclass(frozen=True)
class Row:
    """A configuration in the table."""

    name: str
    method: str
    parameters: int | None
    """As stored in the method's `parameters.json`; None: not stored."""
    crop: tuple[int, int]
    """Height, width."""
    iterations: int
    published: Published | None
    verified: Mapping[str, Any] = field(default_factory=dict)
    """What `verify` found: the row's entry in the method's `verified.json`; empty: not verified."""

    @property
    def millions(self) -> str:
        return f"{self.parameters / 1e6:.1f} M" if self.parameters else ""

    @property
    def weights(self) -> str:
        return self.published.weights if self.published else ""


def rows(package: str | None = None) -> list[Row]:
    """Return the configurations of all methods, or of one method's import package; no model is built."""
    found = []
    for point in sorted(entry_points(group="segcore.methods"), key=lambda point: point.name):
        if package in (None, point.value):
            counts, verified = stored_json(point.value, "parameters.json"), stored_json(point.value, "verified.json")
            for key, build in experiments(point.value).items():
                exp = build()
                row = (exp.name, point.name, counts.get(key), exp.data.crop, exp.schedule.iterations)
                found.append(Row(*row, published(key), verified.get(key, {})))
    return found


def as_text(table: list[Row]) -> str:
    """Return one line per configuration."""
    lines = []
    for row in table:
        figures = ", ".join(f"{value:.2f} {key}" for key, value in row.published.miou.items()) if row.published else ""
        height, width = row.crop
        parts = (f"mIoU {figures}" * bool(figures), f"(weights: {row.weights})" * bool(row.weights))
        note = f"({row.published.note})" if row.published and row.published.note else ""
        size = f"{row.millions:>8} {f'{height}x{width}':>9} {row.iterations:>7}"
        lines.append(" ".join(filter(None, (f"{row.name:56}", size, *parts, note))).rstrip())
    return "\n".join([f"{'configuration':56} {'params':>8} {'crop':>9} {'iters':>7} published", *lines])


def as_json(table: list[Row]) -> str:
    """Return a JSON list with an object per configuration."""
    return json.dumps([dataclasses.asdict(row) for row in table], indent=1)


def as_markdown(table: list[Row]) -> str:
    """Return the page of the published configurations."""
    text = HEADER
    for method in dict.fromkeys(row.method for row in table):
        text += f"\n## {method}-seg\n\n"
        text += "| configuration | single scale | multi-scale | parameters | crop | iterations | weights | log |"
        text += " measured by us | SHA-256 of the weights | notes |\n|---|---|---|---|---|---|---|---|---|---|---|\n"
        text += "".join(line(row) for row in table if row.method == method and row.published)
        text += _start_weights(f"{method}_seg")
    return text


def _start_weights(package: str) -> str:
    """Return the table of a method's published weights that no configuration evaluates, if it has any."""
    rows: dict[str, Published] = importlib.import_module(f"{package}.official").PUBLISHED
    lines = [
        f"| `official:{name}` | [{row.weights}]({row.url}) | {_sha256(row)} | {row.note} |\n"
        for name, row in rows.items()
        if name not in experiments(package)
    ]
    heading = "\n| start weights, for `--train.init-from` | weights | SHA-256 | notes |\n|---|---|---|---|\n"
    return "".join([heading, *lines]) if lines else ""


def _sha256(theirs: Published, verified: Mapping[str, Any] | None = None) -> str:
    """Return what is known of the hash of the weights, as a cell."""
    if verified:
        return f"`{verified['sha256']}`"
    known = theirs.stated_sha256
    return f"`{known}`{' …' if len(known) < 64 else ''}" if known else ""


def line(row: Row) -> str:
    """Return the line of a published row in the table."""
    theirs = row.published
    assert theirs is not None
    figures = {key: str(value) for key, value in theirs.miou.items()}
    single, multi = figures.pop("single scale", ""), figures.pop("multi scale", "")
    single = single or "; ".join(f"{value} at {key}" for key, value in figures.items()) or "none given"
    address = theirs.url or theirs.page
    weights = f"[{theirs.weights}]({address})" if address else "none"
    log = f"[log]({theirs.log})" if theirs.log else ""
    height, width = row.crop
    cells = (f"`{row.name}`", single, multi, row.millions, f"{height}x{width}", f"{row.iterations:,}", weights, log)
    measured = "; ".join(f"{value:.2f} {key}" for key, value in row.verified.get("miou", {}).items())
    return f"| {' | '.join((*cells, measured, _sha256(theirs, row.verified), theirs.note))} |\n"


if __name__ == "__main__":
    print(as_markdown(rows()), end="")
