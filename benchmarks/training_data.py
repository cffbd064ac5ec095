"""Training samples of 1024 x 2048, from files to tensors in the main process: segcore against its former hand-over.

Formerly a sample left its worker as float32 and int64; now it does as the files have it (uint8) and is normalized where
it is used. With `data.cache` the arrays are read instead of decoded. All forms make the same crops and go through
a socket as `segcore.data.workers` sends them; their tensors are asserted to be equal, byte for byte. Times are those of
the CPU, in all threads: both ends of the socket add up, and a busy machine matters little. Per draw each step counts
with its fastest of several runs, the forms in turns.

    python benchmarks/training_data.py [--pictures 4] [--draws 12] [--repeats 5]
"""

from __future__ import annotations

import argparse
import math
import socket
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.random import RandomState
from torch import Tensor

from segcore.config.schema import DataConfig
from segcore.data import workers
from segcore.data.batch import Batch
from segcore.data.dataset import Dataset
from segcore.data.layouts import open_dataset
from segcore.data.transforms import TrainTransform, normalize
from segcore.demo.toy import generate
from segcore.environment import environment

STEPS = ("read", "crop", "prepare", "hand over", "normalize")


class Former:
    """The former hand-over of a batch: normalized, padded, and stacked as float32 and int64. It stays as it is."""

    def __init__(self, data: DataConfig) -> None:
        self.data = data

    def prepare(self, samples: list[tuple[np.ndarray, np.ndarray]]) -> Batch:
        images, labels = list[Tensor](), list[Tensor]()
        for image, label in samples:
            image = self.pad(normalize(image, self.data.mean, self.data.std), 0)
            label = self.pad(label, 255).astype(np.int64)
            images.append(torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))))
            labels.append(torch.from_numpy(label))
        return Batch(torch.stack(images), torch.stack(labels), [0] * len(samples), 0)

    def pad(self, array: np.ndarray, value: float) -> np.ndarray:
        missing = [(0, max(new - old, 0)) for new, old in zip(self.data.crop, array.shape[:2], strict=True)]
        if not any(after for _, after in missing):
            return array
        return np.pad(array, missing + [(0, 0)] * (array.ndim - 2), constant_values=value)

    def on_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.images, batch.labels


class Now:
    """What training does."""

    def __init__(self, data: DataConfig) -> None:
        self.data = data

    def prepare(self, samples: list[tuple[np.ndarray, np.ndarray]]) -> Batch:
        return Batch.of(samples, self.data.crop, 255, [0] * len(samples), 0)

    def on_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.on("cpu", self.data.mean, self.data.std)


def handed_over(batch: Batch) -> tuple[Batch, int]:
    """Return the batch as it arrives at the other end of a socket, and the bytes of its tensors."""
    own, other = socket.socketpair()
    with own, other, own.makefile("rwb") as receiving, other.makefile("rwb") as sending:
        thread = threading.Thread(target=workers._send, args=(sending, batch))
        thread.start()
        found = workers._receive(receiving)
        thread.join()
    return found, found.images.nbytes + found.labels.nbytes


class Clock(dict[str, float]):
    """The fastest milliseconds of CPU time of each step."""

    def __call__(self, step: str, function: Callable[..., Any], *args: Any) -> Any:
        start = time.process_time()
        found = function(*args)
        self[step] = min(1e3 * (time.process_time() - start), self.get(step, math.inf))
        return found


def measure(
    data: DataConfig, files: Dataset, cached: Dataset, draws: int, repeats: int
) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """Return the mean milliseconds per form and step, and the bytes that each hands over."""
    transform, sources = TrainTransform(data), {"files": files, "cache": cached}
    forms = {"former": (Former(data), "files"), "now": (Now(data), "files"), "with data.cache": (Now(data), "cache")}
    totals: dict[str, dict[str, float]] = {name: defaultdict(float) for name in forms}
    sizes: dict[str, int] = {}
    for seed in range(draws):
        read, clocks = {name: Clock() for name in sources}, {name: Clock() for name in forms}
        for _ in range(repeats):
            samples, found = {}, list[tuple[Tensor, Tensor]]()
            for name, dataset in sources.items():  # the first two forms share it
                pair = read[name]("read", dataset.pair, seed % len(dataset))
                samples[name] = read[name]("crop", transform.crop, *pair, RandomState(seed))
            for name, (form, source) in forms.items():
                batch = clocks[name]("prepare", form.prepare, [samples[source]])
                batch, sizes[name] = clocks[name]("hand over", handed_over, batch)
                found.append(clocks[name]("normalize", form.on_device, batch))
            for other in found[1:]:
                assert all(map(torch.equal, found[0], other)), f"draw {seed} differs"
        for name, (_, source) in forms.items():
            for step, value in {**read[source], **clocks[name]}.items():
                totals[name][step] += value / draws
    return totals, sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("pictures", 4), ("draws", 12), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    print(f"{environment()['machine']['cpu']}, 1 thread, torch {torch.__version__}", end=", ")
    print(f"numpy {np.__version__}, OpenCV {cv2.__version__}")
    print(f"{args.draws} draws of {args.pictures} pictures; mean per sample")
    with tempfile.TemporaryDirectory() as folder:
        data = DataConfig(
            "toy", Path(folder) / "toy", img_scale=(2048, 1024), crop=(512, 1024),
            ratio_range=(0.5, 2.0), cat_max_ratio=0.75, flip=0.5, photometric=True,
        )  # fmt: skip
        generate(data.root, train=args.pictures, val=1, height=1024, width=2048)
        files, cached = open_dataset(data, "train"), open_dataset(data, "train", Path(folder) / "cache")
        print(f"PNGs of {add_grain(files) / 1e6:.2f} MB\n")
        totals, sizes = measure(data, files, cached, args.draws, args.repeats)
    report(totals, sizes)


def add_grain(dataset: Dataset) -> float:
    """Give the drawn scenes noise, without which they are decoded faster than photographs; return the bytes of each."""
    for number, sample in enumerate(dataset.samples):
        image = cv2.imread(str(sample.image)).astype(np.int16)
        noise = RandomState(number).normal(0, 0.6, image.shape).round().astype(np.int16)
        cv2.imwrite(str(sample.image), (image + noise).clip(0, 255).astype(np.uint8))
    return float(np.mean([sample.image.stat().st_size for sample in dataset.samples]))


def report(totals: dict[str, dict[str, float]], sizes: dict[str, int]) -> None:
    """Print a row per step and form, the sums, and their ratios to the first."""
    print(f"{'ms':18}" + "".join(f"{name:>18}" for name in totals))
    for step in STEPS:
        print(f"{step:18}" + "".join(f"{steps[step]:18.2f}" for steps in totals.values()))
    sums = {name: sum(steps.values()) for name, steps in totals.items()}
    [first, *_] = sums
    print(f"{'sum':18}" + "".join(f"{value:18.2f}" for value in sums.values()))
    print(f"{'times as fast':18}" + "".join(f"{sums[first] / value:18.2f}" for value in sums.values()))
    print(f"{'MB handed over':18}" + "".join(f"{size / 1e6:18.2f}" for size in sizes.values()))
    print(f"{'times fewer bytes':18}" + "".join(f"{sizes[first] / size:18.2f}" for size in sizes.values()))


if __name__ == "__main__":
    main()
