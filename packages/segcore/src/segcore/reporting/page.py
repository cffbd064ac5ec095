"""The page that shows a run: self-contained HTML."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from segcore.config.schema import Experiment
from segcore.data.layouts import open_dataset
from segcore.evaluation.evaluate import Results
from segcore.reporting.figures import heat, legend, loss_curve, png_data_uri, step_title

SCALE = "Uncertainty is the probability of another class than the predicted one, from 0 (black) to 1 (yellow): "
RAMP = np.tile(np.linspace(0, 1, 200), (12, 1))


def render(
    exp: Experiment, results: Results, baseline: float, notes: list[str], shown: list[dict[str, np.ndarray]], log: Path
) -> str:
    """Return the page: self-contained HTML. `notes` are sentences without their full stops."""
    dataset = open_dataset(exp.data, "val")
    curve = loss_curve(map(json.loads, log.read_text(encoding="utf-8").splitlines()))
    name, miou = results.final_step, results.final["mIoU"]
    figures = [(step_title(entry, results.by), m) for entry, m in results.entries.items()]
    rows = [(entry, f"{m['mIoU']:.1%}", f"{m['aAcc']:.1%}", f"{m['mAcc']:.1%}") for entry, m in figures]
    rows.append(("linear classifier", f"{baseline:.1%}", "", ""))
    present = [k for k in range(len(dataset.classes)) if not np.isnan(float(results.final["IoU"][k]))]
    classes = [(dataset.classes[k], *(f"{float(m['IoU'][k]):.1%}" for _, m in figures)) for k in present]
    panels = "".join(
        '<div class="panels">'
        + "".join(
            f'<figure><img src="{png_data_uri(panel)}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
            for caption, panel in maps.items()
        )
        + "</div>"
        for maps in shown
    )
    return PAGE.format(
        name=html.escape(exp.name),
        miou=f"{miou:.1%}",
        steps=f" at {step_title(name, results.by)}" if name.isdigit() else "",
        notes=".<br>\n".join(html.escape(note) for note in notes),
        scale=f'<p>{SCALE}<img src="{png_data_uri(heat(RAMP))}" alt="0 to 1"></p>' if "uncertainty" in shown[0] else "",
        images=results.images,
        iterations=exp.schedule.iterations,
        train=len(open_dataset(exp.data, "train")),
        figures=_table(("", "mIoU", "aAcc", "mAcc"), rows),
        classes=_table(("IoU", *(entry for entry, _ in figures)), classes),
        curve=curve,
        legend=png_data_uri(legend([dataset.classes[k] for k in present], dataset.palette[present])),
        panels=panels,
    )


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: {miou} mIoU</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1c2430; }}
h1 {{ font-size: 1.6rem; margin-bottom: 0; }}
h2 {{ font-size: 1.15rem; margin: 2rem 0 .5rem; }}
.columns {{ display: flex; flex-wrap: wrap; gap: 2.5rem; align-items: flex-start; }}
.panels {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: .6rem; margin-bottom:
1.6rem; }} figure {{ margin: 0; }} figure img {{ width: 100%; display: block; border-radius: 3px; }} figcaption {{
font-size: .85rem; color: #5a6675; }} table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }} th, td
{{ text-align: right; padding: .15rem .8rem; border-bottom: 1px solid #e2e6ec; }} th:first-child, td:first-child {{
text-align: left; padding-left: 0; }} .legend {{ max-width: 100%; }} </style> <h1>{name}: {miou} mIoU{steps}</h1>
<p>Trained from scratch for {iterations} iterations on {train} generated street scenes, evaluated on {images}
others.<br> {notes}.</p> <div class="columns"> <div><h2>Figures</h2>{figures}<h2>Training</h2>{curve}</div>
<div><h2>Per class</h2>{classes}</div> </div> <h2>Validation images, step by step</h2> <p><img class="legend"
src="{legend}" alt="colors of the classes"></p> {scale} {panels} </html>
"""
