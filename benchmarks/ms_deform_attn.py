"""Time segcore.ops.ms_deform_attn on the CPU against the usual formulation, one grid_sample per level.

    python benchmarks/ms_deform_attn.py [--height 64] [--width 128] [--batch 1] [--heads 8] [--threads 1] [--repeats 9]

One level, 4 points, heads of width 32, a query per pixel and offsets of about 2 pixels, as in DDP. The two take turns
in one process; printed are the medians and their ratio, for the forward pass and for forward and backward.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from segcore import ops
from segcore.environment import environment


def grid_sample_form(value: Tensor, spatial_shapes: list[tuple[int, int]], loc: Tensor, attn: Tensor) -> Tensor:
    """Return (N, Q, M * D): the yardstick, kept apart from segcore so that it stays as it is."""
    n, _, m, d = value.shape
    q = loc.shape[1]
    maps = value.split([height * width for height, width in spatial_shapes], 1)
    samples = []
    for level, (height, width) in enumerate(spatial_shapes):
        image = maps[level].flatten(2).transpose(1, 2).reshape(n * m, d, height, width)
        grid = (2 * loc[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = attn.transpose(1, 2).reshape(n * m, 1, q, -1)
    out = (torch.stack(samples, dim=-2).flatten(-2) * weights).sum(-1)
    return out.view(n, m * d, q).transpose(1, 2)


def inputs(batch: int, height: int, width: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return value, locations and weights of DDP's decoder for a map of height x width."""
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    offsets = 2 * torch.randn(batch, height * width, heads, 1, 4, 2) / torch.tensor([width, height])
    loc = torch.stack([x, y], -1).view(1, -1, 1, 1, 1, 2) + offsets
    attn = torch.randn(batch, height * width, heads, 1, 4).softmax(-1)
    return torch.randn(batch, height * width, heads, 32), loc, attn


def alternate(functions: list[Callable[[], object]], repeats: int) -> list[float]:
    """Return the median seconds of each function; they run in turns after one warm-up."""
    seconds: list[list[float]] = [[] for _ in functions]
    for turn in range(repeats + 1):
        for function, taken in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            function()
            if turn:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("height", 64), ("width", 128), ("batch", 1), ("heads", 8), ("threads", 1), ("repeats", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tensors = inputs(args.batch, args.height, args.width, args.heads)
    leaves = [t.requires_grad_() for t in tensors]
    grad = torch.randn(args.batch, args.height * args.width, args.heads * 32)

    def forward(op: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad():
            return op(tensors[0], [(args.height, args.width)], *tensors[1:])

    def both(op: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(op(tensors[0], [(args.height, args.width)], *tensors[1:]), leaves, grad)

    print(f"{environment()['machine']['cpu']}, torch {torch.__version__}, threads {args.threads}")
    print(
        f"map of {args.height}x{args.width}, batch {args.batch}, {args.heads} heads; median of {args.repeats} turns\n"
    )
    forms = (grid_sample_form, ops.ms_deform_attn)
    for name, run in (("forward", forward), ("forward + backward", both)):
        yardstick, ours = alternate([lambda op=op, run=run: run(op) for op in forms], args.repeats)
        times = f"grid_sample {1e3 * yardstick:8.1f} ms   segcore {1e3 * ours:8.1f} ms"
        print(f"{name:20} {times}   {yardstick / ours:5.1f} times as fast")


if __name__ == "__main__":
    main()
