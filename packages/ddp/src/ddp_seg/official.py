"""The published rows: figures, where the weights are hosted, and the names of their tensors. Imports no torch.

Source: the model zoo of the authors' repository (JiYuanFeng/DDP, folder `segmentation`). The Swin rows on Cityscapes
are in a commented-out part of that page and have no weights.
"""

from segcore.config.schema import Published
from segcore.models.key_map import AUXILIARY_HEAD

_HUB = "https://huggingface.co/yfji/DDP-Weight/resolve/main"
_UNLISTED = "commented out on the authors' results page; no weights offered"


def _row(name: str, single: float, multi: float, *, weights: bool = True) -> tuple[str, Published]:
    figures = {"single scale": single, "multi scale": multi}
    return name, _files(name, figures) if weights else Published(figures, note=_UNLISTED)


def _aligned(name: str, *by_step: float) -> tuple[str, Published]:
    steps = dict(zip(("1 step", "3 steps", "10 steps"), by_step, strict=True))
    return name, _files(name, steps)


def _files(name: str, figures: dict[str, float]) -> Published:
    return Published(figures, f"{_HUB}/{name}.pth", log=f"{_HUB}/{name}.log")


PUBLISHED = dict(
    [
        _row("ddp_convnext_t_4x4_512x1024_160k_cityscapes", 82.60, 83.15),
        _row("ddp_convnext_s_4x4_512x1024_160k_cityscapes", 82.69, 83.58),
        _row("ddp_convnext_b_4x4_512x1024_160k_cityscapes", 82.78, 83.49),
        _row("ddp_convnext_l_4x4_512x1024_160k_cityscapes", 83.21, 83.92),
        _aligned("ddp_convnext_t_4x4_512x1024_5k_cityscapes_aligned", 82.3, 82.6, 82.6),
        _aligned("ddp_convnext_l_4x4_512x1024_5k_cityscapes_aligned", 83.0, 83.2, 83.2),
        _row("ddp_swin_t_4x4_512x1024_160k_cityscapes", 81.24, 82.46, weights=False),
        _row("ddp_swin_s_4x4_512x1024_160k_cityscapes", 82.41, 83.21, weights=False),
        _row("ddp_swin_b_4x4_512x1024_160k_cityscapes", 82.54, 83.42, weights=False),
        (
            "ddp_swin_l_4x4_512x1024_160k_cityscapes",
            Published({}, note="a published configuration without figures or weights"),
        ),
        _row("ddp_swin_t_2x8_512x512_160k_ade20k", 47.0, 47.8),
        _row("ddp_swin_s_2x8_512x512_160k_ade20k", 48.7, 49.7),
        _row("ddp_swin_b_2x8_512x512_160k_ade20k", 49.4, 50.8),
        _row("ddp_swin_l_2x8_512x512_160k_ade20k", 53.2, 54.4),
    ]
)

# Our names -> published ones; the backbone's are in segcore.models.backbones.
RULES = (
    (r"^fpn\.lateral\.(\d+)\.", r"neck.0.lateral_convs.\1."),
    (r"^fpn\.output\.(\d+)\.", r"neck.0.fpn_convs.\1."),
    (r"^fuse_conv\.", "neck.1.down."),
    (r"^(neck\..*)\.norm\.", r"\1.gn."),
    (r"^transform\.", "transform.conv."),
    (r"^label_embedding\.", "embedding_table."),
    (r"^time_embedding\.frequencies$", "time_mlp.0.weights"),
    (r"^time_embedding\.fc1\.", "time_mlp.1."),
    (r"^time_embedding\.fc2\.", "time_mlp.3."),
    (r"^decoder\.classifier\.", "decode_head.conv_seg."),
    (r"^decoder\.layers\.", "decode_head.encoder.layers."),
    (r"^(decode_head\..*)\.attention\.", r"\1.attentions.0."),
    (r"^(decode_head\..*)\.norm1\.", r"\1.norms.0."),
    (r"^(decode_head\..*)\.norm2\.", r"\1.norms.1."),
    (r"^(decode_head\..*)\.fc1\.", r"\1.ffns.0.layers.0.0."),
    (r"^(decode_head\..*)\.fc2\.", r"\1.ffns.0.layers.1."),
    (r"^(decode_head\..*)\.time\.", r"\1.time_mlp.1."),
    *AUXILIARY_HEAD,
)
