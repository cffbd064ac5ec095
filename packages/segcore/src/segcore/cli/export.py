"""`export`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from segcore.cli.common import Command, load
from segcore.config.options import Flag


@dataclass(frozen=True)
class Export(Command):
    """Write a checkpoint as ONNX (.onnx) or as a torch.export program (.pt2), checked against the model."""

    checkpoint: str = field(kw_only=True)
    """A run folder (its best checkpoint), a checkpoint folder, a weights file, or `official`: published weights."""
    output: Path = field(kw_only=True)
    """The file to write; its ending says which kind."""
    size: str | None = None
    """Size of the images, HEIGHTxWIDTH; evaluate.img_scale if not given."""
    batch: int = 1
    """Images per call."""
    dynamic: Flag = False
    """Accept any number of images of any size whose sides are multiples of what the network needs."""

    def run(self, package: str | None) -> None:
        from segcore.deploy import export
        from segcore.deploy.bench import parse_size

        exp = self.experiment
        size = (exp.evaluate.img_scale or exp.data.crop[::-1])[::-1]
        height, width = parse_size(self.size, "--size") if self.size else size
        settings = export.Settings(height, width, self.batch, self.dynamic)
        model = load(self, self.checkpoint, device="cpu").model
        for check in export.export(model, exp, self.output, settings):
            print(check)
        print(f"{self.output}: {self.output.stat().st_size / 2**20:.1f} MiB")
