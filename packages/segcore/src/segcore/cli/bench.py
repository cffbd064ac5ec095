"""`bench`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from segcore import files
from segcore.cli.common import Command
from segcore.errors import UsageError


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
    steps: tuple[int, ...] = ()
    """Sampling steps; as the model is configured if not given. Several: a run of each in one pass."""
    warmup: int = 2
    """Passes before the timed ones; compiling happens there."""
    repeats: int = 10
    """Timed passes: the median is shown, and the 10th to the 90th percentile."""
    json: Path | None = None
    """Also write the figures, at full precision, to this file."""

    def run(self, package: str | None) -> None:
        from segcore.deploy import bench
        from segcore.inference import find_device

        both = {"no": (False,), "yes": (True,), "both": (False, True)}
        if not (self.batches and self.dtypes):
            raise UsageError("--batches and --dtypes need a value at least; leave them out for the usual ones")
        exp = self.experiment
        sizes = tuple(bench.parse_size(size) for size in self.sizes) or (exp.data.crop,)
        settings = bench.Settings(
            sizes, self.batches, self.dtypes, both[self.compile], both[self.channels_last],
            self.steps, self.warmup, self.repeats,
        )  # fmt: skip
        device, model = find_device(self.device), exp.model.build()
        bench.check(model, settings)
        header = {"name": exp.name, **bench.header(model, device), "steps": self.steps or None}
        print(*(f"{name}: {value}" for name, value in header.items() if value is not None), bench.COLUMNS, sep="\n")
        cells = []
        for cell in bench.measure(model, exp.model.in_channels, settings, device):
            print(bench.as_line(cell), flush=True)
            cells.append(cell)
        if self.json:
            files.write(self.json, json.dumps({**header, "cells": cells}, indent=1) + "\n")
