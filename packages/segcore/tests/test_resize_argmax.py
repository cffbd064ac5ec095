"""Classes from logits at the network's resolution, against resize, softmax and maximum one after the other."""

import importlib
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from segcore import ops
from segcore.errors import UserError
from segcore.ops import registry
from segcore.ops.resize_argmax import strips

module = importlib.import_module("segcore.ops.resize_argmax")  # whose function has the same name

SIDES = st.integers(1, 40)


def as_on_a_gpu(*args: object) -> tuple[Tensor, Tensor]:
    with mock.patch.object(module, "_class_by_class", lambda strip, _, *out: module._all_classes(strip, *out)):
        return module.reference(*args)  # type: ignore[arg-type]


FORMS = {
    "plain": registry.defaults["resize_argmax"],
    "as on a GPU": as_on_a_gpu,
    "dispatched": torch.ops.segcore.resize_argmax,  # the compiled kernel where one is installed
}


def resized(logits: Tensor, size: tuple[int, int], crop: tuple[int, int], corners: bool) -> Tensor:
    if tuple(logits.shape[2:]) != size:
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=corners)
    return logits[..., : crop[0], : crop[1]]


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 2),
    classes=st.sampled_from([2, 3, 19, 256, 257]),
    given_size=st.tuples(SIDES, SIDES),
    full=st.tuples(SIDES, SIDES),
    cut=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    corners=st.booleans(),
    last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_resize_softmax_and_maximum(form, n, classes, given_size, full, cut, corners, last, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(n, classes, *given_size, generator=generator)
    if last:
        logits = logits.to(memory_format=torch.channels_last)
    crop = (max(full[0] - cut[0], 1), max(full[1] - cut[1], 1))
    found, confidence = FORMS[form](logits, full, crop, corners, True)
    alone, nothing = FORMS[form](logits, full, crop, corners, False)
    wanted = resized(logits, full, crop, corners)
    probability, index = wanted.softmax(1).max(1)
    assert torch.equal(found, alone)
    assert nothing.numel() == 0
    assert found.dtype == (torch.uint8 if classes <= 256 else torch.int32)
    torch.testing.assert_close(confidence, probability, atol=2e-5, rtol=0)
    best = wanted.topk(2, dim=1).values
    clear = best[:, 0] - best[:, 1] > 1e-4  # the others are ties up to rounding
    assert torch.equal(found[clear].long(), index[clear])


@pytest.mark.parametrize("form", FORMS)
def test_ties_infinities_and_other_sizes(form):
    run = FORMS[form]
    level = torch.zeros(1, 5, 3, 4)
    for size in ((3, 4), (7, 9), (2, 2)):
        classes, confidence = run(level, size, size, False, True)
        assert (classes == 0).all(), "of equal ones the first"
        torch.testing.assert_close(confidence, torch.full_like(confidence, 0.2))
    level[:, 1] = -torch.inf  # a class that a model rules out, at the image's own size
    level[:, 2, 1, 1] = 3
    classes, confidence = run(level, (3, 4), (3, 4), False, True)
    assert classes[0].nonzero().tolist() == [[1, 1]]
    assert confidence.isfinite().all()
    wide = torch.randn(1, 3, 70, 900)  # several blocks of the compiled kernel
    classes, _ = run(wide, (140, 1301), (130, 1300), False, False)
    expected = resized(wide, (140, 1301), (130, 1300), False).argmax(1)
    assert (classes != expected).float().mean() < 1e-4
    assert run(wide[:0], (140, 1301), (130, 1300), False, True)[1].shape == (0, 130, 1300)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(form, dtype):
    logits = torch.randn(1, 7, 9, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    classes, confidence = FORMS[form](logits, (20, 31), (20, 31), True, True)
    wanted = resized(logits.double(), (20, 31), (20, 31), True)
    chosen = wanted.gather(1, classes[:, None].long())[:, 0]
    torch.testing.assert_close(chosen, wanted.amax(1), atol=1e-5, rtol=0)  # two may be equal to rounding
    torch.testing.assert_close(confidence, wanted.softmax(1).amax(1).float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("wrong", "winner"), [(0, 0), (1, 3), (3, 2)])
def test_a_pixel_with_nan_has_no_confidence(form, wrong, winner):
    logits = torch.arange(5.0)[[0, 1, 3, 4, 2], None, None].expand(5, 4, 20).clone()[None]
    logits[:, wrong, 1, 2] = torch.nan
    classes, confidence = FORMS[form](logits, (4, 20), (4, 20), False, True)
    assert confidence.isnan().nonzero().tolist() == [[0, 1, 2]]
    assert classes[0, 1, 2] == winner
    assert (classes != 3).sum() <= 1


@pytest.mark.parametrize("form", FORMS)
def test_one_class_is_thresholded(form):
    logits = torch.tensor([-2.0, -1e-9, 0.0, 1e-9, 2.0]).view(1, 1, 1, 5)
    classes, confidence = FORMS[form](logits, (1, 5), (1, 5), False, True)
    p = logits.sigmoid()
    assert torch.equal(classes, (p[:, 0] > 0.5).to(torch.uint8))
    assert torch.equal(confidence, torch.maximum(p, 1 - p)[:, 0])


def test_threads_change_no_bit():
    logits, threads, found = torch.randn(2, 19, 40, 60), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(ops.resize_argmax(logits, (320, 480), confidence=True))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.parametrize("values", [1, 100, 10**6])
def test_strips_cover_the_map(values):
    logits = torch.randn(2, 3, 7, 5)
    for size, crop, corners in (((20, 30), (19, 28), False), ((7, 9), (7, 9), True), ((3, 5), (3, 5), False)):
        parts = list(strips(logits, size, crop, corners, values))
        assert [row for part in parts for row in range(part.rows.start, part.rows.stop)] == list(range(crop[0]))
        whole = torch.cat([part.of(slice(None)) for part in parts], 2)
        torch.testing.assert_close(whole, resized(logits, size, crop, corners))


def test_shapes_for_tracing_and_errors():
    args = torch.randn(2, 3, 4, 5), [8, 10], [7, 10], False, True
    torch.library.opcheck(torch.ops.segcore.resize_argmax, args, test_utils=("test_schema", "test_faketensor"))
    for form in FORMS.values():
        with pytest.raises(UserError, match="crop"):
            form(args[0], [8, 10], [9, 10], False, False)
        with pytest.raises(UserError, match="4 dimensions"):
            form(args[0][0], [8, 10], [8, 10], False, False)


def test_a_device_without_its_kernel_is_told():
    served = ops.kernels()["resize_argmax"]
    assert served["cuda"].startswith("plain PyTorch")
    assert served["cpu"] == ops.kernels()["ms_deform_attn"]["cpu"]
