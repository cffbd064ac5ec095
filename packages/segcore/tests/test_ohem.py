"""OHEM without boolean indexing equals OHEM with it: both published forms, whose plain versions are kept here."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from segcore.models.losses import ohem_cross_entropy, ohem_pyradd
from segcore.testing.host_reads import HostReads

IGNORE = 255


def plain_ohem(logits: Tensor, labels: Tensor, threshold: float, min_kept: int, class_weight: Tensor | None) -> Tensor:
    """Return MMSegmentation's loss: pick the labeled pixels, sort them, pick the hard ones."""
    valid = labels != IGNORE
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")[valid]
    weights = torch.ones_like(losses) if class_weight is None else class_weight.to(logits)[labels[valid]]
    probabilities = (-losses.detach()).exp()
    hard = probabilities < threshold
    if len(losses) and hard.sum() <= min_kept:
        limit = probabilities.sort().values[min(min_kept, len(losses) - 1)].clamp(min=threshold)
        hard = probabilities < limit
    return (losses * weights)[hard].sum() / hard.sum().clamp(min=1)


def plain_pyradd(
    logits: Tensor, labels: Tensor, threshold: float, min_kept: int, class_weight: Tensor | None
) -> Tensor:
    """Return pyradd/DDRNet-pytorch's loss: likewise, with a mean by weight."""
    valid = labels != IGNORE
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")[valid]
    weights = torch.ones_like(losses) if class_weight is None else class_weight.to(logits)[labels[valid]]
    if len(losses) >= min_kept:
        probabilities = (-losses.detach()).exp()
        hard = probabilities <= probabilities.sort().values[min_kept - 1].clamp(min=threshold)
        losses, weights = losses[hard], weights[hard]
    return (losses * weights).sum() / weights.sum() if len(losses) else losses.sum()


FORMS = pytest.mark.parametrize(("ohem", "plain"), [(ohem_cross_entropy, plain_ohem), (ohem_pyradd, plain_pyradd)])


@FORMS
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 7)),
    ignored=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    threshold=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    min_kept=st.integers(1, 140),
    weighted=st.booleans(),
    ties=st.booleans(),
)
def test_value_and_gradient_are_those_of_the_plain_form(
    ohem, plain, seed, shape, ignored, threshold, min_kept, weighted, ties
):
    generator = torch.Generator().manual_seed(seed)
    batch, height, width = shape
    logits = 2 * torch.randn(batch, 4, height, width, generator=generator, dtype=torch.float64)
    logits = (logits.round() if ties else logits).requires_grad_()
    labels = torch.randint(4, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < ignored] = IGNORE
    weight = torch.rand(4, generator=generator) + 0.1 if weighted else None
    options = {"threshold": threshold, "min_kept": min_kept, "class_weight": weight}
    with HostReads() as reads:
        ours = ohem(logits, labels, ignore_index=IGNORE, **options)
        [gradient] = torch.autograd.grad(ours, logits)
    assert reads.found == []
    theirs = plain(logits, labels, **options)
    [expected] = torch.autograd.grad(theirs, logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_host_reads_are_seen():
    x = torch.arange(4.0)
    for read in (lambda: x[x > 1], lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.nonzero(),
                 lambda: x.masked_select(x > 1), lambda: x.index_put((x > 1,), x[0])):  # fmt: skip
        with HostReads() as reads:
            read()
        assert reads.found
    with HostReads() as reads:
        torch.where(x > 1, x, 0).sum() + x[torch.tensor([1, 2])].sum()
    assert reads.found == []


@FORMS
@pytest.mark.parametrize("min_kept", [5, 100])
def test_a_batch_without_labels_has_loss_0(ohem, plain, min_kept):
    logits = torch.randn(1, 4, 3, 5, requires_grad=True)
    labels = torch.full((1, 3, 5), IGNORE)
    loss = ohem(logits, labels, ignore_index=IGNORE, min_kept=min_kept)
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()
