"""The settings of the loss; `segcore.config.schema` exports them with the others. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from segcore.config.fields import Section, setting
from segcore.errors import UserError

LossKind = Literal["cross_entropy", "ohem", "ohem_pyradd", "focal", "dice", "lovasz"]


@dataclass(frozen=True)
class LossConfig(Section):
    """The loss on the pixels of every head."""

    section: ClassVar[str] = "loss"
    commands: ClassVar[tuple[str, ...]] = ()

    kind: LossKind | tuple[LossKind, ...] = setting("cross_entropy", stated=True, nonempty=True)
    """Cross entropy on all pixels or on hard ones (online hard example mining: ohem as in MMSegmentation, ohem_pyradd
    as in pyradd/DDRNet-pytorch), focal, dice, lovasz (Lovász-softmax), or the weighted sum of several."""
    class_weight: tuple[float, ...] | Literal["auto", "auto_sqrt"] | None = setting(None, above=0)
    """Weight of each class, a number per class: of its pixels in cross_entropy, ohem and ohem_pyradd, in the mean over
    the classes in focal, dice and lovasz. auto: the rarer, the heavier: 1 / ln(1.02 + share of the training labels'
    pixels), scaled so that the loss keeps its size. auto_sqrt: the square roots of those, likewise scaled."""
    ohem_threshold: float = setting(0.9, above=0, most=1)
    """ohem and ohem_pyradd: pixels whose true class has a lower probability are hard."""
    ohem_min_kept: int = setting(131_072, least=1)
    """ohem and ohem_pyradd: at least this many pixels of a forward pass on one device count as hard."""
    avg_non_ignore: bool = False
    """cross_entropy: divide by the number of labeled pixels; False: by that of all pixels, as published."""
    weights: tuple[float, ...] = setting((), above=0)
    """Factor of each loss that `kind` names; empty: 1 each."""
    label_smoothing: float = setting(0.0, least=0, below=1)
    """cross_entropy: share of each pixel's target that is spread evenly over all classes."""
    focal_gamma: float = setting(2.0, least=0)
    """focal: exponent that lowers the loss of pixels which are already right; 0: none."""
    focal_alpha: float | None = setting(None, above=0, below=1)
    """focal: weight of a pixel's own class, 1 - alpha that of the others; None: 1 each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights and len(self.weights) != len(self.kinds):
            raise UserError(
                f"loss.weights has {len(self.weights)} values for {len(self.kinds)} losses "
                f"({' '.join(self.kinds)}); give one per loss of loss.kind, or none"
            )

    @property
    def kinds(self) -> tuple[LossKind, ...]:
        """The names in `kind`."""
        return self.kind if isinstance(self.kind, tuple) else (self.kind,)

    @property
    def terms(self) -> tuple[tuple[LossKind, float], ...]:
        """The losses to add up, each with its factor."""
        return tuple(zip(self.kinds, self.weights or (1.0,) * len(self.kinds), strict=True))
