"""The training loop.

All randomness of a step follows from (seed, iteration), so a run that was cut off anywhere and resumed ends with the
same weights, bit for bit on the CPU, as one that was not. Order and noise of the images do not depend on the number of
processes either; what each process does alone is its share of the passes, and what the first does alone is to write.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from segcore import distributed
from segcore.checkpoints import run_checkpoint as checkpoint
from segcore.config.schema import Experiment
from segcore.data.check import check_headers
from segcore.data.dataset import Dataset
from segcore.data.layouts import open_dataset
from segcore.data.loader import Batch, train_batches
from segcore.data.transforms import TrainTransform
from segcore.errors import Stopped, UserError
from segcore.evaluation.evaluate import Results, check_fit, evaluate
from segcore.evaluation.predictor import autocast
from segcore.files import write
from segcore.reporting import tables as report
from segcore.reporting.prediction_grid import PredictionGrid
from segcore.seeds import dropout_seed
from segcore.training.class_weight import class_weights
from segcore.training.ema import averaged, start_ema, update_ema
from segcore.training.logger import Logger
from segcore.training.schedule import learning_rate
from segcore.training.setup import build, prepare
from segcore.training.signals import Stop
from segcore.training.state import Run, restore, save

MAX_FAILURES = 3
"""Steps in a row whose loss or gradient is not finite before the run stops."""


def train(
    exp: Experiment, work_dir: Path, *, device: str | torch.device = "cpu", resume: bool = False, offline: bool = False
) -> Results | None:
    """Train `exp` and return its final evaluation, None when `train.evaluate_every` is 0.

    `work_dir` gets experiment.json, log.jsonl, figures/, checkpoints/, best.json and results.json. `resume` goes on
    from the newest whole checkpoint in it, or starts when there is none yet; without it `work_dir` must be new or
    empty. `offline` forbids downloading start weights. Inside `distributed.process_group` each process trains on its
    share of the batch and returns the same results.

    Raises UserError about anything that cannot be used, after saving what was trained. Ctrl-C and SIGTERM raise
    KeyboardInterrupt, holding the signal's number, once the running iteration is finished and saved; a second Ctrl-C
    does so at once.
    """
    share_of_batch(exp)  # refuses a batch that does not divide
    found = distributed.on_main_process(lambda: _resume_from(work_dir, resume))
    dataset = distributed.main_process_first(lambda: open_dataset(exp.data, "train"))
    val = open_dataset(exp.data, "val") if exp.train.evaluate_every else None
    broken = distributed.on_main_process(
        lambda: [line for part in (dataset, val) if part for line in check_headers(part)]
    )
    if broken and exp.data.on_error == "stop":
        raise UserError(f"{broken[0]} (and {len(broken) - 1} more; `check` lists all)" if broken[1:] else broken[0])
    if val and (bare := next((sample.image for sample in val.samples if sample.label is None), None)):
        raise UserError(f"{bare}: has no label to evaluate with; set data.val_masks, or train.evaluate_every to 0")
    run = build(exp, torch.device(device))
    check_fit(run.model, dataset)
    if val:
        run.model.check_steps(exp.evaluate.steps)
    notes = [*broken, *_notes(run)]
    if found:
        notes += restore(exp, run, found)
    elif resume:
        notes.append(f"{work_dir}: no checkpoint yet, starting from the beginning")
    if exp.train.init_from and not found:
        from segcore.checkpoints.load import initialize

        start = exp.train.init_from
        notes.append(distributed.main_process_first(lambda: initialize(run.model, start, offline=offline)))
        run.average = None if run.average is None else start_ema(run.model)
    weights = distributed.main_process_first(lambda: class_weights(exp, dataset, work_dir))
    run.model.class_weight = weights if weights is None else weights.to(run.device)
    prepare(exp, run)
    record = {**run.description, "torchrun": distributed.elastic_run_id()}
    distributed.on_main_process(lambda: write(work_dir / "experiment.json", json.dumps(record, indent=1) + "\n"))
    own_dir = None if distributed.rank() else work_dir  # the first process writes and talks
    with Stop() as stop, Logger(own_dir, exp.schedule.iterations, run.description, start=run.iteration) as log:
        for note in notes:
            log.line(note)
        try:
            results = iterate(exp, run, dataset, val, work_dir, log, stop)
            best = (
                f"; best: iteration {run.best_iteration}, mIoU {100 * run.best_miou:.2f}" if run.best_iteration else ""
            )
            log.line(f"{work_dir}: finished{best}")
            return results
        except Stopped as error:
            if run.saved < run.iteration:
                save(exp, run, work_dir)
            log.line(
                f"{work_dir}: stopped after iteration {run.iteration}; it goes on from there (train: with --resume)"
            )
            raise KeyboardInterrupt(*error.args) from None
        except UserError as error:  # a file that cannot be read, say: what was trained so far is kept
            together = distributed.world_size() == 1 or error.agreed
            if run.saved < run.iteration and together and not isinstance(error, DivergedError):
                with contextlib.suppress(UserError):
                    save(exp, run, work_dir)
            raise
        except torch.OutOfMemoryError:  # inside the optimizer, where some weights may have changed: nothing to save
            raise UserError(_memory_for_training(exp)) from None


def iterate(
    exp: Experiment, run: Run, dataset: Dataset, val: Dataset | None, work_dir: Path, log: Logger, stop: Stop
) -> Results | None:
    """Train from `run.iteration` to the end, evaluating and saving on the way; return the last results."""
    settings, total = exp.train, exp.schedule.iterations
    results, meter, failures = None, Meter(), 0
    run.model.train()
    with closing(_batches(exp, run, dataset)) as batches:
        while True:
            last, new, best = run.iteration == total, run.evaluated < run.iteration, run.best_iteration
            if _due(run.iteration, settings.save_every, total) and run.saved < run.iteration:
                save(exp, run, work_dir)  # before the evaluation, which a single bad file can end
            if val and _due(run.iteration, settings.evaluate_every, total) and (new or last):
                results = measure(exp, run, val, log, stop)
                if run.best_iteration != best or (new and run.saved == run.iteration):
                    save(exp, run, work_dir)  # again, so that a resumed run knows of this evaluation
            if last:
                break

            parts = read(run, batches, meter, stop, log)
            healthy = step(exp, run, parts, meter)
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
                lr = run.optimizer.param_groups[0]["lr"]
                log.train(run.iteration, {"lr": lr, **meter.read(settings.batch_size, run.device)})
                meter = Meter()
    if run.skipped:
        log.line(f"{run.skipped} training samples could not be read and were skipped; `check` names the files")
    if results:
        found, extra = results, {"name": exp.name, "iteration": run.iteration, "skipped_training_samples": run.skipped}
        distributed.on_main_process(lambda: report.write_json(work_dir / "results.json", found, extra))
    return results


def read(run: Run, batches: Iterator[list[Batch]], meter: Meter, stop: Stop, log: Logger) -> list[Batch]:
    """Return the parts of the next step. Raises Stopped or UserError in all processes when one has reason to."""
    began = time.perf_counter()
    parts: list[Batch] = []
    error: UserError | Stopped | None = None
    try:
        stop.check()
        parts = next(batches)
    except (UserError, Stopped) as caught:
        error = caught
    wrong = [text for part in parts for text in part.skipped]
    [skipped] = distributed.sync_status(error, len(wrong))
    run.skipped += skipped
    for text in wrong:
        log.once(f"skipped: {text}")
    meter.data_seconds += time.perf_counter() - began
    meter.seconds += time.perf_counter() - began
    return parts


def step(exp: Experiment, run: Run, parts: list[Batch], meter: Meter) -> bool:
    """Do one optimizer step and return whether loss and gradient were finite; otherwise weights and buffers stay.

    They also stay when the passes raise UserError for lack of GPU memory. Gradients are accumulated over the parts of
    this process, and averaged over the processes in the last one. With fp16 a gradient may overflow until the scaler
    has found its scale, so that is not held against the run until no scale is left.
    """
    model, optimizer, scaler, device = run.model, run.optimizer, run.scaler, run.device
    layout = torch.channels_last if exp.train.channels_last else torch.contiguous_format
    began, losses = time.perf_counter(), dict[str, Tensor]()
    kept = [buffer.clone() for buffer in model.buffers()]
    torch.manual_seed(dropout_seed(exp.seed, run.iteration, distributed.rank()))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(exp.schedule, group["initial_lr"], run.iteration)
    optimizer.zero_grad()
    try:
        for number, batch in enumerate(parts, 1):
            accumulate = number < len(parts) and distributed.world_size() > 1
            with (
                _enough_memory(_memory_for_training(exp)),
                distributed.collective(counted=False),
                run.losses.no_sync() if accumulate else contextlib.nullcontext(),  # type: ignore[operator]
            ):
                images = batch.images.to(device, memory_format=layout, non_blocking=True)
                labels = batch.labels.to(device, non_blocking=True)
                with autocast(device, exp.train.precision):
                    part = run.losses(images, labels, batch.seeds)
                with distributed.collective():
                    scaler.scale(part["loss"] / len(parts)).backward()
            losses = {name: losses.get(name, 0) + value.detach().float() / len(parts) for name, value in part.items()}
    except UserError:
        _put_back(model.buffers(), kept)  # running statistics have seen the parts before
        raise
    values = distributed.all_reduce_sum(torch.stack(list(losses.values()))) / distributed.world_size()
    losses = dict(zip(losses, values, strict=True))
    scaler.unscale_(optimizer)
    norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    loss_finite, norm_finite = torch.isfinite(torch.stack((losses["loss"], norm.float()))).tolist()
    if loss_finite and norm_finite:
        if exp.optimizer.clip_norm is not None:
            clip_grads_with_norm_(model.parameters(), exp.optimizer.clip_norm, norm)
        scaler.step(optimizer)
        meter.add({**losses, "grad_norm": norm})
        due = (run.iteration + 1) % exp.train.ema_every == 0
        if due and run.average is not None and exp.train.ema is not None:
            update_ema(run.average, model, exp.train.ema)
    else:
        meter.skipped += 1
        _put_back(model.buffers(), kept)  # running statistics have seen the NaN
    overflow = loss_finite and scaler.is_enabled() and scaler.get_scale() > 1
    scaler.update()
    meter.seconds += time.perf_counter() - began
    return (loss_finite and norm_finite) or overflow


def measure(exp: Experiment, run: Run, val: Dataset, log: Logger, stop: Stop) -> Results:
    """Evaluate the model as it is, log the results and note the best mIoU. A signal ends it after the running batch."""

    def on_progress(done: int, total: int) -> None:
        log.evaluating(done, total)
        stop.check()

    gallery = PredictionGrid(val, run.model.step_unit)
    batch, mode = exp.evaluate.batch_size, exp.evaluate.mode
    remedy = f"lower evaluate.batch_size ({batch}), or set evaluate.mode ({mode}) to slide with a smaller evaluate.crop"
    with averaged(run.model, run.average), _enough_memory(f"out of GPU memory in the evaluation: {remedy}"):
        distributed.broadcast(list(run.model.buffers()))  # running statistics of the first process count
        results = evaluate(
            run.model,
            val,
            exp.evaluate,
            exp.data,
            device=run.device,
            seed=exp.seed,
            workers=exp.data.workers,
            precision=exp.train.precision,
            channels_last=exp.train.channels_last,
            on_progress=on_progress,
            on_prediction=gallery.add if log.path else None,
        )
    run.evaluated = run.iteration
    figures = {name: float(results.final[name]) for name in ("aAcc", "mIoU", "mAcc")}
    if figures["mIoU"] > run.best_miou:
        run.best_iteration, run.best_miou = run.iteration, figures["mIoU"]
    metrics = exp.evaluate.metrics
    text = f"{report.per_class(results, metrics)}\n\n{report.summary(results, metrics)}"
    log.val(run.iteration, {**figures, **results.to_json()}, text)
    log.picture(run.iteration, gallery.picture())
    log.curve()
    return results


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


def _resume_from(work_dir: Path, resume: bool) -> Path | None:
    """Return the checkpoint to go on from, None to start; raises UserError when the folder cannot be used for that."""
    if work_dir.exists() and not work_dir.is_dir():
        raise UserError(f"{work_dir}: is a file; choose another --work-dir")
    if not resume:
        if work_dir.exists() and next(work_dir.iterdir(), None) is not None:
            raise UserError(
                f"{work_dir}: is not empty; add --resume to go on with its run, or choose another --work-dir"
            )
        return None
    found = checkpoint.newest(work_dir)
    if found is None and any((work_dir / "checkpoints").glob("iter_*")):
        raise UserError(f"{work_dir / 'checkpoints'}: no checkpoint is whole; start again with another --work-dir")
    return found


def _notes(run: Run) -> Iterator[str]:
    """Yield what a user of several processes should know."""
    if (count := distributed.world_size()) > 1:
        local = any(isinstance(module, torch.nn.BatchNorm2d) for module in run.model.modules())
        yield f"{count} processes on {run.device.type}" + (", batch norm stays local to each" if local else "")


def _batches(exp: Experiment, run: Run, dataset: Dataset) -> Generator[list[Batch], None, None]:
    """Yield the parts of every step of this process."""
    share, part = share_of_batch(exp)
    batches = train_batches(
        dataset,
        TrainTransform(exp.data, dataset.ignore_index),
        batch=exp.train.batch_size,
        micro=part,
        seed=exp.seed,
        start=run.iteration,
        stop=exp.schedule.iterations,
        workers=exp.data.workers,
        rank=distributed.rank(),
        world=distributed.world_size(),
        on_error=exp.data.on_error,
        pin_memory=run.device.type == "cuda",
    )
    while parts := list(islice(batches, share // part)):
        yield parts


def share_of_batch(exp: Experiment) -> tuple[int, int]:
    """Return the images per step and per forward pass of one process; raises UserError when they do not divide."""
    batch, most, world = exp.train.batch_size, exp.train.device_batch_size, distributed.world_size()
    share = batch // world
    part = min(most, share)
    if batch % world or share % part:
        raise UserError(
            f"train.batch_size {batch} on {world} devices does not divide into passes of train.device_batch_size "
            f"{most}; "
            "choose a multiple for train.batch_size, or another number of devices"
        )
    return share, part


@contextlib.contextmanager
def _enough_memory(message: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(message) from None


def _memory_for_training(exp: Experiment) -> str:
    height, width = exp.data.crop
    return (
        f"out of GPU memory: lower train.device_batch_size ({share_of_batch(exp)[1]}) or data.crop ({height} {width})"
    )


def _put_back(buffers: Iterable[Tensor], kept: Iterable[Tensor]) -> None:
    for buffer, value in zip(buffers, kept, strict=True):
        buffer.copy_(value)


def _due(iteration: int, every: int, total: int) -> bool:
    """Return whether something that happens every so many iterations (0: never) and at the end happens now."""
    return every > 0 and iteration > 0 and (iteration == total or iteration % every == 0)
