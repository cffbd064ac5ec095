"""`demo`: generate street scenes, train a small model on them, evaluate it, and show it all on one page."""

from __future__ import annotations

import dataclasses
import html
import importlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from segcore.data import toy
from segcore.data.dataset import Dataset, open_dataset
from segcore.data.transforms import normalize
from segcore.errors import UserError
from segcore.evaluation import report
from segcore.evaluation.baseline import fit_linear
from segcore.evaluation.evaluate import Results
from segcore.evaluation.inference import autocast
from segcore.evaluation.metrics import ConfusionMatrix
from segcore.evaluation.uncertainty import evaluate_uncertainty, predict_uncertainty
from segcore.experiment import Experiment, load_experiment
from segcore.files import write, writing
from segcore.models.segmentor import Segmentor
from segcore.progress import progress
from segcore.seeds import derive
from segcore.training import checkpoint
from segcore.training.log import loss_curve
from segcore.training.loop import train
from segcore.visualize import colorize, entry_title, heat, legend, png_data_uri, strip, write_image

SHOWN = 4
"""Validation images on the page."""
JUDGED = 20
"""Validation images on which the uncertainty is judged: each takes several more runs of the model."""
SCALE = "Uncertainty is the probability of another class than the predicted one, from 0 (black) to 1 (yellow): "
RAMP = np.tile(np.linspace(0, 1, 200), (12, 1))


def run(exp: Experiment, work_dir: Path, *, device: torch.device, package: str | None = None) -> Path:
    """Do all of it below `work_dir` and return the page. What is there already is kept: an interrupted demo goes on.

    An experiment that starts from another one's run has that trained first; then `<package>.demo.measure`, of the
    method's import package, adds figures and sentences of its own.
    """
    with writing(work_dir):
        work_dir.mkdir(parents=True, exist_ok=True)
    exp = prepare(exp, work_dir / "scenes")
    first = first_stage(exp)
    if first is not None:
        base_dir = work_dir / "base"
        if not (base_dir / "results.json").exists():
            print(f"the first stage, {first.name}:")
            train(first, base_dir, device=device, resume=True)
        exp = dataclasses.replace(exp, train=dataclasses.replace(exp.train, init=str(base_dir)))
        print(f"the second stage, {exp.name}:")
    results = train(exp, work_dir / "run", device=device, resume=True)
    if results is None:
        raise UserError("train.evaluate_every is 0; the demo needs an evaluation, so give it any other value")
    print("fitting the linear baseline …")
    baseline = linear_baseline(open_dataset(exp.data, "train"), open_dataset(exp.data, "val"))
    model = exp.model.build()
    folder = checkpoint.newest(work_dir / "run")
    assert folder is not None
    model.load_own(checkpoint.read_model_state(folder))
    judged, notes = judge_uncertainty(model.eval().to(device), exp)
    shown = pictures(model, exp)
    for i, maps in enumerate(shown, 1):
        write_image(work_dir / f"picture_{i}.png", strip(list(maps.values()), list(maps)))
    figures = {"mIoU": results.final["mIoU"], "linear_mIoU": baseline, "iterations": exp.schedule.iterations}
    figures |= judged
    if first is not None:
        added, own = importlib.import_module(f"{package}.demo").measure(model, exp, first, base_dir)
        figures |= {"by_step": {entry: m["mIoU"] for entry, m in results.entries.items()}, **added}
        notes += own
    write(work_dir / "figures.json", json.dumps(figures, indent=1) + "\n")
    page = work_dir / "index.html"
    notes.insert(0, comparison(results, baseline))
    write(page, render(exp, results, baseline, notes, shown, work_dir / "run" / "log.jsonl"))
    print("", report.summary(results), *notes, f"open {page} in a browser", sep="\n\n")
    return page


def prepare(exp: Experiment, scenes: Path) -> Experiment:
    """Generate the scenes if they are not there, and return the experiment on them."""
    toy.complete(scenes)
    return dataclasses.replace(exp, data=dataclasses.replace(exp.data, root=scenes))


def first_stage(exp: Experiment) -> Experiment | None:
    """Return the experiment whose run `exp` starts from (`train.init` is `runs/NAME`), on the same data; or None."""
    folder, _, name = (exp.train.init or "").partition("/")
    if folder != "runs":
        return None
    first = load_experiment(name)
    return dataclasses.replace(first, data=dataclasses.replace(first.data, root=exp.data.root))


