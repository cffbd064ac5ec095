"""What follows a run beside its log.jsonl: TensorBoard, Weights & Biases, or a tracker that a user's function returns.

Rank 0 alone has trackers. Those that `train.log` names must start, or the run does not; what fails later ends no run.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from segcore import distributed
from segcore.config.record import changed_settings, flat_settings, settings_of
from segcore.config.schema import Experiment
from segcore.config.user_code import is_reference, load_function
from segcore.errors import UserError
from segcore.files import read_json, write

WANDB_ID = "wandb.json"
"""File of the run's id at Weights & Biases: a resumed run continues there."""
METHODS = ("log", "image", "finish")


@dataclass(frozen=True)
class Run:
    """The run that a tracker is for: the one argument of a function or class that `train.log` names."""

    name: str
    """The configuration."""
    work_dir: Path
    """The run's folder."""
    start: int
    """Iterations that were finished before: above 0 in a resumed run."""
    settings: dict[str, Any]
    """`train.batch_size` -> 8: all resolved settings, as plain data."""
    changed: dict[str, Any]
    """Those that differ from the neutral defaults."""

    @classmethod
    def of(cls, exp: Experiment, work_dir: Path, start: int = 0) -> Run:
        """Return what a tracker receives about a run."""
        settings = settings_of(exp)
        return cls(exp.name, work_dir, start, flat_settings(settings), changed_settings(settings, type(exp.model)))


class Tracker(Protocol):
    """What receives the figures of a run. A tracker that raises receives nothing further, and the run goes on."""

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """Take values after `iteration` iterations: `train/loss`, `train/lr`, `val/mIoU`, `val_iou/road` …, 0..1."""

    def image(self, iteration: int, image: np.ndarray) -> None:
        """Take an evaluation's images with ground truth and prediction, (H, W, 3) uint8 RGB."""

    def finish(self, results: Mapping[str, Any] | None) -> None:
        """End: with the content of results.json, empty without evaluations; None for a run that did not get there."""


def start_trackers(exp: Experiment, work_dir: Path, start: int) -> dict[str, Tracker]:
    """Return the started trackers of a run by name: TensorBoard where it is installed, and those of `train.log`.

    Raises UserError when one of `train.log` cannot start; the others are then ended.
    """
    run = Run.of(exp, work_dir, start)
    found: dict[str, Tracker] = {}
    try:
        for name, begin in find_trackers(exp.train.log).items():
            found[name] = begin(run)
    except UserError:
        for tracker in found.values():
            tracker.finish(None)
        raise
    board = _tensorboard(run)
    return {"tensorboard": board, **found} if board else found


@contextlib.contextmanager
def trackers_of_main_process(exp: Experiment, work_dir: Path, start: int) -> Iterator[dict[str, Tracker]]:
    """Call `start_trackers` on rank 0, whose UserError all ranks raise, and yield the trackers; other ranks have none.

    Those that are left in the dictionary after the block are ended as those of a run that did not get to its end.
    """
    found: dict[str, Tracker] = {}
    distributed.on_main_process(lambda: found.update(start_trackers(exp, work_dir, start)))
    try:
        yield found
    finally:
        for tracker in found.values():
            with contextlib.suppress(Exception):
                tracker.finish(None)


def find_trackers(names: Sequence[str]) -> dict[str, Callable[[Run], Tracker]]:
    """Return what starts each tracker; raises UserError for one that is not installed or cannot be imported."""
    return {
        name: partial(_of_user, name, load_function("train.log", name)) if is_reference(name) else _wandb()
        for name in names
    }


def _of_user(name: str, sink: Callable[..., Any], run: Run) -> Tracker:
    """Return the tracker that a user's function or class makes."""
    tracker: Tracker = sink(run)
    if missing := [method for method in METHODS if not callable(getattr(tracker, method, None))]:
        raise UserError(
            f"train.log {name}: returned {type(tracker).__name__} without {', '.join(missing)}; return an object with "
            f"the methods {', '.join(METHODS)}"
        )
    return tracker


def _wandb() -> Callable[[Run], Tracker]:
    try:
        from wandb import init  # noqa: F401  (a folder `wandb` of earlier runs can be imported, too)
    except ImportError:
        raise UserError("train.log wandb: is not installed; pip install 'segcore[wandb]'") from None
    return WandB


