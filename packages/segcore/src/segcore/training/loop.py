"""The training loop.

All randomness of a step follows from (seed, iteration), so a run that is interrupted anywhere and resumed ends with
the same weights as an uninterrupted one, bit for bit on the CPU. Order and noise of the images do not depend on the
number of ranks either. Each rank computes its share of the micro-batches; only rank 0 writes files.

The host never waits for a GPU between two log lines: the device decides whether a step is skipped, and the host reads
the decision during the next step. (Torch's SyncBatchNorm, used on several GPUs, does wait in every layer.) Nor does the
host wait for other ranks, which agree on a step during the previous one.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from segcore import distributed
from segcore.checkpoints import run_checkpoint as checkpoint
from segcore.config.schema import Experiment
from segcore.data.batch import Batch
from segcore.data.dataset import Dataset
from segcore.data.loader import train_batches
from segcore.data.transforms import TrainTransform
from segcore.data.workers import worker_count
from segcore.environment import command_line, device_name
from segcore.errors import Stopped, UserError
from segcore.evaluation.evaluate import Results, evaluate
from segcore.evaluation.predictor import Predictor, autocast
from segcore.files import write
from segcore.reporting import tables
from segcore.reporting.prediction_grid import PredictionGrid
from segcore.reporting.run_record import Evaluation, write_evaluation
from segcore.seeds import dropout_seed
from segcore.training.ema import averaged, update_ema
from segcore.training.guard import HostCopy, guarded_passes
from segcore.training.lock import run_lock
from segcore.training.logger import Logger, MetricLogger
from segcore.training.schedule import learning_rate
from segcore.training.setup import batch_shares, setup
from segcore.training.signals import SignalHandler
from segcore.training.state import TrainState, save_state
from segcore.training.trackers import Tracker, trackers_of_main_process

MAX_FAILURES = 3
"""Consecutive steps with a loss or gradient that is not finite, after which the run stops."""


def train(
    exp: Experiment, work_dir: Path, *, device: str | torch.device = "cpu", resume: bool = False, offline: bool = False
) -> Results | None:
    """Train `exp` and return its final evaluation, None when `train.evaluate_every` is 0.

    `work_dir` gets experiment.json, log.jsonl, figures/, checkpoints/, best.json, results.json and evaluation.json.
    `resume` continues from its newest complete checkpoint, or starts if there is none yet; without it `work_dir` must
    be new or empty. A folder where another run lives is refused. `offline` forbids downloading start weights. Inside
    `distributed.process_group` each rank trains on its share of the batch and returns the same results.

    Raises UserError for anything unusable, after saving the training state. Ctrl-C and SIGTERM raise KeyboardInterrupt
    with the signal's number once the current iteration (with several ranks, the next one) is finished and saved; a
    second Ctrl-C raises it at once.
    """
    with run_lock(work_dir):
        return _train(exp, work_dir, torch.device(device), resume=resume, offline=offline)


def _train(
    exp: Experiment, work_dir: Path, device: torch.device, *, resume: bool, offline: bool
) -> Results | None:  # fmt: skip
    exp, state, dataset, val, notes = setup(exp, work_dir, device, resume=resume, offline=offline)
    with trackers_of_main_process(exp, work_dir, state.iteration) as trackers:
        return _run(exp, state, dataset, val, work_dir, notes, trackers)


def _run(
    exp: Experiment, state: TrainState, dataset: Dataset, val: Dataset | None, work_dir: Path, notes: list[str],
    trackers: dict[str, Tracker],
) -> Results | None:  # fmt: skip
    """Train from the state that `setup` returned, and write what the run's folder holds."""
    device = state.device
    how = {"torchrun": distributed.elastic_run_id(), "command": command_line(), "device": device_name(device)}
    record = {**state.description, **how}
    file, finished = work_dir / "experiment.json", state.iteration == exp.schedule.iterations or state.early_end(exp)

    def keep() -> None:
        if not (finished and file.exists()):  # of a finished run, what it was trained with stays
            write(file, json.dumps(record, indent=1) + "\n")

    distributed.on_main_process(keep)  # every rank takes part, whether or not it sees the file
    own_dir = None if distributed.rank() else work_dir  # rank 0 writes and prints
    with (
        SignalHandler() as signals,
        Logger(
            own_dir,
            exp.schedule.iterations,
            state.description,
            start=state.iteration,
            best=state.best_miou,
            trackers=trackers,
        ) as log,
    ):
        sizes = f"{len(dataset)} training images" + (f", {len(val)} validation images" if val else "")
        for note in (f"{device_name(device)}: {sizes}", *notes):
            log.line(note)
        try:
            results = train_loop(exp, state, dataset, val, work_dir, log, signals)
        except Stopped as error:
            _stop(exp, state, work_dir, log)
            raise KeyboardInterrupt(*error.args) from None
        except UserError as error:  # such as an unreadable file: save the progress before it
            together = distributed.world_size() == 1 or error.agreed
            if state.saved < state.iteration and together and not isinstance(error, DivergedError):
                with contextlib.suppress(UserError):
                    _stop(exp, state, work_dir, log)
            raise
        except torch.OutOfMemoryError:  # in the optimizer, which may have changed some weights: do not save
            raise UserError(out_of_memory(exp)) from None
        if results:
            found = Evaluation.of(results, "train", state.iteration)
            distributed.on_main_process(lambda: write_evaluation(work_dir, exp, found))
        early = state.early_end(exp)
        where = f" at iteration {state.iteration} of {exp.schedule.iterations}, {early}" if early else ""
        best = f"; best: iteration {state.best_iteration}, mIoU {100 * state.best_miou:.2f}"
        log.line(f"{work_dir}: finished{where}{best if state.best_iteration else ''}")
        log.finish({**figures_of(results), **results.to_json()} if results else {})
        return results


