"""The library of float32 products: DGMN2-Tiny with Semantic FPN, MKL's (SEG_LINEAR=mkl) against oneDNN's (onednn).

    python benchmarks/products.py [CONFIG] [--size 512x512] [--threads 1] [--repeats 10]

Both take turns in one process, on the same image and (random) weights, after a warm-up each. Printed is the best turn;
with one thread the seconds are the process's CPU time. The difference is the largest of the logits, over the largest
logit; the command fails above 2e-5. CONFIG may be any other configuration.
"""

import argparse
import os
import time

import torch
from torch import Tensor

import segcore
from segcore.deploy import bench
from segcore.environment import LIBRARIES, environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="fpn_dgmn2_tiny_4x2_769x769_40k_cityscapes")
    parser.add_argument("--size", type=bench.parse_size, default=(512, 512))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    torch.manual_seed(0)
    model = segcore.load_experiment(args.config).model.build().eval().fuse()
    images = torch.randn(1, 3, *args.size)
    best, answers = dict.fromkeys(LIBRARIES, float("inf")), dict[str, Tensor]()
    with torch.no_grad():
        for turn in range(args.repeats + 1):
            for library in LIBRARIES:
                os.environ["SEG_LINEAR"] = library
                start = clock()
                answers[library] = model(images)
                if turn:
                    best[library] = min(best[library], clock() - start)
    mkl, onednn = answers.values()
    off, same = (
        ((onednn - mkl).abs().max() / mkl.abs().max()).item(),
        (onednn.argmax(1) == mkl.argmax(1)).float().mean(),
    )
    height, width = args.size
    print(f"{args.config}, {height}x{width}, batch 1, float32, best of {args.repeats} turns")
    print(f"{environment()['machine']['cpu']}, torch {torch.__version__}, threads {args.threads}")
    for library, seconds in best.items():
        print(f"{library:8}{1e3 * seconds:9.1f} ms{best['mkl'] / seconds:7.2f}x")
    print(f"logits within {off:.1e} of the largest, {100 * same:.4f}% same class")
    if not off <= 2e-5:
        raise SystemExit("the answers differ; they must be the same numbers")


if __name__ == "__main__":
    main()
