"""Time DDRNet-23-slim on all cores while another program keeps one of them busy, by how its threads wait.

    python benchmarks/busy_core.py [--size 512 1024] [--images 6] [--repeats 3]

OpenMP's threads wait for each other after every layer. By default they spin, and take the time from the thread that
they wait for; with OMP_WAIT_POLICY=PASSIVE, which the commands set, they sleep. The variable is read once, so each form
runs in processes of its own, which take turns.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

import torch
from ddrnet_cpu import build

from segcore.environment import environment

FORMS = {"as OpenMP has it": {}, "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"}}


@torch.no_grad()
def seconds(size: list[int], images: int) -> float:
    """Return the median seconds per image."""
    model = build("23_slim").fuse().to(memory_format=torch.channels_last)
    image = torch.randn(1, 3, *size).to(memory_format=torch.channels_last)
    times = []
    for _ in range(images + 2):
        start = time.perf_counter()
        model(image)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def run(options: argparse.Namespace, form: dict[str, str]) -> float:
    """Return what a process of its own measures."""
    words = ["--size", *map(str, options.size), "--images", str(options.images), "--alone"]
    free = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")}
    done = subprocess.run([sys.executable, __file__, *words], env=free | form, check=True, stdout=subprocess.PIPE)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 1024), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(seconds(options.size, options.images))
        return
    cpu, threads = environment()["machine"]["cpu"], torch.get_num_threads()
    print(f"DDRNet-23-slim, {options.size[0]}x{options.size[1]}, {threads} threads")
    print(f"{cpu}, torch {torch.__version__}, least of {options.repeats} medians")
    for beside in ("nothing else runs", "one core is busy"):
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"])] if beside.startswith("one") else []
        try:
            turns = [{name: run(options, form) for name, form in FORMS.items()} for _ in range(options.repeats)]
        finally:
            for process in busy:
                process.kill()
        least = {name: min(turn[name] for turn in turns) for name in FORMS}
        first = next(iter(least.values()))
        for name, value in least.items():
            print(f"{beside:20}{name:26}{1e3 * value:8.1f} ms {first / value:6.2f}x")


if __name__ == "__main__":
    main()