def _stop(exp: Experiment, state: TrainState, work_dir: Path, log: Logger) -> None:
    """Save what a run has reached that ends early."""
    if state.saved < state.iteration:
        save_state(exp, state, work_dir)
    log.line(f"{work_dir}: stopped after iteration {state.iteration}; continue with `train --resume`")


def train_loop(
    exp: Experiment, state: TrainState, dataset: Dataset, val: Dataset | None, work_dir: Path, log: Logger,
    signals: SignalHandler,
) -> Results | None:  # fmt: skip
    """Train from `state.iteration` to the end, evaluating and saving on the way; return the last results.

    The end is the last iteration, or the evaluation at which `train.patience` is exhausted.
    """
    settings, total = exp.train, exp.schedule.iterations
    results, metrics, failures = None, MetricLogger(), None
    state.train_mode()
    with closing(batches_of_rank(exp, state, dataset, signals)) as batches:
        steps = _agreed(batches, range(state.iteration, total), state, metrics, log, signals)
        while True:
            last = state.iteration == total or bool(state.early_end(exp))
            new, best = state.evaluated < state.iteration, state.best_iteration
            if _due(state.iteration, settings.save_every, last) and state.saved < state.iteration:
                _check(failures, work_dir)
                save_state(exp, state, work_dir)  # before the evaluation, which a single bad file can abort
            if val and _due(state.iteration, settings.evaluate_every, last) and (new or last):
                _check(failures, work_dir)
                results = validate(exp, state, val, log, signals)
                last = last or bool(state.early_end(exp))
                if state.best_iteration != best or (new and (last or state.saved == state.iteration)):
                    save_state(exp, state, work_dir)  # again, to record this evaluation for a resumed run
            if last:
                _check(failures, work_dir)
                break

            began = time.perf_counter()
            micro_batches = next(steps)
            train_step(exp, state, micro_batches, metrics)
            state.iteration += 1
            _check(failures, work_dir)
            failures = state.iteration, HostCopy(state.failures)
            metrics.seconds += time.perf_counter() - began
            log.advance(state.iteration)
            if _due(state.iteration, settings.log_every, state.iteration == total):
                lr = state.optimizer.param_groups[0]["lr"]
                values = {"lr": lr, **metrics.read(settings.batch_size, state.device)}
                metrics.reset()
                distributed.on_main_process(partial(log.train, state.iteration, values))  # its error is that of all
    if state.skipped:
        log.line(f"{state.skipped} training samples could not be read and were skipped; `check` names the files")
    if results:
        found = results
        extra: dict[str, object] = {"name": exp.name, "iteration": state.iteration}
        extra |= {"stopped_early": state.early_end(exp), "skipped_training_samples": state.skipped}
        distributed.on_main_process(lambda: tables.write_json(work_dir / "results.json", found, extra))
    return results


