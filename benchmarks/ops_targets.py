"""What the operators should reach on an H200, and what their instructions and bytes let expect: for `ops_gpu.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ops_cases import Case

SASS = Path(__file__).with_name("results") / "ops_sass.txt"
ISSUED = 132 * 4 * 1.98e9
"""Instructions that an H200's warps issue per second: multiprocessors, schedulers of each, clock."""
SHARE = 0.65
"""Of ISSUED, what a kernel that waits for memory may hope for (assumed)."""
COPIED = 4.3e12
"""Bytes per second that a copy reads and writes, measured on an H200 elsewhere."""
ADDED = 5e12
"""Bytes per second of atomic additions, which the L2 cache does (assumed, as fast as it is read)."""


@dataclass(frozen=True)
class Time:
    """Median seconds of a pass: launched by the host, and as a replayed CUDA graph, None where there is none."""

    eager: float
    graph: float | None = None

    @property
    def best(self) -> float:
        """Return the graph's time, which is the kernels' alone, or what there is."""
        return self.eager if self.graph is None else self.graph

    def __str__(self) -> str:
        return f"{1e3 * self.best:.3f} ms ({'no graph' if self.graph is None else f'eager {1e3 * self.eager:.3f}'})"


@dataclass(frozen=True)
class Target:
    """A pass of a case and its limit: the most milliseconds, or how many times as fast as the form `than` at least."""

    case: str
    step: str
    limit: float
    than: str = ""


TARGETS = [
    Target("ms_deform_attn, Q=131072, bf16", "forward", 0.10),
    Target("ms_deform_attn, Q=131072, bf16", "backward", 0.6),
    Target("deform_local_attn, stage 1, bf16", "forward", 0.05),
    Target("deform_local_attn, stage 1, bf16", "backward", 0.35),
    *(
        Target(f"deform_conv2d, {dtype}", step, 1.5, "torchvision")
        for dtype in ("fp16", "fp32")  # torchvision has no kernel for bf16
        for step in ("forward", "backward")
    ),
]
KERNELS = {
    TARGETS[0]: ("ms_deform_attn bf16 8 4 1", [4]),
    TARGETS[1]: ("ms_deform_attn_backward bf16 8 4 1", [4]),
    TARGETS[2]: ("local_attn bf16 8 8 1", [2, 9, 2, 9, 2]),
    TARGETS[3]: ("local_attn_backward bf16 8 8 1", [2, 0, 2, 2, 0, 9, 9]),
}
"""The kernel of a pass in ops_sass.txt, and how often a warp runs its innermost loops, in the order of that line: once
per point or tap; once per eight taps where lanes take one each; never what only windows beyond 3x3 need."""


def moved(inputs: int, out: int, step: str) -> int:
    """Return the bytes that a pass reads and writes at least; backward the inputs, their gradients and the output's."""
    return inputs + out if step == "forward" else 2 * inputs + out


def verdict(target: Target, times: Mapping[str, Time], moved: int, bandwidth: float) -> str:
    """Return the line on a target: measured, target, reached or not, and the share of a copy's bandwidth (bytes/s)."""
    name, ours = f"{target.case}, {target.step}", times["compiled"]
    how = "eager, as there is no graph" if ours.graph is None else "graph"
    share = f"{100 * moved / ours.best / bandwidth:.0f}% of a copy's bandwidth"
    if not target.than:
        reached = 1e3 * ours.best <= target.limit
        measured, limit = f"{1e3 * ours.best:.3f} ms", f"at most {target.limit:.2f} ms"
    elif target.than in times:
        ratio = times[target.than].best / ours.best
        measured, limit, reached = f"{ratio:.2f}x", f"at least {target.limit}x {target.than}", ratio >= target.limit
    else:
        measured, limit, reached = "–", f"at least {target.limit}x {target.than}, which did not run", False
    return f"{name:44} {measured:>9} / {limit} / {'yes' if reached else 'no'}   {how}, {share}"


def instructions(line: str, trips: Sequence[int]) -> int:
    """Return how many instructions a warp runs at most: those of a line of ops_sass.txt, and loops as often as said."""
    counts, loops = (part.split() for part in line[34:].split(";")[0].rsplit("  ", 1))
    return int(counts[-1]) + sum(int(loop) * (times - 1) for loop, times in zip(loops, trips, strict=True))


def estimate(target: Target, case: Case) -> str:
    """Return the line on a target that says what to expect of an attention, and why.

    A kernel takes as long as the slowest of: its instructions, at ISSUED and at SHARE of it; the bytes that must move;
    and backward the atomic additions, four corners of every sample in float32. Backward the buffers of the gradients
    that are added to are filled with zeros before, and those of all features converted after.
    """
    kernel, trips = KERNELS[target]
    (line,) = (line for line in SASS.read_text(encoding="utf-8").splitlines() if line.startswith(f"{kernel} "))
    count, (features, *others) = instructions(line, trips), case.tensors
    warps = features.shape[0] * features.shape[1] * features.shape[2] * int(kernel.split()[-2]) // 32
    least = moved(sum(t.nbytes for t in case.tensors), features.nbytes, target.step) / COPIED
    added = around = 0.0
    if target.step == "backward":
        maps = 2 if target.case.startswith("deform_local_attn") else 1  # keys and values
        samples = next(t for t in others if t.dtype != features.dtype).numel() // 2
        added = maps * samples * 4 * features.shape[-1] * 4 / ADDED
        converted = sum(t.numel() for t in case.tensors if t.dtype == features.dtype)
        around = (maps * features.numel() * 4 + converted * (4 + features.element_size())) / COPIED
    fast, slow = (1e3 * (max(least, added, warps * count / rate) + around) for rate in (ISSUED, SHARE * ISSUED))
    parts = [f"{count} instructions x {warps} warps", f"bytes {1e6 * least:.0f} us", f"additions {1e6 * added:.0f} us"]
    parts += [f"zeros and conversion {1e6 * around:.0f} us"]
    name = f"{target.case}, {target.step}"
    return f"{name:44} target {target.limit:.2f} ms, estimate {fast:.3f} to {slow:.3f} ms: {', '.join(parts)}"
