"""Pairs of image and mask that a program makes, such as a torch.utils.data.Dataset, as a data set."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from segcore.data.dataset import Dataset, Sample, check_sizes
from segcore.data.images import DTYPES, label_values
from segcore.data.labels import distinct_colors, ignored_label, label_lut
from segcore.errors import UserError

_lock = threading.Lock()
"""Items are made by one thread at a time: what a user's data set reads from need not allow several."""
_TO_RGB = ("1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
"""Modes of PIL with 8 bits or fewer per channel: those beyond would lose theirs."""


class Pairs(Protocol):
    """Has a length, and items (image, mask) by index."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


def from_pairs(pairs: Pairs, classes: Sequence[str], palette: Sequence[Sequence[int]] | None = None) -> Dataset:
    """Return a data set of pairs (image, mask), such as a torch.utils.data.Dataset.

    Images are PIL images, arrays (H, W, C) or tensors (C, H, W) in the units of files: uint8 by default, see
    `data.bit_depth`. Masks are PIL images, arrays or tensors (H, W) or (1, H, W) of whole numbers: the class, 0 .. K-1,
    or 255 for ignored pixels (65535 above 255 classes). An index must always give the same pair, without random
    augmentation: that follows in training. `palette` has K colors (red, green, blue), by default distinct ones.
    """
    colors = distinct_colors(len(classes)) if palette is None else np.array(palette, np.uint8).reshape(-1, 3)
    ignored = ignored_label(len(classes))
    dataset = PairDataset(tuple(classes), colors, ignored, (), Path(), label_lut(len(classes)), pairs=pairs)
    return named(dataset, Path("samples"))


@dataclass(frozen=True, eq=False)
class PairDataset(Dataset):
    """The data set that `from_pairs` returns. The paths of its samples are only names for messages."""

    pairs: Any = None

    def image(self, index: int) -> np.ndarray:
        """Return (H, W, C) RGB, uint8, uint16 or float32 by bit depth. Raises UserError naming the sample."""
        return self._item(index)[0]

    def label(self, index: int) -> np.ndarray:
        """Return (H, W) train ids as of a file. Raises UserError naming the sample."""
        return self._item(index)[1]

    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return (image, label). Raises UserError naming the sample, also when they differ in height or width."""
        image, label = self._item(index)
        check_sizes(self.samples[index], image.shape[:2], label.shape)
        return image, label

    def not_cached(self, index: int) -> tuple[int, ...]:
        """Return nothing: there is no file to decode."""
        return ()

    def _item(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        name = self.samples[index].image
        try:
            with _lock:
                item = self.pairs[index]
            if not isinstance(item, (tuple, list)) or len(item) != 2:
                raise UserError(f"is {type(item).__name__}; give a pair (image, mask)")
            image = as_array(item[0], self.channels, self.bit_depth)
            mask = item[1].numpy() if hasattr(item[1], "numpy") else np.array(item[1])
        except Exception as error:  # whatever the user's data set raises
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            raise UserError(f"{name}: {kind}{' '.join(str(error).split())}") from None
        return image, self.train_ids(name, label_values(name, mask[0] if mask.shape[:1] == (1,) else mask))


def named(dataset: PairDataset, root: Path) -> PairDataset:
    """Return the data set with samples that are named by their indices below `root`."""
    paths = [root / str(index) for index in range(len(dataset.pairs))]
    return replace(dataset, samples=tuple(Sample(path, path) for path in paths), image_root=root)


def as_array(image: Any, channels: int, bit_depth: int) -> np.ndarray:
    """Return a PIL image, an array (H, W, C), (H, W) with one channel, or a tensor (C, H, W) as an array (H, W, C).

    The array is uint8, uint16 or float32 by `bit_depth`; gray and palettes become RGB where there are three channels.
    Raises UserError for other shapes and types.
    """
    if isinstance(image, Image.Image):
        image = image.convert("RGB") if channels == 3 and image.mode in _TO_RGB else image
    elif hasattr(image, "permute") and image.ndim == 3:
        image = image.permute(1, 2, 0).cpu().numpy()
    array = np.asarray(image)
    array = array[..., None] if array.ndim == 2 else array
    wanted = np.dtype(DTYPES[bit_depth])
    if array.ndim != 3 or array.shape[2] != channels or array.dtype != wanted or not array.size:
        raise UserError(
            f"an image of shape {np.shape(array)} and type {array.dtype}; give an array (H, W, {channels}) or "
            f"a tensor ({channels}, H, W), {wanted}, in the units of the files"
        )
    return np.ascontiguousarray(array)
