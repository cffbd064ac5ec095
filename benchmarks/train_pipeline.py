"""The training pipeline on 1024 x 2048 PNGs, one core: segcore against the plain OpenCV form of the published one.

Both take the same decoded pictures and the same draws, and their tensors are asserted to be equal, byte for byte. Per
draw each step counts with its fastest of several runs, the two forms in turns. Decoding is listed, but left out of the
totals: it is the same for both.

    python benchmarks/train_pipeline.py [--pictures 4] [--draws 40] [--repeats 5]
"""

from __future__ import annotations

import argparse
import tempfile
import time
import timeit
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.random import RandomState
from torch import Tensor

from segcore.config.schema import DataConfig
from segcore.data import transforms
from segcore.data.layouts import open_dataset
from segcore.demo.toy import generate
from segcore.environment import environment

STEPS = ("resize image", "resize label", "crop", "flip", "photometric", "normalize, pad")
FUNCTIONS = ("resize_image", "resize_label", "random_crop_box", "flip", "photometric_distortion")
"""The functions of `segcore.data.transforms` that do all steps but the last."""


class Clock:
    """Seconds per step; of steps inside steps, only the outer one counts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.busy = False

    def __call__(self, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` with its time added to `step`."""

        def timed(*args: Any) -> Any:
            if self.busy:
                return function(*args)
            self.busy, start = True, time.perf_counter()
            try:
                return function(*args)
            finally:
                self.busy = False
                self.seconds[step] += time.perf_counter() - start

        return timed


