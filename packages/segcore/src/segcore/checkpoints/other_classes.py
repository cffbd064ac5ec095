"""Start weights from a model of other classes: what belongs to a class is taken over for the class of the same name.

Which tensors these are follows from the model itself: their shapes change with `num_classes`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from segcore.config.record import from_plain, record_of
from segcore.config.registry import experiments
from segcore.config.schema import DataConfig, ModelConfig
from segcore.data.layouts import palette_of
from segcore.errors import UserError
from segcore.files import read_json
from segcore.models.segmentor import LoadReport, Segmentor

Load = Callable[[Segmentor], LoadReport]
"""Loads the checkpoint, strictly, into a model."""


def trained_classes(init: str, path: Path, name: str) -> tuple[str, ...] | None:
    """Return the class names of the weights that `init` names, found at `path`; None if nothing states them.

    They are those of the published row (`official:ROW`, or `official` for row `name`), or of the run that a checkpoint
    folder belongs to.
    """
    official, _, row = init.partition(":")
    try:
        if official == "official":
            build = experiments().get((row or name).replace("-", "_"))
            return palette_of(build().data)[0] if build else None
        record = read_json(record_of(path))
        return palette_of(from_plain(DataConfig, record["experiment"]["data"], "data"))[0] or None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def fitting_count(config: ModelConfig, state: Mapping[str, Tensor], load: Load) -> int | None:
    """Return the number of classes with which the model of `config` takes a checkpoint; None if there is none.

    Every length of a one-dimensional tensor, such as a classifier's bias, may be that number; rare ones come first.
    """
    lengths = Counter(len(tensor) for tensor in state.values() if tensor.ndim == 1)
    for count in sorted(lengths, key=lambda length: (lengths[length], length)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # nothing is copied to the meta device
                load(_skeleton(config, count))
        except UserError:
            continue
        return count
    return None


def load_other_classes(
    model: Segmentor, config: ModelConfig, load: Load, before: Sequence[str], after: Sequence[str]
) -> str:
    """Load a checkpoint of a model with the classes `before` into `model`, which has the classes `after`; report it.

    Names are compared without regard to case, `_` and `-`; an empty name is unknown. What belongs to no class of
    `before` stays as it is. Raises UserError unless the checkpoint fits a model of `config` with as many classes as
    `before` has, and for a tensor with a row and a column per class.
    """
    source = dataclasses.replace(config, num_classes=len(before)).build()
    built = {name: buffer.clone() for name, buffer in source.named_buffers()}
    report = load(source)
    known = {_key(name): row for row, name in reversed([*enumerate(before)]) if name}
    rows = [known.get(_key(name)) for name in after]
    kept = [name for name, row in zip(after, rows, strict=True) if row is not None]
    new = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wider = _skeleton(config, len(after) + 1).state_dict()
    for name, theirs in source.state_dict().items():
        own = new[name]
        axes = [axis for axis, (a, b) in enumerate(zip(own.shape, wider[name].shape, strict=True)) if a != b]
        if not axes:
            # A table that follows from the number of classes, such as DDPS's noise schedule, is that of the new number.
            if name not in built or torch.equal(built[name].to(own), own):
                own.copy_(theirs)
            continue
        if len(axes) > 1:
            raise UserError(f"{name} has the classes on {len(axes)} axes; start from weights of the same classes")
        own, theirs = own.movedim(axes[0], 0), theirs.movedim(axes[0], 0)
        own[len(after) :] = theirs[len(before) :].to(own)  # such as the label embedding's row for ignored pixels
        for i, row in enumerate(rows):
            if row is not None:
                own[i] = theirs[row].to(own)
    model.load_state_dict(new)
    names = ", ".join(kept) if 0 < len(kept) <= 3 else str(len(kept) or "none")
    return f"{report}; classifier: {names} kept, {len(after) - len(kept)} of {len(after)} classes new"


def _skeleton(config: ModelConfig, num_classes: int) -> Segmentor:
    """Return the model with another number of classes, with shapes and without weights."""
    with torch.device("meta"):
        return dataclasses.replace(config, num_classes=num_classes).build()


def _key(name: str) -> str:
    return name.replace("_", " ").replace("-", " ").casefold().strip()
