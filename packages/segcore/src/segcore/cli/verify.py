"""`verify`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segcore.cli.common import Parallel, check_file, complete_toy_set, is_row, load
from segcore.config import model_zoo
from segcore.config.options import Flag
from segcore.config.registry import published
from segcore.config.schema import multi_scale
from segcore.errors import UserError
from segcore.files import read_json

if TYPE_CHECKING:
    from segcore.evaluation.evaluate import Results

TOLERANCE = 0.1
"""Difference in points of mIoU up to which a figure counts as reproduced."""
SINGLE, MULTI = "single scale", "multi scale"


@dataclass(frozen=True)
class Verify(Parallel):
    """Evaluate the published weights of a row at its published setting and compare with the published figures.

    It ends with status 1 if one differs by more than 0.1 points of mIoU.
    """

    checkpoint: str | None = field(default=None, kw_only=True)
    """The file of the row's published weights; if it is left out, they are downloaded."""
    multi_scale: Flag = False
    """Compare the multi-scale figure instead: six scales, each also flipped."""
    json: Path | None = None
    """A file .json for what was found, the row's entry in the method's verified.json, from which the model zoo is made;
    by default runs/<configuration>.verify.json. Other rows there are kept, and so are other figures of the same
    weights, as of --multi-scale."""

    def run_in_process(self) -> Callable[[], None] | None:
        from segcore import distributed
        from segcore.checkpoints.load import find_weights
        from segcore.data.layouts import open_dataset
        from segcore.data.workers import worker_count
        from segcore.evaluation.evaluate import evaluate
        from segcore.progress import progress

        exp, theirs = self.experiment, self._published()
        check_file("json", self.json, ".json", [self.checkpoint])
        stored_entries(self._output)  # what cannot be added to is said before the evaluation
        path = distributed.main_process_first(
            lambda: find_weights(self.checkpoint or "official", exp.name, offline=self.offline)
        )
        if path.is_dir():
            raise UserError(f"{path}: is a folder; give the file of the row's published weights, or none")
        predictor = load(self, str(path)).predictor
        complete_toy_set(self)
        steps = () if {SINGLE, MULTI} & set(theirs) else tuple(int(re.sub(r"\D", "", key)) for key in theirs)
        if self.multi_scale:
            predictor = replace(predictor, evaluate=multi_scale(predictor.evaluate))
        elif steps:
            predictor = predictor.using(steps=steps)
        dataset = distributed.main_process_first(lambda: open_dataset(exp.data, "val"))
        with progress("evaluating") as advance:
            results = evaluate(
                predictor, dataset, seed=exp.seed, workers=worker_count(exp.data.workers), on_progress=advance
            )
        return None if distributed.rank() else partial(self._compare, theirs, results, path)

    @property
    def _output(self) -> Path:
        return self.json or Path("runs") / f"{self.experiment.name}.verify.json"

    def _published(self) -> dict[str, float]:
        """Return the published figures to compare with, in percent."""
        exp = self.experiment
        row = published(exp.name)
        if self.folder or row is None or not is_row(exp):
            raise UserError(f"{self.folder or exp.name}: not a published row; `configs` lists them with their figures")
        theirs = {key: value for key, value in row.miou.items() if (key == MULTI) == self.multi_scale}
        if not theirs:
            kind = "multi-scale figure" if self.multi_scale else "figure on the validation set"
            raise UserError(f"{exp.name}: its authors publish no {kind}, so there is nothing to compare with")
        return theirs

    def _compare(self, theirs: dict[str, float], results: Results, path: Path) -> None:
        """Print the comparison, write what was found, and raise UserError for a figure that is not the authors'."""
        from segcore import files
        from segcore.environment import versions
        from segcore.reporting.figures import step_title

        by_step = {step_title(name, results.by): entry for name, entry in results.entries.items()}
        by_step |= {SINGLE: results.final, MULTI: results.final}
        ours = {key: 100 * float(by_step[key]["mIoU"]) for key in theirs}
        outside = differing(ours, theirs)
        for key, value in theirs.items():
            verdict = f"differs by more than {TOLERANCE}" if key in outside else "reproduced"
            print(f"{key}: {ours[key]:.2f}, published {value:.2f} ({results.images} images): {verdict}")
        name = self.experiment.name
        known: dict[str, Any] = {"file": path.name, "bytes": path.stat().st_size, "sha256": files.sha256(path)}
        output, key = self._output, name.replace("-", "_")
        row = next(row for row in model_zoo.rows() if row.name == name)
        known |= {"images": results.images}
        stored = stored_entries(output)
        miou = same_figures(stored.get(key), known) | ours
        reproduced = not differing(miou, row.published.miou if row.published else theirs)
        entry = {"miou": miou, **known, "versions": versions(), "reproduced": reproduced}
        files.write(output, json.dumps({**stored, key: entry}, indent=1) + "\n")
        print(f"{path}: sha256 {known['sha256']}\n{output}\n{model_zoo.line(replace(row, verified=entry))}", end="")
        if outside:
            figures = ", ".join(f"{key} {ours[key]:.2f} instead of {theirs[key]:.2f}" for key in outside)
            raise UserError(
                f"{name}: {figures}; check --data.root ({results.images} images) and that {path.name} is the row's file"
            )


def differing(ours: Mapping[str, float], theirs: Mapping[str, float]) -> list[str]:
    """Return the conditions of the figures in percent that are not the published ones."""
    both = [key for key in theirs if key in ours]
    return [key for key in both if not abs(round(ours[key], 2) - theirs[key]) < TOLERANCE + 1e-6]


def stored_entries(path: Path) -> dict[str, Any]:
    """Return the entries by row that a file of `verify` has, empty where there is none; UserError for another file."""
    try:
        return read_json(path)
    except FileNotFoundError:
        return {}
    except UserError as error:
        raise UserError(f"{error}; name another file with --json") from None


def same_figures(entry: Any, known: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures in an entry if it is of the same weights and number of images, otherwise none."""
    try:
        same = all(entry[name] == known[name] for name in ("sha256", "images"))
        return {str(name): float(value) for name, value in entry["miou"].items()} if same else {}
    except (ValueError, KeyError, TypeError, AttributeError):  # not what `verify` writes
        return {}
