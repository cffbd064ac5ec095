"""`import-config`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from segcore.errors import UserError
from segcore.files import write


@dataclass(frozen=True)
class ImportConfig:
    """Turn a configuration of MMSegmentation into the equal one of ours; nothing in the file is executed.

    Files of 0.x and 1.x are read, with their `_base_`: DDP's, DDPS's, DDRNet's and DGMN2's as published, SegFormer's
    and DeepLabV3+'s. All that has no equal here is refused by name, with file and line.
    """

    file: Path = field(kw_only=True)
    """The configuration, a .py file."""
    write: Path | None = None
    """The .py file to write, which `segcore train` takes; an existing one is not replaced. None: print it."""
    batch_size: int | None = None
    """Images per optimizer step over all devices, where neither `gpu_ids` nor the file's name says it."""

    def run(self, package: str | None) -> None:
        from segcore.config.mmseg_config import import_config
        from segcore.config.registry import program
        from segcore.config.source import source

        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"--batch-size is {self.batch_size}; it must be at least 1")
        if self.write and self.write.suffix != ".py":
            raise UserError(f"{self.write}: a configuration is written as .py; choose such a name")
        found = import_config(self.file, self.batch_size)
        text = source(found.experiment)
        train = found.experiment.train
        batch = f"{train.batch_size} images per step, {train.device_batch_size} per device ({found.batch})"
        if self.write is None:
            print(text, end="")
        elif self.write.exists() and (not self.write.is_file() or self.write.read_bytes() != text.encode()):
            raise UserError(f"{self.write}: is there already; choose another name")
        else:
            write(self.write, text)
        print(f"note: {batch}", file=sys.stderr)
        print(f"note: left out, without influence on results: {', '.join(found.skipped)}", file=sys.stderr)
        if self.write:
            reference = shlex.quote(f"{self.write}:experiment")
            print(f"{self.write}: {found.experiment.name}; to train: {program(package)} train {reference}")
