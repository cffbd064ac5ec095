"""`export`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segcore.cli.common import Command, complete_toy_set, load
from segcore.config.options import Flag
from segcore.errors import UserError


@dataclass(frozen=True)
class Export(Command):
    """Write a checkpoint as ONNX (.onnx) or as a torch.export program (.pt2), checked against the model."""

    checkpoint: str = field(kw_only=True)
    """A run folder (its best checkpoint), a checkpoint folder, a weights file, `official` (published weights) or
    hub:USER/REPO."""
    output: Path = field(kw_only=True)
    """The file to write; its ending says which kind."""
    size: str | None = None
    """Size of the images, HEIGHTxWIDTH; if not given, evaluate.img_scale, or evaluate.crop where the mode is slide."""
    batch: int = 1
    """Images per call."""
    dynamic: Flag = False
    """Accept any number of images of any size whose sides are multiples of what the network needs."""
    classes: Flag = False
    """Return the classes (N, H, W) uint8 (int32 above 256 classes) instead of the logits."""
    normalize: Flag = False
    """Take images (N, H, W, C) uint8, RGB, as files are decoded, and normalize them inside."""
    int8: Flag = False
    """ONNX only: compute in 8-bit integers; the mIoU on the validation set is compared before the file is written."""
    calibrate: Path | None = None
    """With --int8: folder of images whose maps set the ranges of the integers; by default the training images."""
    max_drop: float | None = None
    """With --int8: points of mIoU that may be lost, by default 1; beyond, nothing is written."""

    def run(self, package: str | None) -> None:
        from segcore.data.layouts import open_dataset
        from segcore.deploy import export, quantize
        from segcore.deploy.bench import parse_size
        from segcore.progress import progress

        exp = self.experiment
        whole = exp.evaluate.img_scale[::-1] if exp.evaluate.img_scale else exp.data.crop
        size = exp.evaluate.crop if exp.evaluate.mode == "slide" else whole
        height, width = parse_size(self.size, "--size") if self.size else size
        settings = export.Settings(height, width, self.batch, self.dynamic, self.classes, self.normalize)
        for option, value in (("calibrate", self.calibrate), ("max-drop", self.max_drop)):
            if value is not None and not self.int8:
                raise UserError(f"--{option} {value} is for --int8; add it, or leave this out")
        export.check_output(self.output, int8=self.int8)
        model = load(self, self.checkpoint, device="cpu").model
        if self.int8:
            complete_toy_set(self)
            images, dataset = quantize.calibration_images(exp.data, self.calibrate), open_dataset(exp.data, "val")
            how: dict[str, Any] = {} if self.max_drop is None else {"max_drop": self.max_drop}
            with progress("evaluating") as how["on_progress"]:
                checks, loss = quantize.export_int8(model, exp, self.output, settings, images, dataset, **how)
            print(*checks, loss, sep="\n")
        else:
            print(*export.export(model, exp, self.output, settings), sep="\n")
        print(f"{self.output}: {self.output.stat().st_size / 2**20:.1f} MiB")
