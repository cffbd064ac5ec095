"""`demo`: generate street scenes, train a small model on them, evaluate it, and show it all on one page."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path

import numpy as np
import torch

from segcore.checkpoints import run_checkpoint as checkpoint
from segcore.config.registry import load_experiment
from segcore.config.schema import Experiment
from segcore.data.dataset import Dataset
from segcore.data.layouts import open_dataset
from segcore.data.transforms import normalize
from segcore.demo import toy
from segcore.demo.baseline import fit_linear
from segcore.errors import UserError
from segcore.evaluation.evaluate import Results
from segcore.evaluation.metrics import ConfusionMatrix
from segcore.evaluation.predictor import autocast
from segcore.evaluation.uncertainty import evaluate_uncertainty, predict_uncertainty
from segcore.files import write, writing
from segcore.models.segmentor import Segmentor
from segcore.progress import progress
from segcore.reporting import tables as report
from segcore.reporting.figures import colorize, heat, step_title, strip, write_image
from segcore.reporting.page import render
from segcore.seeds import evaluation_seed
from segcore.training.loop import train

SHOWN = 4
"""Validation images on the page."""
JUDGED = 20
"""Validation images on which the uncertainty is judged: each takes several more runs of the model."""


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
        exp = dataclasses.replace(exp, train=dataclasses.replace(exp.train, init_from=str(base_dir)))
        print(f"the second stage, {exp.name}:")
    results = train(exp, work_dir / "run", device=device, resume=True)
    if results is None:
        raise UserError("train.evaluate_every is 0; the demo needs an evaluation, so give it any other value")
    print("fitting the linear baseline …")
    baseline = linear_baseline(open_dataset(exp.data, "train"), open_dataset(exp.data, "val"))
    model = exp.model.build()
    folder = checkpoint.newest(work_dir / "run")
    assert folder is not None
    model.load_checkpoint(checkpoint.read_model_state(folder))
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
    """Return the experiment whose run `exp` starts from (`train.init_from`: `runs/NAME`), on the same data; or None."""
    folder, _, name = (exp.train.init_from or "").partition("/")
    if folder != "runs":
        return None
    first = load_experiment(name)
    return dataclasses.replace(first, data=dataclasses.replace(first.data, root=exp.data.root))


def linear_baseline(train_set: Dataset, val_set: Dataset) -> float:
    """Return the validation mIoU, a fraction, of a linear classifier on color and position."""
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
    name, miou = results.final_step, results.final["mIoU"]
    steps = f" at {step_title(name, results.by)}" if name.isdigit() else ""
    return (
        f"mIoU{steps}: {miou:.1%}; linear classifier on color and position (quadratic terms): {baseline:.1%}; "
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
        seeds = [evaluation_seed(exp.seed, index)]
        with autocast(device, exp.train.precision):
            steps = model.denoising_trajectory(batch, seeds=seeds)
            answer = model(batch, seeds=seeds)
        truth = colorize(label, dataset.palette, dataset.ignore_index)
        maps = {"input": image, "truth": truth}
        for caption, logits in {**steps, "prediction": answer}.items():
            classes = logits[0].argmax(0).cpu()
            maps[step_title(caption, model.step_unit)] = colorize(
                classes.numpy(), dataset.palette, dataset.ignore_index
            )
        if model.diffusion:
            whole = dataclasses.replace(exp.evaluate, img_scale=None, mode="whole", img_ratios=(1.0,), flip=False)
            [unsure] = predict_uncertainty(
                model, [image], [classes], whole, exp.data, seeds, device=device, precision=exp.train.precision
            )
            maps["uncertainty"] = heat(unsure.cpu().numpy())
            maps["wrong pixels"] = heat((classes.numpy() != label) & (label != dataset.ignore_index))
        shown.append(maps)
    return shown
