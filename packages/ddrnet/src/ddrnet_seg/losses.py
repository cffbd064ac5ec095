"""Online hard example mining as the seed project (pyradd/DDRNet-pytorch) defines it."""

from torch import Tensor

from segcore.models.losses import pixel_losses, smallest


def ohem_pyradd(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int,
    threshold: float = 0.7,
    min_kept: int = 100_000,
    align_corners: bool = False,
    class_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the loss and the accuracy on the pixels whose true class has a probability of `threshold` or less.

    Of a batch with `min_kept` pixels or more at least `min_kept` are taken, of a smaller one all. The loss is the mean
    by weight: the weighted cross entropies divided by the sum of the weights. It is 0, where the seed has NaN, for a
    batch without any labeled pixel. Otherwise as `segcore.models.losses.ohem_cross_entropy`.
    """
    losses, weights, valid, accuracy = pixel_losses(
        logits, labels, ignore_index=ignore_index, align_corners=align_corners, class_weight=class_weight
    )
    probabilities = (-losses.detach()).exp()
    limit = smallest(probabilities, valid, min_kept).clamp(min=threshold)
    hard = valid & (probabilities <= limit)
    total = (losses * weights).where(hard, 0).sum()
    return total / weights.where(hard, 0).sum().where(valid.any(), 1), accuracy
