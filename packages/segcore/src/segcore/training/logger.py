"""The log of a run: a line per interval or a progress bar for people, `<work_dir>/log.jsonl` for programs."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor

from segcore.files import parse_json, regular_file, write, writing
from segcore.reporting.figures import write_image


class Logger:
    """The log of one run; use it in a `with` statement.

    On a terminal it shows a progress bar with rate, loss and time left, otherwise it prints plain lines. `log.jsonl`
    gets one object per line at full precision: `{"mode": "meta", …}` at every start, then `train` and `val`, each with
    `iteration`, the number of finished iterations. Values that are not finite become null. If the extra
    `tensorboard` is installed, the values are also written to `<work_dir>/tensorboard`.

    `start` is the iteration that a resumed run continues from: later log entries are dropped, so that curves are clean.
    Without a `work_dir` nothing is written or shown, because one of several processes is enough.

    Raises UserError naming the file when it cannot be written.
    """

    def __init__(
        self,
        work_dir: Path | None,
        iterations: int,
        meta: Mapping[str, Any],
        *,
        start: int = 0,
        console: Console | None = None,
    ) -> None:
        self.path, self.iterations, self.start = work_dir and work_dir / "log.jsonl", iterations, start
        self.console = console or Console(quiet=work_dir is None)
        self.began = time.perf_counter()
        self.said = set[str]()
        if self.path and self.path.exists():
            regular_file(self.path)
            write(self.path, _until(self.path, start))
        self.plain = self.console.quiet or not self.console.is_terminal
        name, text = TextColumn("{task.description}"), TextColumn("{task.fields[text]}")
        columns = (name, BarColumn(None), MofNCompleteColumn(), text)
        self.bar = Progress(*columns, console=self.console, disable=self.plain)
        self.training = self.bar.add_task("train", total=iterations, completed=start, text="")
        self.evaluation = self.bar.add_task("evaluate", visible=False, text="")
        self.board = _board(work_dir / "tensorboard", start) if work_dir else None
        self._write({"mode": "meta", "iteration": start, **meta})

    def __enter__(self) -> Logger:
        self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.bar.stop()
        if self.board and self.path:
            with writing(self.path.with_name("tensorboard")):
                self.board.close()

    def line(self, text: str) -> None:
        """Print a text for people, above the progress bar if there is one."""
        if not self.plain:
            self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self.path:
            print(text, file=self.console.file, flush=True)

    def once(self, text: str) -> None:
        """Print a text on standard error the first time it occurs, on any rank."""
        if text not in self.said:
            self.said.add(text)
            print(text, file=sys.stderr, flush=True)

    def advance(self, iteration: int) -> None:
        """Move the bar to `iteration` finished iterations."""
        self.bar.update(self.training, completed=iteration)

    def evaluating(self, done: int, total: int) -> None:
        """Show the progress of an evaluation, in images."""
        self.bar.update(self.evaluation, completed=done, total=total, visible=done < total)

    def train(self, iteration: int, values: Mapping[str, float]) -> None:
        """Log means over the last interval: lr, loss, seconds, data_seconds, images_per_second and others."""
        self._write({"mode": "train", "iteration": iteration, **values})
        pace = (time.perf_counter() - self.began) / max(iteration - self.start, 1)
        rate, eta = values["images_per_second"], timedelta(seconds=round(pace * (self.iterations - iteration)))
        text = f"loss {values['loss']:.4f}  {rate:.1f} images/s  eta {eta}"
        self.bar.update(self.training, completed=iteration, text=text)
        if self.plain:
            known = {"lr": f"{values['lr']:.3e}", "eta": eta, "time": f"{values['seconds']:.3f}"}
            known |= {"data_time": f"{values['data_seconds']:.3f}", "images/s": f"{rate:.1f}"}
            others = {key: _short(value) for key, value in values.items() if key not in _NAMED}
            text = ", ".join(f"{key}: {value}" for key, value in (known | others).items())
            self.line(f"Iter [{iteration}/{self.iterations}]  {text}")

    def val(self, iteration: int, values: Mapping[str, Any], text: str) -> None:
        """Log an evaluation: plain data for the file, tables for people. `values` holds `Results.to_json()`."""
        self._write({"mode": "val", "iteration": iteration, **values})
        for entry, metrics in values.get("entries", {}).items():
            for name, value in zip(values["classes"], metrics["IoU"], strict=True):
                if self.board and value is not None:
                    tag = f"IoU {entry}/{name}".encode(errors="backslashreplace").decode()
                    self.board.add_scalar(tag, value, iteration)
        self.line(f"Iter(val) [{iteration}]\n{text}")

    def picture(self, iteration: int, image: np.ndarray | None) -> None:
        """Write an evaluation's image (H, W, 3) uint8 to figures/predictions_<iteration>.png and to TensorBoard."""
        if self.path and image is not None:
            write_image(self.path.parent / "figures" / f"predictions_{iteration}.png", image)
            if self.board:
                self.board.add_image("predictions", image, iteration, dataformats="HWC")

    def _write(self, record: Mapping[str, Any]) -> None:
        if not self.path:
            return
        line = json.dumps({key: _finite(value) for key, value in record.items()}, allow_nan=False) + "\n"
        with writing(self.path):
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
            for key, value in record.items():
                if self.board and isinstance(value, float):
                    self.board.add_scalar(f"{record['mode']}/{key}", value, record["iteration"])


class MetricLogger:
    """Means since the last log line. They stay on the device until read, so that the host does not wait."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin a new interval."""
        self.names: list[str] = []
        self.sums: Tensor | None = None
        self.steps = 0
        self.seconds = self.data_seconds = 0.0

    def add(self, names: Iterable[str], values: Tensor, skipped: Tensor) -> None:
        """Add a step's values (n,) under their names, unless the step was `skipped` (() bool on the same device)."""
        self.names, self.steps = list(names), self.steps + 1
        values = torch.where(skipped, 0.0, torch.cat((values, torch.ones_like(values[:1]))))
        self.sums = values if self.sums is None else self.sums + values

    def read(self, batch: int, device: torch.device) -> dict[str, float]:
        """Return the means by name, at `batch` images per step on `device`; the loss is NaN when all were skipped.

        Waits for the device, and counts the wait as step time.
        """
        began = time.perf_counter()
        *sums, taken = self.sums.tolist() if self.sums is not None else [0]
        self.seconds += time.perf_counter() - began
        values = {"loss": math.nan}
        if taken:
            values |= {name: value / taken for name, value in zip(self.names, sums, strict=True)}
        values["images_per_second"] = batch * self.steps / self.seconds
        values |= {"seconds": self.seconds / self.steps, "data_seconds": self.data_seconds / self.steps}
        if taken < self.steps:
            values["skipped"] = self.steps - int(taken)
        if device.type == "cuda":
            values["memory_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
        return values


_NAMED = ("lr", "seconds", "data_seconds", "images_per_second")


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _board(folder: Path, start: int) -> Any:
    """Return a TensorBoard writer if the extra `tensorboard` is installed and can write to the folder, else None."""
    try:
        str(folder).encode()  # TensorBoard knows no other names of folders
        from torch.utils.tensorboard import SummaryWriter
    except (ImportError, UnicodeEncodeError):
        return None
    return SummaryWriter(str(folder), purge_step=start + 1)


def _until(path: Path, iteration: int) -> str:
    """Return the lines of a log up to `iteration`, without a truncated last line."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            wanted = parse_json(line)["iteration"] <= iteration
        except (ValueError, KeyError, TypeError):
            continue
        if wanted:
            lines.append(line + "\n")
    return "".join(lines)
