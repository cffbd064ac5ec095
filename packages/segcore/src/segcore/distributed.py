"""Several processes that train or evaluate together: one per GPU over NCCL, or on the CPU over gloo.

torchrun starts them and says by environment variables which one each is. A process alone needs none of this: every
function here then does the obvious thing at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from segcore.errors import Stopped, UserError

T = TypeVar("T")

_store: dist.Store | None = None
_entered = 0
"""How often this process has begun to communicate; the store has it of every process, to tell who is behind."""


class PeerError(UserError):
    """Another process failed and says why; this one only ends."""

    agreed = True


class LostError(UserError):
    """Another process did not answer."""


def rank() -> int:
    """Return the number of this process, 0 .. world_size() - 1; the first one writes files and talks."""
    return dist.get_rank() if _together() else 0


def world_size() -> int:
    """Return how many processes work together."""
    return dist.get_world_size() if _together() else 1


def elastic_run_id() -> str | None:
    """Return torchrun's name of this start, the same after its restarts; None without torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


@contextlib.contextmanager
def process_group(timeout: float) -> Iterator[None]:
    """Join the other processes for a `with` block where torchrun has started this one; otherwise do nothing.

    A process that the others wait for longer than `timeout` seconds ends the run, see `collective`.
    """
    global _store, _entered
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield
        return
    limit = timedelta(seconds=timeout)
    cuda = torch.cuda.is_available()
    try:
        found, own, count = next(iter(dist.rendezvous("env://", timeout=limit)))
        # torchrun may keep one store for all its restarts: the addresses of processes that have ended are in it, too.
        _entered = 0
        _store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", found)
        # Tensors on the CPU always travel over gloo: what they hold is needed on the host, without waiting for a GPU.
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=_store, rank=own, world_size=count, timeout=limit)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"cannot join the other processes ({reason}); start with --gpus N, or with torchrun") from None
    yield
    with collective():
        dist.barrier()  # nobody leaves while another one still needs it
    dist.destroy_process_group()  # not after an error: it could wait for processes that no longer answer
    _store = None


def hard_exit(status: int) -> None:
    """End this process now if it has ever joined others; otherwise return.

    gloo's threads outlive their group (torch 2.10 to 2.15), and one that still lets go of a Python object aborts an
    interpreter that is coming to its end.
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


def on_main_process(function: Callable[[], T]) -> T:
    """Let the first process call `function`; return its (picklable) result, or raise its UserError, in all of them."""
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
        raise error
    answer, failed = box[0]
    if failed:
        raise PeerError
    return answer  # type: ignore[return-value]


def main_process_first(function: Callable[[], T]) -> T:
    """Let the first process call `function` before the others do, who then find what it downloaded or generated."""
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
    """Return the sum of each count over all processes, or raise `error`, which ends all of them.

    Where another process has it, PeerError or Stopped is raised.
    """
    ctrl_c = isinstance(error, Stopped) and signal.SIGINT in error.args
    flags = [isinstance(error, UserError), isinstance(error, Stopped), ctrl_c, *counts]
    try:
        failed, stopped, interrupted, *sums = all_reduce_sum(torch.tensor(flags, dtype=torch.int64)).tolist()
    except LostError as lost:
        raise LostError(f"{error} (besides, {lost})") if isinstance(error, UserError) else lost from None
    if isinstance(error, UserError):
        error.agreed = True
        raise error
    if failed:
        raise PeerError
    if stopped:
        raise Stopped(signal.SIGINT if interrupted else signal.SIGTERM)  # the same in all, so that they say the same
    return sums


def all_gather_object(items: list[T]) -> list[T]:
    """Return the (picklable) items of all processes, one process after the other."""
    if world_size() == 1:
        return items
    parts: list[list[T]] = [[] for _ in range(world_size())]
    with collective():
        dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, computed in place."""
    if world_size() > 1:
        with collective():
            dist.all_reduce(tensor)
    return tensor


def broadcast(tensors: list[Tensor]) -> None:
    """Overwrite tensors with those of the first process."""
    if world_size() > 1:
        with collective():
            for tensor in tensors:
                dist.broadcast(tensor, 0)


def first_to_print(text: str) -> bool:
    """Return whether no other process has said this already, so that one error of all of them is one line."""
    try:
        return _store is None or _store.add(f"said {text}", 1) == 1
    except RuntimeError:
        return True


def in_parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """Return a module whose gradients are averaged over the processes in the backward pass; itself when alone.

    Running statistics of batch norm are those of the first process (on CUDA, with SyncBatchNorm, they are all equal).
    """
    if world_size() == 1:
        return module
    return DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None)


@contextlib.contextmanager
def collective(counted: bool = True) -> Iterator[None]:
    """Turn the failure of communication in a `with` block into a LostError that names the missing processes.

    `counted` is False for a block that does other things before it communicates.
    """
    global _entered
    try:
        if counted and world_size() > 1:
            assert _store is not None
            _entered += 1
            _store.set(f"entered {rank()}", str(_entered))
        yield
    except RuntimeError as error:
        if world_size() == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
            raise
        names = _missing()
        if not names:
            raise LostError(f"communication failed ({str(error).strip().splitlines()[0][:200]})") from None
        raise LostError(
            f"process{'es' * (len(names) > 1)} {', '.join(map(str, names))} of 0-{world_size() - 1} did not answer: "
            "ended, or busy for longer than train.timeout; see what it printed, then go on with --resume"
        ) from None


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def _missing() -> list[int]:
    """Return the processes that have not come as far as this one."""
    assert _store is not None
    try:
        keys = [f"entered {other}" for other in range(world_size())]
        return [n for n, key in enumerate(keys) if not _store.check([key]) or int(_store.get(key)) < _entered]
    except RuntimeError:  # the store is in process 0 when torchrun does not keep it
        return [0]
