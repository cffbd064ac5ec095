"""Sliding-window inference on images that do not fit in memory: windows in, blocks of probabilities out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from segcore.data.rasters import Box
from segcore.data.transforms import normalize
from segcore.errors import UserError
from segcore.evaluation.predictor import Network, Predictor, at_input, window_boxes
from segcore.evaluation.scores import to_probabilities
from segcore.models.stepwise import average_entries
from segcore.seeds import window_seed

SUMS = 1 << 30
"""Bytes that the sums of logits take at most, unless a window is that large: the memory of any image."""
COLUMNS = 1024
"""Width of a block at most."""


def predict_blocks(
    predictor: Predictor,
    size: tuple[int, int],
    read: Callable[[Box], np.ndarray],
    seed: int,
    *,
    network: Network | None = None,
    sums: int = SUMS,
) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    """Yield (y, x, probabilities (K, h, w) by step entry) of blocks that together cover an image of `size` once.

    `read` returns the window (y1, x1, y2, x2) of the image as (h, w, C). The result is `Predictor.probabilities` with
    `evaluate.mode` slide: the same windows, seeds, and means of logits. Only the rows of the windows that are open are
    kept; where these would take more than `sums` bytes, the image is divided into strips, and windows that lie in two
    strips are computed twice. The image keeps its size: `evaluate.img_scale` does not count. Raises UserError for
    several views.
    """
    settings = predictor.evaluate
    if settings.img_ratios != (1.0,) or settings.flip:
        raise UserError("windows are predicted in one view; set --evaluate.img-ratios 1 and --evaluate.flip False")
    (height, width), crop = size, settings.crop
    boxes = list(enumerate(window_boxes(height, width, crop, settings.stride)))
    values = sum(model.num_classes for model in (predictor.model, *predictor.ensemble)) * (len(settings.steps) + 1)
    wanted = math.ceil(4 * values * min(crop[0], height) * width / sums)
    strips = max(min(wanted, width // crop[1]), 1)
    edges = np.linspace(0, width, strips + 1).astype(int).tolist()
    networks = [at_input(model, net) for net, model in predictor.networks(network)]
    for left, right in pairwise(edges):
        inside = [(number, box) for number, box in boxes if box[1] < right and box[3] > left]
        yield from _strip(predictor, networks, inside, (left, right), read, seed)


@torch.no_grad()
def _strip(
    predictor: Predictor,
    networks: Sequence[Network],
    boxes: Sequence[tuple[int, Box]],
    columns: tuple[int, int],
    read: Callable[[Box], np.ndarray],
    seed: int,
) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    """Yield the blocks of a strip of columns, from the numbered windows that touch it."""
    left, right = columns
    rows = defaultdict[int, list[tuple[int, Box]]](list)
    for number, box in boxes:
        rows[box[0]].append((number, box))
    height = boxes[-1][1][2]
    down, across = torch.zeros(height), torch.zeros(right)  # windows per row and column
    for y1, y2 in {(box[0], box[2]) for _, box in boxes}:
        down[y1:y2] += 1
    for x1, x2 in {(box[1], box[3]) for _, box in boxes}:
        across[x1:x2] += 1
    totals: list[dict[str, Tensor]] = [{} for _ in networks]
    for (top, row), below in zip(rows.items(), [*list(rows)[1:], height], strict=True):
        for number, box in row:
            image = normalize(read(box), predictor.data.mean, predictor.data.std)
            batch = torch.from_numpy(image).permute(2, 0, 1)[None]
            x1, x2 = max(box[1], left), min(box[3], right)
            for network, total in zip(networks, totals, strict=True):
                for entry, logits in network(batch, [window_seed(seed, 0, number)]):
                    if entry not in total:
                        shape = *logits.shape[:3], right - left
                        total[entry] = logits.new_zeros(shape, dtype=torch.float32)
                    total[entry][..., x1 - left : x2 - left] += logits[..., x1 - box[1] : x2 - box[1]]
        done = below - top  # no window further down has these rows
        for x in range(left, right, COLUMNS):
            part = (..., slice(done), slice(x - left, min(x + COLUMNS, right) - left))
            count = down[top:below, None] * across[x : min(x + COLUMNS, right)]
            means = ({entry: total[part] / count.to(total.device) for entry, total in t.items()} for t in totals)
            yield top, x, _probabilities(predictor, means)
            for sums in (total[..., part[2]] for t in totals for total in t.values()):
                sums[..., :-done, :] = sums[..., done:, :].clone()
                sums[..., -done:, :] = 0


def _probabilities(predictor: Predictor, logits: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the probabilities (K, h, w) by step entry for the logits (1, K, h, w) of each model."""
    models = (predictor.model, *predictor.ensemble)
    probabilities = (
        {entry: to_probabilities(x, (x.shape[2], x.shape[3]), model.align_corners) for entry, x in by_entry.items()}
        for by_entry, model in zip(logits, models, strict=True)
    )
    return {entry: mean[0] for entry, mean in _mean_over_models(predictor, probabilities).items()}


def _mean_over_models(predictor: Predictor, found: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return, per step entry, the mean of the probabilities (1, K, …) of the model and those of the ensemble's.

    Changes the first ones in place.
    """
    rest = iter(found)
    mean = next(rest)
    for other in rest:
        theirs = other["final"]
        missing = predictor.model.num_classes - theirs.shape[1]  # one without background class has none for class 0
        for probabilities in mean.values():
            probabilities[:, missing:] += theirs
    if predictor.evaluate.ensemble_steps:
        average_entries(mean)
    if predictor.ensemble:
        for probabilities in mean.values():
            probabilities.div_(1 + len(predictor.ensemble))
    return mean
