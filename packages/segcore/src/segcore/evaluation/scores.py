"""One entry of a prediction, from the network's own resolution to classes, confidence or probabilities.

Softmax follows the resize to the image's own size, as published, but cannot change which class wins: classes are taken
from the logits, and probabilities of all classes are computed only where they are averaged or asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from segcore.errors import UserError
from segcore.models.layers import resize
from segcore.models.segmentor import Segmentor
from segcore.ops.resize_argmax import resize_argmax, strips


@dataclass(frozen=True, eq=False)
class Scores:
    """What a model says about N images of one size.

    `values` (N, K, h, w) are logits. Resized to `full`, of which the first rows and columns are those of `size`, they
    belong to the images' pixels, or with `flip` to those of their mirror images. With `averaged` they are probabilities
    at `size`. With `refusal` they are classes (N, 1, H, W) at `size`, and what needs probabilities raises that error.
    With `others`, of the same images, the mean of all probabilities counts.
    """

    values: Tensor
    full: tuple[int, int]
    size: tuple[int, int]
    align_corners: bool = False
    flip: bool = False
    averaged: bool = False
    refusal: UserError | None = None
    others: tuple[Scores, ...] = ()

    @classmethod
    def of_view(
        cls, model: Segmentor, logits: Tensor, view: tuple[int, int], size: tuple[int, int], flip: bool
    ) -> Scores:
        """Return the scores for logits (N, K, h, w) of a view (height, width), at the network's own resolution.

        They are resized to the view and then to the images' size; where the two are the same, once.
        """
        logits = logits.float()
        if view != size:
            return cls(model.resize_to_input(logits, view), size, size, model.align_corners, flip)
        height, width = model.padded_size(size)
        return cls(model.shown(logits), (height, width), size, model.align_corners, flip)

    def strips(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield probabilities (N, K, rows, W) float32 of some of the images' rows at a time."""
        if self.refusal:
            raise self.refusal
        values = (1 << 19 if self.values.device.type == "cpu" else 1 << 26) // self.values.shape[1]
        each = (scores._own_strips(values) for scores in (self, *self.others))
        for (rows, x), *more in zip(*each, strict=True):
            yield rows, sum((y for _, y in more), start=x) / (1 + len(more)) if more else x

    def _own_strips(self, values: int) -> Iterator[tuple[slice, Tensor]]:
        for strip in strips(self.values, self.full, self.size, self.align_corners, values):
            x = strip.of(slice(None))
            if not self.averaged:
                x = x.sigmoid() if x.shape[1] == 1 else x.softmax(1)
            yield strip.rows, x.flip(-1) if self.flip else x

    def probabilities(self) -> Tensor:
        """Return probabilities (N, K, H, W) float32."""
        if self.averaged:
            return self.values
        found = self.values.new_empty(*self.values.shape[:2], *self.size)
        for rows, part in self.strips():
            found[:, :, rows] = part
        return found

    def added_to(self, total: Tensor | None) -> Tensor:
        """Return probabilities (N, K, H, W) added to `total` in place, of which a class 0 may be missing here."""
        if total is None:
            return self.probabilities()
        missing = total.shape[1] - self.values.shape[1]
        for rows, part in self.strips():
            total[:, missing:, rows] += part
        return total

    def classes(self) -> Tensor:
        """Return the most probable classes (N, H, W), uint8 up to 256 classes and int32 above."""
        if self.refusal:
            return self.values[:, 0]
        if self.others:
            return torch.cat([averaged(x).classes() for _, x in self.strips()], 1)
        if self.averaged and self.values.shape[1] == 1:
            return (self.values[:, 0] > 0.5).to(torch.uint8)
        return self._argmax(confidence=False)[0]

    def classes_and_confidence(self) -> tuple[Tensor, Tensor]:
        """Return the classes as `classes` does and their probabilities (N, H, W) float32."""
        if self.refusal:
            raise self.refusal
        if self.others:
            parts = [averaged(x).classes_and_confidence() for _, x in self.strips()]
            classes, confidence = (torch.cat(x, 1) for x in zip(*parts, strict=True))
            return classes, confidence
        if not self.averaged:
            return self._argmax(confidence=True)
        top = self.values.amax(1)
        return self.classes(), torch.maximum(top, 1 - top) if self.values.shape[1] == 1 else top

    def _argmax(self, confidence: bool) -> tuple[Tensor, Tensor]:
        found = resize_argmax(
            self.values, self.full, crop=self.size, align_corners=self.align_corners, confidence=confidence
        )
        return (found[0].flip(-1), found[1].flip(-1)) if self.flip else found


def to_probabilities(logits: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Return class probabilities float32 at `size`; the softmax comes after the resize, as published."""
    logits = resize(logits.float(), size, align_corners=align_corners)
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


def averaged(probabilities: Tensor) -> Scores:
    """Return the scores for probabilities (N, K, H, W)."""
    size = (probabilities.shape[2], probabilities.shape[3])
    return Scores(probabilities, size, size, averaged=True)


def most_probable(probabilities: Tensor) -> Tensor:
    """Return the classes (H, W) int64 of probabilities (K, H, W); of equal ones the first."""
    return averaged(probabilities[None]).classes()[0].long()
