"""Time the operators of segcore on a GPU: compiled, in plain PyTorch, and the usual way to compute each.

    python benchmarks/ops_gpu.py [--repeats 30] [--only ms_deform_attn] [--small] [--device cpu]
    python benchmarks/ops_gpu.py --estimate

Cases and usual forms are in `ops_cases.py`, torchvision's operator among them. Per form: the median of the times
between two CUDA events, with a cache emptied before each, and its share of the compiled kernel's speed; and for the
compiled kernel what it must read and write at least, with the share of the bandwidth that a copy reaches on the same
device. A pass is timed as a replayed CUDA graph, and, in brackets, as the host launches it; there the device is kept
busy until all of it is launched. Where a graph cannot be captured, a line says why, and the eager time stands in. A
form that has no kernel for a dtype, or no memory, says so. The compiled answers are compared with the plain ones, and
the command fails when they differ. At the end, each target of `ops_targets.py`: measured, target, reached or not.

`--small` takes small inputs, for a quick check, under the names of the full ones; `--device cpu` rehearses the command
without a GPU, and its times say nothing. `--estimate` prints what to expect of an H200, for which no GPU is needed.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from ops_cases import Case, attention, convolution, local_attention, unfold
from ops_targets import KERNELS, TARGETS, Time, estimate, moved, verdict
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
        for height, width in ((256, 512), (128, 256)):
            make = partial(attention, height // part, width // part, dtype=dtype)
            by_name[f"ms_deform_attn, Q={height * width}, {name}"] = make
        size = (64 // part, 128 // part)
        by_name[f"deform_conv2d, {name}"] = partial(convolution, 256, 256, *size, dtype=dtype)
        by_name[f"deform_unfold, {name}"] = partial(unfold, 256, *size, dtype=dtype)
        for stage, (side, heads) in enumerate(stages, 1):
            make = partial(local_attention, side // part, side // part, heads, batch=2, dtype=dtype)
            by_name[f"deform_local_attn, stage {stage}, {name}"] = make
    by_name["deform_conv2d, fp16"] = partial(
        convolution, 256, 256, *size, dtype=torch.float16
    )  # torchvision has no bf16
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


def captured(run: Run) -> Run:
    """Return the replay of a CUDA graph of a run on the current stream, which must not be the default one."""
    for _ in range(3):
        run()  # whatever is only done at first is done
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        run()
    return graph.replay


def timed(run: Run, repeats: int, scratch: Tensor) -> Time:
    """Return the times of a run; print why there is none as a graph."""
    eager = seconds(run, repeats, scratch)
    if not scratch.is_cuda:
        return Time(eager)
    try:
        return Time(eager, seconds(captured(run), repeats, scratch))
    except RuntimeError as error:
        print(f"  no CUDA graph, the eager time stands in: {str(error).splitlines()[0][:100]}")
        return Time(eager)


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


def time_case(case: Case, repeats: int, bandwidth: float, scratch: Tensor) -> dict[str, tuple[dict[str, Time], int]]:
    """Print the times of a case; return them by pass, by form, with the bytes that must move."""
    tensors = [t.to(scratch.device) for t in case.tensors]
    forms = {"compiled": (True, case.ours), "plain": (False, case.ours)}
    forms |= {name: (False, form) for name, form in case.usual.items()}
    answers: dict[str, list[Tensor]] = {}
    times: dict[str, dict[str, Time]] = {"forward": {}, "backward": {}}
    for name, (compiled, form) in forms.items():
        switch(compiled)
        try:
            *steps, answers[name] = runs(form, tensors)
            for step, run in zip(times, steps, strict=True):
                times[step][name] = timed(run, repeats, scratch)
        except (NotImplementedError, RuntimeError) as error:
            if name == "compiled":
                raise
            print(f"  {name:16} – ({str(error).splitlines()[0][:80]})")
    inputs, out = sum(t.nbytes for t in tensors), answers["compiled"][0].nbytes
    results = {step: (by_form, moved(inputs, out, step)) for step, by_form in times.items()}
    for step, (by_form, least) in results.items():
        best = by_form["compiled"].best
        columns = [f"{name} {time} ({best / time.best:.2f})" for name, time in by_form.items()]
        share = f"{least / 1e6:.0f} MB at {100 * least / best / bandwidth:.0f}% of a copy's bandwidth"
        print(f"  {step:9}{'   '.join(columns)}   {share}")
    for ours, plain in zip(answers["compiled"], answers.get("plain", answers["compiled"]), strict=True):
        off = ((ours.double() - plain.double()).abs().max() / plain.double().abs().max()).item()
        if off > (2e-2 if ours.dtype.itemsize == 2 else 1e-4):
            raise SystemExit(f"{case.title}: compiled and plain differ by {off:.1e} of the largest number")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--small", action="store_true", help="small inputs, for a quick check")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: only to rehearse the command")
    parser.add_argument("--estimate", action="store_true", help="print what to expect of an H200, and time nothing")
    args = parser.parse_args()
    if args.estimate:
        print("\n".join(estimate(target, cases(small=False)[target.case]()) for target in KERNELS))
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("ops_gpu.py needs a CUDA device, and torch sees none on this machine")
    switch(True)
    served = ops.kernels()["ms_deform_attn"][args.device]
    if served.startswith("plain"):
        raise SystemExit(f"no compiled kernels to time: {served}")
    seen = environment()["cuda"]
    print(f"{seen.get('gpu 0')}, driver {seen['driver']}, torch {torch.__version__}, {served}")
    if args.device == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # a graph cannot be captured on the default one
    scratch = torch.empty(2**16 if args.device == "cpu" else 2**26, device=args.device)  # 256 MiB on a GPU
    bandwidth = copy_bandwidth(args.repeats, scratch)
    print(f"a copy moves {bandwidth / 1e9:.0f} GB/s\n")
    torch.manual_seed(0)
    results = {}
    for name, build in cases(args.small).items():
        if name.startswith(args.only):
            case = build()
            print(f"{name}: {case.title}", flush=True)
            results[name] = time_case(case, args.repeats, bandwidth, scratch)
    print(f"\nmeasured / target / reached{', on small inputs, which says nothing' if args.small else ''}")
    for target in TARGETS:
        if target.case in results:
            print(verdict(target, *results[target.case][target.step], bandwidth))


if __name__ == "__main__":
    main()