class Plain:
    """The published pipeline, operation by operation in the published order (reference/eval/SPEC.md, section 2).

    The yardstick: it shares nothing with segcore and stays as it is.
    """

    def __init__(self, data: DataConfig, ignore_index: int = 255) -> None:
        self.data, self.ignore_index = data, ignore_index

    def __call__(
        self, image: np.ndarray, label: np.ndarray, rng: RandomState, clock: Clock | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the image as float32 (C, *crop) and the label as int64 (*crop)."""
        clock = clock or Clock()
        low, high = self.data.ratio_range
        ratio = rng.random_sample() * (high - low) + low
        size = self.size(image, ratio)
        image = clock("resize image", cv2.resize)(image, size)
        label = clock("resize label", self.resize_label)(label, size)
        image, label = clock("crop", self.crop)(image, label, rng)
        if rng.rand() < self.data.flip:
            image, label = clock("flip", self.flip)(image, label)
        image = clock("photometric", self.photometric)(image, rng)
        image = clock("normalize, pad", self.normalize)(image)
        return clock("normalize, pad", self.to_tensors)(image, label)

    def size(self, image: np.ndarray, ratio: float) -> tuple[int, int]:
        """Return the (width, height) that fits the base scale times `ratio`."""
        (height, width), scale = image.shape[:2], self.data.img_scale or image.shape[1::-1]
        box = [int(side * ratio) for side in scale]
        factor = min(max(box) / max(height, width), min(box) / min(height, width))
        return int(width * factor + 0.5), int(height * factor + 0.5)

    def resize_label(self, label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        return cv2.resize(label, size, interpolation=cv2.INTER_NEAREST)

    def crop(self, image: np.ndarray, label: np.ndarray, rng: RandomState) -> tuple[np.ndarray, np.ndarray]:
        """Draw a window, up to 10 times more while one class fills too much of it, and cut it out."""

        def draw() -> tuple[slice, slice]:
            y = rng.randint(0, max(label.shape[0] - self.data.crop[0], 0) + 1)
            x = rng.randint(0, max(label.shape[1] - self.data.crop[1], 0) + 1)
            return slice(y, y + self.data.crop[0]), slice(x, x + self.data.crop[1])

        window = draw()
        if self.data.cat_max_ratio < 1:
            for _ in range(10):
                values, counts = np.unique(label[window], return_counts=True)
                counts = counts[values != 255]
                if len(counts) > 1 and counts.max() / counts.sum() < self.data.cat_max_ratio:
                    break
                window = draw()
        return image[window], label[window]

    def flip(self, image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return cv2.flip(image, 1), cv2.flip(label, 1)

    def photometric(self, image: np.ndarray, rng: RandomState) -> np.ndarray:
        """Brightness, contrast, saturation, hue or contrast last: in float32, back to 8 bits after each."""

        def scaled(values: np.ndarray, alpha: float = 1.0, beta: float = 0.0) -> np.ndarray:
            return np.clip(values.astype(np.float32) * alpha + beta, 0, 255).astype(np.uint8)

        if rng.randint(2):
            image = scaled(image, beta=rng.uniform(-32, 32))
        mode = rng.randint(2)
        if mode == 1 and rng.randint(2):
            image = scaled(image, alpha=rng.uniform(0.5, 1.5))
        if rng.randint(2):
            hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
            hsv[..., 1] = scaled(hsv[..., 1], alpha=rng.uniform(0.5, 1.5))
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
        if rng.randint(2):
            hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
            hsv[..., 0] = (hsv[..., 0].astype(int) + rng.randint(-18, 18)) % 180
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
        if mode == 0 and rng.randint(2):
            image = scaled(image, alpha=rng.uniform(0.5, 1.5))
        return image

    def normalize(self, image: np.ndarray) -> np.ndarray:
        mean, std = (np.array([x], np.float32).astype(np.float64) for x in (self.data.mean, self.data.std))
        image = image.astype(np.float32)
        cv2.subtract(image, mean, image)
        cv2.multiply(image, 1 / std, image)
        return image

    def to_tensors(self, image: np.ndarray, label: np.ndarray) -> tuple[Tensor, Tensor]:
        height, width = (new - old for new, old in zip(self.data.crop, label.shape, strict=True))
        border = 0, height, 0, width, cv2.BORDER_CONSTANT
        label = cv2.copyMakeBorder(label, *border, value=self.ignore_index)
        image = np.ascontiguousarray(cv2.copyMakeBorder(image, *border, value=0).transpose(2, 0, 1))
        return torch.from_numpy(image), torch.from_numpy(label.astype(np.int64))


def segcore_steps(transform: transforms.TrainTransform, *args: Any) -> tuple[tuple[Tensor, Tensor], dict[str, float]]:
    """Return what the transform gives and the seconds of its steps: of the functions it calls, the rest being last."""
    clock, own = Clock(), {name: getattr(transforms, name) for name in FUNCTIONS}
    for step, name in zip(STEPS, FUNCTIONS, strict=False):
        setattr(transforms, name, clock(step, own[name]))
    try:
        start = time.perf_counter()
        found = transform(*args)
        total = time.perf_counter() - start
    finally:
        for name, function in own.items():
            setattr(transforms, name, function)
    return found, clock.seconds | {STEPS[-1]: total - sum(clock.seconds.values())}


def measure(
    pairs: list[tuple[np.ndarray, np.ndarray]], data: DataConfig, draws: int, repeats: int
) -> list[dict[str, float]]:
    """Return the mean milliseconds per step of the plain form and of segcore, equal output asserted at every draw."""
    plain, ours = Plain(data), transforms.TrainTransform(data)
    totals: list[dict[str, float]] = [defaultdict(float), defaultdict(float)]
    for seed in range(draws):
        pair = pairs[seed % len(pairs)]
        best: list[dict[str, float]] = [{}, {}]
        for _ in range(repeats):
            clock = Clock()
            expected = plain(*pair, RandomState(seed), clock)
            found, steps = segcore_steps(ours, *pair, RandomState(seed))
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), f"draw {seed} differs"
            for fastest, seconds in zip(best, (clock.seconds, steps), strict=True):
                for step, value in seconds.items():
                    fastest[step] = min(value, fastest.get(step, value))
        for total, fastest in zip(totals, best, strict=True):
            for step, value in fastest.items():
                total[step] += 1e3 * value / draws
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("pictures", 4), ("draws", 40), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    print(f"{environment()['machine']['cpu']}, 1 thread, torch {torch.__version__}", end=", ")
    print(f"numpy {np.__version__}, OpenCV {cv2.__version__}")
    print(f"{args.draws} draws of {args.pictures} pictures; plain OpenCV, segcore, mean per picture\n")
    with tempfile.TemporaryDirectory() as folder:
        data = DataConfig(
            "toy", Path(folder) / "toy", img_scale=(2048, 1024), crop=(512, 1024),
            ratio_range=(0.5, 2.0), cat_max_ratio=0.75, flip=0.5, photometric=True,
        )  # fmt: skip
        generate(data.root, train=args.pictures, val=1, height=1024, width=2048)
        dataset = open_dataset(data, "train")
        pairs = [dataset.pair(i) for i in range(len(dataset))]
        decode = {"decode image": dataset.image, "decode label": dataset.label}
        for name, read in decode.items():
            fastest = [min(timeit.repeat(partial(read, i), number=1, repeat=args.repeats)) for i in range(len(pairs))]
            print(f"{name:16} {1e3 * sum(fastest) / len(pairs):8.2f} ms in both")
    plain, ours = measure(pairs, data, args.draws, args.repeats)
    for step in STEPS:
        print(f"{step:16} {plain[step]:8.2f} ms {ours[step]:8.2f} ms   {plain[step] / ours[step]:5.1f} times as fast")
    a, b = sum(plain.values()), sum(ours.values())
    print(f"{'total':16} {a:8.2f} ms {b:8.2f} ms   {a / b:5.1f} times as fast, without decoding")


if __name__ == "__main__":
    main()
