"""Counting a prediction against its label, 1024 x 2048 pixels: ConfusionMatrix.update against three histograms, and
BoundaryIoU.update against one erosion per class and map.

    python benchmarks/metrics.py [--height 1024] [--width 2048] [--classes 19] [--repeats 15]

One CPU thread; the forms take turns in one process, the fastest run of each counts, and that they count the same is
asserted. Predictions are int64, as argmax returns them, or uint8; labels are uint8, as they are read.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import cv2
import numpy as np
import torch
from torch import Tensor

from segcore.environment import environment
from segcore.evaluation.metrics import BoundaryIoU, ConfusionMatrix


def histc_form(prediction: Tensor, label: Tensor, classes: int, ignore_index: int = 255) -> list[Tensor]:
    """Return the areas (K,) of the intersection, the prediction and the label: the yardstick, which stays as it is."""
    kept = label != ignore_index
    prediction, label = prediction[kept], label[kept]
    parts = prediction[prediction == label], prediction, label
    return [torch.histc(part.float(), bins=classes, min=0, max=classes - 1) for part in parts]


def areas(matrix: ConfusionMatrix) -> list[Tensor]:
    """Return the same areas from the counts of pairs."""
    counts = matrix.matrix
    return [counts.diagonal()[:-1], counts.sum(0)[:-1], counts.sum(1)[:-1]]


def erosion_form(prediction: np.ndarray, label: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return intersection and union (K,) of the boundaries, class by class: the yardstick, which stays as it is."""
    band = round(0.02 * (label.shape[0] ** 2 + label.shape[1] ** 2) ** 0.5)
    window, counts = np.ones((3, 3), np.uint8), np.zeros((2, classes), np.int64)
    for k in range(classes):
        edges = []
        for x in (label, prediction):
            mask = (x == k).astype(np.uint8)
            ringed = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
            edges.append((mask - cv2.erode(ringed, window, iterations=band)[1:-1, 1:-1]).astype(bool))
        counts[:, k] = (edges[0] & edges[1]).sum(), (edges[0] | edges[1]).sum()
    return counts[0], counts[1]


def maps(height: int, width: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return prediction and label (H, W) uint8 of regions some 30 pixels wide, about 3 of 4 alike, a tenth ignored."""
    rng = np.random.RandomState(0)
    grid = max(height // 32, 1), max(width // 32, 1)

    def spread(values: np.ndarray) -> np.ndarray:
        return cv2.resize(values.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)

    truth, other = (spread(rng.randint(0, classes, grid)) for _ in range(2))
    wrong, ignored = (spread(rng.rand(*grid) < share) for share in (0.25, 0.1))
    return np.where(wrong, other, truth), np.where(ignored, 255, truth).astype(np.uint8)


def fastest(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the least seconds of each function; they run in turns."""
    least = dict.fromkeys(functions, float("inf"))
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            least[name] = min(least[name], time.perf_counter() - start)
    return least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("height", 1024), ("width", 2048), ("classes", 19), ("repeats", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    small, label = maps(args.height, args.width, args.classes)
    prediction, labels = torch.from_numpy(small).long(), torch.from_numpy(label)
    expected = histc_form(prediction, labels, args.classes)
    for form in (prediction, small):
        for ours, theirs in zip(areas(ConfusionMatrix(args.classes).update(form, label)), expected, strict=True):
            assert torch.equal(ours, theirs.long())
    matrix = ConfusionMatrix(args.classes)
    seconds = fastest(
        {
            "three histc": lambda: histc_form(prediction, labels, args.classes),
            "ConfusionMatrix, int64 prediction": lambda: matrix.update(prediction, label),
            "ConfusionMatrix, uint8 prediction": lambda: matrix.update(small, label),
        },
        args.repeats,
    )
    band = BoundaryIoU(args.classes).update(small, label)
    for ours, theirs in zip(band.counts, erosion_form(small, label, args.classes), strict=True):
        assert torch.equal(ours, torch.from_numpy(theirs))
    boundary = fastest(
        {
            "one erosion per class and map": lambda: erosion_form(small, label, args.classes),
            "BoundaryIoU": lambda: band.update(small, label),
        },
        args.repeats,
    )
    print(f"{environment()['machine']['cpu']}, 1 thread, torch {torch.__version__}", end=", ")
    print(f"numpy {np.__version__}, OpenCV {cv2.__version__}")
    print(f"{args.height}x{args.width} pixels, {args.classes} classes, best of {args.repeats} turns\n")
    for name, taken in seconds.items():
        print(f"{name:34} {1e3 * taken:8.2f} ms   {seconds['three histc'] / taken:6.1f} times as fast")
    print()
    for name, taken in boundary.items():
        ratio = boundary["one erosion per class and map"] / taken
        print(f"{name:34} {1e3 * taken:8.2f} ms   {ratio:6.1f} times as fast")


if __name__ == "__main__":
    main()
