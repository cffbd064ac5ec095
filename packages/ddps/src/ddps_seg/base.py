"""The base models: SegFormer (arXiv 2105.15203) and DeepLabV3+ (arXiv 1802.02611), as MMSegmentation 0.30 has them.

Each can be used alone; their features are the condition of DDPS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ddps_seg import backbones, heads
from ddps_seg.official import from_hugging_face
from segcore.config.schema import LossConfig
from segcore.models.backbones import BackboneSegmentor
from segcore.models.heads import FCNHead
from segcore.models.key_map import AUXILIARY_HEAD, rename
from segcore.models.layers import check_two_images, use_fast_products
from segcore.models.losses import head_losses
from segcore.models.segmentor import LoadReport

AUXILIARY_WEIGHT = 0.4


class EncoderSegmentor(BackboneSegmentor):
    """Shared parts of base models and DDPS: backbone and condition head."""

    def __init__(
        self, num_classes: int, in_channels: int, backbone: str, drop_path: float, condition_width: int | None
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = backbones.build(backbone, in_channels=in_channels, drop_path=drop_path)
        self.min_size = self.backbone.min_size
        dilated = self.backbone.strides[-1] == 8
        head, width = (heads.DeepLabHead, 512) if dilated else (heads.SegFormerHead, 256)
        self.head = head(self.backbone.channels, condition_width or width)
        for module in self.head.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def encode(self, images: Tensor) -> Tensor:
        """Return the condition (N, width, H/4, W/4) of normalized images (N, C, H, W).

        Sides are rounded up, by ConvNeXt down.
        """
        self.check_size(images)
        return self.head(self.backbone(images))

    def check_batch(self, images: Tensor) -> None:
        """Raise UserError for a batch on which the pooled branch of DeepLabV3+ cannot train."""
        if isinstance(self.head, heads.DeepLabHead):
            check_two_images("DeepLabV3+", images, self.head.pool.norm)

    def recomputed_blocks(self) -> list[nn.Module]:
        convs = [part for part in self.head.modules() if isinstance(part, heads.ConvBNReLU)]
        return [*self.backbone.recomputed_blocks(), *convs]

    def published_name(self, name: str) -> str:
        part, _, rest = name.partition(".")
        return f"decode_head.{rename(rest, heads.RULES)}" if part == "head" else rename(name, RULES)

    def load_pretrained(self, state: Mapping[str, Tensor]) -> tuple[str, LoadReport]:
        """Load the backbone; it may have HuggingFace's names. See `Segmentor`."""
        return super().load_pretrained(from_hugging_face(state))

    def is_full_checkpoint(self, state: Mapping[str, Tensor]) -> bool:
        """Return whether the initial weights `state` cover a whole model; HuggingFace's have other heads."""
        return from_hugging_face(state) is state and super().is_full_checkpoint(state)


class BaseModel(EncoderSegmentor):
    """SegFormer or DeepLabV3+; the arguments are the fields of `ddps_seg.configs.BaseModelConfig`."""

    def __init__(
        self,
        *,
        num_classes: int = 150,
        in_channels: int = 3,
        backbone: str = "mit_b2",
        drop_path: float = 0.1,
        condition_width: int | None = None,
        dropout: float = 0.1,
        auxiliary: bool = False,
    ) -> None:
        super().__init__(num_classes, in_channels, backbone, drop_path, condition_width)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(self.head.width, num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        assert self.classifier.bias is not None
        nn.init.zeros_(self.classifier.bias)
        self.auxiliary_head = FCNHead(self.backbone.channels[2], 256, num_classes) if auxiliary else None
        use_fast_products(self)

    def logits(self, images: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """Return logits (N, K, H/4, W/4), sides rounded as by `encode`; nothing is drawn."""
        return self.classifier(self.encode(images))

    def losses(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        seeds: Sequence[int] | None = None,
        draws: Mapping[str, Tensor] | None = None,
        loss: LossConfig = LossConfig(),  # noqa: B008  (frozen)
    ) -> dict[str, Tensor]:
        """Return the losses of one training step; nothing is drawn. See `Segmentor`.

        Raises UserError for a single image on DeepLabV3+ in training mode.
        """
        self.check_size(images)
        self.check_batch(images)
        maps = self.backbone(images)
        heads = {"decode": (self.classifier(self.dropout(self.head(maps))), 1.0)}
        if self.auxiliary_head is not None:
            heads["aux"] = self.auxiliary_head(maps[2]), AUXILIARY_WEIGHT
        return head_losses(heads, labels, loss, ignore_index=self.ignore_index)


RULES = ((r"^classifier\.", "decode_head.conv_seg."), *AUXILIARY_HEAD)
