"""`data.also`: further training sets, whose classes count where the first set has one of the same name."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from segcore.data.dataset import Dataset
from segcore.data.labels import FORBIDDEN


@dataclass(frozen=True, eq=False)
class JoinedDataset(Dataset):
    """Several data sets, one after the other; `samples` are those of all, the other attributes those of the first."""

    parts: tuple[Dataset, ...] = ()

    def name(self, index: int) -> str:
        """Return the name that the part gives the sample."""
        part, index = self._part(index)
        return part.name(index)

    def image(self, index: int) -> np.ndarray:
        """Return the image as `Dataset.image` does."""
        part, index = self._part(index)
        return part.image(index)

    def label(self, index: int) -> np.ndarray:
        """Return the train ids of the first set as `Dataset.label` does."""
        part, index = self._part(index)
        return part.label(index)

    def not_cached(self, index: int) -> tuple[int, ...]:
        """Return what the cache lacks as `Dataset.not_cached` does."""
        part, index = self._part(index)
        return part.not_cached(index)

    def _part(self, index: int) -> tuple[Dataset, int]:
        for part in self.parts[:-1]:
            if index < len(part):
                return part, index
            index -= len(part)
        return self.parts[-1], index


def join(first: Dataset, others: list[Dataset]) -> JoinedDataset:
    """Return the data sets as one with the classes of the first; pixels of classes that it has not are ignored."""
    parts = (first, *(with_classes_of(first, other) for other in others))
    fields = {name: getattr(first, name) for name in Dataset.__dataclass_fields__}
    fields |= {"samples": tuple(sample for part in parts for sample in part.samples)}
    for name in ("missing", "unmatched_labels"):
        fields[name] = tuple(entry for part in parts for entry in getattr(part, name))
    return JoinedDataset(**fields, parts=parts)


def with_classes_of(first: Dataset, other: Dataset) -> Dataset:
    """Return the data set `other` with the classes of `first`, by their names."""
    table = np.full(other.table.shape, FORBIDDEN, np.uint16)
    table[other.table != FORBIDDEN] = first.ignore_index
    for index, name in enumerate(other.classes):
        if name in first.classes and index != other.ignore_index:
            table[other.table == index] = first.classes.index(name)
    return replace(other, classes=first.classes, palette=first.palette, ignore_index=first.ignore_index, table=table)
