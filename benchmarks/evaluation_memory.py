"""Peak memory of an evaluation over few and many images: it does not grow with their number.

    python benchmarks/evaluation_memory.py [--images 8 64 256] [--height 512] [--width 1024] [--no-ddps]

Each count runs in a process of its own on the CPU, whose greatest resident memory (ru_maxrss) is printed. The model is
one 1x1 convolution, so that the images, predictions and probabilities make up what can grow: for comparison, the size
that all predictions (int64) would have is printed, too. Then the peak of one image with many step entries: DDPS with
151 classes over 1200x1600 pixels, 11 entries, with flip and without. Its layers are narrow and its weights random, but
all maps of logits have their real size. Needs Linux or macOS.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddps_seg.model import DDPS
from segcore.config.schema import DataConfig, EvalConfig
from segcore.data.layouts import open_dataset
from segcore.demo.toy import generate
from segcore.environment import environment
from segcore.evaluation.evaluate import evaluate
from segcore.evaluation.predictor import Predictor
from segcore.models.segmentor import Segmentor


class Pointwise(Segmentor):
    """The smallest model: one 1x1 convolution to 19 classes."""

    num_classes = 19

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, self.num_classes, 1)

    def logits(self, images: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        return self.head(images)

    def losses(self, images: Tensor, labels: Tensor, **options: Any) -> dict[str, Tensor]:
        raise NotImplementedError("it is only evaluated")


def peak(root: Path, images: int) -> float:
    """Return this process's peak memory in MB after evaluating that many images, the one of the toy set over again."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = DataConfig("toy", root)
    dataset = open_dataset(data, "val")
    dataset = dataclasses.replace(dataset, samples=dataset.samples[:1] * images)
    results = evaluate(Predictor(Pointwise(), EvalConfig(img_scale=None), data), dataset)
    assert results.images == images
    return own_peak()


def entries_peak(flip: bool) -> None:
    """Print this process's peak memory in MB after the evaluation of one image by DDPS."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"condition_width": 32, "width": 32, "output_width": 32}
    model = DDPS(num_classes=151, backbone="mit_b0", num_inference_steps=20, **sizes).eval()  # type: ignore[arg-type]
    settings = EvalConfig(img_scale=None, steps=tuple(model.step_keys)[-11:], flip=flip)
    image = np.random.RandomState(0).randint(0, 256, (1200, 1600, 3)).astype(np.uint8)
    loaded = own_peak()
    [found] = Predictor(model, settings, DataConfig()).classes([image], [0])
    assert len(found) == 11
    print(
        f"{len(found)} entries, flip {flip}: peak {own_peak():.0f} MB, of which {loaded:.0f} MB before the first image"
    )


def own_peak() -> float:
    """Return this process's greatest resident memory so far in MB."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used * (1 if sys.platform == "darwin" else 1024) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[8, 64, 256])
    for name, default in (("height", 512), ("width", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)  # set in the process that measures one count
    parser.add_argument("--no-ddps", action="store_true", help="leave out the step entries")
    parser.add_argument("--entries", choices=["plain", "flip"], help=argparse.SUPPRESS)  # likewise
    args = parser.parse_args()
    if args.root:
        print(peak(args.root, args.images[0]))
        return
    if args.entries:
        entries_peak(args.entries == "flip")
        return
    print(f"{environment()['machine']['cpu']}, torch {torch.__version__}, 1 thread")
    print(f"images of {args.height}x{args.width} pixels, a 1x1 convolution to {Pointwise.num_classes} classes\n")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "toy"
        generate(root, train=1, val=1, height=args.height, width=args.width)
        first = None
        for images in args.images:
            command = [sys.executable, __file__, "--root", str(root), "--images", str(images)]
            used = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            first = first or used
            predictions = images * args.height * args.width * 8 / 1e6
            ratio = f"{used / first:5.2f} of the first"
            print(f"{images:4} images   peak {used:7.0f} MB   {ratio}   all predictions: {predictions:6.0f} MB")
    if not args.no_ddps:
        print("\nDDPS, 151 classes, an image of 1200x1600 pixels; a map of all classes has 1160 MB", flush=True)
        for views in ("plain", "flip"):
            subprocess.run([sys.executable, __file__, "--entries", views], check=True)


if __name__ == "__main__":
    main()
