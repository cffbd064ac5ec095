"""SegFormer and DeepLabV3+ of MMSegmentation, 0.x and 1.x, and DDPS's configurations for 0.x: their models as ours.

Sources: open-mmlab/mmsegmentation, configs/{segformer,deeplabv3plus,mobilenet_v2}; OpenGVLab/DDPS, configs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ddps_seg.configs import BaseModelConfig, DDPSConfig
from ddps_seg.configs.base_models import IMAGENET
from segcore.config.mmseg_model import BN, CLASSES, TEST, auxiliary_head, cross_entropy, start_weights, variant
from segcore.config.mmseg_read import Table
from segcore.config.mmseg_rules import SELECTED, Choice, Found, Is, Maybe, To

MIT: dict[str, dict[str, Any]] = {
    name: {"embed_dims": width, "num_layers": layers}
    for name, width, layers in (
        ("mit_b0", 32, (2, 2, 2, 2)),
        ("mit_b1", 64, (2, 2, 2, 2)),
        ("mit_b2", 64, (3, 4, 6, 3)),
        ("mit_b3", 64, (3, 4, 18, 3)),
        ("mit_b4", 64, (3, 8, 27, 3)),
        ("mit_b5", 64, (3, 6, 40, 3)),
    )
}
DEEPLAB: dict[str, dict[str, Any]] = {
    "resnet50": {"type": "ResNetV1c", "depth": 50},
    "resnet101": {"type": "ResNetV1c", "depth": 101},
    "mobilenet_v2": {"type": "MobileNetV2", "widen_factor": 1.0},
}
CHANNELS = {"resnet50": (256, 1024, 2048), "resnet101": (256, 1024, 2048), "mobilenet_v2": (24, 96, 320)}
"""Of the first, third and last map."""
WEIGHTS = start_weights({"resnet50_v1c": IMAGENET["resnet50"], "resnet101_v1c": IMAGENET["resnet101"],
                         "mobilenet_v2": IMAGENET["mobilenet_v2"]})  # fmt: skip
START = Maybe(To("train.init_from", WEIGHTS))
INIT = Maybe({"type": Is("Pretrained"), "checkpoint": START.rule})
BACKBONES = {
    "mit": {
        "type": Is("MixVisionTransformer", "MixVisionTransformerCustomInitWeights"),
        "in_channels": Maybe(Is(3)),
        "num_stages": Maybe(Is(4)),
        "num_heads": Is((1, 2, 5, 8)),
        "patch_sizes": Maybe(Is((7, 3, 3, 3))),
        "sr_ratios": Maybe(Is((8, 4, 2, 1))),
        "out_indices": Maybe(Is((0, 1, 2, 3))),
        "mlp_ratio": Maybe(Is(4)),
        "qkv_bias": Maybe(Is(True)),
        "drop_rate": Maybe(Is(0.0)),
        "attn_drop_rate": Maybe(Is(0.0)),
        "drop_path_rate": Maybe(To("model.drop_path"), 0.0),
        "init_cfg": INIT,
    },
    "resnet": {
        "type": Is("ResNetV1c"),
        "num_stages": Maybe(Is(4)),
        "out_indices": Maybe(Is((0, 1, 2, 3))),
        "dilations": Is((1, 1, 2, 4)),
        "strides": Is((1, 2, 1, 1)),
        "norm_cfg": BN,
        "norm_eval": Maybe(Is(False)),
        "style": Maybe(Is("pytorch")),
        "contract_dilation": Is(True),
        "init_cfg": INIT,
    },
    "mobilenet": {
        "type": Is("MobileNetV2"),
        "strides": Is((1, 2, 2, 1, 1, 1, 1)),
        "dilations": Is((1, 1, 1, 2, 2, 4, 4)),
        "out_indices": Is((1, 2, 4, 6)),
        "norm_cfg": BN,
        "init_cfg": INIT,
    },
}
HEAD = {
    "dropout_ratio": Maybe(To("model.dropout"), 0.1),
    "norm_cfg": BN,
    "align_corners": Maybe(Is(False)),
    "loss_decode": cross_entropy(),
    **CLASSES,
}
UNET = {
    "pretrained": START,
    "dim": To("model.width"),
    "out_dim": To("model.output_width"),
    "dim_mults": To("model.multipliers"),
    "cat_embedding_dim": To("model.embedding_width"),
    "backbone_drop_out_ratio": Maybe(To("model.condition_dropout"), 0.0),
    "interpolate_mode": Maybe(Is("bilinear")),
}
STEPS = {
    "diffusion_timesteps": To("model.num_train_timesteps"),
    "inference_timesteps": Maybe(To("model.num_inference_steps")),
    "collect_timesteps": To("evaluate.steps", lambda steps: tuple(sorted(steps))),
    "guidance_scale": Maybe(To("model.guidance_scale"), 1.0),
    "alpha_schedule": Maybe(To("model.noise_schedule"), "linear"),
    "inference_mode": Maybe(To("model.mode"), "q_pred"),
}


def width(usual: int) -> To:
    """Return the rule of a head's channels, of which `usual` need not be stated."""
    return To("model.condition_width", lambda channels: None if channels == usual else channels)


