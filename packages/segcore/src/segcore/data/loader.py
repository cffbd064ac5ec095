"""The order of the training samples and their random draws.

Order, rare-class sampling and augmentation are pure functions of (seed, iteration, position in the global batch). A
run can therefore resume at any iteration, and the samples do not depend on the number of workers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.random import RandomState

from segcore.data.batch import Batch
from segcore.data.dataset import Dataset
from segcore.data.transforms import TrainTransform
from segcore.data.workers import read_ahead
from segcore.errors import UserError
from segcore.seeds import augmentation_seed, noise_seed, order_seed, rare_class_seed

OnError = Literal["stop", "skip"]
S = TypeVar("S", bound=tuple[Any, ...])
Loaded = tuple[int, np.ndarray, np.ndarray | None] | UserError
"""Index, image and label of a sample, or the error of an unreadable one."""


def sample_index(seed: int, iteration: int, position: int, batch: int, length: int) -> int:
    """Return the dataset index of `position` 0 .. batch-1 of an iteration.

    Samples are one stream, a fresh permutation of 0 .. length-1 per epoch; an epoch may end inside a batch.
    """
    epoch, offset = divmod(iteration * batch + position, length)
    return int(_permutation(seed, epoch, length)[offset])


@dataclass(frozen=True, eq=False)
class RareClasses:
    """Rare-class sampling: a class by its probability, then one of the images with it.

    Attributes:
        probabilities: (C,) float64, of the classes that have a pixel.
        images: the indices of the samples with each of these classes.
    """

    probabilities: np.ndarray
    images: tuple[np.ndarray, ...]

    def index(self, seed: int, iteration: int, position: int) -> int:
        """Return the dataset index of a position of the global batch."""
        random = RandomState(rare_class_seed(seed, iteration, position))
        images = self.images[random.choice(len(self.images), p=self.probabilities)]
        return int(images[random.randint(len(images))])


def rare_class_probabilities(pixels: np.ndarray, temperature: float) -> np.ndarray:
    """Return the probability (K,) float64 to draw each class, from the pixels (K,) of each: exp((1 - share) / T).

    DAFormer, arXiv 2111.14887, equations 4 and 5. A class without a pixel is not drawn: all are 0 without any.
    """
    share = pixels / max(pixels.sum(), 1)
    least = share[pixels > 0].min(initial=1)
    weights = np.where(pixels > 0, np.exp((least - share) / temperature), 0)  # the largest is 1
    return weights / max(weights.sum(), 1)


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    return RandomState(order_seed(seed, epoch)).permutation(length)


def train_batches(
    dataset: Dataset,
    transform: TrainTransform,
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
    rare_classes: RareClasses | None = None,
    pin_memory: bool = False,
    on_wait: Callable[[], None] | None = None,
) -> Generator[Batch, None, None]:
    """Yield, in order, the micro-batches of iterations start .. stop-1 that process `rank` of `world` trains on.

    `batch` is the global batch size, of which each process takes an equal share; `micro`, the images per micro-batch,
    divides that share. An unreadable sample raises UserError; with `on_error` "skip" the next sample of the data set
    replaces it. `rare_classes` draws the samples, which then come in no epochs. For `workers`, `pin_memory` and
    `on_wait` see `read_ahead`.
    """
    share = batch // world
    if batch % world or share % micro:
        raise ValueError(f"batch {batch} does not divide into parts of {micro} in {world} processes")
    firsts = range(rank * share, (rank + 1) * share, micro)
    keys = ((iteration, first) for iteration in range(start, stop) for first in firsts)
    load = functools.partial(_load_batch, dataset, transform, batch, micro, seed, on_error, rare_classes)
    return read_ahead(load, keys, workers, pin_memory=pin_memory, on_wait=on_wait)


def eval_samples(
    dataset: Dataset,
    workers: int,
    indices: Iterable[int] | None = None,
    *,
    on_wait: Callable[[], None] | None = None,
) -> Generator[Loaded, None, None]:
    """Yield (index, image, label) of the samples `indices` (None: all) in order, as `Dataset.pair` reads them.

    An unreadable sample yields its UserError instead. For `workers` and `on_wait` see `read_ahead`.
    """
    load = functools.partial(_load_pair, dataset)
    return read_ahead(load, range(len(dataset)) if indices is None else indices, workers, on_wait=on_wait)


def equal_sized(samples: Iterable[S], batch: int) -> Iterator[list[S]]:
    """Collect up to `batch` consecutive samples, tuples whose second part is an image, of one shape."""
    group: list[S] = []
    for sample in samples:
        if group and (len(group) == batch or sample[1].shape != group[0][1].shape):
            yield group
            group = []
        group.append(sample)
    if group:
        yield group


def _load_batch(
    dataset: Dataset,
    transform: TrainTransform,
    batch: int,
    micro: int,
    seed: int,
    on_error: OnError,
    rare_classes: RareClasses | None,
    key: tuple[int, int],
) -> Batch:
    iteration, first = key
    positions = range(first, first + micro)
    samples, skipped = [], list[str]()
    for position in positions:
        if rare_classes:
            index = rare_classes.index(seed, iteration, position)
        else:
            index = sample_index(seed, iteration, position, batch, len(dataset))
        image, label, errors = _readable(dataset, index, on_error)
        skipped += errors
        samples.append(transform.crop(image, label, RandomState(augmentation_seed(seed, iteration, position))))
    seeds = [noise_seed(seed, iteration, position) for position in positions]
    return Batch.of(samples, transform.data.crop, transform.ignore_index, seeds, iteration, tuple(skipped))


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


def _load_pair(dataset: Dataset, index: int) -> Loaded:
    try:
        return index, *dataset.pair(index)
    except UserError as error:
        return error