def train_step(exp: Experiment, state: TrainState, micro_batches: list[Batch], metrics: MetricLogger) -> None:
    """Do one optimizer step; if the loss or gradient is not finite, skip it on the device, with no change of state.

    The same holds when the passes raise UserError for lack of GPU memory. Gradients accumulate over this rank's
    micro-batches; the last one averages them over the ranks. `state.failures` counts consecutive skipped steps. With
    fp16 a gradient may overflow until the scaler finds its scale: this is a failure only if the scale is down to 1.
    """
    model, optimizer, scaler, device = state.model, state.optimizer, state.scaler, state.device
    layout = torch.channels_last if exp.train.channels_last else torch.contiguous_format
    count, values = len(micro_batches), torch.zeros((), device=device)
    torch.manual_seed(dropout_seed(exp.seed, state.iteration, distributed.rank()))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(exp.schedule, group["initial_lr"], state.iteration)

    with guarded_passes(state.buffers, out_of_memory(exp)):
        for number, batch in enumerate(micro_batches, 1):
            with distributed.no_sync(state.losses, number < count):
                images, labels = batch.on(device, exp.data.mean, exp.data.std, layout)
                with autocast(device, exp.train.precision):
                    losses = state.losses(images, labels, batch.seeds)
                distributed.announce()
                scaler.scale(losses["loss"] / count).backward()
            values = values + torch.stack([value.detach().float() for value in losses.values()]) / count
    values = distributed.all_reduce_sum(values) / distributed.world_size()
    scaler.unscale_(optimizer)
    norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    loss_finite = values[list(losses).index("loss")].isfinite()
    skip = ~(loss_finite & norm.isfinite())
    if exp.optimizer.clip_norm is not None:
        clip_grads_with_norm_(model.parameters(), exp.optimizer.clip_norm, norm)
    optimizer.found_inf = skip.float()  # type: ignore[attr-defined]  # 1: the fused kernels do nothing
    optimizer.step()
    optimizer.zero_grad()

    state.buffers.put_back(skip)
    if state.average is not None and exp.train.ema is not None and (state.iteration + 1) % exp.train.ema_every == 0:
        update_ema(state.average, model, exp.train.ema, skip)
    overflow = loss_finite & (scaler.scale(torch.ones_like(norm)) > 1)
    state.failures = torch.where(skip & ~overflow, state.failures + 1, 0)
    scaler.update()
    metrics.add((*losses, "grad_norm"), torch.cat((values, norm.float()[None])), skip)


def validate(exp: Experiment, state: TrainState, val: Dataset, log: Logger, signals: SignalHandler) -> Results:
    """Evaluate the model, log the results and record the best mIoU. A signal stops it after the current batch."""

    def on_progress(done: int, total: int) -> None:
        log.evaluating(done, total)
        signals.check()

    gallery = PredictionGrid(val, getattr(state.model, "step_unit", ""))
    with averaged(state.model, state.average):
        distributed.broadcast(list(state.model.buffers()))  # use the running statistics of rank 0
        results = evaluate(
            Predictor.of(state.model, exp),
            val,
            seed=exp.seed,
            workers=worker_count(exp.data.workers),
            on_progress=on_progress,
            on_prediction=gallery.add if log.path else None,
        )
    state.not_better += state.evaluated < state.iteration
    state.evaluated = state.iteration
    figures = figures_of(results)
    if figures["mIoU"] > state.best_miou:
        state.best_iteration, state.best_miou, state.not_better = state.iteration, figures["mIoU"], 0
    metrics = exp.evaluate.metrics
    text = f"{tables.per_class(results, metrics)}\n\n{tables.summary(results, metrics)}"

    def write_log() -> None:
        log.val(state.iteration, {**figures, **results.to_json()}, text)
        log.image(state.iteration, gallery.picture())

    distributed.on_main_process(write_log)
    return results


