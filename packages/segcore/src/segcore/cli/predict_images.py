"""`predict` on images: read ahead, computed in batches of one size and written behind, by any number of processes."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from segcore import distributed
from segcore.cli.common import OUT_OF_MEMORY
from segcore.cli.predict_files import Job, start_map, write
from segcore.cli.predict_record import Record, stamp
from segcore.config.schema import DataConfig
from segcore.data.loader import equal_sized
from segcore.data.workers import in_threads, worker_count
from segcore.errors import UserError
from segcore.inference import LoadedModel, as_array
from segcore.progress import progress
from segcore.result import Result

Sample = tuple[Job, np.ndarray, list[str]]
Answer = tuple[Result, dict[str, np.ndarray], np.ndarray | None]
"""Result, classes after every denoising step by title where they are shown, and uncertainty where it is."""


class Done(NamedTuple):
    """What became of an image."""

    job: Job
    stamp: list[str]
    """That of its files before they were read, see `predict_record.stamp`."""
    answer: Answer | None = None
    """What is to be written."""
    size: tuple[int, ...] = ()
    """(width, height)."""
    seconds: float = 0.0
    steps: float | None = None
    """Number of denoising steps with early exit."""
    error: str = ""


def run(seg: LoadedModel, jobs: Sequence[Job], record: Record | None = None) -> None:
    """Predict every image at its own size and write the files of its job, each whole or not at all.

    The mask is the same whatever is written beside it. Several processes share the images; each calls this with the
    same jobs. Images that cannot be read or predicted are left out; then a UserError at the end names the first.
    """
    left = distributed.on_main_process(lambda: record.begin(jobs)) if record else list(jobs)
    own = left[distributed.rank() :: distributed.world_size()]
    failures, used, count = list[tuple[Path, str]](), list[float](), 0
    with (
        distributed.each_at_its_pace() as total,
        record.part() if record else contextlib.nullcontext() as note,
        progress("predicting") as advance,
        contextlib.closing(_done(seg, own)) as results,
    ):
        for done in results:
            if note:
                seconds = f"{done.seconds:.4f}" if done.size else ""
                note(done.job, *(done.size or ("", "")), seconds, done.error, *done.stamp)
            failures += [(done.job.image, done.error)] if done.error else []
            used += [done.steps] if done.steps else []
            count += 1
            advance(total(count), len(left))
    failures, used = distributed.all_gather_object(failures), distributed.all_gather_object(used)
    distributed.on_main_process(lambda: _report(jobs, len(left), record, [text for _, text in sorted(failures)], used))


def _report(jobs: Sequence[Job], left: int, record: Record | None, failures: list[str], used: list[float]) -> None:
    """Say what was written; raises UserError about the failures."""
    if record:
        record.finish(jobs)
    written = len(jobs) - len(failures)
    if len(jobs) > 1:
        before = f", {len(jobs) - left} of them by an earlier run" if left < len(jobs) else ""
        folder = os.path.commonpath([job.mask.parent for job in jobs])
        print(f"{written} of {len(jobs)} images written below {folder}{before}")
    elif written:
        print(*jobs[0].written, sep="\n")
    if used:
        print(f"{sum(used) / len(used):.2f} denoising steps on average")
    if failures:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise UserError(f"{failures[0]}{more}")


def _done(seg: LoadedModel, jobs: Sequence[Job]) -> Generator[Done, None, None]:
    """Yield what became of every job once its files are written. Threads read and write while this one computes."""
    data = seg.experiment.data
    threads = max(min(worker_count(data.workers), len(jobs) - 1), 0)
    with contextlib.closing(in_threads(partial(_read, data), jobs, threads)) as images:
        yield from in_threads(_write, _predicted(seg, images), threads)


def _read(data: DataConfig, job: Job) -> tuple[Job, np.ndarray | UserError, list[str]]:
    before = stamp(job)
    try:
        return job, as_array(job.image, data), before
    except UserError as error:
        return job, error, before


def _predicted(seg: LoadedModel, images: Iterator[tuple[Job, np.ndarray | UserError, list[str]]]) -> Iterator[Done]:
    """Yield the answers for images; those of one size that follow each other are computed together."""
    unread = list[Done]()

    def readable() -> Iterator[Sample]:
        for job, image, before in images:
            if isinstance(image, UserError):
                unread.append(Done(job, before, error=str(image)))
            else:
                yield job, image, before

    for batch in equal_sized(readable(), seg.experiment.evaluate.batch_size):
        yield from unread
        unread.clear()
        yield from _answers(seg, batch)
    yield from unread


def _answers(seg: LoadedModel, batch: list[Sample]) -> Iterator[Done]:
    """Yield the answers for images of one size; where they fail together, for one after the other."""
    start, error = time.perf_counter(), ""
    try:
        first = batch[0][0]  # all jobs are of one kind
        keep = bool(first.confidence or first.probabilities)
        images = [image for _, image, _ in batch]
        results = [None] * len(batch) if first.start else seg(images, probabilities=keep)
        answers = [_answer(seg, *sample[:2], result) for sample, result in zip(batch, results, strict=True)]
    except UserError as caught:  # too small for the model, perhaps
        error = str(caught)
    except torch.OutOfMemoryError:
        error = OUT_OF_MEMORY
    if error and len(batch) > 1:
        for sample in batch:
            yield from _answers(seg, [sample])
        return
    seconds = (time.perf_counter() - start) / len(batch)
    for n, (job, image, before) in enumerate(batch):
        done = Done(job, before, size=image.shape[1::-1], seconds=seconds)
        if error:
            yield done._replace(error=f"{job.image}: {error}")
        else:
            yield done._replace(answer=answers[n], steps=answers[n][0].steps_used)


def _answer(seg: LoadedModel, job: Job, image: np.ndarray, result: Result | None) -> Answer:
    """Return what the files of a job show; `result` is None if it has a mask to start from."""
    if result is None:
        assert job.start
        start = start_map(job.start, image, len(seg.mask_classes[0]), seg.experiment.data.add_background_class)
        result, maps = seg.refine(image, start)
        if job.confidence or job.probabilities:
            _ = result.probabilities  # computed here, where it is handled that the device's memory runs out
    else:
        maps = seg.steps(image) if job.steps or job.animation else {}
    return result, maps, seg.uncertainty(result) if job.uncertainty else None


def _write(done: Done) -> Done:
    """Write the files of a job, and let go of what they show; a name that is too long for the disk is its error."""
    try:
        if done.answer:
            write(done.job, *done.answer)
    except UserError as error:
        cause = error.__context__  # which `from None` keeps
        if not (isinstance(cause, OSError) and cause.errno == errno.ENAMETOOLONG):
            raise
        return done._replace(answer=None, error=str(error))
    return done._replace(answer=None)
