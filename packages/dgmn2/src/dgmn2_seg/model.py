"""DGMN2: a backbone of dynamic graph message passing with one of four heads (arXiv 2209.09760)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from dgmn2_seg.backbone import VARIANTS, Backbone
from dgmn2_seg.heads import SETRMLA, SETRPUP, SemanticFPN, SETRNaive
from dgmn2_seg.official import RULES
from segcore.config.schema import LossConfig
from segcore.models.key_map import rename
from segcore.models.layers import ConvNorm, fused, residual_blocks, use_fast_products
from segcore.models.losses import head_losses
from segcore.models.segmentor import LoadReport, Segmentor

SETR = {"setr_naive": SETRNaive, "setr_pup": SETRPUP, "setr_mla": SETRMLA}


class DGMN2(Segmentor):
    """Backbone and head; the arguments are the fields of `dgmn2_seg.configs.DGMN2Config`. Images are not padded."""

    align_corners = True

    def __init__(
        self,
        *,
        num_classes: int = 19,
        in_channels: int = 3,
        backbone: str = "tiny",
        head: str = "fpn",
        img_size: int | None = 769,
        dropout: float = 0.1,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        variant, fpn = VARIANTS[backbone], head == "fpn"
        self.backbone = Backbone(variant, in_channels, dense=not fpn, drop_path=drop_path)
        self.head = (
            SemanticFPN(variant.widths, num_classes, dropout)
            if fpn
            else SETR[head](variant.widths, num_classes, img_size)
        )
        use_fast_products(self)

    def logits(self, images: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """Return logits (N, K, h, w) at the head's own size; nothing is drawn."""
        return self.head(self.backbone(images), images.shape[-2:])

    def losses(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        seeds: Sequence[int] | None = None,
        draws: Mapping[str, Tensor] | None = None,
        loss: LossConfig = LossConfig(),  # noqa: B008  (frozen)
    ) -> dict[str, Tensor]:
        """Return the losses of one training step; nothing is drawn from `seeds`. See `Segmentor`."""
        heads = {"decode": (self.logits(images), 1.0)}
        return head_losses(heads, labels, loss, ignore_index=self.ignore_index, align_corners=True)

    def recomputed_blocks(self) -> list[nn.Module]:
        embeds = [stage.get_submodule("embed") for stage in self.backbone.stages]
        convs = [part for part in self.head.modules() if isinstance(part, ConvNorm)]
        return [*embeds, *residual_blocks(self.backbone), *convs]

    def fuse(self) -> DGMN2:
        """Return a copy for inference: the batch norms are folded into the preceding convolutions."""
        return fused(self)

    # Weights

    def key_map(self) -> dict[str, str]:
        """Return the published name of every entry of `state_dict()`."""
        return {name: rename(name, RULES) for name in self.state_dict()}

    def load_backbone(self, state: Mapping[str, Tensor]) -> LoadReport:
        """Load ImageNet weights under their published names, with or without the prefix `backbone.`.

        The whole backbone must be present; the classifier, `head.*`, is dropped. See `Segmentor.load_official`.
        """
        dropped = tuple(name for name in state if name.startswith("head."))
        names = {name: official for name, official in self.key_map().items() if name.startswith("backbone.")}
        tensors = {
            name if name.startswith("backbone.") else f"backbone.{name}": tensor
            for name, tensor in state.items()
            if name not in dropped
        }
        report = self._load(tensors, names, self.convert)
        return replace(report, dropped=(*report.dropped, *dropped), source="ImageNet")
