"""`demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from segcore.cli.common import Command
from segcore.config.toy import DATA
from segcore.errors import UserError


@dataclass(frozen=True)
class Demo(Command):
    """Train a small model on generated street scenes and write a page with its results; continues if interrupted."""

    work_dir: Path | None = None
    """Folder for the scenes, the run and the page; by default runs/demo/<configuration>."""

    def run(self, package: str | None) -> None:
        from segcore.demo import run as demo
        from segcore.distributed import find_device

        if self.experiment.data.root != DATA.root:
            raise UserError("the demo generates its scenes in --work-dir; leave --data.root out")
        work_dir = self.work_dir or Path("runs/demo", self.experiment.name)
        demo.run(self.experiment, work_dir, device=find_device(self.device), offline=self.offline)
