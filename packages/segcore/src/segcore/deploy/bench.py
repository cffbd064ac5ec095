"""Inference speed and memory of a model over image sizes, batch sizes, precisions and memory layouts.

Times the configured output, without gradients, on random images with random weights: the figures do not depend on the
model's quality and say nothing about it. A setting is one cell of the table, a plain dict:

    height, width   of the images in pixels
    batch           images per forward pass
    dtype           "fp32", "bf16" or "fp16" (autocast; weights stay float32)
    runtime         "torch", "onnxruntime" or "openvino"; the latter two run an export of this size
    compile, channels_last, fused   how the model runs; `fused` is the model after its own `fuse()`
    latency_ms, p10_ms, p90_ms      median and 10th and 90th percentile over the repeats, after the warm-up
    images_per_s    batch / median
    memory_mib      peak of a forward pass in addition to model and images; None: cannot be measured here
    gflops          per image, as `torch.utils.flop_counter` counts: a multiply-add is 2; None: of an exported file
    error           None, or the reason for missing figures ("out of memory" …)

On CUDA, memory is the peak of torch's allocator. On a CPU it is the growth of the process's peak resident set during
one pass, after the heap's free pages are released, so it includes the libraries' work space; Linux only.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from segcore import environment
from segcore.config.schema import Experiment, Precision
from segcore.deploy import export
from segcore.deploy.runtimes import load_exported
from segcore.errors import UserError
from segcore.models.segmentor import Segmentor
from segcore.models.stepwise import predict_entries
from segcore.ops import flops  # noqa: F401  (registers our operators with the counter)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NOTE = "random weights and images; GFLOPs per image, a multiply-add counts 2; memory beyond model and images"

MEASURED = ("latency_ms", "p10_ms", "p90_ms", "images_per_s", "memory_mib")

Forward = Callable[[Tensor], object]


@dataclass(frozen=True)
class Settings:
    """The benchmark grid: every combination of the tuples is a cell."""

    sizes: tuple[tuple[int, int], ...]
    """(height, width) in pixels."""
    batches: tuple[int, ...] = (1,)
    dtypes: tuple[str, ...] = ("fp32",)
    compile: tuple[bool, ...] = (False,)
    channels_last: tuple[bool, ...] = (False,)
    steps: tuple[int, ...] = ()
    """Sampling steps of a pass; empty: as the model is configured."""
    warmup: int = 2
    """Warm-up passes before the timed ones, at least 1; they include compilation."""
    repeats: int = 10
    """Timed passes, at least 1."""


def parse_size(text: str, option: str = "--sizes") -> tuple[int, int]:
    """Return (height, width) of "HxW". Raises UserError, which names the option, if the text is malformed."""
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()) or not (int(height) and int(width)):
        raise UserError(f"{option} {text}: not a size; write HEIGHTxWIDTH, such as 512x1024")
    return int(height), int(width)


def check(settings: Settings, model: Segmentor | None = None) -> None:
    """Raise a one-line UserError for settings that no cell can be measured with, and sizes that the model cannot."""
    for name in ("warmup", "repeats"):
        if getattr(settings, name) < 1:
            raise UserError(f"--{name} is {getattr(settings, name)}; it must be at least 1")
    for name in ("batches", "steps"):
        if any(value < 1 for value in getattr(settings, name)):
            raise UserError(f"--{name} {min(getattr(settings, name))} is too small; it must be at least 1")
    if model is not None:
        for height, width in settings.sizes:
            model.check_size(torch.empty(1, 1, height, width, device="meta"))


def header(model: nn.Module, device: torch.device) -> dict[str, Any]:
    """Return the environment and settings of the measurement."""
    found = environment.environment()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": gpu or found["machine"]["cpu"],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()) or None,
        "git": found["versions"]["git"],
        "note": NOTE,
    }


def measure(model: Segmentor, channels: int, settings: Settings, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield the cells one by one for images with `channels` channels.

    A model that `fuse` changes is measured before and after fusing. The given model is moved but not changed otherwise.
    """
    check(settings, model)
    model = model.eval().to(device)
    fused_model = model.fuse()
    variants = [(False, model)] if fused_model is model else [(False, model), (True, fused_model)]
    for fused, variant in variants:
        for height, width in settings.sizes:
            gflops: float | None = None
            combinations = itertools.product(
                settings.batches, settings.dtypes, settings.compile, settings.channels_last
            )
            for batch, dtype, compiled, channels_last in combinations:
                layout = torch.channels_last if channels_last else torch.contiguous_format
                variant.to(memory_format=layout)
                cell: dict[str, Any] = {
                    "height": height, "width": width, "batch": batch, "dtype": dtype, "runtime": "torch",
                    "compile": compiled, "channels_last": channels_last, "fused": fused,
                }  # fmt: skip
                try:
                    if gflops is None:
                        gflops = count_gflops(variant, torch.randn(1, channels, height, width, device=device), settings)
                    images = torch.randn(batch, channels, height, width, device=device).to(memory_format=layout)
                    cell |= time_forward(forward_of(variant, settings.steps, dtype, compiled, device), images, settings)
                    cell["error"] = None
                except (RuntimeError, MemoryError) as error:
                    cell |= dict.fromkeys(MEASURED) | {"error": reason(error)}
                yield cell | {"gflops": gflops}


