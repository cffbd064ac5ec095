"""What followed the network before: every entry, view and window as a whole map of probabilities, then the maximum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from segcore.data.transforms import normalize
from segcore.evaluation.predictor import Predictor
from segcore.models.stepwise import predict_entries


def classes_and_confidence(logits: Tensor, size: Sequence[int], align_corners: bool) -> tuple[Tensor, Tensor]:
    """Return the classes (H, W) int64 for logits (1, K, h, w), and their probabilities (H, W)."""
    full = F.interpolate(logits, size=list(size), mode="bilinear", align_corners=align_corners)
    return most_probable(full)


def most_probable(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the classes (H, W) int64 for logits (1, K, H, W) at the image's size, and their probabilities."""
    probabilities = logits.float().softmax(1)
    probabilities.div_(1)  # by the number of views, and of models
    probabilities.div_(1)
    confidence, classes = probabilities[0].max(0)
    return classes, confidence


class FormerPredictor(Predictor):
    """A predictor that reduces as before, for whole images in one view at their own size."""

    @torch.no_grad()
    def reduced(
        self, images: Sequence[np.ndarray], seeds: Sequence[int], reduce: Callable[..., Any], **_: Any
    ) -> list[dict[str, Any]]:
        """Return the classes (H, W) int64 per image and step entry, whatever `reduce` is."""
        batch = torch.from_numpy(np.stack([normalize(x, self.data.mean, self.data.std) for x in images]))
        batch = batch.permute(0, 3, 1, 2)
        layout = torch.channels_last if self.evaluate.channels_last else torch.contiguous_format
        found = predict_entries(self.model, batch.contiguous(memory_format=layout), self.evaluate.steps, list(seeds))
        return [{entry: most_probable(x[i : i + 1])[0] for entry, x in found.items()} for i in range(len(images))]
