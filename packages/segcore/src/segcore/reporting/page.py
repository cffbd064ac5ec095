"""The result page of a run: self-contained HTML from the template `page.html`."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

import numpy as np

from segcore.config.schema import Experiment
from segcore.data.layouts import open_dataset
from segcore.evaluation.evaluate import Results
from segcore.files import parse_json
from segcore.reporting.figures import colormap, loss_curve, png_data_uri, step_title

RAMP = np.tile(np.linspace(0, 1, 200), (12, 1))


def render(
    exp: Experiment, results: Results, baseline: float, notes: list[str], shown: list[dict[str, np.ndarray]], log: Path
) -> str:
    """Return the page.

    Args:
        results: of the evaluation on the validation set of `exp`.
        baseline: mIoU of the linear classifier, 0..1.
        notes: sentences without final periods.
        shown: per image the panels (H, W, 3) uint8 by caption.
        log: `log.jsonl` of the training.
    """
    dataset = open_dataset(exp.data, "val")
    name, miou = results.final_step, results.final["mIoU"]
    figures = [(step_title(step, results.by), metrics) for step, metrics in results.entries.items()]
    rows = [(step, f"{m['mIoU']:.1%}", f"{m['aAcc']:.1%}", f"{m['mAcc']:.1%}") for step, m in figures]
    rows.append(("linear classifier", f"{baseline:.1%}", "", ""))
    present = [k for k in range(len(dataset.classes)) if not np.isnan(float(results.final["IoU"][k]))]
    classes = [(dataset.classes[k], *(f"{float(m['IoU'][k]):.1%}" for _, m in figures)) for k in present]
    colors = [(dataset.palette[k].tolist(), dataset.classes[k]) for k in present if k != dataset.ignore_index]
    return Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8")).substitute(
        name=escape(exp.name),
        miou=f"{miou:.1%}",
        steps=f" at {step_title(name, results.by)}" if name.isdigit() else "",
        start="on top of its base model" if exp.train.init_from else "from scratch",
        iterations=exp.schedule.iterations,
        train=len(open_dataset(exp.data, "train")),
        images=results.images,
        notes="\n".join(f"<li>{escape(note)}.</li>" for note in notes),
        figures=_table(("", "mIoU", "aAcc", "mAcc"), rows),
        curve=loss_curve(map(parse_json, log.read_text(encoding="utf-8").splitlines())),
        classes=_table(("IoU", *(step for step, _ in figures)), classes),
        legend="\n".join(_color(*pair) for pair in [*colors, ([0, 0, 0], "ignored")]),
        scale=_scale() if any("uncertainty" in panels for panels in shown) else "",
        panels="\n".join(_panels(panels) for panels in shown),
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _color(rgb: Sequence[int], name: str) -> str:
    return f'<li><i style="background: #{bytes(rgb).hex()}"></i>{escape(name)}</li>'


def _scale() -> str:
    ramp = f'<img class="ramp" src="{png_data_uri(colormap(RAMP))}" alt="black to yellow">'
    return f"<p>Uncertainty is the probability of a class other than the predicted one: <nobr>0 {ramp} 1</nobr></p>"


def _panels(panels: dict[str, np.ndarray]) -> str:
    images = (
        f'<figure><img src="{png_data_uri(panel)}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for caption, panel in panels.items()
    )
    return f'<div class="panels">{"".join(images)}</div>'
