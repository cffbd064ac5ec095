"""Peak memory and time of a training pass with stored activations, and with `train.checkpoint_activations`.

    python benchmarks/training_memory.py [CONFIG …] [--size 512]

Each pass, forward and backward over two square images on the CPU in one thread, runs in a process of its own. Printed
are the growth of its greatest resident memory (ru_maxrss) over that of a small first pass, and its CPU time. Needs
Linux with glibc, whose allocator is told to return memory at once.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time

import torch

from segcore.config.registry import load_experiment
from segcore.environment import environment
from segcore.testing.contract import images, labels
from segcore.training.activations import checkpoint_activations

CONFIGS = (
    "ddrnet_23_slim_cityscapes",
    "fpn_dgmn2_tiny_4x2_769x769_40k_cityscapes",
    "ddp_convnext_t_4x4_512x1024_160k_cityscapes",
    "ddps_segformer_b0_toy",
)
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def measure(config: str, size: int, recompute: bool) -> tuple[float, float]:
    """Return the memory in MiB and the CPU time in seconds of a pass in this process."""
    torch.manual_seed(0)
    model = load_experiment(config).model.build().train()
    if recompute:
        checkpoint_activations(model)
    for side in (64, size):
        batch, target = images(2, side, side), labels(model, 2, side, side)
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        model.losses(batch, target, seeds=[0, 1])["loss"].backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10, time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", default=CONFIGS)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--one", choices=("stored", "recomputed"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(*measure(args.configs[0], args.size, args.one == "recomputed"))
        return
    machine = environment()["machine"]["cpu"]
    print(f"{machine}, torch {torch.__version__}\ntwo images of {args.size}x{args.size} pixels, one thread\n")
    for config in args.configs:
        found = []
        for one in ("stored", "recomputed"):
            command = [sys.executable, __file__, config, "--size", str(args.size), "--one", one]
            env = {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": "1"}
            found.append([float(word) for word in subprocess.check_output(command, env=env, text=True).split()])
        (memory, seconds), (less, more) = found
        print(
            f"{config:45}{memory:6.0f} -> {less:5.0f} MiB ({less / memory:.2f})"
            f"{seconds:7.1f} -> {more:5.1f} s ({more / seconds:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
