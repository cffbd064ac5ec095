"""The losses: values and gradients are those of segmentation_models_pytorch and torch; any label may be ignored."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from segcore.config.schema import LossConfig
from segcore.errors import UserError
from segcore.models.losses import LOSSES, segmentation_loss
from segcore.testing.host_reads import HostReads

smp = pytest.importorskip("segmentation_models_pytorch")


def batch(seed: int, classes: int, shape: tuple[int, int, int], ignored: float, ignore: int) -> tuple[Tensor, Tensor]:
    """Return logits (N, K, H, W) float64 and labels (N, H, W), some of them ignored, some classes without a pixel."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(shape[0], classes, *shape[1:], generator=generator, dtype=torch.float64)
    present = torch.randperm(classes, generator=generator)[: max(1, 2 * classes // 3)]
    labels = present[torch.randint(len(present), shape, generator=generator)]
    return logits.requires_grad_(), labels.masked_fill(torch.rand(shape, generator=generator) < ignored, ignore)


def ours(logits: Tensor, labels: Tensor, ignore: int, **options) -> tuple[Tensor, Tensor]:
    """Return the loss and its gradient; nothing in either makes the host wait for the device."""
    with HostReads() as reads:
        loss, _ = segmentation_loss(logits, labels, LossConfig(**options), ignore_index=ignore)
        [gradient] = torch.autograd.grad(loss, logits)
    assert reads.found == []
    return loss, gradient


def lovasz(logits: Tensor, labels: Tensor, ignore: int, weights: Tensor | None) -> Tensor:
    """Return smp's loss; it has no class weights, so with them the mean over the classes is taken here."""
    if weights is None:
        return smp.losses.LovaszLoss("multiclass", ignore_index=ignore)(logits.float(), labels)
    valid = labels != ignore
    scores, valid_labels = logits.float().softmax(1).movedim(1, -1)[valid], labels[valid]
    classes = valid_labels.unique()
    flat = smp.losses.lovasz._lovasz_softmax_flat
    by_class = torch.stack([flat(scores, valid_labels, classes=[k]) for k in classes.tolist()])
    return (by_class * weights[classes]).sum() / weights[classes].sum()


def theirs(kind: str, logits: Tensor, labels: Tensor, ignore: int, weights: Tensor | None, options: dict) -> Tensor:
    """Return the loss of the library that is the model of ours."""
    if kind == "cross_entropy":
        weights = None if weights is None else weights.double()
        smoothing = options.get("label_smoothing", 0.0)
        losses = F.cross_entropy(
            logits, labels, weights, ignore_index=ignore, reduction="sum", label_smoothing=smoothing
        )
        return losses / ((labels != ignore).sum() if options.get("avg_non_ignore") else labels.numel())
    if kind == "lovasz":
        return lovasz(logits, labels, ignore, weights)
    if kind == "dice":
        return smp.losses.DiceLoss("multiclass", ignore_index=ignore, class_weights=weights)(logits, labels)
    options = {name.removeprefix("focal_"): value for name, value in options.items()}
    return smp.losses.FocalLoss("multiclass", ignore_index=ignore, class_weights=weights, **options)(logits, labels)


CASES = [
    ("cross_entropy", {}),
    ("cross_entropy", {"label_smoothing": 0.1}),
    ("cross_entropy", {"label_smoothing": 0.3, "avg_non_ignore": True}),
    ("focal", {}),
    ("focal", {"focal_gamma": 0.0}),
    ("focal", {"focal_gamma": 0.5, "focal_alpha": 0.25}),
    ("dice", {}),
    ("lovasz", {}),
]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    classes=st.integers(2, 9),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 7)),
    ignored=st.sampled_from([0.0, 0.3, 0.9]),
    ignore=st.sampled_from([255, 0, -1]),
    weighted=st.booleans(),
)
def test_value_and_gradient_are_the_library_s(kind, options, seed, classes, shape, ignored, ignore, weighted):
    logits, labels = batch(seed, classes, shape, ignored, ignore)
    if (labels == ignore).all():
        labels[0, 0, 0] = classes - 1  # without a label theirs are NaN; ours are below
    weights = torch.linspace(0.5, 2, classes) if weighted else None
    expected = theirs(kind, logits, labels, ignore, weights, options)
    [expected_gradient] = torch.autograd.grad(expected, logits)
    class_weight = None if weights is None else tuple(weights.tolist())
    loss, gradient = ours(logits, labels, ignore, kind=kind, class_weight=class_weight, **options)
    torch.testing.assert_close(loss, expected, check_dtype=False, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def test_smoothing_is_that_of_smp():
    logits, labels = batch(0, 5, (2, 8, 9), 0.3, 255)
    expected = smp.losses.SoftCrossEntropyLoss(smooth_factor=0.2, ignore_index=255)(logits, labels)
    loss, _ = ours(logits, labels, 255, kind="cross_entropy", label_smoothing=0.2)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("classes", [1, 2, 300])
@pytest.mark.parametrize("ignored", [0.0, 0.5, 1.0])
def test_any_number_of_classes_and_labels(kind, classes, ignored):
    ignore = 65535 if classes > 255 else 255
    logits, labels = batch(1, classes, (2, 5, 6), ignored, ignore)
    loss, gradient = ours(logits, labels, ignore, kind=kind, ohem_min_kept=1)
    assert loss.isfinite()
    assert loss >= 0
    assert gradient.isfinite().all()
    assert not gradient[:, :, labels[0] == ignore][0].any(), "an ignored pixel has a gradient"
    if ignored == 1:
        assert loss == 0
        assert not gradient.any()


@pytest.mark.parametrize("kind", LOSSES)
def test_an_ignored_class_stays_out(kind):
    """With an ignored class 0, as a background is, its pixels change neither the loss nor the gradient elsewhere."""
    logits, labels = batch(2, 4, (1, 6, 6), 0.4, 0)
    loss, gradient = ours(logits, labels, 0, kind=kind, ohem_min_kept=1)
    with torch.no_grad():
        logits[:, :, labels[0] == 0] += 5 * torch.randn(1, 4, int((labels == 0).sum()))
    again, gradient_again = ours(logits, labels, 0, kind=kind, ohem_min_kept=1)
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(gradient_again, gradient)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("scale", [1.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_float32(kind, scale, dtype):
    """Also inside autocast, and also for logits whose sigmoid or softmax is 0 or 1."""
    logits, labels = batch(3, 5, (2, 8, 8), 0.2, 255)
    half = (scale * logits.detach()).to(dtype).requires_grad_()
    full = half.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradient = ours(half, labels, 255, kind=kind, focal_gamma=0.5)
    expected, expected_gradient = ours(full, labels, 255, kind=kind, focal_gamma=0.5)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient.to(dtype))
    assert gradient.isfinite().all()


def test_lovasz_is_exact_among_many_pixels():
    """Each pixel's share is a few float32 epsilons of the whole: differences of running sums would lose it."""
    count = 1 << 18
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 2, 1, count, generator=generator)
    labels = (torch.rand(1, 1, count, generator=generator) < 0.3).long()
    single, double = (ours(x.requires_grad_(), labels, 255, kind="lovasz")[1] for x in (logits, logits.double()))
    error = (single - double).abs() / double.abs().max()
    assert error.max() < 1e-4


def test_a_sum_adds_its_terms_on_the_same_pixels():
    logits, labels = batch(4, 4, (2, 4, 5), 0.2, 255)
    small = logits.detach()[:, :, ::2, ::2].requires_grad_()
    kinds, factors = ("cross_entropy", "dice", "focal", "lovasz", "ohem"), (1.0, 0.5, 2.0, 0.25, 3.0)
    options = {"label_smoothing": 0.1, "ohem_min_kept": 5}
    total, gradient = ours(small, labels, 255, kind=kinds, weights=factors, **options)
    parts = [ours(small, labels, 255, kind=kind, **options) for kind in kinds]
    torch.testing.assert_close(total, sum(f * loss for f, (loss, _) in zip(factors, parts, strict=True)))
    torch.testing.assert_close(gradient, sum(f * g for f, (_, g) in zip(factors, parts, strict=True)))
    equal, _ = ours(small, labels, 255, kind=kinds, **options)
    torch.testing.assert_close(equal, sum(loss for loss, _ in parts))


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_falls_where_it_is_followed(kind):
    logits, labels = batch(5, 3, (1, 6, 6), 0.1, 255)
    before, gradient = ours(logits, labels, 255, kind=kind, ohem_min_kept=1)
    after, _ = ours((logits - 0.1 * gradient).detach().requires_grad_(), labels, 255, kind=kind, ohem_min_kept=1)
    assert after < before
    perfect = 50.0 * F.one_hot(labels.where(labels != 255, 0), 3).movedim(-1, 1).double()
    none, _ = ours(perfect.requires_grad_(), labels, 255, kind=kind, ohem_min_kept=1)
    assert none < 0.3 * after


def test_losses_compile_without_a_break():
    """torch.compile takes them as one graph."""
    logits, labels = batch(6, 3, (1, 4, 4), 0.2, 255)
    loss = LossConfig(tuple(LOSSES), class_weight=(1.0, 2.0, 3.0))

    def function(logits: Tensor, labels: Tensor) -> Tensor:
        return segmentation_loss(logits, labels, loss, ignore_index=255)[0]

    expected = function(logits, labels)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)(logits, labels)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(torch.autograd.grad(compiled, logits), torch.autograd.grad(expected, logits))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kind": "dices"}, "loss.kind is 'dices'; it must be one or more of cross_entropy, ohem, ohem_pyradd, focal"),
        ({"kind": ("dice", "x")}, "loss.kind is .*x.*; it must be one or more of"),
        ({"kind": ()}, "loss.kind is empty"),
        ({"kind": ("dice", "focal"), "weights": (1.0,)}, "loss.weights has 1 values for 2 losses .dice focal."),
        ({"weights": (1.0, 2.0)}, "loss.weights has 2 values for 1 losses .cross_entropy."),
        ({"kind": ("dice", "focal"), "weights": (1.0, 0.0)}, "loss.weights is 0.0; it must be above 0"),
        ({"label_smoothing": 1.0}, "loss.label_smoothing is 1.0"),
        ({"focal_gamma": math.nan}, "loss.focal_gamma is nan"),
        ({"focal_alpha": 0.0}, "loss.focal_alpha is 0.0"),
    ],
)
def test_settings_that_are_no_loss_are_refused(options, text):
    with pytest.raises(UserError, match=text):
        LossConfig(**options)
