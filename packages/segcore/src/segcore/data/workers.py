"""Worker processes that read ahead, and threads for what they are enough for.

Each worker has one thread in the main process, which asks it for one item after another over a socket of their own.
Workers share neither locks nor memory: a thread notices the end of its worker, whatever ended it, and a container with
little shared memory needs no more of it.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import multiprocessing
import os
import pickle
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from multiprocessing import resource_tracker
from typing import Any, Literal, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor

from segcore.environment import usable_cpus
from segcore.errors import UserError

T = TypeVar("T")
Load = Callable[[Any], Any]
Link = io.BufferedRWPair


MOST_WORKERS = 8
"""Workers per device that `data.workers auto` starts at most: each takes memory for its own libraries and batches."""


def worker_count(workers: int | Literal["auto"]) -> int:
    """Return the number that `data.workers` stands for. auto: this process's share of the usable CPUs, but for one.

    The share is that among the processes that torchrun has started on this machine; 1 to MOST_WORKERS.
    """
    if workers != "auto":
        return workers
    processes = os.environ.get("LOCAL_WORLD_SIZE", "")
    share = usable_cpus() // (int(processes) if processes.isdecimal() and int(processes) else 1)
    return min(max(share - 1, 1), MOST_WORKERS)


def read_ahead(
    load: Load,
    keys: Iterable[Any],
    workers: int,
    *,
    pin_memory: bool = False,
    on_wait: Callable[[], None] | None = None,
) -> Generator[Any, None, None]:
    """Yield `load(key)` of every key in order.

    `workers` spawned processes compute two items each ahead and exit with the iterator, however it ends; with 0 this
    process computes. `pin_memory` puts the items into page-locked memory by their method of that name. `on_wait` is
    called every second in which no item arrives, and may raise.

    Raises UserError when `load` does, memory runs out, or a worker ends.
    """
    if not workers:
        for key in keys:
            with _enough_memory(workers):
                item = load(key)
            yield item.pin_memory() if pin_memory else item
        return
    keys, started, idle = iter(keys), list[_Worker](), deque[_Worker]()
    device = (torch.cuda.set_device, (torch.cuda.current_device(),)) if pin_memory else ()
    pool = ThreadPoolExecutor(workers, "reader", *device)

    def ask(key: Any) -> Any:
        worker = idle.popleft()  # there is one: there are as many threads
        try:
            with _enough_memory(workers):
                item = worker.ask(key)
        finally:
            idle.append(worker)
        return item.pin_memory() if pin_memory else item

    try:
        with _signals_held():
            for _ in range(workers):
                started.append(_Worker(load, workers))
        idle.extend(started)
        ahead = deque[Future[Any]](pool.submit(ask, key) for key in islice(keys, 2 * workers))
        while ahead:
            while not wait([ahead[0]], timeout=1).done:
                if on_wait:
                    on_wait()
            item = ahead.popleft().result()
            ahead.extend(pool.submit(ask, key) for key in islice(keys, 1))
            yield item
    finally:
        for worker in started:
            worker.end()
        pool.shutdown(cancel_futures=True)


def in_threads(function: Callable[[Any], T], items: Iterable[Any], threads: int) -> Generator[T, None, None]:
    """Yield `function(item)` of every item in order; `threads` work on as many items ahead. 0: this thread does it.

    It suits functions that mostly wait or compute outside the interpreter, such as codecs: threads start at once.
    """
    if not threads:
        yield from map(function, items)
        return
    pending, pool = deque[Future[T]](), ThreadPoolExecutor(threads)
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class _Worker:
    """A process that computes items: one of `count`."""

    def __init__(self, load: Load, count: int) -> None:
        self.count, self.unsent = count, [load]
        try:
            own, other = socket.socketpair()
            with own, other:
                self.link = own.makefile("rwb")
                self.process = multiprocessing.get_context("spawn").Process(target=_serve, args=(count, other))
                self.process.start()
        except OSError as error:
            raise UserError(f"a data-loading process cannot start ({error}); lower data.workers ({count})") from None
        atexit.register(self.process.kill)  # where an iterator is still open; multiprocessing waits for its processes

    def ask(self, key: Any) -> Any:
        """Return the item of a key, or raise the error of `load`."""
        try:
            while self.unsent:  # not when it starts: multiprocessing waits for ever for a process that ends then
                pickle.dump(self.unsent.pop(), self.link)
            pickle.dump(key, self.link)
            self.link.flush()
            error, item = _receive(self.link)
        except (OSError, EOFError, pickle.UnpicklingError):
            self.process.join()
            status = self.process.exitcode or 0
            end = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended, see its output ({status})"
            raise UserError(f"a data-loading process {end}; {_remedy(self.count)}") from None
        if error:
            raise error
        return item

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()
        atexit.unregister(self.process.kill)


@contextlib.contextmanager
def _enough_memory(workers: int) -> Iterator[None]:
    """Raise UserError when a `with` block runs out of memory."""
    try:
        yield
    except MemoryError:
        raise UserError(f"no memory left to load data; {_remedy(workers)}") from None


def _remedy(workers: int) -> str:
    return (
        f"if memory ran out, lower data.workers ({workers}) or data.crop, or give the machine or container more of it"
    )


def _serve(count: int, connection: socket.socket) -> None:
    """Answer keys with items, what `load` returns, which comes first, until the main process closes or has ended."""
    for number in (signal.SIGINT, signal.SIGTERM):  # in case they were not inherited as blocked
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    with connection:
        link = connection.makefile("rwb")
    load: Load | None = None
    while True:
        try:
            load = load or pickle.load(link)
            key = pickle.load(link)
        except (ConnectionError, EOFError):
            os._exit(0)  # without unloading libraries, whose running threads could abort
        error, item = None, None
        try:
            with _enough_memory(count):
                item = load(key)
        except UserError as caught:
            error = caught
        try:
            _send(link, (error, item))
        except ConnectionError:
            os._exit(0)


class _Pickler(pickle.Pickler):
    """Pickles tensors as arrays, whose memory is handed to `buffer_callback`."""

    def reducer_override(self, value: Any) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, Tensor) else NotImplemented


def _send(link: Link, item: Any) -> None:
    """Send an item: its structure, then the memory of its arrays, without copying that."""
    structure, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(structure, 5, buffer_callback=buffers.append).dump(item)
    arrays = [buffer.raw() for buffer in buffers]
    pickle.dump((structure.getvalue(), [array.nbytes for array in arrays]), link)
    for array in arrays:
        link.write(array)
    link.flush()


def _receive(link: Link) -> Any:
    """Return what `_send` sent."""
    structure, sizes = pickle.load(link)
    arrays = [np.empty(size, np.uint8) for size in sizes]
    for array in arrays:
        if link.readinto(array.data) < array.size:
            raise EOFError
    return pickle.loads(structure, buffers=arrays)


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
