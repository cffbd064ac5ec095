"""Time the operators of segcore on a GPU: compiled, in plain PyTorch, and the usual way to compute each.

    python benchmarks/ops_gpu.py [--repeats 30] [--only ms_deform_attn] [--small] [--device cpu]

Cases and usual forms are in `ops_cases.py`, torchvision's operator among them. Per form: the median of the times
between two CUDA events, with a cache emptied before each, and its share of the compiled kernel's speed; and for the
compiled kernel what it must read and write at least, with the share of the bandwidth that a copy reaches on the same
device. The device is kept busy until the host has launched a whole pass, so the times hold kernels and no launches.
A form that has no kernel for a dtype, or no memory, says so. The compiled answers are compared with the plain ones,
and the command fails when they differ. `--small` takes small inputs, for a quick check; `--device cpu` rehearses the
command without a GPU, and its times say nothing.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from ops_cases import Case, attention, convolution, local_attention, unfold
from torch import Tensor

from segcore import ops
from segcore.environment import environment

Run = Callable[[], object]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SPIN = (2**20, 2**26)
"""Clock cycles that the device is kept busy before a timed pass: at first, and at most (0.5 and 34 ms at 2 GHz)."""


def cases(small: bool) -> dict[str, Callable[[], Case]]:
    """Return functions that make the cases by name, with sides divided by 16 for small ones."""
    part = 16 if small else 1
    stages = [(193, 1), (97, 2), (97, 5), (97, 8)]  # side and heads in DGMN2 at 769x769
    by_name: dict[str, Callable[[], Case]] = {}
    for name, dtype in DTYPES.items():
        for height, width in ((256 // part, 512 // part), (128 // part, 256 // part)):
            by_name[f"ms_deform_attn, Q={height * width}, {name}"] = partial(attention, height, width, dtype=dtype)
        size = (64 // part, 128 // part)
        by_name[f"deform_conv2d, {name}"] = partial(convolution, 256, 256, *size, dtype=dtype)
        by_name[f"deform_unfold, {name}"] = partial(unfold, 256, *size, dtype=dtype)
        for stage, (side, heads) in enumerate(stages, 1):
            make = partial(local_attention, side // part, side // part, heads, batch=2, dtype=dtype)
            by_name[f"deform_local_attn, stage {stage}, {name}"] = make
    return by_name


def switch(compiled: bool) -> None:
    """Use the compiled kernels or the plain ones."""
    ops.load() if compiled else ops.unload()


def seconds(run: Run, repeats: int, scratch: Tensor) -> float:
    """Return the median time of a run on the device of `scratch`, which is larger than the caches and written before.

    On a GPU a spinning kernel goes first: the start is recorded once it ends, and by then the host should have launched
    all of the run. If the start was passed earlier, the turn does not count and the next spins for twice as long; a run
    that waits for the device itself is taken as it is at the longest.
    """
    times: list[float] = []
    spin, longest = SPIN
    while len(times) < repeats + 3:
        scratch.zero_()
        if not scratch.is_cuda:
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(spin)
        start.record()
        run()
        end.record()
        if start.query() and spin < longest:
            spin *= 2
            continue
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])


def copy_bandwidth(repeats: int, scratch: Tensor) -> float:
    """Return the bytes per second that a copy of four times `scratch` reads and writes."""
    source = torch.zeros(4 * scratch.numel(), device=scratch.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), repeats, scratch)


def runs(form: Callable[..., Tensor], tensors: list[Tensor]) -> tuple[Run, Run, list[Tensor]]:
    """Return the forward pass alone, the backward pass alone, and the output with all gradients."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = form(*leaves)
    grad = torch.cos(torch.arange(out.numel(), device=out.device)).view(out.shape).to(out.dtype)

    def forward() -> object:
        with torch.no_grad():
            return form(*leaves)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, grad, retain_graph=True)

    return forward, backward, [out.detach(), *backward()]


def time_case(case: Case, repeats: int, bandwidth: float, scratch: Tensor) -> None:
    tensors = [t.to(scratch.device) for t in case.tensors]
    forms = {"compiled": (True, case.ours), "plain": (False, case.ours)}
    forms |= {name: (False, form) for name, form in case.usual.items()}
    answers: dict[str, list[Tensor]] = {}
    times: dict[str, list[float]] = {}
    for name, (compiled, form) in forms.items():
        switch(compiled)
        try:
            forward, backward, answers[name] = runs(form, tensors)
            times[name] = [seconds(step, repeats, scratch) for step in (forward, backward)]
        except (NotImplementedError, RuntimeError) as error:
            if name == "compiled":
                raise
            print(f"  {name:16} – ({str(error).splitlines()[0][:80]})")
    inputs = sum(t.nbytes for t in tensors)
    out = answers["compiled"][0].nbytes
    for step, (pass_, moved) in enumerate([("forward", inputs + out), ("backward", 2 * inputs + out)]):
        least = times["compiled"][step]
        columns = [f"{name} {1e3 * taken[step]:.3f} ms ({least / taken[step]:.2f})" for name, taken in times.items()]
        share = f"{moved / 1e6:.0f} MB at {100 * moved / least / bandwidth:.0f}% of a copy's bandwidth"
        print(f"  {pass_:9}{'   '.join(columns)}   {share}")
    for ours, plain in zip(answers["compiled"], answers.get("plain", answers["compiled"]), strict=True):
        off = ((ours.double() - plain.double()).abs().max() / plain.double().abs().max()).item()
        if off > (2e-2 if ours.dtype == torch.bfloat16 else 1e-4):
            raise SystemExit(f"{case.title}: compiled and plain differ by {off:.1e} of the largest number")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--small", action="store_true", help="small inputs, for a quick check")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: only to rehearse the command")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("ops_gpu.py needs a CUDA device, and torch sees none on this machine")
    switch(True)
    served = ops.kernels()["ms_deform_attn"][args.device]
    if served.startswith("plain"):
        raise SystemExit(f"no compiled kernels to time: {served}")
    seen = environment()["cuda"]
    print(f"{seen.get('gpu 0')}, driver {seen['driver']}, torch {torch.__version__}, {served}")
    scratch = torch.empty(2**16 if args.device == "cpu" else 2**26, device=args.device)  # 256 MiB on a GPU
    bandwidth = copy_bandwidth(args.repeats, scratch)
    print(f"a copy moves {bandwidth / 1e9:.0f} GB/s\n")
    torch.manual_seed(0)
    for name, build in cases(args.small).items():
        if name.startswith(args.only):
            case = build()
            print(f"{name}: {case.title}", flush=True)
            time_case(case, args.repeats, bandwidth, scratch)


if __name__ == "__main__":
    main()
