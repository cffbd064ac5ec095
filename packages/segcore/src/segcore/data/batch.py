"""The input of one forward pass of training: handed over as the files have it, normalized on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class Batch:
    """One forward pass of training.

    Attributes:
        images: (n, C, H, W) in the units of the files, uint8, uint16 or float32.
        labels: (n, H, W) train ids in any type of whole numbers.
        seeds: one integer per image, for the model's noise; augmentation has its own seed.
        iteration: the optimizer step that the batch belongs to.
        skipped: one error message per sample that was replaced by another one.
        sizes: (height, width) of each image; what is below and to the right is padding. Empty: none is padded.
    """

    images: Tensor
    labels: Tensor
    seeds: list[int]
    iteration: int
    skipped: tuple[str, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(
        cls,
        samples: Sequence[tuple[np.ndarray, np.ndarray]],
        size: tuple[int, int],
        ignore_index: int,
        seeds: list[int],
        iteration: int,
        skipped: tuple[str, ...] = (),
    ) -> Batch:
        """Return images (h, w, C) and labels (h, w), padded to `size`, in types that hold those of all samples."""
        image_type = np.result_type(*(image.dtype for image, _ in samples))
        label_type = np.result_type(*(label.dtype for _, label in samples), np.min_scalar_type(ignore_index))
        images = np.zeros((len(samples), samples[0][0].shape[2], *size), image_type)
        labels = np.full((len(samples), *size), ignore_index, label_type)
        for n, (image, label) in enumerate(samples):
            height, width = label.shape
            images[n, :, :height, :width] = image.transpose(2, 0, 1)
            labels[n, :height, :width] = label
        sizes = tuple(label.shape for _, label in samples)
        return cls(torch.from_numpy(images), torch.from_numpy(labels), seeds, iteration, skipped, sizes)

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory; `read_ahead` calls this."""
        return dataclasses.replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())

    def on(
        self,
        device: torch.device | str,
        mean: Sequence[float],
        std: Sequence[float],
        layout: torch.memory_format = torch.contiguous_format,
    ) -> tuple[Tensor, Tensor]:
        """Return images (n, C, H, W) float32, normalized and then padded with 0, and labels int64, on a device.

        The host does not wait. The numbers are those of `transforms.normalize`: both round once after the subtraction
        and once after the division, as IEEE 754 says.
        """
        center, width = (
            torch.tensor(values, dtype=torch.float32)[:, None, None].to(device, non_blocking=True)
            for values in (mean, std)
        )
        images = (self.images.to(device, non_blocking=True).float() - center).div_(width)
        for image, (rows, columns) in zip(images, self.sizes, strict=False):
            image[:, rows:] = 0
            image[:, :, columns:] = 0
        return images.contiguous(memory_format=layout), self.labels.to(device, non_blocking=True).long()
