"""`configs`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from segcore import files
from segcore.config.registry import experiments, load_experiment, program, published
from segcore.config.source import source
from segcore.errors import UsageError, UserError


@dataclass(frozen=True)
class Configs:
    """List the configurations with their published figures, or show one."""

    config: str | None = field(default=None, kw_only=True)
    """Show this configuration: a name, or file.py:function."""
    write: Path | None = None
    """Write the configuration as a Python file to edit; run it as `train FILE.py`."""

    def run(self, package: str | None) -> None:
        if self.config is None and self.write:
            usage = f"{program(package)} configs CONFIG --write {self.write}"
            raise UsageError(f"--write {self.write}: which configuration? write `{usage}`")
        if self.config is None:
            for name in experiments(package):
                row = published(name)
                figures = ", ".join(f"{value:.2f} {key}" for key, value in row.miou.items()) if row else ""
                figures = f"mIoU {figures}" if figures else ""
                weights = " (weights: official)" if row and row.url else ""
                note = f" ({row.note})" if row and row.note else ""
                print(f"{name:55}{figures}{weights}{note}".rstrip())
            return
        text = source(load_experiment(self.config, package))
        if self.write is None:
            print(text)
            return
        if self.write.exists():
            raise UserError(f"{self.write}: exists already; choose another name or remove it")
        files.write(self.write, text)
        print(f"{self.write}: edit it, then `train {self.write}`")
