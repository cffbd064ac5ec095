"""Detects, on the CPU, operations that make the host wait for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class HostReads(TorchDispatchMode):
    """Counts, in a `with` block, operators whose result the host must read; on a GPU, each one synchronizes.

    `item`, `bool` and `float` of a tensor, boolean indexing, `nonzero`, `unique`. Copies, such as `cpu`, do not count.
    """

    WAITING = (
        torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select,
        torch.ops.aten.equal, torch.ops.aten._unique2, torch.ops.aten.is_nonzero,
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices = args[1] if func.overloadpacket in _INDEXING else ()
        if func.overloadpacket in self.WAITING or any(i is not None and i.dtype == torch.bool for i in indices):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


_INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_)
