"""`report`, and the report that `train` and `test` end with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from segcore.cli.common import check_file
from segcore.errors import UsageError, UserError

if TYPE_CHECKING:
    from segcore.config.schema import Experiment
    from segcore.evaluation.predictor import Predictor
    from segcore.reporting.run_record import Run

NAME = "report.html"


@dataclass(frozen=True)
class Report:
    """Write a page about a run, or one that compares several; only its images are predicted again."""

    runs: tuple[Path, ...] = field(kw_only=True)
    """Folder of a run, and those of others to compare it with."""
    output: Path | None = None
    """The page to write; by default report.html in the run, or comparison.html in the first of several."""
    device: str = "auto"
    """Where to predict the images: auto (CUDA if there is one, else the CPU), cpu, cuda, cuda:1, mps …"""

    def run(self, package: str | None) -> None:
        if len({os.path.realpath(folder) for folder in self.runs}) < len(self.runs):
            raise UsageError(f"{' '.join(map(str, self.runs))}: a run is named twice; name different ones")
        check_file("output", self.output, ".html")
        name = NAME if len(self.runs) == 1 else "comparison.html"
        report(self.runs, self.output or self.runs[0] / name, self.device)


def report(folders: Sequence[Path], path: Path, device: str, exp: Experiment | None = None) -> None:
    """Write the page of runs to `path` and print where it is, and what it lacks.

    `exp` is the experiment of a run that has just been trained; by default it is read, without code of the user's.
    """
    from segcore.reporting.report import write_report
    from segcore.reporting.run_record import read_run

    runs = [read_run(folder) for folder in folders]
    for note in write_report(path, runs, [partial(load, run, device, exp) for run in runs]):
        print(f"note: {note}")
    print(f"{path}: open it in a browser")


def load(run: Run, device: str, exp: Experiment | None) -> tuple[Predictor, Experiment]:
    """Return the predictor of the checkpoint that a run's stored evaluation is of, and the settings of that one."""
    from segcore.checkpoints.run_checkpoint import folder_of
    from segcore.config.registry import read_experiment
    from segcore.inference import load_model
    from segcore.reporting.run_record import EVALUATION

    assert run.folder is not None
    assert run.evaluation is not None
    checkpoint = folder_of(run.folder, run.evaluation.iteration or 0)
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint}, which was evaluated, is not there any more; `test` takes the best one")
    exp = exp or read_experiment(run.folder, EVALUATION)
    return load_model(exp, checkpoint, device=device, offline=True).predictor, exp
