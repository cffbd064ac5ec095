"""`data.augment`: a function of the user, called on every training sample after the published steps."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.random import RandomState

from segcore.config.schema import DataConfig
from segcore.config.user_code import load_function
from segcore.data.labels import ranges
from segcore.errors import UserError


class Augmentation:
    """Calls the function and checks what it returns. In another process it imports the user's file again."""

    def __init__(self, data: DataConfig, ignore_index: int, num_classes: int | None) -> None:
        assert data.augment is not None
        self.arguments = data, ignore_index, num_classes
        self.name, self.crop = f"data.augment {data.augment}", data.crop
        self.function = load_function("data.augment", data.augment)

    def __reduce__(self) -> Any:
        return Augmentation, self.arguments

    def __call__(self, image: np.ndarray, label: np.ndarray, rng: RandomState) -> tuple[np.ndarray, np.ndarray]:
        """Return another image (h, w, C) and label (h, w) of the same types, in which h x w is at most the crop.

        Raises UserError naming the function when it fails or returns anything else.
        """
        found = self.function(image.copy(), label.copy(), rng)  # it may change them in place
        if not (isinstance(found, tuple) and [type(part) for part in found] == [np.ndarray] * 2):
            kinds = [type(part).__name__ for part in found] if isinstance(found, tuple) else type(found).__name__
            raise UserError(f"{self.name}: returned {kinds}; return two numpy arrays, the image and the mask")
        image, mask, like = *found, image
        (height, width), channels = self.crop, like.shape[2]
        fits = image.ndim == 3 and image.shape[2] == channels and image.dtype == like.dtype
        if not fits or mask.shape != image.shape[:2] or mask.dtype.kind not in "iu" or not mask.size:
            raise UserError(
                f"{self.name}: returned an image {image.shape} of {image.dtype} and a mask {mask.shape} of "
                f"{mask.dtype}; return an image (H, W, {channels}) of {like.dtype} and a mask (H, W) of whole numbers"
            )
        if mask.shape[0] > height or mask.shape[1] > width:
            raise UserError(
                f"{self.name}: returned {mask.shape[0]}x{mask.shape[1]} pixels (height x width); "
                f"return at most data.crop, {height}x{width}"
            )
        self._check_values(mask)
        return np.ascontiguousarray(image), np.ascontiguousarray(mask, label.dtype)

    def _check_values(self, mask: np.ndarray) -> None:
        _, ignored, count = self.arguments
        if count is None:
            return
        wrong = mask[((mask < 0) | (mask >= count)) & (mask != ignored)]
        if wrong.size:
            raise UserError(
                f"{self.name}: returned the mask values {ranges(np.unique(wrong))}, which are neither a class, "
                f"0-{count - 1}, nor the ignored {ignored}; resample masks to the nearest pixel"
            )
