"""The entry point that segcore calls: which kernels are registered for which device, and why others are not."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from seg_cuda_ops import _cpu
from seg_cuda_ops.kernels import Backend, kernels, resize_argmax

try:
    from seg_cuda_ops import _cuda
except ImportError:
    _cuda = None  # type: ignore[assignment]

SUFFIXES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}
MAX_LEVELS = 16  # of ms_deform_attn; csrc/kernels.cuh


def register(library: torch.library.Library, defaults: Mapping[str, Callable[..., Any]]) -> dict[str, str]:
    """Add kernels to the operators of `library`; return per device type "" or why there are none for it.

    `defaults` holds every operator's plain kernel by name, for what the compiled ones leave to it, and NAME_shape,
    which checks the inputs and returns the shape of the output.
    """
    for name, kernel in kernels(defaults, Backend(call_cpu, half=False, chunk=2**20)).items():
        library.impl(name, kernel, "CPU")
    library.impl("resize_argmax", resize_argmax(defaults, call_cpu), "CPU")  # on CUDA the plain one
    reason = why_no_cuda()
    if not reason:
        for name, kernel in kernels(defaults, Backend(call_cuda, half=True, chunk=2**28)).items():
            library.impl(name, or_default(name, kernel, defaults[name]), "CUDA")
    return {"cpu": "", "cuda": reason}


def call_cpu(name: str, dtype: torch.dtype, tensors: Sequence[Tensor | None], *sizes: Any) -> None:
    """Run a function of the extension for the CPU on torch's threads."""
    if name.endswith("_backward"):
        sizes = (*sizes, torch.get_num_threads())
    getattr(_cpu, f"{name}_{SUFFIXES[dtype]}")([0 if t is None else t.data_ptr() for t in tensors], *sizes)


def call_cuda(name: str, dtype: torch.dtype, tensors: Sequence[Tensor | None], *sizes: Any) -> None:
    """Launch a kernel on the first tensor's device and torch's current stream there; the host does not wait."""
    device = next(t.device for t in tensors if t is not None)
    pointers = [0 if t is None else t.data_ptr() for t in tensors]
    with torch.cuda.device(device):  # the extension's own CUDA runtime then looks at the same device as torch's
        stream = torch.cuda.current_stream(device).cuda_stream
        getattr(_cuda, f"{name}_{SUFFIXES[dtype]}")(pointers, *sizes, device.index, stream)


def why_no_cuda() -> str:
    """Return "" if kernels can be launched at all, without touching a device: processes that fork must not do that."""
    if _cuda is None:
        return "this build has no CUDA kernels"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    driver, built_for = _cuda.driver_version(), _cuda.built_for
    if driver // 1000 < built_for // 1000:
        known = f"the driver knows CUDA {driver // 1000}.{driver % 1000 // 10}" if driver else "there is no driver"
        return f"{known}, this build needs {built_for // 1000}.0 or newer"
    return ""


@functools.cache
def runs_on(device: int) -> bool:
    """Whether this build has code for a device; a warning once if it has not."""
    with torch.cuda.device(device):
        reason = _cuda.probe(device)
    if reason:
        name = torch.cuda.get_device_name(device)
        warnings.warn(f"seg-cuda-ops does not run on {name}, plain PyTorch does instead: {reason}", stacklevel=2)
    return not reason


def or_default(name: str, kernel: Callable[..., Any], default: Callable[..., Any]) -> Callable[..., Any]:
    """Return a kernel that leaves to the plain one what the compiled one cannot do.

    That is a device that it has no code for, more levels than it has room for, maps of 2^31 pixels, and gradients when
    torch is asked for deterministic ones: atomic additions come in any order, the plain kernels add in a fixed one.
    """
    backward = name.endswith("_backward")

    def chosen(*args: Any) -> Any:
        features, second, *rest = args[1:] if backward else args
        if name.startswith("ms_deform_attn"):
            levels = second
        elif name.startswith("deform_local_attn"):
            levels = rest[3][:2]
        else:
            levels = features.shape[2:]
        pixels = max(h * w for h, w in zip(levels[::2], levels[1::2], strict=True))
        large = len(levels) > 2 * MAX_LEVELS or pixels >= 2**31
        if large or (backward and torch.are_deterministic_algorithms_enabled()) or not runs_on(features.device.index):
            return default(*args)
        return kernel(*args)

    return chosen
