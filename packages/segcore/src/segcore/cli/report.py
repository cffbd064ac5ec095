"""`report`, and the report that `train` and `test` end with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from segcore.errors import UsageError

if TYPE_CHECKING:
    from segcore.config.schema import Experiment
    from segcore.evaluation.predictor import Predictor

NAME = "report.html"


@dataclass(frozen=True)
class Report:
    """Write a page about a run, or one that compares several: figures, curves, classes, confusions, images, settings.

    The last evaluation is used as it is stored; only the images on the page are predicted again.
    """

    runs: tuple[Path, ...] = field(kw_only=True)
    """Folder of a run, and those of others to compare it with."""
    output: Path | None = None
    """The page to write; by default report.html in the run, or comparison.html in the first of several."""
    device: str = "auto"
    """Where to predict the images: auto (CUDA if there is one, else the CPU), cpu, cuda, cuda:1, mps …"""

    def run(self, package: str | None) -> None:
        if len({folder.resolve() for folder in self.runs}) < len(self.runs):
            raise UsageError(f"{' '.join(map(str, self.runs))}: a run is named twice; name different ones")
        name = NAME if len(self.runs) == 1 else "comparison.html"
        report(self.runs, self.output or self.runs[0] / name, self.device)


def report(folders: Sequence[Path], path: Path, device: str) -> None:
    """Write the page of runs to `path` and print where it is, and what it lacks."""
    from segcore.reporting.report import write_report
    from segcore.reporting.run_record import read_run

    runs = [read_run(folder) for folder in folders]
    for note in write_report(path, runs, [partial(load, folder, device) for folder in folders]):
        print(f"note: {note}")
    print(f"{path}: open it in a browser")


def load(folder: Path, device: str) -> tuple[Predictor, Experiment]:
    """Return the predictor of the checkpoint that a run's stored evaluation is of, and the settings of that one."""
    from segcore.checkpoints.run_checkpoint import folder_of
    from segcore.config.registry import read_experiment
    from segcore.errors import UserError
    from segcore.inference import load_model
    from segcore.reporting.run_record import EVALUATION, read_run

    found = read_run(folder).evaluation
    assert found is not None
    if found.ensemble:
        raise UserError("the evaluation is of an ensemble; `test` shows its images")
    checkpoint = folder_of(folder, found.iteration or 0)
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint}, the checkpoint that was evaluated, is not there any more; `test` takes another")
    exp = read_experiment(folder, EVALUATION)
    return load_model(exp, checkpoint, device=device, offline=True).predictor, exp
