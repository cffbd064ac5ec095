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
from segcore.training.trackers import Tracker


class Logger:
    """The log of one run; use it in a `with` statement.

    On a terminal it shows a progress bar with rate, loss and time left, otherwise it prints plain lines. `log.jsonl`
    gets one object per line at full precision: `{"mode": "meta", …}` at every start, then `train` and `val`, each with
    `iteration`, the number of finished iterations. Values that are not finite become null. `trackers` get the values,
    too, and leave the dictionary when they fail or end.

    `start` is the iteration that a resumed run continues from: later log entries are dropped, so that curves are clean.
    `best` is its best mIoU (0..1) so far.
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
        best: float = -math.inf,
        trackers: dict[str, Tracker] | None = None,
        console: Console | None = None,
    ) -> None:
        self.path, self.iterations, self.start = work_dir and work_dir / "log.jsonl", iterations, start
        self.best, self.trackers = best, {} if trackers is None else trackers
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
        self._write({"mode": "meta", "iteration": start, **meta})

    def __enter__(self) -> Logger:
        self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.bar.stop()
        self.finish(None)

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
        self._track("log", iteration, {f"train/{name}": float(value) for name, value in values.items()})
        pace = (time.perf_counter() - self.began) / max(iteration - self.start, 1)
        rate, eta = values["images_per_second"], timedelta(seconds=round(pace * (self.iterations - iteration)))
        if self.plain:
            known = {"lr": f"{values['lr']:.3e}", "eta": eta, "time": f"{values['seconds']:.3f}"}
            known |= {"data_time": f"{values['data_seconds']:.3f}", "images/s": f"{rate:.1f}"}
            others = {key: _short(value) for key, value in values.items() if key not in _NAMED}
            text = ", ".join(f"{key}: {value}" for key, value in (known | others).items())
            self.line(f"Iter [{iteration}/{self.iterations}]  {text}")
            return
        parts = [f"loss {values['loss']:.4f}", f"eta {eta}", f"lr {values['lr']:.2e}", f"{rate:.1f} images/s"]
        if self.best >= 0:
            parts.insert(2, f"best mIoU {100 * self.best:.2f}")
        if "memory_mb" in values:
            parts.insert(-1, f"{values['memory_mb'] / 1024:.1f} GiB")
        while len(parts) > 2 and len("  ".join(parts)) > self.console.width - _BAR:  # the last matter least
            parts.pop()
        self.bar.update(self.training, completed=iteration, text="  ".join(parts))

    def val(self, iteration: int, values: Mapping[str, Any], text: str) -> None:
        """Log an evaluation: plain data for the file, tables for people. `values` holds `Results.to_json()`."""
        self._write({"mode": "val", "iteration": iteration, **values})
        self.best = max(self.best, values.get("mIoU") or self.best)
        means = {name: value for name, value in values.items() if isinstance(value, float)}
        # In alphabetical order, which trackers show: the mIoU, the other means, the classes.
        tags = {f"{'val' if name == 'mIoU' else 'val_means'}/{name}": value for name, value in means.items()}
        entries = values.get("entries", {})
        for entry, metrics in entries.items():
            group = f"val_iou {entry}" if len(entries) > 1 else "val_iou"
            ious = zip(values["classes"], metrics["IoU"], strict=True)
            tags |= {f"{group}/{name}": value for name, value in ious if value is not None}
        self._track("log", iteration, tags)
        self.line(f"Iter(val) [{iteration}]\n{text}")

    def image(self, iteration: int, image: np.ndarray | None) -> None:
        """Write an evaluation's image (H, W, 3) uint8 to figures/predictions_<iteration>.png and to the trackers."""
        if self.path and image is not None:
            write_image(self.path.parent / "figures" / f"predictions_{iteration}.png", image)
            self._track("image", iteration, image)

    def finish(self, results: Mapping[str, Any] | None) -> None:
        """End the trackers, see `Tracker.finish`, once."""
        self._track("finish", results)
        self.trackers.clear()

    def _track(self, method: str, *values: Any) -> None:
        """Call a method of every tracker; one that fails is reported and not called again."""
        for name, tracker in list(self.trackers.items()):
            try:
                getattr(tracker, method)(*values)
            except Exception as error:
                del self.trackers[name]
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                self.once(f"warning: the tracker {name} failed ({reason}); the run goes on without it")

    def _write(self, record: Mapping[str, Any]) -> None:
        if not self.path:
            return
        line = json.dumps({key: _finite(value) for key, value in record.items()}, allow_nan=False) + "\n"
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line)


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
_BAR = 36
"""Columns of a terminal that the name, the bar and the numbers of iterations take."""


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
