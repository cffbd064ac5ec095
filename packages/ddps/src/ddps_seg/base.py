"""The base models: SegFormer (arXiv 2105.15203) and DeepLabV3+ (arXiv 1802.02611), as MMSegmentation 0.30 has them.

They segment on their own, and their features are the condition of DDPS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from ddps_seg import backbones, heads
from ddps_seg.configs import Base, Encoder
from segcore.errors import UserError
from segcore.models.heads import FCNHead
from segcore.models.layers import resize
from segcore.models.losses import cross_entropy
from segcore.models.segmentor import LoadReport, Segmentor

STRIDE = 16
"""Images are padded to a multiple of it: the UNet halves a map at 1/4 of the image's size twice."""
AUXILIARY_WEIGHT = 0.4


class EncoderSegmentor(Segmentor):
    """What base models and DDPS have in common: backbone and condition head."""

    def __init__(self, config: Encoder) -> None:
        super().__init__()
        self.num_classes = config.num_classes
        self.backbone = backbones.build(config.backbone, in_channels=config.in_channels, drop_path=config.drop_path)
        self.min_size = self.backbone.min_size
        dilated = backbones.is_dilated(self.backbone)
        head, width = (heads.DeepLabHead, 512) if dilated else (heads.SegFormerHead, 256)
        self.head = head(self.backbone.channels, config.condition_width or width)
        for module in self.head.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def encode(self, images: Tensor) -> Tensor:
        """Return the condition (N, C, H/4, W/4) of normalized images (N, 3, H, W); sides are rounded up."""
        self.check_size(images)
        return self.head(self.backbone(images))

    def key_map(self) -> dict[str, str]:
        backbone = {f"backbone.{name}": f"backbone.{value}" for name, value in self.backbone.key_map().items()}
        return {name: backbone.get(name) or self._official_name(name) for name in self.state_dict()}

    def _official_name(self, name: str) -> str:
        """Return the published name of an entry outside the backbone."""
        part, _, rest = name.partition(".")
        return f"decode_head.{heads.official_name(rest)}" if part == "head" else name

    def load_backbone(self, state: Mapping[str, Tensor]) -> LoadReport:
        """Load ImageNet weights under timm's or the published names; see `Backbone.load_pretrained`."""
        return self.backbone.load_pretrained(state)

    def check_batch(self, images: Tensor) -> None:
        """Raise UserError when the batch norm of the pooled branch would train on one value per channel."""
        if isinstance(self.head, heads.DeepLabHead) and self.head.training and len(images) == 1:
            raise UserError("DeepLabV3+ trains on 2 images per forward pass or more; raise train.device_batch_size (1)")


class BaseSegmentor(EncoderSegmentor):
    """SegFormer or DeepLabV3+. Built by `Base.build`."""

    def __init__(self, config: Base) -> None:
        super().__init__(config)
        self.config = config
        self.dropout = nn.Dropout2d(config.dropout)
        self.classifier = nn.Conv2d(self.head.width, config.num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        assert self.classifier.bias is not None
        nn.init.zeros_(self.classifier.bias)
        channels = self.backbone.channels[2]
        self.auxiliary_head = FCNHead(channels, 256, config.num_classes) if config.auxiliary else None

    def predict_steps(
        self, images: Tensor, steps: Sequence[int] | None = None, seeds: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Return the one entry "final"; `steps` and `seeds` change nothing. See `Segmentor`."""
        return {"final": resize(self.classifier(self.encode(images)), images.shape[-2:])}

    def losses(
        self,
        images: Tensor,
        labels: Tensor,
        seeds: Sequence[int] | None = None,
        draws: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return the losses of one training step; nothing is drawn. See `Segmentor`.

        Raises UserError for a single image on DeepLabV3+ in training mode.
        """
        self.check_size(images)
        self.check_batch(images)
        maps = self.backbone(images)
        outputs = {"decode": (self.classifier(self.dropout(self.head(maps))), 1.0)}
        if self.auxiliary_head is not None:
            outputs["aux"] = self.auxiliary_head(maps[2]), AUXILIARY_WEIGHT
        losses: dict[str, Tensor] = {}
        for name, (logits, weight) in outputs.items():
            loss, accuracy = cross_entropy(
                logits, labels, ignore_index=self.ignore_index, class_weight=self.class_weight
            )
            losses |= {f"{name}.loss_ce": weight * loss, f"{name}.acc_seg": accuracy}
        losses["loss"] = sum(losses[f"{name}.loss_ce"] for name in outputs)  # type: ignore[assignment]
        return losses

    def _official_name(self, name: str) -> str:
        for ours, theirs in _NAMES.items():
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return super()._official_name(name)


_NAMES = {
    "classifier.": "decode_head.conv_seg.",
    "auxiliary_head.hidden.conv.": "auxiliary_head.convs.0.conv.",
    "auxiliary_head.hidden.norm.": "auxiliary_head.convs.0.bn.",
    "auxiliary_head.classifier.": "auxiliary_head.conv_seg.",
}


def padded(images: Tensor) -> Tensor:
    """Return images (N, C, H, W) with zeros to the right and below, up to multiples of 16."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % STRIDE, 0, -height % STRIDE))
