"""MMSegmentation's configurations of DDRNet (1.x, configs/ddrnet): their model as ours."""

from __future__ import annotations

from typing import Any

from ddrnet_seg.configs import DDRNetConfig
from segcore.config.mmseg_model import BN, CLASS_WEIGHT, CLASSES, TEST, start_weights, variant
from segcore.config.mmseg_read import Table
from segcore.config.mmseg_rules import SKIP, Choice, Found, Is, Maybe, To

VARIANTS = {"23_slim": {"channels": 32, "ppm_channels": 128}, "23": {"channels": 64, "ppm_channels": 128}}
WEIGHTS = start_weights(
    {"ddrnet23s-in1kpre": "official:ddrnet_23_slim_imagenet", "ddrnet23-in1kpre": "official:ddrnet_23_imagenet"}
)


def ohem(weight: Any) -> dict[str, Any]:
    """Return the rules of a head's loss; `weight` is that of its factor."""
    return {
        "type": Choice({"OhemCrossEntropy": {"loss.kind": "ohem"}}),
        "thres": To("loss.ohem_threshold"),
        "min_kept": To("loss.ohem_min_kept"),
        "class_weight": CLASS_WEIGHT,
        "loss_weight": weight,
        "ignore_label": Maybe(Is(255)),
        "loss_name": SKIP,
    }


def ddr_head(model: Table) -> Found:
    """Return the rules of a DDRNet."""
    name, values = variant(model, "backbone", VARIANTS)
    width = VARIANTS[name]["channels"]
    backbone = {
        "type": Is("DDRNet"),
        "in_channels": Maybe(Is(3)),
        "norm_cfg": BN,
        "align_corners": Maybe(Is(False)),  # of the resizes inside, which the authors' weights fix
        "init_cfg": Maybe({"type": Is("Pretrained"), "checkpoint": To("train.init_from", WEIGHTS)}),
        **values,
    }
    head = {
        "type": Is("DDRHead"),
        "in_channels": Is(4 * width),
        "channels": Is(2 * width),
        "dropout_ratio": Is(0.0),
        "align_corners": To("model.align_corners"),
        "norm_cfg": BN,
        "loss_decode": (ohem(Maybe(Is(1.0))), ohem(To("model.auxiliary_weight"))),
        **CLASSES,
    }
    rules = {
        "type": Is("EncoderDecoder"),
        "pretrained": Maybe(Is(None)),
        "backbone": backbone,
        "decode_head": head,
        "train_cfg": Maybe(Is({})),
        "test_cfg": TEST,
    }
    return Found(DDRNetConfig, rules, {"model.variant": name, "model.auxiliary": True})


HEADS = {"DDRHead": ddr_head}
"""What the type of a decode head means."""
