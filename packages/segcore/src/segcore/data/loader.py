"""The order of the training samples and their random draws, and the processes that read ahead.

Order and augmentation are pure functions of (seed, iteration, position in the global batch). A run can therefore go
on at any iteration, and the samples do not depend on the number of workers.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.random import RandomState
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from segcore.data.dataset import Dataset
from segcore.errors import UserError
from segcore.seeds import derive

Transform = Callable[[np.ndarray, np.ndarray, RandomState], tuple[Tensor, Tensor]]


@dataclass
class Batch:
    """One forward pass of training.

    Attributes:
        images: (n, C, H, W) float32, normalised.
        labels: (n, H, W) int64 train ids.
        seeds: one integer per image, for the model's noise.
        iteration: the optimizer step that it belongs to.
    """

    images: Tensor
    labels: Tensor
    seeds: list[int]
    iteration: int

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory; the loader calls this."""
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.seeds, self.iteration)


def sample_index(seed: int, iteration: int, position: int, batch: int, length: int) -> int:
    """Return the dataset index of `position` 0 .. batch-1 of an iteration.

    Samples are one stream, a fresh permutation of 0 .. length-1 per epoch; an epoch may end inside a batch.
    """
    epoch, offset = divmod(iteration * batch + position, length)
    return int(_permutation(seed, epoch, length)[offset])


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    return RandomState(derive(seed, epoch)).permutation(length)


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
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Yield the `batch // micro` parts of every iteration start .. stop-1, in order.

    `batch` is the global batch and `micro` the images per part, which divides it. `workers` spawned processes read
    ahead; with 0 this process reads. They end with the iterator, whichever way that ends. Raises UserError about a
    file in either case.
    """
    if batch % micro:
        raise ValueError(f"batch {batch} does not divide into parts of {micro}")
    keys = ((iteration, first) for iteration in range(start, stop) for first in range(0, batch, micro))
    load = functools.partial(_load_batch, dataset, transform, batch, micro, seed)
    return _read_ahead(load, keys, workers, pin_memory)


def eval_samples(dataset: Dataset, workers: int) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
    """Yield (index, image, label) of every sample in order, as `Dataset.pair` reads them; `workers` read ahead."""
    return _read_ahead(functools.partial(_load_pair, dataset), range(len(dataset)), workers)


def _load_batch(
    dataset: Dataset, transform: Transform, batch: int, micro: int, seed: int, key: tuple[int, int]
) -> Batch:
    iteration, first = key
    seeds = [derive(seed, iteration, position) for position in range(first, first + micro)]
    samples = []
    for position, own_seed in enumerate(seeds, first):
        index = sample_index(seed, iteration, position, batch, len(dataset))
        image, label = dataset.pair(index)
        if label is None:
            raise UserError(f"{dataset.samples[index].image}: has no label file; training needs one")
        samples.append(transform(image, label, RandomState(own_seed)))
    images, labels = zip(*samples, strict=True)
    return Batch(torch.stack(images), torch.stack(labels), seeds, iteration)


def _load_pair(dataset: Dataset, index: int) -> tuple[int, np.ndarray, np.ndarray | None]:
    return index, *dataset.pair(index)


class _Loads(TorchDataset):
    """What `load` returns for a key. A UserError is handed over as a value, as raising in a worker changes its text."""

    def __init__(self, load: Callable[[Any], Any]) -> None:
        self.load = load

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.load(key)
        except UserError as error:
            return error


def _read_ahead(
    load: Callable[[Any], Any], keys: Iterable[Any], workers: int, pin_memory: bool = False
) -> Iterator[Any]:
    """Yield load(key) of every key in order."""
    # Workers inherit that interrupts are ignored: Ctrl-C is for the main process, which ends them.
    with _interrupts_ignored(), warnings.catch_warnings():
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
            generator=torch.Generator(),  # the loader draws a number when it starts; leave torch's own generator alone
        )
        loaded = iter(loader)
    try:
        for item in loaded:
            if isinstance(item, UserError):
                raise item
            yield item
    finally:
        del loaded  # the last reference: ends the workers


def _as_it_is(item: Any) -> Any:
    return item


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set signal handlers
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
