"""The baseline that a segmentation model must beat: logistic regression on single pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from segcore.errors import UserError


@dataclass(frozen=True)
class LinearPixelClassifier:
    """Multinomial logistic regression on all terms up to degree two of a pixel's color and, optionally, position."""

    position: bool
    """Whether x and y are used in addition to the channels."""
    classes: np.ndarray
    """(C,) int64: the classes in the training labels."""
    weight: np.ndarray
    """(T, C) float64, one column per class."""
    bias: np.ndarray
    """(C,) float64."""

    def predict(self, image: np.ndarray) -> np.ndarray:
        """Return the most likely class (H, W) int64 of every pixel of an image (H, W, channels) uint8."""
        scores = _terms(image, self.position) @ self.weight + self.bias
        return self.classes[scores.argmax(1)].reshape(image.shape[:2])


def fit_linear(
    images: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    num_classes: int,
    ignore_index: int,
    *,
    position: bool,
    seed: int = 0,
    pixels: int = 40_000,
) -> LinearPixelClassifier:
    """Fit a pixel classifier by maximum likelihood, unweighted and to convergence.

    Args:
        images: (H, W, channels) uint8, of any sizes.
        labels: (H, W) integer classes 0 .. num_classes - 1 or `ignore_index`, one per image.
        position: also use x and y, as fractions of width and height.
        seed: determines the choice of pixels.
        pixels: total number drawn, equally from every image; more change the result little.

    Raises UserError when no pixel has a class.
    """
    rng = np.random.RandomState(seed)
    share = -(-pixels // len(images)) if images else 0
    chosen_terms, chosen_labels = [], []
    for image, label in zip(images, labels, strict=True):
        flat = label.reshape(-1)
        usable = np.flatnonzero((flat != ignore_index) & (flat >= 0) & (flat < num_classes))
        chosen = rng.choice(usable, min(share, usable.size), replace=False) if usable.size else usable
        chosen_terms.append(_terms(image, position)[chosen])
        chosen_labels.append(flat[chosen])
    if not sum(map(len, chosen_labels)):
        raise UserError(f"{len(images)} training images without a labeled pixel; the linear baseline needs one")
    classes, target = np.unique(np.concatenate(chosen_labels).astype(np.int64), return_inverse=True)
    weight, bias = _maximize_likelihood(np.concatenate(chosen_terms), target, len(classes))
    return LinearPixelClassifier(position, classes, weight, bias)


def _maximize_likelihood(terms: np.ndarray, target: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return weight (T, count) and bias (count,) that explain `target` (n,) from `terms` (n, T) best."""
    # Terms such as red, green and red * green are nearly collinear: decorrelated, they need far fewer steps.
    mean = terms.mean(0)
    variance, axes = np.linalg.eigh(np.cov(terms.T))
    whiten = axes / np.sqrt(np.maximum(variance, 1e-9 * variance.max() + 1e-12))
    x, y = torch.from_numpy((terms - mean) @ whiten), torch.from_numpy(target)
    parameters = torch.zeros(x.shape[1] + 1, count, dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=300, tolerance_change=1e-6, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(torch.addmm(parameters[-1], x, parameters[:-1]), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    solution = parameters.detach().numpy()
    weight = whiten @ solution[:-1]
    return weight, solution[-1] - mean @ weight


def _terms(image: np.ndarray, position: bool) -> np.ndarray:
    """Return all terms of degree one and two (H * W, T) float64 of the channels in 0..1, optionally with x, y."""
    height, width, channels = image.shape
    base = list(image.reshape(-1, channels).T.astype(np.float64) / 255)
    if position:
        x, y = np.linspace(0, 1, width), np.linspace(0, 1, height)
        base += [np.tile(x, height), np.repeat(y, width)]
    products = [a * b for i, a in enumerate(base) for b in base[i:]]
    return np.stack(base + products, 1)
