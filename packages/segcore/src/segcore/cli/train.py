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
from segcore.files import read_json


@dataclass(frozen=True)
class Train(Parallel):
    """Train a configuration and evaluate it."""

    work_dir: Path | None = None
    """Folder for checkpoints, log and results; by default runs/<configuration>, or the run that CONFIG is."""
    resume: Flag = False
    """Continue from the newest valid checkpoint in the folder, if there is one."""
    no_report: Flag = False
    """Do not write report.html at the end."""

    def run_in_process(self) -> Callable[[], None] | None:
        from segcore import distributed
        from segcore.inference import find_device
        from segcore.training.loop import train

        complete_toy_set(self)
        work_dir = self.work_dir or self.run_dir
        # torchrun --max-restarts starts the same words again after a failure; the run then goes on in its own folder.
        record = work_dir / "experiment.json"
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and record.is_file()
        resume = self.resume or (restarted and read_json(record).get("torchrun") == distributed.elastic_run_id())
        train(self.experiment, work_dir, device=find_device(self.device), resume=resume, offline=self.offline)
        if distributed.rank() or self.no_report:
            return None
        return partial(report.report, [work_dir], work_dir / report.NAME, self.device)
