"""DGMN2's configurations for MMSegmentation 0.x (fudan-zvg/DGMN2, segmentation/configs): their model as ours."""

from __future__ import annotations

from typing import Any

from dgmn2_seg.configs import DGMN2Config
from segcore.config.mmseg_model import BN, CLASSES, TEST, cross_entropy, start_weights
from segcore.config.mmseg_read import Table
from segcore.config.mmseg_rules import Choice, Found, Is, Maybe, To

SIZES = ("tiny", "small", "medium", "large")
WEIGHTS = start_weights({f"dgmn2_{size}_model": f"official:dgmn2_{size}_imagenet" for size in SIZES})
CHANNELS = (64, 128, 320, 512)
HEAD = {"norm_cfg": BN, "align_corners": Is(True), "loss_decode": cross_entropy(), **CLASSES}
SETR = {"in_channels": Is(512), "img_size": To("model.img_size"), "dropout_ratio": Is(0), **HEAD}
NECK = {"type": Is("FPN"), "in_channels": Is(CHANNELS), "out_channels": Is(256), "num_outs": Is(4)}


def _found(output: Any, head: dict[str, Any], **more: Any) -> Found:
    """Return the rules of a model with a head; `output` is the rule of what the backbone hands to it."""
    sizes = {f"dgmn2_{size}": {"model.backbone": size} for size in SIZES}
    rules = {
        "type": Is("EncoderDecoder"),
        "pretrained": Maybe(To("train.init_from", WEIGHTS)),
        "backbone": {"type": Choice(sizes), "norm_cfg": BN, "output": output},
        "decode_head": head,
        "train_cfg": Maybe(Is({})),
        "test_cfg": TEST,
        **more,
    }
    return Found(DGMN2Config, rules)


def fpn_head(model: Table) -> Found:
    """Return the rules of Semantic FPN."""
    head = {
        "type": Choice({"FPNHead": {"model.head": "fpn"}}),
        "in_channels": Is((256,) * 4),
        "in_index": Is((0, 1, 2, 3)),
        "feature_strides": Is((4, 8, 16, 32)),
        "channels": Is(128),
        "dropout_ratio": To("model.dropout"),
        **HEAD,
    }
    return _found(Is("neck"), head, neck=NECK)


def up_head(model: Table) -> Found:
    """Return the rules of SETR-Naive, with 2 convolutions, and SETR-PUP, with 4."""
    head = {
        "type": Is("VisionTransformerUpHead"),
        "channels": Is(256, 512),  # of the classifier's input, which num_conv decides
        "in_index": Is(0),
        "embed_dim": Is(512),
        "num_conv": Choice({2: {"model.head": "setr_naive"}, 4: {"model.head": "setr_pup"}}),
        **SETR,
    }
    return _found(Maybe(Is("decode_head")), head)


def mla_head(model: Table) -> Found:
    """Return the rules of SETR-MLA."""
    head = {
        "type": Choice({"VIT_MLAHead": {"model.head": "setr_mla"}}),
        "channels": Is(512),
        "mla_channels": Is(CHANNELS),
        "mlahead_channels": Is(128),
        **SETR,
    }
    return _found(Is("decode_head_multi"), head)


HEADS = {"FPNHead": fpn_head, "VisionTransformerUpHead": up_head, "VIT_MLAHead": mla_head}
"""What the type of a decode head means."""
