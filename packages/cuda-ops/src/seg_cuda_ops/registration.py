"""The entry point that segcore calls: which kernels are registered for which device, and why others are not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from seg_cuda_ops import _cpu
from seg_cuda_ops.kernels import Backend, kernels

SUFFIXES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}


def register(library: torch.library.Library, defaults: Mapping[str, Callable[..., Any]]) -> dict[str, str]:
    """Add kernels to the operators of `library`; return per device type "" or why there are none for it.

    `defaults` holds for every operator NAME_shape, which checks the inputs and returns the shape of the output.
    """
    for name, kernel in kernels(defaults, Backend(call_cpu, half=False, chunk=2**20)).items():
        library.impl(name, kernel, "CPU")
    return {"cpu": "", "cuda": "this build has no CUDA kernels"}


def call_cpu(name: str, dtype: torch.dtype, tensors: Sequence[Tensor | None], *sizes: Any) -> None:
    """Run a function of the extension for the CPU on torch's threads."""
    if name.endswith("_backward"):
        sizes = (*sizes, torch.get_num_threads())
    getattr(_cpu, f"{name}_{SUFFIXES[dtype]}")([0 if t is None else t.data_ptr() for t in tensors], *sizes)