def condition_encoder(model: Table) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return the name of the backbone and the rules of backbone and head."""
    kind = model["backbone"].get("type") if isinstance(model.get("backbone"), Table) else None
    if not str(kind).startswith("MixVisionTransformer"):
        backbone, values = variant(model, "backbone", DEEPLAB)
        first, _, last = CHANNELS[backbone]
        head = {
            "channels": width(512),
            "in_channels": Is(last),
            "in_index": Is(3),
            "dilations": Is((1, 12, 24, 36)),
            "c1_in_channels": Is(first),
            "c1_channels": Is(48),
        }
        return backbone, {**BACKBONES["mobilenet" if "mobilenet" in backbone else "resnet"], **values}, {**HEAD, **head}
    backbone, values = variant(model, "backbone", MIT)
    head = {
        "channels": width(256),
        "in_channels": Is(tuple(heads * MIT[backbone]["embed_dims"] for heads in (1, 2, 5, 8))),
        "in_index": Is((0, 1, 2, 3)),
    }
    return backbone, {**BACKBONES["mit"], **values}, {**HEAD, **head}


def base_model(model: Table) -> Found:
    """Return the rules of SegFormer or DeepLabV3+."""
    name, backbone, head = condition_encoder(model)
    rules = {
        "type": Is("EncoderDecoder"),
        "pretrained": START,
        "backbone": backbone,
        "decode_head": {"type": SELECTED, **head},
        "auxiliary_head": Maybe(auxiliary_head(CHANNELS[name][1] if name in CHANNELS else 0, 2)),
        "train_cfg": Maybe(Is({})),
        "test_cfg": TEST,
    }
    return Found(BaseModelConfig, rules, {"model.backbone": name})


def prior(model: Table, *, single_step: bool) -> Found:
    """Return the rules of a DDPS, or of its single-step variant."""
    name, backbone, head = condition_encoder(model)
    condition = 512 if name in CHANNELS else 256
    unet = {**UNET, "unet_channels": Is(condition + 16), **({} if single_step else STEPS)}
    rules = {
        "type": Is("EncoderDecoderFreeze" if single_step else "EncoderDecoderDiffusion"),
        "freeze_parameters": Choice({("backbone", "decode_head"): {"model.freeze": "published"}}),
        "pretrained": START,
        "backbone": backbone,
        "decode_head": {"type": SELECTED, **head, **unet},
        "auxiliary_head": Maybe(Is(None)),
        "train_cfg": Maybe(Is({})),
        "test_cfg": TEST,
    }
    return Found(DDPSConfig, rules, {"model.backbone": name, "model.single_step": single_step})


HEADS = {
    "SegformerHead": base_model,
    "DepthwiseSeparableASPPHead": base_model,
    **{
        f"{head}UnetFCHead{kind}Step": partial(prior, single_step=kind == "Single")
        for head in ("SegformerHead", "DepthwiseSeparableASPPHead")
        for kind in ("Single", "Multi")
    },
}
"""What the type of a decode head means."""
