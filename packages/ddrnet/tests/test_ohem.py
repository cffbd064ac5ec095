"""OHEM without boolean indexing is OHEM with it: that of pyradd/DDRNet-pytorch, whose plain form is kept here."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from segcore.models.losses import ohem_pyradd
from segcore.testing.host_reads import HostReads

IGNORE = 255


def plain(logits: Tensor, labels: Tensor, threshold: float, min_kept: int, class_weight: Tensor | None) -> Tensor:
    """Return the loss as published: pick the labeled pixels, sort them, pick the hard ones; the mean is by weight."""
    valid = labels != IGNORE
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")[valid]
    weights = torch.ones_like(losses) if class_weight is None else class_weight.to(logits)[labels[valid]]
    if len(losses) >= min_kept:
        probabilities = (-losses.detach()).exp()
        hard = probabilities <= probabilities.sort().values[min_kept - 1].clamp(min=threshold)
        losses, weights = losses[hard], weights[hard]
    return (losses * weights).sum() / weights.sum() if len(losses) else losses.sum()


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 7)),
    ignored=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    threshold=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    min_kept=st.integers(1, 140),
    weighted=st.booleans(),
    ties=st.booleans(),
)
def test_value_and_gradient_are_those_of_the_plain_form(seed, shape, ignored, threshold, min_kept, weighted, ties):
    generator = torch.Generator().manual_seed(seed)
    batch, height, width = shape
    logits = 2 * torch.randn(batch, 4, height, width, generator=generator, dtype=torch.float64)
    logits = (logits.round() if ties else logits).requires_grad_()
    labels = torch.randint(4, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < ignored] = IGNORE
    weight = torch.rand(4, generator=generator) + 0.1 if weighted else None
    options = {"threshold": threshold, "min_kept": min_kept, "class_weight": weight}
    with HostReads() as reads:
        ours, _ = ohem_pyradd(logits, labels, ignore_index=IGNORE, **options)
        [gradient] = torch.autograd.grad(ours, logits)
    assert reads.found == []
    theirs = plain(logits, labels, **options)
    [expected] = torch.autograd.grad(theirs, logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("min_kept", [5, 100])
def test_a_batch_without_labels_has_loss_0(min_kept):
    logits = torch.randn(1, 4, 3, 5, requires_grad=True)
    labels = torch.full((1, 3, 5), IGNORE)
    loss, _ = ohem_pyradd(logits, labels, ignore_index=IGNORE, min_kept=min_kept)
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()
