"""`demo`: generate street scenes, train a small model on them, evaluate it, and show the results on one page."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from segcore.checkpoints import run_checkpoint
from segcore.config.registry import load_experiment
from segcore.config.schema import Experiment
from segcore.data.dataset import Dataset
from segcore.data.layouts import open_dataset
from segcore.demo import toy
from segcore.demo.baseline import LinearPixelClassifier, fit_linear
from segcore.evaluation.evaluate import Results, evaluate
from segcore.evaluation.metrics import ConfusionMatrix
from segcore.evaluation.predictor import Predictor
from segcore.evaluation.uncertainty import AUROC, predict_uncertainty
from segcore.files import write, writing
from segcore.models.segmentor import Segmentor
from segcore.models.stepwise import StepwiseSegmentor
from segcore.progress import progress
from segcore.reporting import tables
from segcore.reporting.figures import colorize, colormap, hstack_panels, step_title, write_image
from segcore.reporting.report import write_report
from segcore.reporting.run_record import Evaluation, read_run
from segcore.seeds import evaluation_seed
from segcore.training.loop import train

SHOWN = 4
"""Validation images on the page, spread evenly."""
JUDGED = 20
"""Number of first validation images with a judged uncertainty: each takes several more runs of the model."""


@dataclass
class Answer:
    """A validation image and the predictions that the evaluation counted for it."""

    image: np.ndarray
    """(H, W, 3) uint8."""
    label: np.ndarray
    """(H, W) uint8."""
    classes: Mapping[str, Tensor]
    """Step entry -> (H, W) int64 on the CPU."""
    seed: int
    uncertainty: Tensor | None = None
    """(H, W) float32, 0..1, of the classes at the final step, on the CPU; None for a model without steps."""


def run(exp: Experiment, work_dir: Path, *, device: torch.device, offline: bool = False) -> Path:
    """Run the demo in `work_dir` and return its page. Finished parts are kept, so an interrupted demo continues.

    If the experiment starts from the run of a base model, that model is trained first; `demo.compare` of the method's
    package then adds values and sentences that compare the two.
    """
    with writing(work_dir):
        work_dir.mkdir(parents=True, exist_ok=True)
    toy.generate_missing(work_dir / "scenes")
    exp = replace(exp, data=replace(exp.data, root=work_dir / "scenes"))
    base, base_dir = base_experiment(exp), work_dir / "base"
    if base is not None:
        if not (base_dir / "results.json").exists():
            print(f"training the base model, {base.name}:")
            train(base, base_dir, device=device, resume=True, offline=offline)
        exp = replace(exp, train=replace(exp.train, init_from=str(base_dir)))
        print(f"training on top of it, {exp.name}:")
    train(exp, work_dir / "run", device=device, resume=True, offline=offline)
    newest = run_checkpoint.newest(work_dir / "run")
    assert newest is not None
    iterations = int(newest.name.removeprefix("iter_"))  # of schedule.epochs, or fewer by train.patience
    exp = replace(exp, schedule=replace(exp.schedule, iterations=iterations))
    predictor = Predictor.of(trained_model(exp, work_dir / "run").to(device), exp)
    val_set = open_dataset(exp.data, "val")
    print("fitting the linear baseline …")
    baseline = miou_of(linear_classifier(open_dataset(exp.data, "train")).predict, val_set)

    results, answers = evaluate_and_keep(predictor, val_set, exp.seed)
    step = results.final_step
    figures = {"mIoU": results.final["mIoU"], "linear_mIoU": baseline, "iterations": exp.schedule.iterations}
    notes = [comparison(results, baseline)]
    if isinstance(predictor.model, StepwiseSegmentor):
        judged = [answers[index] for index in sorted(answers) if index < JUDGED]
        figures["uncertainty_AUROC"] = area = auroc(judged, step, val_set.ignore_index)
        notes.append(
            f"On {len(judged)} images its uncertainty separates wrong from right pixels with an AUROC of {area:.3f} "
            "(0.5 is chance, 1 is perfect)"
        )
    if base is not None:
        package = type(exp.model).__module__.partition(".")[0]
        more, sentences = importlib.import_module(f"{package}.demo").compare(predictor, exp, base, base_dir)
        figures |= {"by_step": {step: metrics["mIoU"] for step, metrics in results.entries.items()}, **more}
        notes += sentences
    shown = [panels(predictor, val_set, answers[index], step) for index in shown_indices(len(val_set))]

    for i, maps in enumerate(shown, 1):
        write_image(work_dir / f"panels_{i}.png", hstack_panels(list(maps.values()), list(maps)))
    write(work_dir / "figures.json", json.dumps(figures, indent=1) + "\n")
    page = work_dir / "run" / "report.html"
    record = replace(read_run(work_dir / "run"), evaluation=Evaluation.of(results, "train", exp.schedule.iterations))
    write_report(page, [record], [lambda: (predictor, exp)], notes)
    print("", tables.summary(results), *notes, f"open {page} in a browser", sep="\n\n")
    return page


def base_experiment(exp: Experiment) -> Experiment | None:
    """Return the experiment whose run `exp` starts from (`train.init_from`: `runs/NAME`), on the same data; or None."""
    folder, _, name = (exp.train.init_from or "").partition("/")
    if folder != "runs":
        return None
    base = load_experiment(name)
    return replace(base, data=replace(base.data, root=exp.data.root))


def trained_model(exp: Experiment, work_dir: Path) -> Segmentor:
    """Return the model of a run's newest checkpoint, in evaluation mode on the CPU."""
    folder = run_checkpoint.newest(work_dir)
    assert folder is not None
    model = exp.model.build()
    model.load_checkpoint(run_checkpoint.read_model_state(folder))
    return model.eval()


