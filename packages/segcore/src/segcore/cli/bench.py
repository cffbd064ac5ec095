"""`bench`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from segcore import files
from segcore.cli.common import PROVIDER, STEPWISE, Command, check_file
from segcore.config.options import Flag
from segcore.errors import UsageError, UserError

if TYPE_CHECKING:
    from segcore.deploy.bench import Settings


@dataclass(frozen=True)
class Bench(Command):
    """Time the model with random weights: latency, throughput, peak memory, GFLOPs; a line per combination."""

    sizes: tuple[str, ...] = ()
    """Image sizes, HEIGHTxWIDTH; the training crop if not given."""
    batches: tuple[int, ...] = (1,)
    """Images per forward pass."""
    dtypes: tuple[Literal["fp32", "bf16", "fp16"], ...] = ("fp32",)
    """Precision of the forward pass (autocast)."""
    compile: Literal["no", "yes", "both"] = "no"
    """torch.compile."""
    channels_last: Literal["no", "yes", "both"] = "no"
    """Memory layout of images and convolutions."""
    steps: tuple[int, ...] = field(default=(), metadata=STEPWISE)
    """Sampling steps; as the model is configured if not given. Several: a run of each in one pass."""
    warmup: int = 2
    """Passes before the timed ones; compiling happens there."""
    repeats: int = 10
    """Timed passes: the median is shown, and the 10th to the 90th percentile."""
    runtimes: Flag = False
    """Eager, compiled, ONNX Runtime and OpenVINO (--dtypes bf16 too) side by side on the CPU; exporting takes time."""
    provider: str | None = field(default=None, metadata=PROVIDER)
    """What runs an exported model: openvino, or one of ONNX Runtime's that is installed: cpu (the default), cuda …"""
    json: Path | None = None
    """Also write the figures, at full precision, to this file."""

    def run(self, package: str | None) -> None:
        from torch import nn

        from segcore.deploy import bench
        from segcore.distributed import find_device

        both = {"no": (False,), "yes": (True,), "both": (False, True)}
        if not (self.batches and self.dtypes):
            raise UsageError("--batches and --dtypes need a value at least; leave them out for the usual ones")
        given = {
            "device": self.device not in ("auto", "cpu"), "steps": self.steps,
            "compile": self.exported and self.compile != "no",
            "channels-last": self.exported and self.channels_last != "no",
        }  # fmt: skip
        if (self.exported or self.runtimes) and any(given.values()):
            option = next(name for name in given if given[name])
            raise UserError(f"--{option} is for models in PyTorch; leave it out for exported ones and --runtimes")
        check_file("json", self.json, ".json", [self.record])
        exp = self.experiment
        sizes = tuple(bench.parse_size(size) for size in self.sizes) or (exp.data.crop,)
        settings = bench.Settings(
            sizes, self.batches, self.dtypes, both["both" if self.runtimes else self.compile],
            both[self.channels_last], self.steps, self.warmup, self.repeats,
        )  # fmt: skip
        device = find_device("cpu" if self.runtimes or self.exported else self.device)
        if self.exported:
            bench.check(settings)
            found = self._of_file(settings)
            header = bench.header(nn.Module(), device) | {"provider": self.provider or "cpu"}
        else:
            model = exp.model.build()
            bench.check(settings, model)
            found, header = bench.measure(model, exp.model.in_channels, settings, device), bench.header(model, device)
            if self.runtimes:
                found = itertools.chain(found, bench.measure_runtimes(model, exp, settings))
        header = {"name": exp.name, **header, "steps": self.steps or None}
        print(*(f"{name}: {value}" for name, value in header.items() if value is not None), bench.COLUMNS, sep="\n")
        cells = []
        for cell in found:
            print(bench.as_line(cell), flush=True)
            cells.append(cell)
        if self.json:
            files.write(self.json, json.dumps({**header, "cells": cells}, indent=1) + "\n")

    def _of_file(self, settings: Settings) -> Iterator[dict[str, Any]]:
        """Yield the cells of an exported file, by default of the size and number of images that it was made for."""
        from segcore.config.exported import read_exported
        from segcore.deploy import bench

        assert self.folder
        exp, about = read_exported(self.folder)
        sizes = settings.sizes if self.sizes else (about.size,)
        if not about.dynamic and self.batches not in ((1,), (about.batch,)):
            raise UserError(
                f"--batches {' '.join(map(str, self.batches))}: {self.folder} takes {about.batch} per call; leave it "
                "out, or export with --dynamic"
            )
        if (self.provider or "").lower() != "openvino" and self.dtypes != ("fp32",):
            raise UserError(
                f"--dtypes {' '.join(self.dtypes)}: ONNX Runtime computes as the file says; leave it out, or add "
                "--provider openvino"
            )
        batches = settings.batches if about.dynamic else (about.batch,)
        for (height, width), batch, dtype in itertools.product(sizes, batches, settings.dtypes):
            shape = batch, exp.data.channels, height, width
            yield bench.measure_exported(self.folder, self.provider or "cpu", dtype, shape, settings)
