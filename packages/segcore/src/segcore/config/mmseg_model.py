"""Rules for what the models of MMSegmentation have in common, for the methods' `configs/from_mmseg.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from segcore.config.mmseg_read import Table
from segcore.config.mmseg_rules import NOTHING, SKIP, By, Choice, Is, Key, Maybe, To, same, table_of
from segcore.config.registry import experiments, published_files

BN = Is(*({"type": kind, **grad} for kind in ("SyncBN", "BN") for grad in ({"requires_grad": True}, {})))
"""Batch norm; over all devices where several train, as here by itself."""
CLASSES = {
    "num_classes": To("model.num_classes"),
    "ignore_index": Maybe(
        Choice({255: {"data.add_background_class": False}, 0: {"data.add_background_class": True}}), 255
    ),
}
CLASS_WEIGHT = Maybe(To("loss.class_weight", lambda weights: weights or None), ())
TEST = By(
    "mode",
    {
        "whole": {"mode": To("evaluate.mode")},
        "slide": {"mode": To("evaluate.mode"), "crop_size": To("evaluate.crop"), "stride": To("evaluate.stride")},
    },
)


def cross_entropy(weight: float = 1.0) -> dict[str, Any]:
    """Return the rules of a head's cross entropy with its factor."""
    return {
        "type": Choice({"CrossEntropyLoss": {"loss.kind": "cross_entropy"}}),
        "use_sigmoid": Maybe(Is(False)),
        "loss_weight": Is(weight) if weight != 1 else Maybe(Is(weight)),
        "class_weight": CLASS_WEIGHT,
        "avg_non_ignore": Maybe(To("loss.avg_non_ignore"), False),
        "loss_name": SKIP,
    }


def auxiliary_head(channels: int, index: int) -> dict[str, Any]:
    """Return the rules of the FCN head on the feature map `index`, which has `channels`."""
    return {
        "type": Choice({"FCNHead": {"model.auxiliary": True}}),
        "in_channels": Is(channels),
        "in_index": Is(index),
        "channels": Is(256),
        "num_convs": Is(1),
        "concat_input": Is(False),
        "dropout_ratio": Maybe(Is(0.1)),
        "norm_cfg": BN,
        "align_corners": Maybe(Is(False)),
        "loss_decode": cross_entropy(0.4),
        **CLASSES,
    }


def variant(model: Table, part: str, variants: Mapping[str, Mapping[str, Any]]) -> tuple[str, dict[str, Is]]:
    """Return the name of the variant whose values `model[part]` has, and rules that these are its values."""
    key = Key("model", next(iter(model.lines.values()), "")).of(model, part)
    table = table_of(model.get(part), key)
    for name, values in variants.items():
        if all(same(table.get(item), value) for item, value in values.items()):
            return name, {item: Is(value) for item, value in values.items()}
    given = {item: table.get(item) for values in variants.values() for item in values}
    return key.refuse(given, f"of these, known are the values of {', '.join(variants)}")


def start_weights(known: Mapping[str, str]) -> Callable[[Any], Any]:
    """Return a function for `To` that turns the address of start weights into `train.init_from`.

    `known` maps names without suffix to our names of the weights, and published files are known, too. In an address,
    the beginning of the file's name counts. Another path of this machine stays as it is: the file may hold anything.
    """

    def convert(address: str | None) -> Any:
        if address is None:
            return NOTHING
        name = PurePosixPath(address).name
        if name in (rows := _official()):
            return rows[name]
        if "://" not in address:
            return known.get(PurePosixPath(address).stem, address)
        for start, ours in known.items():
            if name.startswith(start):
                return ours
        raise ValueError("these weights are not known here; download them and write the path of the file")

    return convert


@cache
def _official() -> dict[str, str]:
    """Return `official:CONFIG` of each published weights file, by the file's name."""
    rows = experiments()
    return {file: f"official:{rows[row]().name if row in rows else row}" for file, row in published_files().items()}
