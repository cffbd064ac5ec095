"""Compare the mask prior with its base model, for `ddps-seg demo`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor

from ddps_seg.model import DDPS
from segcore.checkpoints.load import find_weights, load_weights
from segcore.config.schema import Experiment
from segcore.data.layouts import open_dataset
from segcore.evaluation.metrics import ConfusionMatrix
from segcore.evaluation.predictor import Network, Predictor
from segcore.progress import progress
from segcore.seeds import corruption_seed, evaluation_seed, start_seed

SEEDS = 3
IMAGES = 10
"""Number of validation images to use, from the first; each takes 1 + SEEDS runs of the prior."""
BLOCKS = 12
"""Rectangles of random classes in a corrupted map, each up to a quarter of its height and width."""


def compare(
    predictor: Predictor, exp: Experiment, base: Experiment, base_dir: Path
) -> tuple[dict[str, Any], list[str]]:
    """Return figures and sentences on the validation set: the base model, the prior, and the prior on corrupted maps.

    A corrupted map is the base model's prediction with rectangles of random classes. The prior refines it: its run
    starts from the corrupted map instead of a random one. Figures for corrupted maps are means over SEEDS seeds.
    """
    prior, base_model = predictor.using(steps=()), base_predictor(predictor, base, base_dir)
    model = cast(DDPS, predictor.model)
    dataset = open_dataset(exp.data, "val")
    total = min(IMAGES, len(dataset))
    names = "base", "prior", *(f"{kind} {seed}" for seed in range(SEEDS) for kind in ("corrupted", "refined"))
    matrices = {name: ConfusionMatrix(model.num_classes, model.ignore_index) for name in names}
    changed = []
    with progress("comparing the prior with its base model") as advance:
        for index in range(total):
            image, label, own = dataset.image(index), dataset.label(index), evaluation_seed(exp.seed, index)
            found = {"base": last_classes(base_model, image, own) + 1, "prior": last_classes(prior, image, own)}
            for seed in range(SEEDS):
                start = corrupt(found["base"], model.num_classes, corruption_seed(seed, index))
                refine = refinement_of(model, start)
                found |= {
                    f"corrupted {seed}": start,
                    f"refined {seed}": last_classes(prior, image, start_seed(own, seed), refine),
                }
            for name, classes in found.items():
                matrices[name].update(classes, label)
            changed.append((found["base"] != found["prior"]).float().mean().item())
            advance(index + 1, total)
    miou = {name: float(matrix.compute()["mIoU"]) for name, matrix in matrices.items()}
    figures = {"base_mIoU": miou["base"], "prior_mIoU": miou["prior"], "changed": float(np.mean(changed))}
    figures |= {kind: float(np.mean([miou[f"{kind} {s}"] for s in range(SEEDS)])) for kind in ("corrupted", "refined")}
    return figures, [
        f"On {total} images the base model alone has mIoU {figures['base_mIoU']:.1%}, the prior "
        f"{figures['prior_mIoU']:.1%}; it changes {figures['changed']:.1%} of the pixels",
        f"The base model's maps with {BLOCKS} rectangles of random classes have mIoU {figures['corrupted']:.1%}; the "
        f"prior refines them to {figures['refined']:.1%} (mean over {SEEDS} seeds)",
    ]


def base_predictor(predictor: Predictor, base: Experiment, base_dir: Path) -> Predictor:
    """Return a predictor like the prior's for the base model, whose classes lack the leading background."""
    model = base.model.build().eval()
    load_weights(model, find_weights(str(base_dir), base.name))
    data = dataclasses.replace(predictor.data, add_background_class=False)
    return dataclasses.replace(predictor.using(steps=()), model=model.to(predictor.device), data=data)


def last_classes(predictor: Predictor, image: np.ndarray, seed: int, network: Network | None = None) -> Tensor:
    """Return the classes (H, W) int64 of the last step, on the CPU."""
    [steps] = predictor.classes([image], [seed], network=network)
    return list(steps.values())[-1].cpu()


def refinement_of(model: DDPS, start: Tensor) -> Network:
    """Return a network whose run starts from the label map `start` (H, W)."""
    return lambda images, seeds: model.refined_answers(images, start[None], seeds)


def corrupt(classes: Tensor, num_classes: int, seed: int) -> Tensor:
    """Return a label map (H, W) with rectangles of random classes, never the background."""
    rng, (height, width) = np.random.RandomState(seed), classes.shape
    result = classes.clone()
    for _ in range(BLOCKS):
        h, w = rng.randint(1, height // 4 + 1), rng.randint(1, width // 4 + 1)
        y, x = rng.randint(height - h + 1), rng.randint(width - w + 1)
        result[y : y + h, x : x + w] = rng.randint(1, num_classes)
    return result
