"""Failed training steps: undo them on the device, without waiting for it, and report the error to the user."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from segcore import distributed
from segcore.errors import UserError

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class OutOfMemoryError(UserError):
    """There is not enough GPU memory."""


class KeptBuffers:
    """The buffers that training changes, such as running statistics, and a copy of them taken before a step.

    These are the buffers of the state dict; the others are constants that the model computes itself. Both lists hold
    the buffers' bits as integers, so that NaNs are copied like any other value.
    """

    def __init__(self, model: nn.Module) -> None:
        saved, live = model.state_dict().keys(), defaultdict(list)
        for name, buffer in model.named_buffers():
            if name in saved:
                bits = buffer.detach().view(_BITS[buffer.element_size()])
                live[bits.dtype].append(bits)
        self.pairs = [(bits, [tensor.clone() for tensor in bits]) for bits in live.values()]

    def keep(self) -> None:
        """Copy the current buffers."""
        for live, kept in self.pairs:
            torch._foreach_copy_(kept, live)

    def put_back(self, when: Tensor | None = None) -> None:
        """Restore the buffers from their copies; with a bool tensor `when`, only if it is true on the device."""
        for live, kept in self.pairs:
            if when is None:
                torch._foreach_copy_(live, kept)
                continue
            change = torch._foreach_sub(kept, live)
            torch._foreach_mul_(change, when.to(live[0].dtype))
            torch._foreach_add_(live, change)


class HostCopy:
    """An integer scalar being copied from the device to the host; the host can do other work before it reads it."""

    def __init__(self, value: Tensor) -> None:
        on_cuda = value.device.type == "cuda"
        self.value = value.to("cpu", non_blocking=on_cuda)
        self.arrived = torch.cuda.Event() if on_cuda else None
        if self.arrived is not None:
            self.arrived.record(torch.cuda.current_stream(value.device))

    def read(self) -> int:
        """Wait for this value, but not for work queued on the device after it, and return it."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return int(self.value.numpy())


@contextlib.contextmanager
def guarded_passes(buffers: KeptBuffers, out_of_memory: str) -> Iterator[None]:
    """Guard the forward and backward passes of a step in a `with` block.

    When they raise UserError, the buffers are restored. Running out of GPU memory raises an OutOfMemoryError with the
    text `out_of_memory`; failed communication raises one that names the missing ranks.
    """
    buffers.keep()
    try:
        with enough_memory(out_of_memory), distributed.collective(counted=False):
            yield
    except UserError:
        buffers.put_back()
        raise


@contextlib.contextmanager
def enough_memory(message: str) -> Iterator[None]:
    """Raise OutOfMemoryError with `message` when a `with` block runs out of GPU memory."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise OutOfMemoryError(message) from None