def linear_baseline(train_set: Dataset, val_set: Dataset) -> float:
    """Return the validation mIoU, a fraction, of a linear classifier on colour and position."""
    pairs = [train_set.pair(i) for i in range(len(train_set))]
    labels = [label for _, label in pairs if label is not None]
    classes = len(train_set.classes)
    classifier = fit_linear([image for image, _ in pairs], labels, classes, train_set.ignore_index, position=True)
    matrix = ConfusionMatrix(classes, val_set.ignore_index)
    for i in range(len(val_set)):
        matrix.update(classifier.predict(val_set.image(i)), val_set.label(i))
    return float(matrix.compute()["mIoU"])


def comparison(results: Results, baseline: float) -> str:
    """Return one line that holds the model against the linear classifier."""
    name, miou = results.final_entry, results.final["mIoU"]
    steps = f" at {entry_title(name, results.by)}" if name.isdigit() else ""
    return (
        f"mIoU{steps}: {miou:.1%}; linear classifier on colour and position (quadratic terms): {baseline:.1%}; "
        f"ratio {miou / baseline:.2f}"
    )


def judge_uncertainty(model: Segmentor, exp: Experiment) -> tuple[dict[str, float], list[str]]:
    """Return a figure and a sentence on the model's uncertainty; nothing for a model without diffusion."""
    if not model.diffusion:
        return {}, []
    dataset = open_dataset(exp.data, "val")
    dataset = dataclasses.replace(dataset, samples=dataset.samples[:JUDGED])
    with progress("judging the uncertainty") as advance:
        area = evaluate_uncertainty(
            model, dataset, exp.evaluate, exp.data, device=next(model.parameters()).device, seed=exp.seed,
            precision=exp.train.precision, channels_last=exp.train.channels_last, on_progress=advance,
        )  # fmt: skip
    return {"uncertainty_AUROC": area}, [
        f"On {len(dataset)} images its uncertainty separates wrong from right pixels with an AUROC of {area:.3f} "
        "(0.5 is chance, 1 perfect)"
    ]


@torch.no_grad()
def pictures(model: Segmentor, exp: Experiment) -> list[dict[str, np.ndarray]]:
    """Return, for some validation images, the panels by caption: input, truth, every denoising step, prediction.

    A diffusion model's last panels are the uncertainty of the prediction and, to compare, where it is wrong.
    """
    dataset = open_dataset(exp.data, "val")
    device = next(model.parameters()).device
    shown = []
    for index in np.linspace(0, len(dataset) - 1, min(SHOWN, len(dataset))).astype(int).tolist():
        image, label = dataset.image(index), dataset.label(index)
        batch = torch.from_numpy(normalize(image, exp.data.mean, exp.data.std)).permute(2, 0, 1)[None].to(device)
        seeds = [derive(exp.seed, index)]
        with autocast(device, exp.train.precision):
            steps = model.predict_trace(batch, seeds=seeds)
            answer = model(batch, seeds=seeds)
        truth = colorize(label, dataset.palette, dataset.ignore_index)
        maps = {"input": image, "truth": truth}
        for caption, logits in {**steps, "prediction": answer}.items():
            classes = logits[0].argmax(0).cpu()
            maps[entry_title(caption, model.entries_by)] = colorize(
                classes.numpy(), dataset.palette, dataset.ignore_index
            )
        if model.diffusion:
            whole = dataclasses.replace(exp.evaluate, scale=None, mode="whole", ratios=(1.0,), flip=False)
            [unsure] = predict_uncertainty(
                model, [image], [classes], whole, exp.data, seeds, device=device, precision=exp.train.precision
            )
            maps["uncertainty"] = heat(unsure.cpu().numpy())
            maps["wrong pixels"] = heat((classes.numpy() != label) & (label != dataset.ignore_index))
        shown.append(maps)
    return shown


def render(
    exp: Experiment, results: Results, baseline: float, notes: list[str], shown: list[dict[str, np.ndarray]], log: Path
) -> str:
    """Return the page: self-contained HTML. `notes` are sentences without their full stops."""
    dataset = open_dataset(exp.data, "val")
    curve = loss_curve(map(json.loads, log.read_text(encoding="utf-8").splitlines()))
    name, miou = results.final_entry, results.final["mIoU"]
    figures = [(entry_title(entry, results.by), m) for entry, m in results.entries.items()]
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
        steps=f" at {entry_title(name, results.by)}" if name.isdigit() else "",
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
src="{legend}" alt="colours of the classes"></p> {scale} {panels} </html>
"""