def linear_classifier(train_set: Dataset) -> LinearPixelClassifier:
    """Return a linear classifier on color and position, fitted to all labeled training images."""
    pairs = [train_set.pair(i) for i in range(len(train_set))]
    labels = [label for _, label in pairs if label is not None]
    classes = len(train_set.classes)
    return fit_linear([image for image, _ in pairs], labels, classes, train_set.ignore_index, position=True)


def miou_of(predict: Callable[[np.ndarray], np.ndarray], dataset: Dataset) -> float:
    """Return the mIoU, 0..1, of a function that maps an image (H, W, channels) to classes (H, W)."""
    matrix = ConfusionMatrix(len(dataset.classes), dataset.ignore_index)
    for i in range(len(dataset)):
        matrix.update(predict(dataset.image(i)), dataset.label(i))
    return float(matrix.compute()["mIoU"])


def shown_indices(count: int) -> list[int]:
    """Return which of `count` validation images the page shows."""
    return [int(i) for i in np.linspace(0, count - 1, min(SHOWN, count))]


def evaluate_and_keep(predictor: Predictor, val_set: Dataset, seed: int) -> tuple[Results, dict[int, Answer]]:
    """Evaluate on the whole validation set; also return, by index, the answers to show or judge.

    Their uncertainty refers to the evaluated classes, from the same seeds, views and precision.
    """
    wanted, answers = {*shown_indices(len(val_set)), *range(JUDGED)}, dict[int, Answer]()

    def keep(index: int, image: np.ndarray, label: np.ndarray, classes: Mapping[str, Tensor]) -> None:
        if index in wanted:
            answers[index] = Answer(
                image, label, {k: x.cpu() for k, x in classes.items()}, evaluation_seed(seed, index)
            )

    with progress("evaluating") as advance:
        results = evaluate(predictor, val_set, seed=seed, on_progress=advance, on_prediction=keep)
    if isinstance(predictor.model, StepwiseSegmentor):
        with progress("estimating the uncertainty") as advance:
            for done, answer in enumerate(answers.values(), 1):
                classes = answer.classes[results.final_step]
                [uncertainty] = predict_uncertainty(predictor, [answer.image], [classes], [answer.seed])
                answer.uncertainty = uncertainty.cpu()
                advance(done, len(answers))
    return results, answers


def comparison(results: Results, baseline: float) -> str:
    """Return a sentence that compares the model with the linear classifier."""
    name, miou = results.final_step, results.final["mIoU"]
    steps = f" at {step_title(name, results.by)}" if name.isdigit() else ""
    return (
        f"mIoU{steps}: {miou:.1%}; linear classifier on color and position (quadratic terms): {baseline:.1%}; "
        f"ratio {miou / baseline:.2f}"
    )


def auroc(answers: list[Answer], step: str, ignore_index: int) -> float:
    """Return how well the uncertainty separates wrong from right pixels, 0..1."""
    area = AUROC(ignore_index)
    for answer in answers:
        assert answer.uncertainty is not None
        area.update(answer.uncertainty, answer.classes[step], torch.from_numpy(answer.label))
    return area.compute()


def panels(predictor: Predictor, val_set: Dataset, answer: Answer, step: str) -> dict[str, np.ndarray]:
    """Return the panels (H, W, 3) uint8 of an image by caption: image, ground truth, denoising steps, prediction.

    With an uncertainty, its map and a map of the wrong pixels follow.
    """
    model, label, prediction = predictor.model, answer.label, answer.classes[step].numpy()
    maps = {"ground truth": label}
    if isinstance(model, StepwiseSegmentor):
        [steps] = predictor.classes([answer.image], [answer.seed], network=model.trajectory_answers)
        maps |= {step_title(key, model.step_unit): classes.cpu().numpy() for key, classes in steps.items()}
    maps["prediction"] = prediction
    found = {"image": answer.image}
    found |= {key: colorize(classes, val_set.palette, val_set.ignore_index) for key, classes in maps.items()}
    if answer.uncertainty is not None:
        found["uncertainty"] = colormap(answer.uncertainty.numpy())
        found["wrong pixels"] = colormap((prediction != label) & (label != val_set.ignore_index))
    return found
