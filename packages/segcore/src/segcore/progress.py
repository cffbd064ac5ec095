"""Progress of a long task: a bar on a terminal, otherwise a plain line every 10 seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function `advance(done, total)` that shows the progress of a task on standard error.

    Under torchrun, only rank 0 shows anything.
    """
    if os.environ.get("RANK", "0") != "0":
        yield lambda done, total: None
        return
    console = Console(stderr=True, force_jupyter=False)
    if not console.is_terminal:
        yield _plain(title)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, redirect_stderr=False) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _plain(title: str) -> Callable[[int, int], None]:
    last = time.monotonic()

    def advance(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= PLAIN_SECONDS:
            last = time.monotonic()
            Console(stderr=True, highlight=False, force_jupyter=False).print(f"{title}: {done}/{total}")

    return advance
