"""Time DDRNet's forms for inference on the CPU against the plain one, in fp32 and bf16.

    python benchmarks/ddrnet_cpu.py [--variant 23_slim] [--size 512 1024] [--threads 1] [--repeats 12]

The forms take turns in one process, so that a busy machine slows them alike. Printed are the best times, their ratio to
the plain model's and how far the answers are from its own. Times are those of the processor, not of the clock, with one
thread; of the clock with more. The last column is the arithmetic done per second; below the table stands that of a
single large convolution, which is what the machine can do. Weights are random, scaled by fan-in, so that maps keep
their size from block to block.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddrnet_seg.model import DDRNet
from segcore.environment import environment


def build(variant: str) -> DDRNet:
    """Return a model in evaluation mode."""
    torch.manual_seed(0)
    model = DDRNet(variant=variant).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 4:
                parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    return model


def forms(variant: str, images: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return what to time, the plain form first."""
    last = torch.channels_last
    model = build(variant)
    turned, fused = images.to(memory_format=last), model.fuse()
    fused_last, plain_last = model.fuse().to(memory_format=last), build(variant).to(memory_format=last)

    def bf16() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return fused_last(turned)

    half, half_images = model.fuse().to(memory_format=last).bfloat16(), turned.bfloat16()
    return {
        "plain": lambda: model(images),
        "channels_last": lambda: plain_last(turned),
        "fused": lambda: fused(images),
        "fused channels_last": lambda: fused_last(turned),
        "fused channels_last bf16 (autocast)": bf16,
        "fused channels_last bf16 (weights)": lambda: half(half_images),
    }


def convolution(dtype: torch.dtype) -> tuple[Callable[[], Tensor], int]:
    """Return a 3x3 convolution of 256 channels on 64x64 pixels, channels-last, and its floating-point operations."""
    layer = nn.Conv2d(256, 256, 3, padding=1, bias=False).to(dtype=dtype, memory_format=torch.channels_last)
    x = torch.randn(1, 256, 64, 64).to(dtype=dtype, memory_format=torch.channels_last)
    return lambda: layer(x), 2 * 9 * 256 * 256 * 64 * 64


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="23_slim", choices=("23_slim", "23", "39"))
    parser.add_argument("--size", type=int, nargs=2, default=(512, 1024), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    images = torch.randn(1, 3, *options.size, generator=torch.Generator().manual_seed(0))
    runs = forms(options.variant, images)
    with FlopCounterMode(display=False) as counter:
        answers = {"plain": runs["plain"]()}
    answers |= {name: run().float() for name, run in runs.items() if name != "plain"}
    operations = dict.fromkeys(runs, counter.get_total_flops())
    for dtype in (torch.float32, torch.bfloat16):
        name = f"one convolution in {str(dtype)[6:]}"
        runs[name], operations[name] = convolution(dtype)
        runs[name]()
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(options.repeats):
        for name, run in runs.items():
            start = clock()
            run()
            best[name] = min(best[name], clock() - start)
    machine = environment()["machine"]["cpu"]
    print(f"DDRNet-{options.variant}, {options.size[0]}x{options.size[1]}, batch 1, {options.threads} thread(s)")
    print(f"{machine}, torch {torch.__version__}, best of {options.repeats}")
    plain = answers["plain"]
    for name in runs:
        rate = f"{operations[name] / best[name] / 1e9:6.1f} GFLOP/s"
        if name not in answers:
            print(f"{name:37}{rate:>72}")
            continue
        answer = answers[name]
        difference = (answer - plain).abs().max().item()
        same = (answer.argmax(1) == plain.argmax(1)).double().mean().item()
        ratio = best["plain"] / best[name]
        print(
            f"{name:37}{1e3 * best[name]:8.1f} ms {ratio:6.2f}x   "
            f"logits within {difference:.1e}, {same:7.2%} same class {rate}"
        )


if __name__ == "__main__":
    main()
