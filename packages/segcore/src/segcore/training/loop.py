"""The training loop.

All randomness of a step follows from (seed, iteration), so a run that was cut off anywhere and resumed ends with the
same weights, bit for bit on the CPU, as one that was not.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from segcore.data.dataset import Dataset, open_dataset
from segcore.data.loader import Batch, train_batches
from segcore.data.transforms import TrainTransform
from segcore.errors import UserError
from segcore.evaluation import report
from segcore.evaluation.evaluate import Results, check_fit, evaluate
from segcore.evaluation.inference import autocast
from segcore.experiment import Experiment
from segcore.files import write
from segcore.models.segmentor import Segmentor
from segcore.seeds import derive
from segcore.training import checkpoint
from segcore.training.log import RunLog, describe, differences
from segcore.training.optimizer import build_optimizer, load_optimizer_state, optimizer_state
from segcore.training.schedule import learning_rate

MAX_FAILURES = 3
"""Steps in a row whose loss or gradient is not finite before the run stops."""


@dataclass
class Run:
    """What changes while a run trains: everything that a checkpoint holds."""

    model: Segmentor
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    description: dict[str, Any]
    """Settings and versions."""
    iteration: int = 0
    """Finished iterations."""
    evaluated: int = 0
    """`iteration` at the last evaluation, and at the best one below."""
    best_iteration: int = 0
    best_miou: float = -math.inf
    saved: int = 0
    """`iteration` of the newest checkpoint."""


def train(
    exp: Experiment, work_dir: Path, *, device: str | torch.device = "cpu", resume: bool = False, offline: bool = False
) -> Results | None:
    """Train `exp` and return its final evaluation, None when `train.evaluate_every` is 0.

    `work_dir` gets experiment.json, log.jsonl, checkpoints/, best.json and results.json. `resume` goes on from the
    newest whole checkpoint in it, or starts when there is none yet; without it `work_dir` must be new or empty.
    `offline` forbids downloading start weights.

    Raises UserError about anything that cannot be used, after saving what was trained. Ctrl-C raises KeyboardInterrupt
    once the running iteration is finished and saved; a second Ctrl-C does so at once.
    """
    found = _resume_from(work_dir, resume)
    dataset = open_dataset(exp.data, "train")
    val = open_dataset(exp.data, "val") if exp.train.evaluate_every else None
    if val and (bare := next((sample.image for sample in val.samples if sample.label is None), None)):
        raise UserError(f"{bare}: has no label to evaluate with; set data.val_masks, or train.evaluate_every to 0")
    run = build(exp, torch.device(device))
    check_fit(run.model, dataset)
    notes = []
    if found:
        notes = restore(exp, run, found)
    elif resume:
        notes = [f"{work_dir}: no checkpoint yet, starting from the beginning"]
    if exp.train.init and not found:
        from segcore.training.weights import initialize

        notes.append(initialize(run.model, exp.train.init, offline=offline))
    write(work_dir / "experiment.json", json.dumps(run.description, indent=1) + "\n")
    with (
        RunLog(work_dir, exp.schedule.iterations, run.description, start=run.iteration) as log,
        Interrupt() as interrupt,
    ):
        for note in notes:
            log.line(note)
        try:
            return iterate(exp, run, dataset, val, work_dir, log, interrupt)
        except Stopped:
            if run.saved < run.iteration:
                save(exp, run, work_dir)
            log.line(
                f"{work_dir}: stopped after iteration {run.iteration}; it goes on from there (train: with --resume)"
            )
            raise KeyboardInterrupt from None
        except UserError as error:  # a file that cannot be read, say: what was trained so far is kept
            if run.saved < run.iteration and not isinstance(error, DivergedError):
                with contextlib.suppress(UserError):
                    save(exp, run, work_dir)
            raise
        except torch.OutOfMemoryError:  # inside the optimizer, where some weights may have changed: nothing to save
            raise UserError(_memory_for_training(exp)) from None


def iterate(
    exp: Experiment, run: Run, dataset: Dataset, val: Dataset | None, work_dir: Path, log: RunLog, interrupt: Interrupt
) -> Results | None:
    """Train from `run.iteration` to the end, evaluating and saving on the way; return the last results."""
    settings, total, device = exp.train, exp.schedule.iterations, next(run.model.parameters()).device
    results, meter, failures = None, Meter(), 0
    run.model.train()
    with closing(_batches(exp, run, dataset)) as batches:
        while True:
            last, new, best = run.iteration == total, run.evaluated < run.iteration, run.best_iteration
            if _due(run.iteration, settings.save_every, total) and run.saved < run.iteration:
                save(exp, run, work_dir)  # before the evaluation, which a single bad file can end
            if val and _due(run.iteration, settings.evaluate_every, total) and (new or last):
                results = measure(exp, run, val, log, interrupt)
                if run.best_iteration != best or (new and run.saved == run.iteration):
                    save(exp, run, work_dir)  # again, so that a resumed run knows of this evaluation
            if last:
                break
            interrupt.check()

            healthy = step(exp, run, batches, meter)
            run.iteration += 1
            log.advance(run.iteration)
            failures = 0 if healthy else failures + 1
            if failures == MAX_FAILURES:
                raise DivergedError(
                    f"{work_dir}: loss or gradient not finite {failures} times in a row, at iteration {run.iteration}; "
                    "lower optimizer.lr or set optimizer.clip_norm; "
                    f"last good checkpoint: {checkpoint.newest(work_dir) or 'none yet'}"
                )
            if _due(run.iteration, settings.log_every, total):
                log.train(
                    run.iteration, {"lr": run.optimizer.param_groups[0]["lr"], **meter.read(settings.batch, device)}
                )
                meter = Meter()
    if results:
        report.write_json(work_dir / "results.json", results, {"name": exp.name, "iteration": run.iteration})
    return results


def step(exp: Experiment, run: Run, batches: Generator[Batch, None, None], meter: Meter) -> bool:
    """Do one optimizer step and return whether loss and gradient were finite; otherwise weights and buffers stay.

    They also stay when the passes raise UserError, for a file that cannot be read or for lack of GPU memory.
    Gradients are accumulated over the parts of the global batch. With fp16 a gradient may overflow until the scaler has
    found its scale, so that is not held against the run until no scale is left.
    """
    model, optimizer, scaler, iteration = run.model, run.optimizer, run.scaler, run.iteration
    device = next(model.parameters()).device
    layout = torch.channels_last if exp.train.channels_last else torch.contiguous_format
    parts = exp.train.batch // _micro(exp)
    began, losses = time.perf_counter(), dict[str, Tensor]()
    kept = [buffer.clone() for buffer in model.buffers()]
    torch.manual_seed(derive(exp.seed, iteration, -1))  # dropout and the like; 0, 1, … are the images of the batch
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(exp.schedule, group["initial_lr"], iteration)
    optimizer.zero_grad()
    try:
        for _ in range(parts):
            asked = time.perf_counter()
            batch = next(batches)
            meter.data_seconds += time.perf_counter() - asked
            with _enough_memory(_memory_for_training(exp)):
                images = batch.images.to(device, memory_format=layout, non_blocking=True)
                labels = batch.labels.to(device, non_blocking=True)
                with autocast(device, exp.train.precision):
                    part = model.losses(images, labels, seeds=batch.seeds)
                scaler.scale(part["loss"] / parts).backward()
            losses = {name: losses.get(name, 0) + value.detach().float() / parts for name, value in part.items()}
    except UserError:
        _put_back(model.buffers(), kept)  # running statistics have seen the parts before
        raise
    scaler.unscale_(optimizer)
    norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    loss_finite, norm_finite = torch.isfinite(torch.stack((losses["loss"], norm))).tolist()
    if loss_finite and norm_finite:
        if exp.optimizer.clip_norm is not None:
            clip_grads_with_norm_(model.parameters(), exp.optimizer.clip_norm, norm)
        scaler.step(optimizer)
        meter.add({**losses, "grad_norm": norm})
    else:
        meter.skipped += 1
        _put_back(model.buffers(), kept)  # running statistics have seen the NaN
    overflow = loss_finite and scaler.is_enabled() and scaler.get_scale() > 1
    scaler.update()
    meter.seconds += time.perf_counter() - began
    return (loss_finite and norm_finite) or overflow


def measure(exp: Experiment, run: Run, val: Dataset, log: RunLog, interrupt: Interrupt) -> Results:
    """Evaluate the model as it is, log the results and note the best mIoU. A Ctrl-C ends it after the running batch."""

    def on_progress(done: int, total: int) -> None:
        log.evaluating(done, total)
        interrupt.check()

    batch, mode = exp.evaluate.batch, exp.evaluate.mode
    remedy = f"lower evaluate.batch ({batch}), or set evaluate.mode ({mode}) to slide with a smaller evaluate.crop"
    with _enough_memory(f"out of GPU memory in the evaluation: {remedy}"):
        results = evaluate(
            run.model,
            val,
            exp.evaluate,
            exp.data,
            device=next(run.model.parameters()).device,
            seed=exp.seed,
            workers=exp.data.workers,
            precision=exp.train.precision,
            channels_last=exp.train.channels_last,
            on_progress=on_progress,
        )
    run.evaluated = run.iteration
    figures = {name: float(results.final[name]) for name in ("aAcc", "mIoU", "mAcc")}
    if figures["mIoU"] > run.best_miou:
        run.best_iteration, run.best_miou = run.iteration, figures["mIoU"]
    metrics = exp.evaluate.metrics
    text = f"{report.per_class(results, metrics)}\n\n{report.summary(results, metrics)}"
    log.val(run.iteration, {**figures, **results.to_json()}, text)
    return results


def build(exp: Experiment, device: torch.device) -> Run:
    """Return a run at its beginning: random weights that follow from the seed, on `device`."""
    torch.manual_seed(exp.seed)
    model = exp.model.build()  # on the CPU, so that the weights do not depend on the device
    model = model.to(device)
    if exp.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    scaler = torch.amp.GradScaler(device.type, enabled=exp.train.precision == "fp16")
    return Run(model, build_optimizer(model, exp.optimizer), scaler, describe(exp))


def save(exp: Experiment, run: Run, work_dir: Path) -> None:
    """Write a checkpoint of the run as it is, record the best one and remove those that are no longer kept."""
    state = {
        "iteration": run.iteration,
        "evaluated": run.evaluated,
        "best_iteration": run.best_iteration,
        "best_miou": run.best_miou,
        "optimizer": optimizer_state(run.model, run.optimizer),
        "scaler": run.scaler.state_dict(),
    }
    checkpoint.save(checkpoint.folder_of(work_dir, run.iteration), run.model.state_dict(), state, run.description)
    run.saved = run.iteration
    if run.best_iteration:
        checkpoint.mark_best(work_dir, run.best_iteration, run.best_miou)
    checkpoint.prune(work_dir, exp.train.keep, run.iteration)


def restore(exp: Experiment, run: Run, folder: Path) -> list[str]:
    """Put a run back to where a checkpoint was written; return lines that say so and which settings are others now.

    Raises UserError when the checkpoint does not fit the model or lies beyond the schedule.
    """
    found = checkpoint.load(folder)
    own, state = run.model.state_dict(), found.state
    if wrong := sorted(n for n in {*own, *found.model} if _shape(own, n) != _shape(found.model, n)):
        raise UserError(
            f"{folder}: {len(wrong)} tensors do not fit the model (first: {wrong[0]}); "
            "resume with the settings in its experiment.json, or choose another --work-dir"
        )
    if state["iteration"] > exp.schedule.iterations:
        raise UserError(f"{folder}: lies beyond schedule.iterations {exp.schedule.iterations}; set more there")
    run.model.load_state_dict(found.model)
    load_optimizer_state(run.model, run.optimizer, state["optimizer"])
    if state["scaler"]:
        run.scaler.load_state_dict(state["scaler"])
    run.iteration, run.saved, run.evaluated = state["iteration"], state["iteration"], state["evaluated"]
    run.best_iteration, run.best_miou = state["best_iteration"], state["best_miou"]
    changed = differences(found.experiment["experiment"], run.description["experiment"])
    return [f"{folder}: going on from iteration {run.iteration}", *(f"changed since then: {line}" for line in changed)]


class Meter:
    """Sums since the last log line. Losses stay on the device until they are read, so that nothing waits for them."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = self.skipped = 0
        self.seconds = self.data_seconds = 0.0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add the scalars of a step that was taken."""
        self.steps += 1
        self.sums = {name: self.sums.get(name, 0) + value for name, value in values.items()}

    def read(self, batch: int, device: torch.device) -> dict[str, float]:
        """Return the means by name, at `batch` images per step on `device`; the loss is NaN when all were skipped."""
        iterations = self.steps + self.skipped
        means = (torch.stack(list(self.sums.values())) / self.steps).tolist() if self.steps else []
        values = {"loss": math.nan, **dict(zip(self.sums, means, strict=True))}
        values["images_per_second"] = batch * iterations / self.seconds
        values |= {"seconds": self.seconds / iterations, "data_seconds": self.data_seconds / iterations}
        if self.skipped:
            values["skipped"] = self.skipped
        if device.type == "cuda":
            values["memory_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
        return values


class DivergedError(UserError):
    """The loss is no longer finite: going on from here is no use, so nothing is saved over the last good checkpoint."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C, raised where the state of the run is whole."""


