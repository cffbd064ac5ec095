"""`export`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from segcore.cli.common import Checkpoint, Command, Flag, load_model


@dataclass(frozen=True)
class Export(Command):
    """Write a checkpoint as ONNX (.onnx) or as a torch.export program (.pt2), checked against the model."""

    checkpoint: Checkpoint = dataclasses.field(kw_only=True)
    """A work folder (its best checkpoint), a checkpoint folder, a weights file, or `official`: published weights."""
    output: Annotated[Positional[Path], arg(metavar="OUTPUT")] = dataclasses.field(kw_only=True)
    """The file to write; its ending says which kind."""
    size: str | None = None
    """Size of the images, HEIGHTxWIDTH; evaluate.img_scale if not given."""
    batch: int = 1
    """Images per call."""
    dynamic: Flag = False
    """Accept any number of images of any size whose sides are multiples of what the network needs."""

    def run(self, package: str | None) -> None:
        import torch

        from segcore.deploy import export
        from segcore.deploy.bench import parse_size

        exp = self.experiment
        size = (exp.evaluate.img_scale or exp.data.crop[::-1])[::-1]
        height, width = parse_size(self.size, "--size") if self.size else size
        settings = export.Settings(height, width, self.batch, self.dynamic)
        model = load_model(self, self.checkpoint, torch.device("cpu"))
        for check in export.export(model, exp, self.output, settings):
            print(check)
        print(f"{self.output}: {self.output.stat().st_size / 2**20:.1f} MiB")
