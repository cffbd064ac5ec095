"""What the mask prior does to the base model's maps, measured for `ddps-seg demo`."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ddps_seg.model import DDPSSegmentor
from segcore.checkpoints.load import load_weights, resolve
from segcore.config.schema import DataConfig, Experiment
from segcore.data.layouts import open_dataset
from segcore.evaluation.metrics import ConfusionMatrix
from segcore.evaluation.predictor import predict_classes
from segcore.models.segmentor import Segmentor
from segcore.progress import progress
from segcore.seeds import corruption_seed, evaluation_seed, start_seed

SEEDS = 3
IMAGES = 10
"""Of the validation set, the first ones: six runs of each are measured."""
BLOCKS = 12
"""Rectangles that a corrupted map gets, each up to a quarter of its sides, of a random class."""


def measure(
    model: DDPSSegmentor, exp: Experiment, base: Experiment, base_dir: Path
) -> tuple[dict[str, Any], list[str]]:
    """Return figures and sentences on the validation set: the base model, the prior, and the prior on spoilt maps.

    `model` is on its device and in evaluation mode. Spoilt maps are the base model's with rectangles of random classes,
    and the prior's run starts from one instead of from a random map; means over three seeds.
    """
    device = next(model.parameters()).device
    first = base.model.build().eval()
    load_weights(first, resolve(str(base_dir), base.name))
    first.to(device)
    data = dataclasses.replace(exp.data, add_background_class=False)
    dataset = open_dataset(exp.data, "val")
    total = min(IMAGES, len(dataset))
    count = model.num_classes
    settings = dataclasses.replace(exp.evaluate, steps=())
    options: dict[str, Any] = {"device": device, "precision": exp.train.precision}
    names = "base", "prior", *(f"{kind} {seed}" for seed in range(SEEDS) for kind in ("spoilt", "mended"))
    matrices = {name: ConfusionMatrix(count, model.ignore_index) for name in names}
    changed = []
    with progress("holding the prior against its base model") as advance:
        for index in range(total):
            image, label = dataset.image(index), dataset.label(index)

            def answer(
                network: Segmentor, of: DataConfig, seed: int, start: Tensor | None = None, image: np.ndarray = image
            ) -> Tensor:
                run = None if start is None else partial(_from, model, start)
                [entries] = predict_classes(network, [image], settings, of, [seed], network=run, **options)
                return list(entries.values())[-1].cpu()

            own = evaluation_seed(exp.seed, index)
            basic = answer(first, data, own) + 1  # background comes first
            found = {"base": basic, "prior": answer(model, exp.data, own)}
            for seed in range(SEEDS):
                found[f"spoilt {seed}"] = start = spoil(basic, count, corruption_seed(seed, index))
                found[f"mended {seed}"] = answer(model, exp.data, start_seed(own, seed), start)
            for name, classes in found.items():
                matrices[name].update(classes, label)
            changed.append((basic != found["prior"]).float().mean().item())
            advance(index + 1, total)
    miou = {name: float(matrix.compute()["mIoU"]) for name, matrix in matrices.items()}
    figures = {"base_mIoU": miou["base"], "prior_mIoU": miou["prior"], "changed": float(np.mean(changed))}
    figures |= {kind: float(np.mean([miou[f"{kind} {s}"] for s in range(SEEDS)])) for kind in ("spoilt", "mended")}
    return figures, [
        f"On {total} images the base model alone has mIoU {figures['base_mIoU']:.1%}, the prior "
        f"{figures['prior_mIoU']:.1%}; it changes {figures['changed']:.1%} of the pixels",
        f"Started from the base model's maps with {BLOCKS} rectangles of random classes, mIoU {figures['spoilt']:.1%}, "
        f"the prior's last step has {figures['mended']:.1%} (mean over {SEEDS} seeds)",
    ]


def _from(model: DDPSSegmentor, start: Tensor, images: Tensor, seeds: list[int]) -> dict[str, Tensor]:
    return model.refine_mask(images, start[None], seeds)


def spoil(classes: Tensor, num_classes: int, seed: int) -> Tensor:
    """Return a label map (H, W) with rectangles of random classes, background left out."""
    rng, (height, width) = np.random.RandomState(seed), classes.shape
    result = classes.clone()
    for _ in range(BLOCKS):
        h, w = rng.randint(1, height // 4 + 1), rng.randint(1, width // 4 + 1)
        y, x = rng.randint(height - h + 1), rng.randint(width - w + 1)
        result[y : y + h, x : x + w] = rng.randint(1, num_classes)
    return result
