"""What start weights of other classes are worth: fine-tuning against training from scratch, at the same iterations.

    python benchmarks/fine_tuning.py [--source 200] [--iterations 40] [--images 8]

A DDRNet-23-slim is trained on the 19 classes of the generated street scenes. Then it, and a new one, learn three
classes (road, vegetation, car; everything else is ignored) from a few images of other scenes, with the same settings.
The mIoU of the three is measured on 50 scenes. Five minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

from ddrnet_seg.configs.toy import ddrnet_23_slim_toy
from segcore.demo import toy
from segcore.training.loop import train

TARGET = (
    "data.dataset=folder", "data.train_images=leftImg8bit/train/**/*.png", "data.val_images=leftImg8bit/val/**/*.png",
    "data.train_masks=gtFine/train/**/*_labelTrainIds.png", "data.val_masks=gtFine/val/**/*_labelTrainIds.png",
    "data.labels=0=road 8=vegetation 13=car", "data.unlisted=ignore",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=int, default=200, help="iterations on the 19 classes")
    parser.add_argument("--iterations", type=int, default=40, help="iterations on the three classes")
    parser.add_argument("--images", type=int, default=8, help="training images of the three classes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        toy.generate(root / "source", train=100, val=2)
        toy.generate(root / "target", train=args.images, val=50, seed=1)
        row = ddrnet_23_slim_toy()

        def run(name: str, iterations: int, *overrides: str) -> float:
            every = [f"schedule.iterations={iterations}", f"train.evaluate_every={iterations}"]
            exp = dataclasses.replace(row, name=name).with_overrides([*every, *overrides])
            results = train(exp, root / name)
            assert results is not None
            return 100 * float(results.final["mIoU"])

        run("source_run", args.source, f"data.root={root / 'source'}")
        target = (*TARGET, f"data.root={root / 'target'}", "schedule.warmup_iterations=5")
        scratch = run("scratch", args.iterations, *target)
        tuned = run("tuned", args.iterations, *target, f"train.init_from={root / 'source_run'}")
        print(f"three classes, {args.images} images, {args.iterations} iterations (after {args.source} on 19 classes)")
        print(f"mIoU from scratch {scratch:.1f}, fine-tuned {tuned:.1f}, difference {tuned - scratch:+.1f}")


if __name__ == "__main__":
    main()