def figures_of(results: Results) -> dict[str, float]:
    """Return the means of an evaluation's configured output, 0..1."""
    return {name: float(results.final[name]) for name in ("aAcc", "mIoU", "mAcc")}


def next_micro_batches(
    batches: Iterator[list[Batch]], signals: SignalHandler, log: Logger
) -> tuple[list[Batch], Callable[[], list[int]]]:
    """Return the micro-batches of the next step, and a function that waits for the other ranks.

    That function returns the number of samples that were skipped for them, over all ranks, or raises the UserError or
    Stopped of a rank.
    """
    micro_batches: list[Batch] = []
    error: UserError | Stopped | None = None
    try:
        signals.check()
        micro_batches = next(batches)
    except (UserError, Stopped) as caught:
        error = caught
    skipped = [text for batch in micro_batches for text in batch.skipped]
    for text in skipped:
        log.once(f"skipped: {text}")
    return micro_batches, distributed.start_sync_status(error, len(skipped))


class DivergedError(UserError):
    """The loss is no longer finite: continuing is useless, so the last good checkpoint is not replaced."""


def _agreed(
    batches: Iterator[list[Batch]], iterations: range, state: TrainState, metrics: MetricLogger, log: Logger,
    signals: SignalHandler,
) -> Iterator[list[Batch]]:  # fmt: skip
    """Yield the micro-batches of each of `iterations` once all ranks have their own.

    They are read one step ahead, and the ranks synchronize during that step, so that all stop at the same one.
    """
    began = time.perf_counter()
    ahead = next_micro_batches(batches, signals, log)
    for iteration in iterations:
        micro_batches, agree = ahead
        [skipped] = agree()
        if distributed.world_size() == 1:
            signals.check()  # no other ranks to agree with
        state.skipped += skipped
        if iteration + 1 < iterations.stop:
            ahead = next_micro_batches(batches, signals, log)
        metrics.data_seconds += time.perf_counter() - began
        yield micro_batches
        began = time.perf_counter()


def batches_of_rank(
    exp: Experiment, state: TrainState, dataset: Dataset, signals: SignalHandler
) -> Generator[list[Batch], None, None]:
    """Yield the micro-batches of this rank, step by step. A signal ends the wait for them, too."""
    share, micro = batch_shares(exp)
    batches = train_batches(
        dataset,
        TrainTransform(exp.data, dataset.ignore_index, len(dataset.classes)),
        batch=exp.train.batch_size,
        micro=micro,
        seed=exp.seed,
        start=state.iteration,
        stop=exp.schedule.iterations,
        workers=worker_count(exp.data.workers),
        rank=distributed.rank(),
        world=distributed.world_size(),
        on_error=exp.data.on_error,
        rare_classes=state.rare_classes,
        pin_memory=state.device.type == "cuda",
        on_wait=signals.check,
    )
    with closing(batches):
        while micro_batches := list(islice(batches, share // micro)):
            yield micro_batches


def _check(failures: tuple[int, HostCopy] | None, work_dir: Path) -> None:
    """Raise DivergedError if too many consecutive steps had failed at an iteration."""
    if failures and (count := failures[1].read()) >= MAX_FAILURES:
        raise DivergedError(
            f"{work_dir}: loss or gradient not finite {count} times in a row, at iteration {failures[0]}; "
            "lower optimizer.lr or set optimizer.clip_norm; "
            f"last good checkpoint: {checkpoint.newest(work_dir) or 'none yet'}"
        )


def out_of_memory(exp: Experiment) -> str:
    (height, width), micro = exp.data.crop, batch_shares(exp)[1]
    settled = exp.train.checkpoint_activations or exp.train.compile  # the two do not work together
    more = "" if settled else ", or set train.checkpoint_activations to True"
    return f"out of GPU memory: lower train.device_batch_size ({micro}) or data.crop ({height} {width}){more}"


def _due(iteration: int, every: int, last: bool) -> bool:
    """Return whether an action due every `every` iterations (0: never) and at the last one is due now."""
    return every > 0 and iteration > 0 and (last or iteration % every == 0)