class WandB:
    """A run at Weights & Biases, in the project WANDB_PROJECT or `segcore`; its other variables count as usual."""

    def __init__(self, run: Run) -> None:
        import wandb

        self.wandb, self.work_dir = wandb, run.work_dir
        own, known = run.work_dir / "wandb", (run.work_dir / "wandb").exists()
        identity = _wandb_id(run.work_dir)
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "segcore"),
                name=os.environ.get("WANDB_NAME", run.work_dir.resolve().name),
                id=identity,
                resume="allow",
                dir=str(run.work_dir),
                config=run.settings,
                settings=wandb.Settings(console="off", quiet=True),  # it would take the terminal from the progress bar
            )
        except Exception as error:
            if not known:
                shutil.rmtree(own, ignore_errors=True)
            raise UserError(
                f"train.log wandb: cannot start ({' '.join(str(error).split())[:200]}); `wandb login`, or set "
                "WANDB_MODE=offline and send the run later with `wandb sync`"
            ) from None
        write(run.work_dir / WANDB_ID, f'{{"id": "{self.run.id}"}}\n')
        self.run.define_metric("*", step_metric="iteration")  # its own steps cannot go back, as a resumed run does
        self.run.define_metric("val/mIoU", step_metric="iteration", summary="max,last")

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        self.run.log({"iteration": iteration, **values})

    def image(self, iteration: int, image: np.ndarray) -> None:
        self.run.log({"iteration": iteration, "predictions": self.wandb.Image(image)})

    def finish(self, results: Mapping[str, Any] | None) -> None:
        if results is not None:
            self.send(self.work_dir / "results.json")
        self.run.summary.update({key: value for key, value in (results or {}).items() if isinstance(value, float)})
        self.run.finish(exit_code=int(results is None))

    def send(self, path: Path) -> None:
        """Keep a file of the run's folder there, if it exists."""
        if path.is_file():
            self.run.save(str(path), base_path=str(self.work_dir), policy="now")


def send_report(exp: Experiment, work_dir: Path, path: Path) -> None:
    """Keep the page of a finished run at Weights & Biases, if `train.log` names it. What fails is a line, no error."""
    if "wandb" not in exp.train.log:
        return
    try:
        board = WandB(Run.of(exp, work_dir))
        board.send(path)
        board.run.finish()
    except Exception as error:
        print(f"note: wandb did not take {path} ({error})")


def _wandb_id(work_dir: Path) -> str:
    """Return the id that the run has there, or a new one."""
    try:
        known = str(read_json(work_dir / WANDB_ID).get("id"))
    except OSError:
        known = ""
    return known if re.fullmatch(r"[\w-]{1,64}", known, re.ASCII) else secrets.token_hex(4)


class TensorBoard:
    """Event files in `<work_dir>/tensorboard`, with the settings as a table and in the tab HPARAMS."""

    def __init__(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        str(run.work_dir).encode()  # TensorBoard knows no other names of folders
        self.board = SummaryWriter(str(run.work_dir / "tensorboard"), purge_step=run.start + 1)
        rows = [f"| {name} | {_cell(value)} |" for name, value in run.settings.items()]
        self.board.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]), run.start)
        plain = (bool, int, float)
        changed = {key: value if isinstance(value, plain) else _cell(value) for key, value in run.changed.items()}
        *begin, self.end = hparams(changed, {"val/mIoU": 0.0})  # the value is the curve's last
        for part in begin:
            self.board._get_file_writer().add_summary(part)

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.board.add_scalar(name.encode(errors="backslashreplace").decode(), value, iteration)

    def image(self, iteration: int, image: np.ndarray) -> None:
        self.board.add_image("predictions", image, iteration, dataformats="HWC")

    def finish(self, results: Mapping[str, Any] | None) -> None:
        if results is not None:
            self.board._get_file_writer().add_summary(self.end)
        self.board.close()


def _tensorboard(run: Run) -> TensorBoard | None:
    """Return the writer, or None without the extra `tensorboard` and, with a note, where it cannot start.

    No run asks for it, so nothing that it raises ends one: a broken installation raises errors of many types.
    """
    try:
        return TensorBoard(run)
    except Exception as error:
        if not (isinstance(error, ModuleNotFoundError) and error.name == "tensorboard"):
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            print(
                f"note: TensorBoard cannot start in {str(run.work_dir)!r} ({reason}); the run goes on without it; "
                "pip install -U 'segcore[tensorboard]' repairs an installation",
                file=sys.stderr,
            )
        return None


def _cell(value: Any) -> str:
    return str(value).encode(errors="backslashreplace").decode().replace("|", "\\|")
