"""Time the operators of segcore on a GPU: compiled, in plain PyTorch, and the usual way to compute each.

    python benchmarks/ops_gpu.py [--repeats 30] [--only ms_deform_attn]

Cases and usual forms are in `ops_cases.py`, torchvision's operator among them. Per form: the median of the times
between two CUDA events, with a cache emptied before each, and its share of the compiled kernel's speed; and for the
compiled kernel what it must read and write at least, with the share of the bandwidth that a copy reaches on the same
device. A form that has no kernel for a dtype, or no memory, says so. The compiled answers are compared with the plain
ones, and the command fails when they differ.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from ops_cases import Case, attention, convolution, local_attention, unfold
from torch import Tensor

from segcore import ops
from segcore.environment import environment

DEVICE = torch.device("cuda")
HALF = torch.bfloat16
CASES: dict[str, Callable[[], Case]] = {
    "ms_deform_attn, Q=131072, bf16": lambda: attention(256, 512, dtype=HALF),
    "ms_deform_attn, Q=131072, fp32": lambda: attention(256, 512),
    "ms_deform_attn, Q=32768, bf16": lambda: attention(128, 256, dtype=HALF),
    "ms_deform_attn, Q=32768, fp32": lambda: attention(128, 256),
    "deform_conv2d, bf16": lambda: convolution(256, 256, 64, 128, dtype=HALF),
    "deform_conv2d, fp32": lambda: convolution(256, 256, 64, 128),
    "deform_unfold, bf16": lambda: unfold(256, 64, 128, dtype=HALF),
    "deform_unfold, fp32": lambda: unfold(256, 64, 128),
    **{
        f"deform_local_attn, stage {stage}, {name}": lambda size=size, heads=heads, dtype=dtype: local_attention(
            size, size, heads, batch=2, dtype=dtype
        )
        for stage, (size, heads) in enumerate([(193, 1), (97, 2), (97, 5), (97, 8)], 1)
        for name, dtype in (("bf16", HALF), ("fp32", torch.float32))
    },
}
Run = Callable[[], object]


def switch(compiled: bool) -> None:
    """Use the compiled kernels or the plain ones."""
    ops.load() if compiled else ops.unload()


def seconds(run: Run, repeats: int, scratch: Tensor) -> float:
    """Return the median time between two events around a run; `scratch`, larger than the caches, is written before."""
    times = []
    for turn in range(repeats + 3):
        scratch.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if turn >= 3:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copy_bandwidth(repeats: int, scratch: Tensor) -> float:
    """Return the bytes per second that a copy reads and writes."""
    source = torch.zeros(2**28, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / seconds(lambda: target.copy_(source), repeats, scratch)


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
    tensors = [t.to(DEVICE) for t in case.tensors]
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
        if off > (2e-2 if ours.dtype == HALF else 1e-4):
            raise SystemExit(f"{case.title}: compiled and plain differ by {off:.1e} of the largest number")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--only", default="", help="cases whose name begins so")
    args = parser.parse_args()
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("ops_gpu.py needs a CUDA device, and torch sees none on this machine")
    switch(True)
    served = ops.kernels()["ms_deform_attn"][DEVICE.type]
    if served.startswith("plain"):
        raise SystemExit(f"no compiled kernels to time: {served}")
    seen = environment()["cuda"]
    print(f"{seen.get('gpu 0')}, driver {seen['driver']}, torch {torch.__version__}, {served}")
    scratch = torch.empty(2**26, device=DEVICE)  # 256 MiB
    bandwidth = copy_bandwidth(args.repeats, scratch)
    print(f"a copy moves {bandwidth / 1e9:.0f} GB/s\n")
    torch.manual_seed(0)
    for name, build in CASES.items():
        if name.startswith(args.only):
            case = build()
            print(f"{name}: {case.title}")
            time_case(case, args.repeats, bandwidth, scratch)


if __name__ == "__main__":
    main()