def measure_runtimes(model: Segmentor, exp: Experiment, settings: Settings) -> Iterator[dict[str, Any]]:
    """Yield cells of ONNX Runtime (fp32) and OpenVINO (each precision) on the CPU, for exports of each size and batch.

    A runtime that is not installed, or a size that cannot be exported, is a cell with the reason.
    Models that denoise run the configured steps, not `settings.steps`.
    """
    model, dtypes = model.cpu().fuse(), settings.dtypes
    for (height, width), batch in itertools.product(settings.sizes, settings.batches):
        with tempfile.TemporaryDirectory() as folder:
            path, error = Path(folder) / "model.onnx", ""
            try:
                export.export(model, exp, path, export.Settings(height, width, batch))
            except UserError as caught:
                error = str(caught)
            for provider, dtype in [("cpu", "fp32"), *(("openvino", dtype) for dtype in dtypes)]:
                shape = batch, exp.model.in_channels, height, width
                cell = measure_exported(path, provider, dtype, shape, settings, error)
                yield cell | {"fused": True, "error": cell["error"] and cell["error"].removeprefix(f"{path}: ")}


def measure_exported(
    path: Path, provider: str, dtype: str, shape: tuple[int, int, int, int], settings: Settings, error: str = ""
) -> dict[str, Any]:
    """Return the cell of an exported file for images (N, C, H, W); with an `error`, one without figures."""
    cell: dict[str, Any] = {
        "height": shape[2], "width": shape[3], "batch": shape[0], "dtype": dtype,
        "runtime": "openvino" if provider.lower() == "openvino" else "onnxruntime",
        "compile": False, "channels_last": False, "fused": False, "gflops": None,
    }  # fmt: skip
    try:
        if error:
            raise UserError(error)
        model = load_exported(path, provider, cast(Precision, dtype))
        images = torch.randn(shape) if not model.about.normalize else torch.randint(256, shape)
        model.check_size(images)
        return cell | time_forward(model.answer, images, settings) | {"error": None}
    except (UserError, MemoryError, RuntimeError) as caught:
        text = str(caught) if isinstance(caught, UserError) else reason(caught)
        return cell | dict.fromkeys(MEASURED) | {"error": text}


def forward_of(model: Segmentor, steps: Sequence[int], dtype: str, compiled: bool, device: torch.device) -> Forward:
    """Return the function to time: images (N, C, H, W) -> the model's output."""

    def forward(images: Tensor) -> object:
        with torch.no_grad(), torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "fp32"):
            return predict_entries(model, images, steps)

    if compiled:
        torch.compiler.reset()  # else many sizes in one process fall back to eager mode
        return torch.compile(forward)
    return forward


def time_forward(forward: Forward, images: Tensor, settings: Settings) -> dict[str, float | None]:
    """Return the latencies, the throughput and the peak memory of a forward pass."""
    wait = functools.partial(torch.cuda.synchronize, images.device) if images.is_cuda else lambda: None
    for _ in range(settings.warmup):
        forward(images)
    memory = peak_memory(lambda: forward(images), images.device)
    seconds = []
    for _ in range(settings.repeats):
        wait()
        start = time.perf_counter()
        forward(images)
        wait()
        seconds.append(time.perf_counter() - start)
    p10, median, p90 = np.percentile(seconds, (10, 50, 90)).tolist()
    return {
        "latency_ms": 1e3 * median, "p10_ms": 1e3 * p10, "p90_ms": 1e3 * p90,
        "images_per_s": len(images) / median, "memory_mib": None if memory is None else memory / 2**20,
    }  # fmt: skip


def count_gflops(model: Segmentor, images: Tensor, settings: Settings) -> float:
    """Return the 10^9 floating-point operations of a pass over `images`, without elementwise ones."""
    with FlopCounterMode(display=False) as counter:
        forward_of(model, settings.steps, "fp32", False, images.device)(images)
    return counter.get_total_flops() / 1e9


def peak_memory(run: Callable[[], object], device: torch.device) -> int | None:
    """Return the peak memory of `run` in bytes beyond the current allocation; None if it cannot be measured."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current resident set
        before = _status("VmRSS")
    except (OSError, AttributeError, StopIteration):
        return None
    run()
    return max(_status("VmHWM") - before, 0)


def _status(name: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def reason(error: Exception) -> str:
    """Return the reason for missing figures in a few words."""
    text = str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in text:
        return "out of memory"
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    return f"failed: {first[:80]}"


RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
COLUMNS = f"{'size':>10}{'batch':>6}{'dtype':>6} {'variant':24}{'ms':>9}{'p10–p90':>17}"
COLUMNS += f"{'images/s':>10}{'MiB':>8}{'GFLOPs':>9}"


def as_line(cell: dict[str, Any]) -> str:
    """Format a cell as a line under `COLUMNS`."""
    flags = [name for name in ("fused", "compile", "channels_last") if cell[name]]
    flags = flags if cell["runtime"] == "torch" else [RUNTIMES[cell["runtime"]]]
    start = f"{cell['height']}x{cell['width']}".rjust(10) + f"{cell['batch']:6}{cell['dtype']:>6} "
    start += f"{' + '.join(flags) or 'eager':24}"
    if cell["error"]:
        return f"{start}  {cell['error']}"
    spread = f"{cell['p10_ms']:.1f}–{cell['p90_ms']:.1f}"
    memory = "–" if cell["memory_mib"] is None else f"{cell['memory_mib']:.0f}"
    rate = f"{cell['images_per_s']:10.2f}"
    gflops = "–" if cell["gflops"] is None else f"{cell['gflops']:.1f}"
    return f"{start}{cell['latency_ms']:9.1f}{spread:>17}{rate}{memory:>8}{gflops:>9}"
