"""`test`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from segcore.cli.common import Parallel, complete_toy_set, is_row, load
from segcore.config.options import Flag
from segcore.config.registry import published
from segcore.config.schema import multi_scale


@dataclass(frozen=True)
class Test(Parallel):
    """Evaluate a checkpoint on the validation set: tables on the terminal, JSON beside them."""

    checkpoint: str = field(kw_only=True)
    """A run folder (its best checkpoint), a checkpoint folder, a weights file, or `official`: published weights.
    Without one, the run in runs/<configuration> is tested, with its own settings."""
    multi_scale: Flag = False
    """Average over the six published scales, each also flipped."""
    limit: int | None = None
    """Evaluate only the first images."""
    ensemble: tuple[str, ...] = ()
    """Average in a second model's class probabilities: its CONFIG and CHECKPOINT, or its run folder alone."""
    json: Path | None = None
    """File for the figures at full precision; by default test.json in the run that CONFIG is, otherwise
    runs/<configuration>.test.json."""

    def run_in_process(self) -> None:
        from segcore import distributed
        from segcore.data.layouts import open_dataset
        from segcore.evaluation.evaluate import evaluate
        from segcore.progress import progress
        from segcore.reporting import tables as report

        complete_toy_set(self)
        exp = self.experiment
        seg = load(self, self.checkpoint, self.ensemble)
        predictor, metrics = seg.predictor, exp.evaluate.metrics
        if self.multi_scale:
            predictor = replace(predictor, evaluate=multi_scale(predictor.evaluate))
        dataset = distributed.main_process_first(lambda: open_dataset(exp.data, "val"))
        with progress("evaluating") as advance:
            results = evaluate(
                predictor, dataset, seed=exp.seed, workers=exp.data.workers, on_progress=advance, limit=self.limit
            )
        if distributed.rank():
            return
        print(report.per_class(results, metrics), report.summary(results, metrics), sep="\n\n")
        row = published(exp.name)
        if row and row.miou and is_row(exp):
            print("\npublished mIoU:", ", ".join(f"{value:.2f} ({name})" for name, value in row.miou.items()))
        path = self.json or (self.run_dir / "test.json" if self.folder else Path("runs") / f"{exp.name}.test.json")
        report.write_json(
            path, results, {"name": exp.name, "checkpoint": str(self.folder or self.checkpoint), "seed": exp.seed}
        )
        print(f"\n{path}")
