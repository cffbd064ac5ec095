"""The published rows: figures, where the weights are hosted, and the names of their tensors. Imports no torch.

Source: the model zoos of the authors' repository (fudan-zvg/DGMN2), which keep the files on Google Drive.
"""

from segcore.config.schema import Published
from segcore.models.key_map import Rules


def _drive(name: str, key: str, miou: dict[str, float], note: str = "") -> tuple[str, Published]:
    """Return a row; Google Drive addresses contain no file names, so the local file name is chosen here."""
    url = f"https://drive.usercontent.google.com/download?id={key}&export=download&confirm=t"
    return name, Published(miou, url, note, file=f"{name}.pth")


def _row(head: str, size: str, single: float, multi: float, key: str) -> tuple[str, Published]:
    name = f"{head}_dgmn2_{size}_4x2_769x769_40k_cityscapes"
    return _drive(name, key, {"single scale": single, "multi scale": multi})


def _imagenet(size: str, top1: float, key: str) -> tuple[str, Published]:
    """Return the initial weights of a backbone, for `train.init_from`: official:NAME."""
    return _drive(f"dgmn2_{size}_imagenet", key, {}, f"ImageNet top-1 accuracy {top1}")


PUBLISHED = dict(
    [
        _row("fpn", "tiny", 78.09, 79.40, "1sg6Mlzg12uTIQvE5XEebzNkd-Tino0eU"),
        _row("fpn", "small", 80.65, 81.58, "19H1ynlczV3dKC5qvTl3l2r-ygp26g5ho"),
        _row("fpn", "medium", 80.60, 81.79, "1IWXPpx6ra7n1svK0yJHD9E4lr7M0lhVU"),
        _row("fpn", "large", 81.75, 82.64, "1gtE2IhkUtsjY6HPajUwlz3pE2szyjNuS"),
        _row("setr_naive", "tiny", 77.23, 78.23, "1RuPaccxYYcpTJ38hpTzUmThL4yRlgT6o"),
        _row("setr_naive", "small", 80.31, 81.04, "1Vrg25uAGUf0ASeLHgUQCLsMzYWAO-BQO"),
        _row("setr_naive", "medium", 80.83, 81.39, "1HoGC-t51bhMqLYr35vDkAIHDlVPJQ8Wy"),
        _row("setr_naive", "large", 81.80, 82.61, "1hYqUr0nF9tKKDhIuJ-heAQwtFCKtPMp9"),
        _row("setr_pup", "tiny", 78.25, 79.26, "1Fz_VgIDvX7WcrEJcdYiB85KWOUGz7qPC"),
        _row("setr_pup", "small", 79.78, 80.73, "1w-XcAmeTUIAQG1WjYubmTRm88_IMPigP"),
        _row("setr_pup", "medium", 80.97, 81.80, "1zQM9CUxXDVfGZsXSkoRt1u-Yak3g_9jN"),
        _row("setr_pup", "large", 81.58, 82.27, "1-ZbdeKIFGGBo73QZjGsIBJTA8vdbeZBL"),
        _row("setr_mla", "tiny", 78.25, 79.32, "1EpgGGDzRzwMslW07ML93fO0VgIKbqFWr"),
        _row("setr_mla", "small", 80.79, 81.62, "1SxjazS3tTwC43H-t1fs1--I3LpgwH9ty"),
        _row("setr_mla", "medium", 81.09, 82.00, "1L_VZSB3TjnEUtzz1cXTY2iR5Grsl-yzM"),
        _row("setr_mla", "large", 81.55, 81.98, "1yRz3yjk6Aox-weRZLQL7-buW0G_RqiPX"),
        _imagenet("tiny", 78.7, "1H21VwFOzkv47GIXnV2a47F2K98wn3s0a"),
        _imagenet("small", 81.7, "1bOhpFnZLO8Va4LJccrlnazD1aL61wm5b"),
        _imagenet("medium", 82.5, "13iDrUlynBs83pdhUoFmwQoZbAf4oDvTm"),
        _imagenet("large", 83.3, "1nXvXHXJZpsScPnI2VQe8ZgrGXuMpbHia"),
    ]
)

# Our names -> published ones. Published stages count from 1, and only the first has more than one convolution.
RULES: Rules = (
    (r"^backbone\.stages\.0\.embed\.(\d)\.(conv|norm)\.", lambda m: f"backbone.patch_embed1.{m[2]}{int(m[1]) + 1}."),
    (r"^backbone\.stages\.(\d)\.embed\.0\.", lambda m: f"backbone.patch_embed{int(m[1]) + 1}."),
    (r"^backbone\.stages\.(\d)\.blocks\.", lambda m: f"backbone.block{int(m[1]) + 1}."),
    (r"^(backbone\..*)\.attention\.", r"\1.attn."),
    (r"\.attn\.offset\.", ".attn.conv_offset."),
    (r"\.attn\.position\.y$", ".attn.pos_emb.rel_height"),
    (r"\.attn\.position\.x$", ".attn.pos_emb.rel_width"),
    (r"^head\.fpn\.lateral\.(\d)\.", r"neck.lateral_convs.\1.conv."),
    (r"^head\.fpn\.output\.(\d)\.", r"neck.fpn_convs.\1.conv."),
    (r"^head\.classifier\.", "decode_head.conv_seg."),
    (r"^head\.scales\.(\d)\.(\d)\.conv\.", lambda m: f"decode_head.scale_heads.{m[1]}.{2 * int(m[2])}.conv."),
    (r"^head\.scales\.(\d)\.(\d)\.norm\.", lambda m: f"decode_head.scale_heads.{m[1]}.{2 * int(m[2])}.bn."),
    (r"^head\.convs\.(\d)\.conv\.", r"decode_head.conv_\1."),
    (r"^head\.convs\.(\d)\.norm\.", r"decode_head.syncbn_fc_\1."),
    (r"^head\.branches\.(\d)\.(\d)\.(conv|norm)\.", lambda m: _mla(int(m[1]), int(m[2]), m[3] == "norm")),
)


def _mla(branch: int, unit: int, norm: bool) -> str:
    """Return the prefix of a published name in SETR-MLA: a ReLU separates two units."""
    return f"decode_head.mlahead.head{branch + 2}.{3 * unit + norm}."
