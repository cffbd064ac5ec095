"""DGMN2: a backbone of dynamic graph message passing with one of four heads (arXiv 2209.09760)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from dgmn2_seg.backbone import Backbone
from dgmn2_seg.configs import DGMN2, VARIANTS
from dgmn2_seg.heads import SETRMLA, SETRPUP, SemanticFPN, SETRNaive
from dgmn2_seg.official import official_name
from segcore.models.layers import fused, resize
from segcore.models.losses import cross_entropy
from segcore.models.segmentor import LoadReport, Segmentor

SETR = {"setr_naive": SETRNaive, "setr_pup": SETRPUP, "setr_mla": SETRMLA}


class DGMN2Segmentor(Segmentor):
    """Backbone and head, built by `DGMN2.build`. Images of any size work; nothing is padded."""

    align_corners = True

    def __init__(self, config: DGMN2) -> None:
        super().__init__()
        self.config = config
        self.num_classes = config.num_classes
        variant, fpn = VARIANTS[config.backbone], config.head == "fpn"
        self.backbone = Backbone(variant, config.in_channels, dense=not fpn, drop_path=config.drop_path)
        self.head = (
            SemanticFPN(variant.widths, config.num_classes, config.dropout)
            if fpn
            else SETR[config.head](variant.widths, config.num_classes, config.img_size)
        )

    def predict_steps(
        self, images: Tensor, steps: Sequence[int] | None = None, seeds: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Return the one entry "final"; `steps` and `seeds` change nothing. See `Segmentor`."""
        self.check_size(images)
        return {"final": resize(self._logits(images), images.shape[-2:], align_corners=True)}

    def losses(
        self,
        images: Tensor,
        labels: Tensor,
        seeds: Sequence[int] | None = None,
        draws: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return the losses of one training step; nothing is drawn from `seeds`. See `Segmentor`."""
        loss, accuracy = cross_entropy(
            self._logits(images),
            labels,
            ignore_index=self.ignore_index,
            align_corners=True,
            class_weight=self.class_weight,
        )
        if self.config.average == "valid":
            loss = loss * (labels.numel() / (labels != self.ignore_index).sum().clamp(min=1))
        return {"decode.loss_ce": loss, "decode.acc_seg": accuracy, "loss": loss}

    def fuse(self) -> DGMN2Segmentor:
        """Return a copy for inference: the batch norms are folded into the convolutions before them."""
        return fused(self)

    def _logits(self, images: Tensor) -> Tensor:
        """Return logits at the head's own size."""
        return self.head(self.backbone(images), images.shape[-2:])

    # Weights

    def key_map(self) -> dict[str, str]:
        """Return the published name of every entry of `state_dict()`."""
        return {name: official_name(name) for name in self.state_dict()}

    def load_backbone(self, state: Mapping[str, Tensor]) -> LoadReport:
        """Load ImageNet weights under their published names, with or without `backbone.` in front.

        All of the backbone must be there; the classifier, `head.*`, is dropped. See `Segmentor.load_official`.
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
