"""The order of the training samples, their random draws, and the worker processes that read ahead.

Order and augmentation are pure functions of (seed, iteration, position in the global batch). A run can therefore
resume at any iteration, and the samples do not depend on the number of workers.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any, Literal

import cv2
import numpy as np
import torch
from numpy.random import RandomState
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from segcore.data.dataset import Dataset
from segcore.errors import UserError
from segcore.seeds import augmentation_seed, noise_seed, order_seed

Transform = Callable[[np.ndarray, np.ndarray, RandomState], tuple[Tensor, Tensor]]
OnError = Literal["stop", "skip"]


@dataclass
class Batch:
    """One forward pass of training.

    Attributes:
        images: (n, C, H, W) float32, normalized.
        labels: (n, H, W) int64 train ids.
        seeds: one integer per image, for the model's noise; augmentation has its own seed.
        iteration: the optimizer step that the batch belongs to.
        skipped: one error message per sample that was replaced by another one.
    """

    images: Tensor
    labels: Tensor
    seeds: list[int]
    iteration: int
    skipped: tuple[str, ...] = ()

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory; the loader calls this."""
        return dataclasses.replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


def sample_index(seed: int, iteration: int, position: int, batch: int, length: int) -> int:
    """Return the dataset index of `position` 0 .. batch-1 of an iteration.

    Samples are one stream, a fresh permutation of 0 .. length-1 per epoch; an epoch may end inside a batch.
    """
    epoch, offset = divmod(iteration * batch + position, length)
    return int(_permutation(seed, epoch, length)[offset])


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    return RandomState(order_seed(seed, epoch)).permutation(length)


def train_batches(
    dataset: Dataset,
    transform: Transform,
    *,
    batch: int,
    micro: int,
    seed: int,
    start: int,
    stop: int,
    workers: int,
    rank: int = 0,
    world: int = 1,
    on_error: OnError = "stop",
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Yield, in order, the micro-batches of iterations start .. stop-1 that process `rank` of `world` trains on.

    `batch` is the global batch size, of which each process takes an equal share; `micro`, the images per micro-batch,
    divides that share. `workers` spawned processes read ahead; with 0 this process reads. They exit with the iterator,
    however it ends. An unreadable sample raises UserError in either case; with `on_error` "skip" the next sample of the
    data set replaces it.
    """
    share = batch // world
    if batch % world or share % micro:
        raise ValueError(f"batch {batch} does not divide into parts of {micro} in {world} processes")
    firsts = range(rank * share, (rank + 1) * share, micro)
    keys = ((iteration, first) for iteration in range(start, stop) for first in firsts)
    load = functools.partial(_load_batch, dataset, transform, batch, micro, seed, on_error)
    return _read_ahead(load, keys, workers, pin_memory)


def eval_samples(
    dataset: Dataset, workers: int, indices: Iterable[int] | None = None
) -> Iterator[tuple[int, np.ndarray, np.ndarray | None] | UserError]:
    """Yield (index, image, label) of the samples `indices` (None: all) in order, as `Dataset.pair` reads them.

    An unreadable sample yields its UserError instead. `workers` spawned processes read ahead.
    """
    load = functools.partial(_load_pair, dataset)
    return _read_ahead(load, range(len(dataset)) if indices is None else indices, workers, errors=True)


def _load_batch(
    dataset: Dataset, transform: Transform, batch: int, micro: int, seed: int, on_error: OnError, key: tuple[int, int]
) -> Batch:
    iteration, first = key
    positions = range(first, first + micro)
    samples, skipped = [], list[str]()
    for position in positions:
        index = sample_index(seed, iteration, position, batch, len(dataset))
        image, label, errors = _readable(dataset, index, on_error)
        skipped += errors
        samples.append(transform(image, label, RandomState(augmentation_seed(seed, iteration, position))))
    images, labels = zip(*samples, strict=True)
    seeds = [noise_seed(seed, iteration, position) for position in positions]
    return Batch(torch.stack(images), torch.stack(labels), seeds, iteration, tuple(skipped))


def _readable(dataset: Dataset, index: int, on_error: OnError) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return sample `index`, or the first readable one after it, and the error messages of those passed over."""
    errors: list[str] = []
    for offset in range(len(dataset)):
        index_now = (index + offset) % len(dataset)
        try:
            image, label = dataset.pair(index_now)
            if label is None:
                raise UserError(f"{dataset.samples[index_now].image}: has no label file; training needs one")
            return image, label, errors
        except UserError as error:
            if on_error == "stop":
                raise
            errors.append(str(error))
    raise UserError(f"{errors[0]} (and none of the {len(dataset)} samples can be read)")


def _load_pair(dataset: Dataset, index: int) -> tuple[int, np.ndarray, np.ndarray | None]:
    return index, *dataset.pair(index)


class _Loads(TorchDataset):
    """The result of `load` by key. A UserError is returned as a value, because raising in a worker changes its text."""

    def __init__(self, load: Callable[[Any], Any]) -> None:
        self.load = load

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.load(key)
        except UserError as error:
            return error


def _read_ahead(
    load: Callable[[Any], Any], keys: Iterable[Any], workers: int, pin_memory: bool = False, errors: bool = False
) -> Iterator[Any]:
    """Yield load(key) of every key in order; raise its UserError, or with `errors` yield it."""
    with _signals_held() if workers else contextlib.nullcontext(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores: the user's choice
        loader = DataLoader(
            _Loads(load),
            sampler=keys,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            multiprocessing_context="spawn" if workers else None,
            worker_init_fn=_start_worker,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # the loader draws a number at its start; leave torch's own generator alone
        )
        loaded = iter(loader)
    try:
        for item in loaded:
            if isinstance(item, UserError) and not errors:
                raise item
            yield item
    finally:
        del loaded  # the last reference: ends the workers


def _as_it_is(item: Any) -> Any:
    return item


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)
    for number in (signal.SIGINT, signal.SIGTERM):  # in case they were not inherited as blocked
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _quiet_when_alone
    atexit.register(os._exit, 0)  # without unloading libraries, whose running threads could abort


def _quiet_when_alone(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    """Print nothing about a connection that broke because the main process has ended or was interrupted."""
    if not issubclass(kind, OSError | EOFError):
        sys.__excepthook__(kind, error, traceback)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM during a `with` block in which worker processes start.

    The workers inherit the blocked signals: only this process handles them, and it ends its workers.
    """
    signals, noted = (signal.SIGINT, signal.SIGTERM), list[int]()
    main = threading.current_thread() is threading.main_thread()  # handlers can be set only there
    handlers = {number: signal.signal(number, lambda caught, _: noted.append(caught)) for number in signals * main}
    mask = None
    if hasattr(signal, "pthread_sigmask"):
        resource_tracker.ensure_running()  # multiprocessing's; when that starts, it unblocks the signals
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # signals that were blocked in this thread are noted now
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for caught in noted:
            signal.raise_signal(caught)
