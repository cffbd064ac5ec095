"""Which number per pixel tells a diffusion model's wrong pixels from its right ones: AUROC of several candidates.

    python benchmarks/uncertainty.py RUN [--images 50]

RUN is the folder of a finished `ddp-seg demo`. Everything is measured on its validation scenes, against the masks of
the configured run, at the image's own size. 0.5 is chance, 1 perfect.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddp_seg.configs.toy import ddp_resnet18_toy
from ddp_seg.model import DDP
from segcore.checkpoints import run_checkpoint as checkpoint
from segcore.data.layouts import open_dataset
from segcore.data.transforms import normalize
from segcore.evaluation.predictor import autocast
from segcore.evaluation.uncertainty import AUROC, STARTS
from segcore.models.layers import resize
from segcore.seeds import evaluation_seed, window_seed


def entropy(p: Tensor) -> Tensor:
    """Return the entropy over dimension -3 of probabilities (…, K, H, W) as a fraction of log K."""
    return -(p * p.clamp(min=1e-12).log()).sum(-3) / math.log(p.shape[-3])


def candidates(p: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return maps (H, W) in 0..1 from probabilities (R, T, K, H, W) of R starts and T steps, and the mask (H, W)."""
    r = p.shape[0]

    def another(p: Tensor) -> Tensor:
        return 1 - p.gather(0, mask[None])[0]

    late, flat = p[:, 1:].mean((0, 1)), p.flatten(0, 1)
    return {
        "last step, 1 start: 1 - p(mask)": another(p[0, -1]),
        f"last step, {r} starts: 1 - p(mask)": another(p[:, -1].mean(0)),
        "all steps but the first, 1 start: 1 - p(mask)": another(p[0, 1:].mean(0)),
        f"all steps but the first, {r} starts: 1 - p(mask)": another(late),
        f"all steps, {r} starts: 1 - p(mask)": another(flat.mean(0)),
        f"all steps but the first, {r} starts: entropy": entropy(late),
        f"all steps, {r} starts: mutual information": entropy(flat.mean(0)) - entropy(flat).mean(0),
        f"all steps, {r} starts: share of other votes": (flat.argmax(1) != mask).float().mean(0),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=int, default=50)
    options = parser.parse_args()
    exp = ddp_resnet18_toy()
    dataset = open_dataset(dataclasses.replace(exp.data, root=options.run / "scenes"), "val")
    model = exp.model.build().eval()
    assert isinstance(model, DDP)
    folder = checkpoint.newest(options.run / "run")
    assert folder is not None, "no checkpoint"
    model.load_checkpoint(checkpoint.read_model_state(folder))
    areas: dict[str, AUROC] = defaultdict(AUROC)
    for index in range(min(options.images, len(dataset))):
        image = torch.from_numpy(normalize(dataset.image(index), exp.data.mean, exp.data.std)).permute(2, 0, 1)[None]
        seeds = [window_seed(evaluation_seed(exp.seed, index), 0, 0)]
        with autocast(torch.device("cpu"), exp.train.precision):
            features = model.encode(image)
            starts = torch.cat([model.draw(features, seeds, run=run)[0] for run in range(STARTS)])
            run = model.denoising_steps(features, starts)
            steps = [resize(step.logits.float(), image.shape[-2:]).softmax(1) for step in run]
        p = torch.stack(steps, 1)
        mask, label = p[0, -1].argmax(0), torch.from_numpy(dataset.label(index).astype(np.int64))
        for name, score in candidates(p, mask).items():
            areas[name].update(score, mask, label)
    right, wrong = next(iter(areas.values())).counts.sum(1).tolist()
    print(f"{min(options.images, len(dataset))} scenes, {wrong / (right + wrong):.1%} of the pixels wrong")
    for name, area in areas.items():
        print(f"{area.compute():.3f}  {name}")


if __name__ == "__main__":
    main()
