"""The report of a run, or of several: which images to show, and writing the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from segcore.config.schema import Experiment
from segcore.data.layouts import open_dataset
from segcore.errors import UnnamedFileError, UserError
from segcore.evaluation.predictor import Predictor
from segcore.files import write
from segcore.progress import progress
from segcore.reporting.page import Card, Group, percent, render
from segcore.reporting.run_record import ImageRow, Run
from segcore.reporting.samples import WORST, WRONG, Shown, choose, compared, panels, predict_shown

Open = Callable[[], tuple[Predictor, Experiment]]
"""Load the model of a run, with the settings of its evaluation."""
PAIR = (96, 165, 250), (251, 146, 60)
"""Colors of the pixels where only the first, or only the second of two runs is right."""


class UnopenedError(UserError):
    """The validation images cannot be opened. The text may quote any file that a stored setting names as a list, so it
    is not for the page, which is made to be passed on.
    """


def write_report(path: Path, runs: Sequence[Run], models: Sequence[Open], notes: Sequence[str] = ()) -> list[str]:
    """Write the page of one run, or the one that compares several, with images that their `models` predict again.

    `notes` are sentences without final periods. Returns what the page lacks, in sentences that it also shows,
    except for why the validation images cannot be opened.
    """
    missing: list[str] = []
    details: list[str] = []
    groups: list[Group] = []
    try:
        groups = _compare(runs, models) if len(runs) > 1 else _show(runs[0], models[0])
    except UnnamedFileError:
        missing = ["Without images: a file of your own defines the model or the data set; `test` with it adds them"]
    except UnopenedError as error:
        missing = ["Without images: the validation images cannot be opened"]
        details = [f"Without images: {error}"]
    except UserError as error:
        missing = [f"Without images: {error}"]
    except torch.OutOfMemoryError:
        missing = ["Without images: out of GPU memory; `segcore report` with `--device cpu` adds them"]
    write(path, render(runs, groups, notes, missing))
    return [note for run in runs for note in run.notes] + (details or missing)


def _predict(run: Run, load: Open, rows: Sequence[ImageRow], what: str) -> list[Shown]:
    predictor, exp = load()
    try:
        dataset = open_dataset(exp.data, "val")
    except UnnamedFileError:
        raise
    except UserError as error:
        raise UnopenedError(*error.args) from None
    assert run.evaluation is not None
    if [row for row in rows if row.index >= len(dataset) or dataset.name(row.index) != row.name]:
        raise UserError(f"{exp.data.root} has other validation images than those that were evaluated")
    with progress(what) as advance:
        return predict_shown(predictor, dataset, [row.index for row in rows], exp.seed, run.evaluation.main, advance)


def _show(run: Run, load: Open) -> list[Group]:
    """Return the worst images of a run and some at random."""
    found = run.evaluation
    if found is None or not found.per_image:
        raise UserError("no evaluation is stored that names them; `test` writes one")
    worst, others = choose(found.per_image)
    shown = _predict(run, load, [*worst, *others], "predicting the report's images")
    cards = [
        Card(row.name, f"mIoU {percent(row.miou)} %, pixel accuracy {percent(row.aacc)} %", panels(image))
        for row, image in zip([*worst, *others], shown, strict=True)
    ]
    groups = [
        Group(f"The {len(worst)} worst images" if others else "All images",
              "Lowest mean IoU over the classes of an image first.",
              cards[: len(worst)], ERRORS),
        Group(f"{len(others)} at random", "Drawn from the others, in the order of the data set.",
              cards[len(worst) :], ERRORS),
    ]  # fmt: skip
    return [group for group in groups if group.cards]


ERRORS = ((f"#{bytes(WRONG).hex()}", "wrong pixels"),)


def _compare(runs: Sequence[Run], models: Sequence[Open]) -> list[Group]:
    """Return the images whose mIoU differs most between runs."""
    rows = [{row.name: row for row in run.evaluation.per_image} if run.evaluation else {} for run in runs]
    if not all(rows):
        raise UserError("not every run has a stored evaluation that names them; `test` writes one")
    common = set(rows[0]).intersection(*rows[1:])
    if not common:
        raise UserError("the runs were evaluated on different images")

    def gap(name: str) -> float:
        values = [found[name].miou for found in rows]
        known = [value for value in values if value is not None]
        return max(known) - min(known) if len(known) == len(values) else 0.0

    names = sorted(common, key=lambda name: (-gap(name), rows[0][name].index))[:WORST]
    labels = [chr(65 + number) for number in range(len(runs))]
    shown = [
        _predict(run, load, [found[name] for name in names], f"predicting with {run.folder}")
        for run, load, found in zip(runs, models, rows, strict=True)
    ]
    cards = []
    for number, name in enumerate(names):
        facts = ", ".join(f"{label} {percent(found[name].miou)} %" for label, found in zip(labels, rows, strict=True))
        pictures = compared([images[number] for images in shown], labels, PAIR)
        cards.append(Card(name, f"mIoU {facts}", pictures))
    legend = [(f"#{bytes(color).hex()}", f"only {label} is right") for color, label in zip(PAIR, labels, strict=False)]
    marks = [*legend, (ERRORS[0][0], "both are wrong")] if len(runs) == 2 else ERRORS
    return [Group("Where they disagree most", "Largest difference of an image's mIoU first.", cards, marks)]
