"""`train --dry-run`: all that a run does up to its first steps, and what the whole run will need."""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segcore import distributed
from segcore.config.schema import Experiment
from segcore.config.source import source
from segcore.data.batch import Batch
from segcore.data.dataset import Dataset
from segcore.environment import device_name
from segcore.errors import UserError
from segcore.evaluation.evaluate import evaluate
from segcore.evaluation.predictor import Predictor
from segcore.reporting.crops import batch_picture
from segcore.reporting.figures import write_image
from segcore.training.guard import OutOfMemoryError, enough_memory
from segcore.training.logger import MetricLogger
from segcore.training.loop import batches_of_rank, out_of_memory, train_step
from segcore.training.setup import batch_shares, setup
from segcore.training.signals import SignalHandler
from segcore.training.state import TrainState, content_of

STEPS = 3
"""Real steps: the first one also makes what later ones reuse, so it is not timed where there are more."""


@dataclass(frozen=True)
class Needs:
    """What a run needs, from its first steps."""

    loss: float
    """Mean over the steps."""
    memory: int
    """Peak bytes: of CUDA's tensors, otherwise of the process without those that load data; 0: unknown."""
    step: float
    """Seconds of a step, with the wait for its images."""
    evaluation: float
    """Seconds of an evaluation; 0 without a validation set."""
    checkpoint: int
    """Bytes of a checkpoint."""


def dry_run(exp: Experiment, work_dir: Path, *, device: torch.device, offline: bool = False) -> None:
    """Set a run up, take its first steps and print what it needs; `<work_dir>.dry_run.png` shows its first images.

    Nothing else is kept but in `data.cache`, and `work_dir` is neither made nor touched. On CUDA with one process it
    also finds the largest device batch. Raises UserError for what a run would raise until then, and for a disk too
    small for the checkpoints.
    """
    work_dir = work_dir.resolve()  # "." has no name to write the image under
    with tempfile.TemporaryDirectory() as scratch:
        exp, state, dataset, val, notes = setup(exp, Path(scratch, "run"), device, resume=False, offline=offline)
    if work_dir.is_dir() and any(work_dir.iterdir()):
        notes.append(f"{work_dir}: is not empty; to train there, add --resume, or choose another --work-dir")
    if not distributed.rank():
        print(*notes, "", source(exp), sep="\n", flush=True)
    search = device.type == "cuda" and distributed.world_size() == 1
    with closing(batches_of_rank(exp, state, dataset, SignalHandler())) as batches:
        first, failed = next(batches), ""
        try:
            needs = measure(exp, state, chain([first], islice(batches, STEPS - 1)), val)
        except OutOfMemoryError as error:
            failed = str(error)
    if failed:  # searched only here, because the exception keeps the tensors of the failed pass in memory
        largest = largest_device_batch(exp, state, first[0]) if search else 0
        raise UserError(f"{failed}; {largest} fit" if largest else failed)

    def report() -> None:
        image = work_dir.parent / f"{work_dir.name}.dry_run.png"
        write_image(image, batch_picture(first[0], dataset, exp.data))
        lines = {"first images": str(image), **_lines(exp, needs, device)}
        if search:
            largest = largest_device_batch(exp, state, first[0])
            lines["device batch"] = f"{exp.train.device_batch_size} as set, at most {largest} (train.device_batch_size)"
        _print_needs(exp, needs, lines, work_dir)

    distributed.on_main_process(report)


def _print_needs(exp: Experiment, needs: Needs, lines: dict[str, str], work_dir: Path) -> None:
    """Print `lines` and the space that the checkpoints need; raises UserError if there is less."""
    folder = next(path for path in (work_dir, *work_dir.parents) if path.exists())
    disk, free = (exp.train.keep_last + 2) * needs.checkpoint, shutil.disk_usage(folder).free
    lines["disk"] = f"{_size(disk)} at most: train.keep_last {exp.train.keep_last}, the best and a new checkpoint of "
    lines["disk"] += f"{_size(needs.checkpoint)} each; {_size(free)} are free"
    width = max(map(len, lines))
    print(*(f"{name:>{width}}: {text}" for name, text in lines.items()), sep="\n")
    if disk > free:
        raise UserError(
            f"{folder}: {_size(free)} are free, but the checkpoints need {_size(disk)}; free space, lower "
            "train.keep_last, or choose another --work-dir"
        )


def measure(exp: Experiment, state: TrainState, steps: Iterable[list[Batch]], val: Dataset | None) -> Needs:
    """Take real steps, then predict a first batch of `val`, and return what the run needs."""
    metrics, seconds = MetricLogger(), list[float]()
    state.train_mode()
    began = time.perf_counter()
    for micro_batches in steps:
        with enough_memory(out_of_memory(exp)):
            train_step(exp, state, micro_batches, metrics)
        state.iteration += 1
        metrics.seconds = 1.0
        loss = metrics.read(exp.train.batch_size, state.device)["loss"]  # waits for the device
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
    timed = seconds[1:] or seconds
    evaluation = 0.0
    if val:
        some = min(len(val), exp.evaluate.batch_size * distributed.world_size())
        began = time.perf_counter()
        evaluate(Predictor.of(state.model, exp), val, seed=exp.seed, limit=some)
        evaluation = (time.perf_counter() - began) * len(val) / some
    return Needs(loss, _peak(state.device), sum(timed) / len(timed), evaluation, tensor_bytes(content_of(state)))


def largest_device_batch(exp: Experiment, state: TrainState, batch: Batch) -> int:
    """Return the most images of a forward pass, a divisor of this process's share of the batch, that fit; 0: none.

    Takes steps with more and more copies of the first image of `batch` until the device is out of memory.
    """
    share, largest = batch_shares(exp)[0], 0
    for count in (number for number in range(1, share + 1) if share % number == 0):
        images, labels = (part[:1].repeat_interleave(count, 0) for part in (batch.images, batch.labels))
        repeated = Batch(images, labels, batch.seeds[:1] * count, batch.iteration, sizes=batch.sizes[:1] * count)
        try:
            with enough_memory(""):
                train_step(exp, state, [repeated], MetricLogger())
                state.failures.item()  # waits for the device
        except OutOfMemoryError:
            state.optimizer.zero_grad()
            break
        except UserError:  # the model needs more images, for batch norm
            continue
        largest = count
    return largest


def tensor_bytes(content: Any) -> int:
    """Return the bytes of all tensors in nested dicts, lists and tuples."""
    if isinstance(content, Tensor):
        return content.numel() * content.element_size()
    parts = content.values() if isinstance(content, Mapping) else content if isinstance(content, list | tuple) else ()
    return sum(map(tensor_bytes, parts))


def _lines(exp: Experiment, needs: Needs, device: torch.device) -> dict[str, str]:
    steps = exp.schedule.iterations
    evaluations = math.ceil(steps / exp.train.evaluate_every) if needs.evaluation else 0
    training, testing = steps * needs.step, evaluations * needs.evaluation
    return {
        "device": device_name(device),
        "loss": f"{needs.loss:.4f}",
        "peak memory": _size(needs.memory) if needs.memory else "unknown",
        "step": f"{needs.step:.3f} s, with the wait for its images",
        "whole run": f"about {_time(training + testing)}: {_time(training)} for {steps} steps, {_time(testing)} for "
        f"evaluations ({evaluations})",
    }


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _time(seconds: float) -> timedelta:
    return timedelta(seconds=math.ceil(seconds))
