"""`train`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from segcore.cli import report
from segcore.cli.common import Parallel, complete_toy_set
from segcore.config.options import Flag
from segcore.config.schema import Experiment
from segcore.errors import UsageError
from segcore.files import read_json


@dataclass(frozen=True)
class Train(Parallel):
    """Train a configuration and evaluate it."""

    work_dir: Path | None = None
    """Folder for checkpoints, log and results; by default runs/<configuration>, or the run that CONFIG is."""
    resume: Flag = False
    """Continue from the newest valid checkpoint in the folder, if there is one."""
    dry_run: Flag = False
    """Only take the first steps, and print the settings, memory, time and disk of the whole run; on CUDA also the
    largest train.device_batch_size that fits, which changes the result of models with batch norm."""
    no_report: Flag = False
    """Do not write report.html at the end."""

    def run(self, package: str | None) -> None:
        if self.dry_run and self.resume:
            raise UsageError("--dry-run takes the first steps of a new run; leave --resume out")
        if os.environ.get("RANK", "0") == "0":
            print(headline(self.experiment, self.work_dir or self.run_dir, self.device), flush=True)
        super().run(package)

    def run_in_process(self) -> Callable[[], None] | None:
        from segcore import distributed
        from segcore.distributed import find_device
        from segcore.training.loop import train

        complete_toy_set(self)
        work_dir = self.work_dir or self.run_dir
        if self.dry_run:
            from segcore.training.dry_run import dry_run

            dry_run(self.experiment, work_dir, device=find_device(self.device), offline=self.offline)
            return None
        # torchrun --max-restarts starts the same words again after a failure; the run then goes on in its own folder.
        record = work_dir / "experiment.json"
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and record.is_file()
        resume = self.resume or (restarted and read_json(record).get("torchrun") == distributed.elastic_run_id())
        train(self.experiment, work_dir, device=find_device(self.device), resume=resume, offline=self.offline)
        if distributed.rank() or self.no_report:
            return None
        return partial(self._report, work_dir)

    def _report(self, work_dir: Path) -> None:
        from segcore.training.trackers import send_report

        report.report([work_dir], work_dir / report.NAME, self.device, self.experiment)
        send_report(self.experiment, work_dir, work_dir / report.NAME)


def headline(exp: Experiment, work_dir: Path, device: str) -> str:
    """Return what is known of a run before torch is imported, in a line."""
    batch, micro, world = exp.train.batch_size, exp.train.device_batch_size, int(os.environ.get("WORLD_SIZE", "1"))
    micro = min(micro, max(batch // world, 1))
    passes, rest = divmod(batch, world * micro)
    length = f"{exp.schedule.epochs} epochs" if exp.schedule.epochs else f"{exp.schedule.iterations} iterations"
    shares = f"{world} device{'s' * (world > 1)} x {micro} images" + (f" x {passes} passes" if passes > 1 else "")
    shares = "" if rest else f" = {shares}"  # an uneven batch is refused later
    return f"{exp.name}: {length} of batch {batch}{shares}, device {device}, folder {work_dir}"
