"""Several processes, called ranks, that train or evaluate together: one per GPU over NCCL, or on the CPU over gloo.

torchrun starts and numbers them through environment variables. With a single process every function here returns at
once: the sum is the value itself, and the main process is this one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from segcore.errors import Stopped, UserError

T = TypeVar("T")

_store: dist.Store | None = None
_entered = 0
"""How often this rank has begun to communicate. The store holds every rank's count, which shows the ranks behind."""


class PeerError(UserError):
    """Another rank failed and prints the reason; this one only exits."""

    agreed = True


class LostError(UserError):
    """Another rank did not respond."""


def rank() -> int:
    """Return the number of this process, 0 .. world_size() - 1; rank 0, the main process, writes files and prints."""
    return dist.get_rank() if _together() else 0


def world_size() -> int:
    """Return the number of processes that work together."""
    return dist.get_world_size() if _together() else 1


def elastic_run_id() -> str | None:
    """Return torchrun's run id, which stays the same when it restarts the processes; None without torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


@contextlib.contextmanager
def process_group(timeout: float) -> Iterator[None]:
    """Join the other ranks for a `with` block if torchrun has started this process; otherwise do nothing.

    The run ends when the others wait for a rank for longer than `timeout` seconds, see `collective`.
    """
    global _store, _entered
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield
        return
    limit = timedelta(seconds=timeout)
    cuda = torch.cuda.is_available()
    try:
        found, own, count = next(iter(dist.rendezvous("env://", timeout=limit)))
        # torchrun may keep one store for all its restarts; it then also holds addresses of processes that have ended.
        _entered = 0
        _store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", found)
        # CPU tensors always travel over gloo: their values are needed on the host, without waiting for a GPU.
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=_store, rank=own, world_size=count, timeout=limit)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"cannot join the other processes ({reason}); start with --gpus N, or with torchrun") from None
    yield
    with collective():
        dist.barrier()  # no rank leaves while another still needs it
    dist.destroy_process_group()  # not after an error: it could wait for unresponsive ranks
    _store = None


def hard_exit(status: int) -> None:
    """Exit at once, without Python's clean-up, if this process has ever joined others; otherwise return.

    gloo's threads outlive their group (torch 2.10 to 2.15). One that releases a Python object while the interpreter
    shuts down aborts the process.
    """
    if _entered:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def local_device() -> torch.device:
    """Return the GPU of this process, or the CPU without one. Raises UserError when the machine has too few GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if "LOCAL_RANK" not in os.environ:
        return torch.device("cuda")
    local = int(os.environ["LOCAL_RANK"])
    if local >= torch.cuda.device_count():
        raise UserError(
            f"process {local} of this machine has no GPU, torch sees {torch.cuda.device_count()}; start fewer processes"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def find_device(name: str | torch.device) -> torch.device:
    """Return the device for a name; auto and cuda are this process's own GPU, auto without a GPU is the CPU.

    Raises UserError when the device is not available.
    """
    if name == "auto" or (name == "cuda" and torch.cuda.is_available()):
        return local_device()
    try:
        device = torch.device(name)
        if device.index is not None and world_size() > 1:
            raise UserError(f"--device {name}: several processes would share it; leave --device out")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(
            f"--device {name} is not available here; use cpu, or cuda with an NVIDIA GPU and driver"
        ) from None
    return device


def on_main_process(function: Callable[[], T]) -> T:
    """Call `function` on rank 0; return its (picklable) result, or raise its UserError, on all ranks."""
    if world_size() == 1:
        return function()
    answer, error = None, None
    if rank() == 0:
        try:
            answer = function()
        except UserError as caught:
            error = caught
    box = [(answer, error is not None)]
    with collective():
        dist.broadcast_object_list(box, 0)
    if error:
        error.agreed = True
        raise error
    answer, failed = box[0]
    if failed:
        raise PeerError
    return answer  # type: ignore[return-value]


def main_process_first(function: Callable[[], T]) -> T:
    """Call `function` on rank 0, then on the others, which find the files that rank 0 downloaded or generated."""
    if world_size() == 1:
        return function()
    found: list[T] = []
    on_main_process(lambda: found.append(function()))
    error = None
    try:
        found = found or [function()]
    except UserError as caught:
        error = caught
    sync_status(error)
    return found[0]


def sync_status(error: UserError | Stopped | None = None, *counts: int) -> list[int]:
    """Return the sum of each count over all ranks; or raise `error`, which stops all of them.

    The other ranks raise PeerError, or Stopped if `error` is a Stopped.
    """
    return start_sync_status(error, *counts)()


def start_sync_status(error: UserError | Stopped | None = None, *counts: int) -> Callable[[], list[int]]:
    """Begin `sync_status` without waiting, and return a function that completes it.

    This rank can do other work in between, including communication.
    """
    return _start_sync_status(error, *counts)[1]


def _start_sync_status(
    error: UserError | Stopped | None, *counts: int
) -> tuple[Callable[[], bool], Callable[[], list[int]]]:
    """Begin `sync_status`, and return what tells without waiting whether it is complete, and what completes it."""
    ctrl_c = isinstance(error, Stopped) and signal.SIGINT in error.args
    flags = torch.tensor([isinstance(error, UserError), isinstance(error, Stopped), ctrl_c, *counts], dtype=torch.int64)
    with collective():
        work = dist.all_reduce(flags, async_op=True) if world_size() > 1 else None

    def finish() -> list[int]:
        try:
            with collective(counted=False):
                if work is not None:
                    work.wait()
        except LostError as lost:
            raise LostError(f"{error} (also, {lost})") if isinstance(error, UserError) else lost from None
        failed, stopped, interrupted, *sums = flags.tolist()
        if isinstance(error, UserError):
            error.agreed = True
            raise error
        if failed:
            raise PeerError
        if stopped:
            raise Stopped(signal.SIGINT if interrupted else signal.SIGTERM)  # the same on all ranks
        return sums

    return lambda: work is None or work.is_completed(), finish


@contextlib.contextmanager
def each_at_its_pace() -> Iterator[Callable[[int], int]]:
    """Let the ranks work without waiting for each other, until all have left the `with` block.

    Yields a function for every rank to call often: it takes the rank's count and returns a recent sum over all ranks.
    It raises PeerError when another rank left with a UserError, and LostError when one is gone.
    """
    total, own, pending = 0, 0, cast(tuple[Callable[[], bool], Callable[[], list[int]]] | None, None)

    def update(count: int) -> int:
        nonlocal total, own, pending
        own = count
        if world_size() == 1:
            return count
        if pending and pending[0]():
            total, _ = pending[1]()
            pending = None
        pending = pending or _start_sync_status(None, count, 0)
        return total

    failed = None
    try:
        yield update
    except (PeerError, LostError):
        raise
    except UserError as error:
        failed = error
    try:
        if pending:
            pending[1]()
    except UserError as error:
        raise failed or error from None
    while sync_status(failed, own, 1)[1] < world_size():
        pass


def all_gather_object(items: list[T]) -> list[T]:
    """Return the (picklable) items of all ranks, in the order of the ranks."""
    if world_size() == 1:
        return items
    parts: list[list[T]] = [[] for _ in range(world_size())]
    with collective():
        dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, computed in place."""
    if world_size() > 1:
        with collective():
            dist.all_reduce(tensor)
    return tensor


def broadcast(tensors: list[Tensor]) -> None:
    """Overwrite tensors with the values of rank 0."""
    if world_size() > 1:
        with collective():
            for tensor in tensors:
                dist.broadcast(tensor, 0)


def first_to_print(text: str) -> bool:
    """Return whether no other rank has printed `text` yet, so that an error common to all ranks is one line."""
    try:
        return _store is None or _store.add(f"printed {text}", 1) == 1
    except RuntimeError:
        return True


def in_parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """Return a module whose gradients are averaged over the ranks in the backward pass; itself with a single process.

    Batch norm uses the running statistics of rank 0 (on CUDA, with SyncBatchNorm, they are equal on all ranks).
    """
    if world_size() == 1:
        return module
    # Torch compares strides of sizes that are 1, too, which mean nothing; of all others, autograd makes a gradient's
    # strides those of its parameter (`obeys_layout_contract` in accumulate_grad.h).
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None)


def no_sync(module: nn.Module, active: bool) -> contextlib.AbstractContextManager[None]:
    """Return a context in which, if `active`, gradients of a module from `in_parallel` are not averaged."""
    return module.no_sync() if active and world_size() > 1 else contextlib.nullcontext()  # type: ignore[operator]


_BROKEN = ("gloo", "pair closure", "connection closed by peer", "connection reset by peer")
"""What an error of communication says, in lower case, where it is a plain RuntimeError."""


@contextlib.contextmanager
def collective(counted: bool = True) -> Iterator[None]:
    """Turn a failure of communication in a `with` block into a LostError that names the missing ranks.

    `counted` is False for a block that does other work before it communicates; it then calls `announce` itself.
    """
    try:
        if counted:
            announce()
        yield
    except RuntimeError as error:
        broken = isinstance(error, dist.DistError) or any(sign in str(error).lower() for sign in _BROKEN)
        if world_size() == 1 or not broken:
            raise
        missing = _missing()
        if not missing:
            raise LostError(f"communication failed ({str(error).strip().splitlines()[0][:200]})") from None
        raise LostError(
            f"{missing} did not respond (ended, or busy for longer than train.timeout); see its output, then continue "
            "with --resume"
        ) from None


def announce() -> None:
    """Announce to the other ranks that this one has reached its next communication, which they may wait for."""
    global _entered
    if world_size() > 1:
        assert _store is not None
        _entered += 1
        _store.set(f"entered {rank()}", str(_entered))


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def _missing() -> str:
    """Return the names of the ranks that are behind this one, or of whoever held the store; "" if there are none."""
    assert _store is not None
    keys = [f"entered {other}" for other in range(world_size())]
    try:
        late = [n for n, key in enumerate(keys) if not _store.check([key]) or int(_store.get(key)) < _entered]
    except RuntimeError:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return "the launcher of the processes"
        late = [0]
    if not late and world_size() == 2:  # both are equally far, as where torch communicates on its own
        late = [1 - rank()]
    names = f"process{'es' * (len(late) > 1)} {', '.join(map(str, late))}"
    return f"{names} of 0-{world_size() - 1}" if late else ""
