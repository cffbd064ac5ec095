"""`test`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from segcore.cli.common import (
    Checkpoint,
    Flag,
    Parallel,
    complete_toy_set,
    device_of,
    is_row,
    load_model,
    load_others,
    with_early_exit,
)
from segcore.config.registry import published
from segcore.config.schema import multi_scale


@dataclass(frozen=True)
class Test(Parallel):
    """Evaluate a checkpoint on the validation set: tables on the terminal, JSON beside them."""

    checkpoint: Checkpoint = dataclasses.field(kw_only=True)
    """A work folder (its best checkpoint), a checkpoint folder, a weights file, or `official`: published weights."""
    multi_scale: Flag = False
    """Average over the six published scales, each also flipped."""
    limit: int | None = None
    """Evaluate the first images only."""
    early_exit_threshold: float | None = None
    """Report a further entry: end an image's denoising once a step changes fewer than this percentage of its pixels."""
    ensemble: tuple[str, str] | None = None
    """Configuration and checkpoint of a second model, whose class probabilities are averaged in."""
    json: Path | None = None
    """Where the figures go at full precision; runs/<configuration>.test.json if not given."""

    def run_in_process(self) -> None:
        from segcore import distributed
        from segcore.data.layouts import open_dataset
        from segcore.evaluation.evaluate import evaluate
        from segcore.evaluation.predictor import Predictor
        from segcore.progress import progress
        from segcore.reporting import tables as report

        complete_toy_set(self.experiment)
        exp = with_early_exit(self.experiment, self.early_exit_threshold)
        exp = dataclasses.replace(exp, evaluate=multi_scale(exp.evaluate)) if self.multi_scale else exp
        device = device_of(self.device)
        others = load_others(self, self.ensemble, device)
        model = load_model(self, self.checkpoint, device)
        dataset = distributed.main_process_first(lambda: open_dataset(exp.data, "val"))
        with progress("evaluating") as advance:
            results = evaluate(
                Predictor.of(model, exp, others), dataset, seed=exp.seed, workers=exp.data.workers,
                on_progress=advance, limit=self.limit,
            )  # fmt: skip
        if distributed.rank():
            return
        metrics = exp.evaluate.metrics
        print(report.per_class(results, metrics), report.summary(results, metrics), sep="\n\n")
        row = published(exp.name)
        if row and row.miou and is_row(exp):
            print("\npublished mIoU:", ", ".join(f"{value:.2f} ({name})" for name, value in row.miou.items()))
        path = self.json or Path("runs") / f"{exp.name}.test.json"
        report.write_json(path, results, {"name": exp.name, "checkpoint": self.checkpoint, "seed": exp.seed})
        print(f"\n{path}")
