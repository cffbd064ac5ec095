"""DDP's configurations for MMSegmentation 0.x (JiYuanFeng/DDP, segmentation/configs): their model as ours."""

from __future__ import annotations

from typing import Any

from ddp_seg.configs import DDPConfig
from ddp_seg.configs.cityscapes import INIT
from segcore.config.mmseg_model import BN, CLASSES, TEST, auxiliary_head, cross_entropy, start_weights, variant
from segcore.config.mmseg_read import Table
from segcore.config.mmseg_rules import SKIP, Choice, Found, Is, Maybe, To

CHANNELS = {96: (96, 192, 384, 768), 128: (128, 256, 512, 1024), 192: (192, 384, 768, 1536)}
CONVNEXT = {
    "convnext_t": {"arch": "tiny"},
    "convnext_s": {"arch": "small"},
    "convnext_b": {"arch": "base"},
    "convnext_l": {"arch": "large"},
}
SWIN: dict[str, dict[str, Any]] = {
    "swin_t": {"embed_dims": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "swin_s": {"embed_dims": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "swin_b": {"embed_dims": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "swin_l": {"embed_dims": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
}
WIDTH = {"t": 96, "s": 96, "b": 128, "l": 192}
"""Channels of the first map, by the last letter of the backbone's name; ConvNeXt-T and -S are as wide as Swin's."""
WEIGHTS = start_weights(
    {f"convnext-{size}_3rdparty": INIT[f"convnext_{size[0]}"] for size in ("tiny", "small", "base", "large")}
    | {f"swin_{size}_patch4": INIT[f"swin_{size[0]}"] for size in ("tiny", "small", "base", "large")}
)
GROUP_NORM, GELU = Is({"type": "GN", "num_groups": 32}), Is({"type": "GELU"})
PRETRAINED = Maybe(
    {"type": Is("Pretrained"), "checkpoint": To("train.init_from", WEIGHTS), "prefix": Maybe(Is("backbone."))}
)
COMMON = {
    "out_indices": Is((0, 1, 2, 3)),
    "drop_path_rate": To("model.drop_path"),
    "init_cfg": PRETRAINED,
}
CONVNEXT_RULES = {
    "type": Is("mmcls.ConvNeXt", "mmpretrain.ConvNeXt"),
    "layer_scale_init_value": Is(1.0),
    "gap_before_final_norm": Is(False),
    **COMMON,
}
SWIN_RULES = {
    "type": Is("SwinTransformer"),
    "window_size": To("model.window"),
    "pretrain_img_size": SKIP,  # for position embeddings, of which there are none
    "in_channels": Maybe(Is(3)),
    "patch_size": Maybe(Is(4)),
    "mlp_ratio": Maybe(Is(4)),
    "strides": Maybe(Is((4, 2, 2, 2))),
    "qkv_bias": Maybe(Is(True)),
    "qk_scale": Maybe(Is(None)),
    "patch_norm": Maybe(Is(True)),
    "drop_rate": Maybe(Is(0.0)),
    "attn_drop_rate": Maybe(Is(0.0)),
    "use_abs_pos_embed": Maybe(Is(False)),
    "act_cfg": Maybe(GELU),
    "norm_cfg": Maybe(Is({"type": "LN", "requires_grad": True}, {"type": "LN"})),
    **COMMON,
}
LAYER = {
    "type": Is("BaseTransformerLayer"),
    "use_time_mlp": Is(True),
    "attn_cfgs": {
        "type": Is("MultiScaleDeformableAttention"),
        "embed_dims": Is(256),
        "num_levels": Is(1),
        "num_heads": To("model.heads"),
        "num_points": Maybe(To("model.points"), 4),
        "dropout": Is(0.0),
    },
    "ffn_cfgs": {
        "type": Is("FFN"),
        "embed_dims": Is(256),
        "feedforward_channels": Is(1024),
        "ffn_drop": Is(0.0),
        "act_cfg": GELU,
    },
    "operation_order": Is(("self_attn", "norm", "ffn", "norm")),
}
HEAD = {
    "type": Is("DeformableHeadWithTime"),
    "in_channels": Is((256,)),
    "channels": Is(256),
    "in_index": Is((0,)),
    "dropout_ratio": Is(0.0),
    "norm_cfg": BN,
    "align_corners": Is(False),
    "num_feature_levels": Is(1),
    "encoder": {
        "type": Is("DetrTransformerEncoder"),
        "num_layers": To("model.decoder_layers"),
        "transformerlayers": LAYER,
    },
    "positional_encoding": Is({"type": "SinePositionalEncoding", "num_feats": 128, "normalize": True, "offset": -0.5}),
    "loss_decode": cross_entropy(),
    **CLASSES,
}
MERGING = {
    "type": Is("MultiStageMerging"),
    "in_channels": Is((256,) * 4),
    "out_channels": Is(256),
    "kernel_size": Is(1),
    "norm_cfg": GROUP_NORM,
    "act_cfg": Is(None),
}


def deformable_head(model: Table) -> Found:
    """Return the rules of a DDP."""
    swin = isinstance(model.get("backbone"), Table) and model["backbone"].get("type") == "SwinTransformer"
    backbone, values = variant(model, "backbone", SWIN if swin else CONVNEXT)
    fpn = {
        "type": Is("FPN"),
        "in_channels": Is(CHANNELS[WIDTH[backbone[-1]]]),
        "out_channels": Is(256),
        "act_cfg": Is(None),
        "norm_cfg": GROUP_NORM,
        "num_outs": Is(4),
    }
    rules = {
        "type": Choice({"DDP": {"model.self_aligned": False}, "SelfAlignedDDP": {"model.self_aligned": True}}),
        "timesteps": To("model.num_inference_steps"),
        "bit_scale": To("model.bit_scale"),
        "randsteps": Maybe(To("model.randsteps"), 1),
        "time_difference": Maybe(To("model.time_difference"), 1),
        "learned_sinusoidal_dim": Maybe(Is(16)),
        "sample_range": Maybe(To("model.sample_range"), (0, 0.999)),
        "noise_schedule": Maybe(To("model.noise_schedule"), "cosine"),
        "diffusion": Maybe(To("model.sampler"), "ddim"),
        "accumulation": Maybe(To("model.accumulation"), False),
        "pretrained": Maybe(To("train.init_from", WEIGHTS)),
        "backbone": {**(SWIN_RULES if swin else CONVNEXT_RULES), **values},
        "neck": (fpn, MERGING),
        "auxiliary_head": auxiliary_head(256, 0),
        "decode_head": HEAD,
        "train_cfg": Maybe(Is({})),
        "test_cfg": TEST,
    }
    return Found(DDPConfig, rules, {"model.backbone": backbone})


HEADS = {"DeformableHeadWithTime": deformable_head}
"""What the type of a decode head means."""