class Interrupt:
    """Holds a Ctrl-C back until `check`, where the state of the run is whole; a second one is not held back."""

    asked = False

    def __enter__(self) -> Interrupt:
        self.main = threading.current_thread() is threading.main_thread()  # only there may a handler be set
        if self.main:
            self.previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.main:
            signal.signal(signal.SIGINT, self.previous)

    def check(self) -> None:
        """Raise Stopped when there was a Ctrl-C."""
        if self.asked:
            raise Stopped

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def _resume_from(work_dir: Path, resume: bool) -> Path | None:
    """Return the checkpoint to go on from, None to start; raises UserError when the folder cannot be used for that."""
    if not resume:
        if work_dir.exists() and not (work_dir.is_dir() and next(work_dir.iterdir(), None) is None):
            raise UserError(
                f"{work_dir}: is not empty; add --resume to go on with its run, or choose another --work-dir"
            )
        return None
    found = checkpoint.newest(work_dir)
    if found is None and any((work_dir / "checkpoints").glob("iter_*")):
        raise UserError(f"{work_dir / 'checkpoints'}: no checkpoint is whole; start again with another --work-dir")
    return found


def _batches(exp: Experiment, run: Run, dataset: Dataset) -> Generator[Batch, None, None]:
    yield from train_batches(
        dataset,
        TrainTransform(exp.data, dataset.ignore_index),
        batch=exp.train.batch,
        micro=_micro(exp),
        seed=exp.seed,
        start=run.iteration,
        stop=exp.schedule.iterations,
        workers=exp.data.workers,
        pin_memory=next(run.model.parameters()).is_cuda,
    )


@contextlib.contextmanager
def _enough_memory(message: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(message) from None


def _memory_for_training(exp: Experiment) -> str:
    height, width = exp.data.crop
    return f"out of GPU memory: lower train.max_per_device ({_micro(exp)}) or data.crop ({height} {width})"


def _put_back(buffers: Iterable[Tensor], kept: Iterable[Tensor]) -> None:
    for buffer, value in zip(buffers, kept, strict=True):
        buffer.copy_(value)


def _micro(exp: Experiment) -> int:
    """Return the images per forward pass."""
    return min(exp.train.max_per_device, exp.train.batch)


def _due(iteration: int, every: int, total: int) -> bool:
    """Return whether something that happens every so many iterations (0: never) and at the end happens now."""
    return every > 0 and iteration > 0 and (iteration == total or iteration % every == 0)


def _shape(state: Mapping[str, Any], name: str) -> Any:
    return state[name].shape if name in state else None
