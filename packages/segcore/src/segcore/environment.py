"""The environment of a run for a bug report: versions, machine, variables, without personal paths."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segcore.errors import UserError

if TYPE_CHECKING:
    import torch

    from segcore.config.schema import Precision

PACKAGES = ("torch", "torchvision", "timm", "numpy", "opencv-python-headless", "pillow", "segcore", "seg-cuda-ops")
VARIABLES = ("OMP_", "MKL_", "CUDA_", "NCCL_", "PYTORCH_", "TORCH", "SEG", "WORLD_SIZE", "SLURM_NTASKS")
"""Prefixes of the environment variables that affect a run."""
LIBRARIES = ("mkl", "onednn")


def versions() -> dict[str, str | None]:
    """Return the versions of Python, the packages that results depend on (None: not installed) and our methods."""
    points = [point.dist for point in entry_points(group="segcore.methods")]
    methods = {dist.name: dist.version for dist in points if dist is not None}
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}, **methods}


def git_hash() -> str | None:
    """Return the commit of the checkout that this code is in, `-dirty` after local changes; None outside a checkout."""
    tracked = ["git", "ls-files", "--error-unmatch", Path(__file__).name]  # not an unrelated repository around a .venv
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    for command in (tracked, describe):
        done = _output(command)
        if done is None:
            return None
    return done or None


def command_line() -> str:
    """Return the command that started this process, as one would write it again, without the program's folder."""
    path = Path(sys.argv[0])
    name = ["python", "-m", path.parent.name] if path.name == "__main__.py" else [path.name]
    return shlex.join([*name, *sys.argv[1:]])


def environment() -> dict[str, dict[str, Any]]:
    """Return everything that `segcore env` prints, in groups, as plain data; values with a `/` are left out."""
    import torch

    cuda = torch.version.cuda is not None and torch.cuda.is_available()
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if cuda else []
    driver = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    names = sorted(name for name in os.environ if name.startswith(VARIABLES))
    return {
        "versions": {**versions(), "git": git_hash()},
        "cuda": {
            "built for": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": driver.splitlines()[0] if driver else None,
            **{f"gpu {i}": f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB" for i, gpu in enumerate(gpus)},
        },
        "machine": {
            "system": platform.platform(),
            "cpu": processor("model name"),
            "cores": os.cpu_count(),
            "usable cores": usable_cpus(),
            "torch threads": torch.get_num_threads(),
            "float32 products": product_library(),
            "bfloat16": "in hardware" if has_bfloat16(torch.device("cpu")) else "converted, slow",
        },
        "variables": {name: "(set)" if {"/", "\\"} & set(os.environ[name]) else os.environ[name] for name in names},
        "kernels": _kernels(),
    }


def product_library() -> str:
    """Return the library of float32 products in CPU inference: "mkl", PyTorch's own choice, or "onednn".

    MKL leaves the AVX-512 units of AMD's processors unused; oneDNN, in the same PyTorch, does not. The rule is fixed,
    never a measurement, so that equal commands give equal numbers. The variable SEG_LINEAR overrides it; where PyTorch
    lacks oneDNN's operator, the answer is "mkl" all the same. Raises UserError for another value of the variable.
    """
    chosen = os.environ.get("SEG_LINEAR")
    if chosen and chosen not in LIBRARIES:
        raise UserError(f"SEG_LINEAR is {chosen!r}; set it to {' or '.join(LIBRARIES)}, or unset it")
    return (chosen or _suited_library()) if _has_onednn() else "mkl"


@functools.cache
def _has_onednn() -> bool:
    import torch

    return hasattr(torch.ops.mkldnn, "_linear_pointwise")  # private, but what torch.compile uses


@functools.cache
def _suited_library() -> str:
    import torch

    wide = torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return "onednn" if wide and "AuthenticAMD" in processor("vendor_id") else "mkl"


def computed_precision(precision: Precision, device: torch.device) -> Precision:
    """Return the precision that `auto` stands for on a device: bf16 where it has instructions for it, else fp32."""
    return precision if precision != "auto" else "bf16" if has_bfloat16(device) else "fp32"


def slow_precision(precision: Precision | None, device: torch.device) -> list[str]:
    """Return a note if the precision is several times slower on the device than fp32."""
    slow = precision == "bf16" and device.type in ("cpu", "cuda") and not has_bfloat16(device)
    what = "processor" if device.type == "cpu" else "GPU"
    return [f"note: this {what} has no instructions for bf16, which is slow on it; precision auto avoids that"] * slow


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device has instructions for bfloat16. Without them PyTorch converts, much slower than float32.

    A fixed rule: NVIDIA's GPUs from compute capability 8.0, all of AMD's, x86 processors with AVX-512 BF16, and other
    processors where oneDNN says so.
    """
    import torch

    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):  # where oneDNN says yes with any AVX-512
        return torch.cpu._is_avx512_bf16_supported()
    return hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported") and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def device_name(device: torch.device) -> str:
    """Return a torch device in words: `cuda:0 (NVIDIA H200)`, `cpu (4 threads)`."""
    import torch

    cuda = device.type == "cuda"
    return f"{device} ({torch.cuda.get_device_name(device) if cuda else f'{torch.get_num_threads()} threads'})"


def as_text(groups: dict[str, dict[str, Any]]) -> str:
    """Return the groups as text to paste: a heading per group, then `name: value` lines."""
    lines = []
    for group, values in groups.items():
        lines += [
            f"{group}:" if values else f"{group}: none",
            *(f"  {name}: {'none' if value is None else value}" for name, value in values.items()),
        ]
    return "\n".join(lines)


def usable_cpus(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the CPUs that this process may use, at least 1: of its affinity, or less where a container has a quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # cgroup 2, cgroup 1
        with contextlib.suppress(OSError, ValueError):  # no such file, "max", or no quota
            quota, period = map(int, " ".join((groups / name).read_text() for name in names).split())
            if quota > 0:
                count = min(count, math.ceil(quota / period))
    return max(count, 1)


def processor(field: str) -> str:
    """Return the `model name` or `vendor_id` of the processor in Linux's words; elsewhere what Python knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "") or (
        platform.processor() or platform.machine()
    )


def _kernels() -> dict[str, str]:
    """Return the kernel that serves each operator on each type of device, if the operators report it."""
    from segcore import ops

    found: dict[str, dict[str, str]] = getattr(ops, "kernels", dict)()
    return {f"{name} on {device}": text for name, devices in found.items() for device, text in devices.items()}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _output(command: list[str]) -> str | None:
    """Return the stripped output of a program; None when it is absent or fails."""
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else done.stdout.strip()
