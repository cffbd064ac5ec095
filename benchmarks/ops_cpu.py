"""Time the operators of segcore on the CPU against the usual way to compute them, and on two threads against one.

    python benchmarks/ops_cpu.py [--repeats 20] [--scaling 0]

Cases and usual forms are in `ops_cases.py`. All forms take turns in one process, float32, after a warm-up each. On one
thread the time is the process's CPU time, which other programs disturb less than the clock; printed are each form's
best and how many times as fast as the usual form it is. "plain" are segcore's kernels in PyTorch, "compiled" those of
seg-cuda-ops. With `--scaling 60` the compiled ones run on one and two threads as well, in wall time, the best of 60
turns: that takes a machine with two free cores. The answers are compared first, and the command fails when they differ.
"""

import argparse
import time
from collections.abc import Callable

import torch
from ops_cases import Case, attention, convolution, local_attention, unfold
from torch import Tensor

from segcore import ops
from segcore.environment import environment

CASES = [attention(64, 128), convolution(64, 64, 64, 128), unfold(64, 64, 128), local_attention(97, 97, 1)]
TOLERANCE = 1e-4
"""Of the largest number; grid_sample computes places in another order, which moves them by a few float32 roundings."""

Run = Callable[[], object]


def forms(case: Case) -> dict[str, tuple[bool, Callable[..., Tensor]]]:
    """Return by name whether compiled kernels are used, and the function; the first is the yardstick."""
    first = next(iter(case.usual))
    return {first: (False, case.usual[first]), "plain": (False, case.ours), "compiled": (True, case.ours)}


def switch(compiled: bool) -> None:
    """Use the compiled kernels or the plain ones."""
    ops.load() if compiled else ops.unload()


def check(case: Case) -> None:
    """Fail unless all forms give the same output and gradients."""
    leaves = [t.requires_grad_() for t in case.tensors]
    answers = {}
    for name, (compiled, form) in forms(case).items():
        switch(compiled)
        out = form(*leaves)
        grads = torch.autograd.grad(out, leaves, torch.cos(torch.arange(out.numel())).view(out.shape))
        answers[name] = [out.detach(), *grads]
    first = next(iter(answers.values()))
    for name, answer in answers.items():
        for expected, actual in zip(first, answer, strict=True):
            off = ((actual - expected).abs().max() / expected.abs().max()).item()
            if off > TOLERANCE:
                raise SystemExit(f"{case.title}: {name} is off by {off:.1e} of the largest number")


def runs(case: Case, form: Callable[..., Tensor]) -> dict[str, Run]:
    """Return the forward pass alone and the backward pass alone."""
    leaves = [t.requires_grad_() for t in case.tensors]

    def forward() -> object:
        with torch.no_grad():
            return form(*case.tensors)

    out = form(*leaves)
    grad = torch.randn_like(out)
    return {"forward": forward, "backward": lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)}


def timed(run: Run, clock: Callable[[], float]) -> float:
    """Return the seconds of a run by a clock."""
    start = clock()
    run()
    return clock() - start


def against_usual(case: Case, repeats: int) -> None:
    torch.set_num_threads(1)
    by_form = {name: (compiled, runs(case, form)) for name, (compiled, form) in forms(case).items()}
    for step in ("forward", "backward"):
        best = dict.fromkeys(by_form, float("inf"))
        for _ in range(repeats + 1):
            for name, (compiled, steps) in by_form.items():
                switch(compiled)
                best[name] = min(best[name], timed(steps[step], time.process_time))
        usual, *ours = best.items()
        columns = "".join(f"{name:>11}{1e3 * seconds:8.2f} ms {usual[1] / seconds:5.1f}x" for name, seconds in ours)
        print(f"  {step:10}{usual[0]:>16}{1e3 * usual[1]:8.1f} ms {columns}")


def on_two_threads(case: Case, repeats: int) -> None:
    switch(True)
    for step, run in runs(case, case.ours).items():
        best = {1: float("inf"), 2: float("inf")}
        for _ in range(repeats + 1):
            for threads in best:
                torch.set_num_threads(threads)
                best[threads] = min(best[threads], timed(run, time.perf_counter))
        print(f"  {step:10}{1e3 * best[1]:8.2f} ms on 1 thread {1e3 * best[2]:8.2f} ms on 2, {best[1] / best[2]:.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--scaling", type=int, default=0, help="turns on one and two threads")
    args = parser.parse_args()
    switch(True)
    served = ops.kernels()["ms_deform_attn"]["cpu"]
    if served.startswith("plain"):
        raise SystemExit(f"no compiled kernels to time: {served}")
    print(f"{environment()['machine']['cpu']}, torch {torch.__version__}, {served}")
    for case in CASES:
        print(case.title)
        torch.set_num_threads(1)
        check(case)
        against_usual(case, args.repeats)
        if args.scaling:
            on_two_threads(case, args.scaling)


if __name__ == "__main__":
    main()
