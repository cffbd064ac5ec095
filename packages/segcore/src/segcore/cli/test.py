"""`test`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from segcore.cli.common import PROVIDER, Parallel, check_file, complete_toy_set, is_row, load
from segcore.config.data_sets import server_files
from segcore.config.options import Flag
from segcore.config.registry import published
from segcore.config.schema import multi_scale
from segcore.errors import UserError

if TYPE_CHECKING:
    from segcore.cli.saved_masks import SavedMasks
    from segcore.data.dataset import Dataset
    from segcore.evaluation.evaluate import Results
    from segcore.evaluation.predictor import Predictor


@dataclass(frozen=True)
class Test(Parallel):
    """Evaluate a checkpoint on the validation set: tables on the terminal, JSON beside them."""

    checkpoint: str = field(kw_only=True)
    """A run folder (its best checkpoint), a checkpoint folder, a weights file, `official` (published weights) or
    hub:USER/REPO.
    Without one, the run in runs/<configuration> is tested, with its own settings."""
    provider: str | None = field(default=None, metadata=PROVIDER)
    """What runs an exported model: openvino, or one of ONNX Runtime's that is installed: cpu (the default), cuda,
    tensorrt, coreml …"""
    multi_scale: Flag = False
    """Average over the six published scales, each also flipped."""
    limit: int | None = None
    """Evaluate only the first images."""
    ensemble: tuple[str, ...] = ()
    """Average in a second model's class probabilities: its CONFIG and CHECKPOINT, or its run folder alone."""
    calibration: Flag = False
    """Also compute the expected calibration error, from the probabilities of the predicted classes in 15 bins."""
    json: Path | None = None
    """A file .json for the figures at full precision and the confusion matrices; by default test.json in the run that
    CONFIG is, NAME.test.json beside an exported file, otherwise runs/<configuration>.test.json. With --multi-scale,
    --ensemble or --limit the name says so."""
    per_image: Path | None = None
    """A file .csv for the figures of every image."""
    save: Path | None = None
    """Folder for the predicted masks, named as the images are; classes.json there says what their values mean."""
    label_ids: Flag = False
    """With --save: also write what the benchmark server of the data set takes, its values and file names, into the
    folder label_ids (cityscapes, ade20k, loveda, voc2012)."""
    zip: Path | None = None
    """With --save: a file .zip to pack the label_ids into, or without --label-ids the masks."""
    no_report: Flag = False
    """Do not write the page with the results: report.html in the run, otherwise runs/<configuration>.report.html, or
    beside the file of --json, NAME.json, as NAME.report.html."""
    split: Literal["val", "test"] = "val"
    """The images: `test` are those without labels, of which only masks are written (--save)."""

    def run_in_process(self) -> Callable[[], None] | None:
        from segcore import distributed
        from segcore.cli.saved_masks import SavedMasks
        from segcore.data.layouts import open_dataset

        self._check()
        data = self.experiment.data
        server = server_files(data.dataset, bool(data.classes or data.labels)) if self.label_ids else None
        seg = load(self, self.checkpoint, self.ensemble)
        complete_toy_set(self)
        predictor = seg.predictor
        if self.multi_scale:
            predictor = replace(predictor, evaluate=multi_scale(predictor.evaluate))
        dataset = distributed.main_process_first(lambda: open_dataset(data, self.split))
        saved = SavedMasks(seg, dataset, self.save, server) if self.save else None
        results = self._evaluate(predictor, dataset, saved)
        if results:
            distributed.on_main_process(lambda: self._report(results))
        count = saved.finish(self.zip) if saved else 0
        if distributed.rank():
            return None
        if saved:
            print(f"{count} masks written below {self.save}", *filter(None, [self.zip]), sep="\n")
        return partial(self._page, results, predictor) if results and not self.no_report else None

    def _check(self) -> None:
        """Raise UserError for options that need or exclude each other, and for files that would be overwritten."""
        inputs = (self.record, self.checkpoint, *self.ensemble, *vars(self.experiment.data).values())
        for option, path, suffix in (
            ("json", self.json, ".json"), ("per-image", self.per_image, ".csv"), ("zip", self.zip, ".zip"),
        ):  # fmt: skip
            check_file(option, path, suffix, inputs)
        for option, value in (("label-ids", self.label_ids), ("zip", self.zip), ("split test", self.split == "test")):
            if value and not self.save:
                raise UserError(f"--{option} writes masks; add --save FOLDER")
        for option, value in (("calibration", self.calibration), ("per-image", self.per_image), ("json", self.json)):
            if value and self.split == "test":
                raise UserError(f"--{option} needs labels, which --split test has not; leave it out")

    def _evaluate(self, predictor: Predictor, dataset: Dataset, saved: SavedMasks | None) -> Results | None:
        """Return the results; None for a split without labels."""
        from segcore.data.workers import worker_count
        from segcore.evaluation.evaluate import configured_entry, evaluate, predict_all
        from segcore.progress import progress

        def save(index: int, *rest: Any) -> None:
            if saved:
                entries = rest[-1]
                saved.write(index, entries[configured_entry(predictor, entries)])

        exp = self.experiment
        how: dict[str, Any] = {"seed": exp.seed, "workers": worker_count(exp.data.workers), "limit": self.limit}
        with progress("evaluating") as advance:
            if self.split == "val":
                return evaluate(
                    predictor, dataset, calibration=self.calibration, on_progress=advance, on_prediction=save, **how
                )
            predict_all(predictor, dataset, lambda p: save(p.index, p.classes), on_progress=advance, **how)
        return None

    def _report(self, results: Results) -> None:
        """Print the tables and write the files of figures."""
        from segcore.reporting import tables

        exp, metrics = self.experiment, self.experiment.evaluate.metrics
        row = published(exp.name)
        theirs = row.miou if row and is_row(exp) else {}
        print(tables.per_class(results, metrics), tables.summary(results, metrics, theirs), sep="\n\n")
        if theirs:
            print("\npublished mIoU:", ", ".join(f"{value:.2f} ({name})" for name, value in theirs.items()))
        path = self.json or self._file("test", "json")
        about = {"name": exp.name, "checkpoint": str(self.folder or self.checkpoint), "seed": exp.seed}
        tables.write_json(path, results, about)
        print(f"\n{path}")
        if self.per_image:
            tables.write_per_image(self.per_image, results)
            print(self.per_image)

    def _page(self, results: Results, predictor: Predictor) -> None:
        """Write the page with the results, and into a run what a later `report` needs."""
        from segcore.checkpoints.load import find_weights
        from segcore.reporting.report import write_report
        from segcore.reporting.run_record import Evaluation, Run, read_run, write_evaluation

        exp, iteration = replace(self.experiment, evaluate=predictor.evaluate), None
        if self.folder and not self.exported:
            checkpoint = find_weights(self.folder.as_posix(), exp.name, offline=self.offline)
            match = re.fullmatch(r"iter_(\d+)", checkpoint.resolve().name)
            iteration = int(match[1]) if match else None
        evaluation = Evaluation.of(results, "test", iteration)
        of_a_run = self.of_run and (self.run_dir / "experiment.json").is_file()
        if of_a_run and iteration is not None and not self._kinds() and not self.json:
            write_evaluation(self.run_dir, exp, evaluation)
        run = replace(read_run(self.run_dir), evaluation=evaluation) if of_a_run else Run.of(exp, evaluation)
        path = self.json.with_suffix(".report.html") if self.json else self._file("report", "html")
        for note in write_report(path, [run], [lambda: (predictor, exp)]):
            print(f"note: {note}")
        print(path)

    def _kinds(self) -> list[str]:
        """Return what makes this another evaluation than the plain one."""
        kinds = {"multi_scale": self.multi_scale, "ensemble": self.ensemble, f"limit_{self.limit}": self.limit}
        return [kind for kind, asked in kinds.items() if asked]

    def _file(self, name: str, suffix: str) -> Path:
        """Return the default file for the figures or the page, which never are another evaluation's."""
        name = ".".join([name, *self._kinds(), suffix])
        if self.folder and self.exported:
            return self.folder.with_suffix(f".{name}")
        return self.run_dir / name if self.of_run else Path("runs") / f"{self.experiment.name}.{name}"
