"""The confusion matrix against the published numbers, an independent library, and arithmetic by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from torchmetrics.functional import classification

from segcore.errors import UserError
from segcore.evaluation.metrics import BoundaryIoU, ConfusionMatrix

PER_CLASS = ("IoU", "Acc", "Dice", "Fscore", "Precision", "Recall")
SETS = [
    *("city19_ignore", "ade150_reduce_zero", "absent6", "only_one_present", "num_classes_1", "binary2"),
    *("label_out_of_range", "one_all_ignored", "ignore0_7"),
]


def areas(matrix):
    """Intersection, predicted and labeled pixels per class of a matrix with more than one class."""
    counts = matrix.matrix
    return [counts.diagonal()[:-1].tolist(), counts.sum(0)[:-1].tolist(), counts.sum(1)[:-1].tolist()]


def reduce_zero(label):
    return np.where((label == 0) | (label == 255), 255, label - 1).astype(np.uint8)


@pytest.mark.parametrize("name", SETS)
def test_published_numbers(golden, name):
    file = golden("eval/golden/metrics.npz")
    case = {key.removeprefix(f"{name}/"): value for key, value in file.items() if key.startswith(f"{name}/")}
    num_classes, ignore_index = int(case["num_classes"]), int(case["ignore_index"])
    label = reduce_zero(case["label"]) if case["reduce_zero_label"] else case["label"]
    total = ConfusionMatrix(num_classes, ignore_index)
    for i, (one_prediction, one_label) in enumerate(zip(case["pred"], label, strict=True)):
        image = ConfusionMatrix(num_classes, ignore_index).update(one_prediction, one_label)
        if num_classes > 1:
            assert areas(image) == [case[f"area_{key}"][i].tolist() for key in ("intersect", "pred", "label")]
        total.merge(image)
    found = total.compute()
    assert found["aAcc"] == pytest.approx(float(case["f64_aAcc"]), abs=1e-12)
    for key in PER_CLASS:
        np.testing.assert_allclose(found[key], case[f"f64_{key}"], atol=1e-12)
        np.testing.assert_allclose(found[key], case[key], atol=2e-6)
    published = dict(zip(case["eval_keys"].tolist(), case["eval_values"].tolist(), strict=True))
    assert list(published)[:7] == list(found)[:7]
    for key in list(published)[:7]:
        assert found[key] == pytest.approx(published[key], abs=1.5e-4, nan_ok=True)


def test_real_ade20k_predictions(golden, real_data):
    case = golden("eval/golden/real_ade20k.npz")
    total = ConfusionMatrix(150)
    for i, name in enumerate(case["names"]):
        label = reduce_zero(np.array(Image.open(real_data / f"ade20k/annotations/validation/{name}.png")))
        prediction = np.array(Image.open(real_data / f"ade20k/predictions/validation/{name}.png"))
        image = ConfusionMatrix(150).update(prediction, label)
        assert areas(image) == [case[f"area_{key}"][i].tolist() for key in ("intersect", "pred", "label")]
        total.merge(image)
    found = total.compute()
    for key in PER_CLASS:
        np.testing.assert_allclose(found[key], case[key], atol=2e-6)
    for key, percent in zip(case["summary_keys"].tolist(), case["summary_percent"].tolist(), strict=True):
        if key != "bIoU":
            assert 100 * found[key if key == "aAcc" else f"m{key}"] == pytest.approx(percent, abs=0.01)


def test_by_hand():
    # class 0: 1 of 2 found; 1: all 2 found, 1 too many; 2: only predicted; 3: in neither; 4: missed
    label = np.array([[0, 0, 1, 1], [4, 255, 255, 7]], np.uint8)
    prediction = torch.tensor([[0, 1, 1, 1], [2, 3, 0, 0]])
    found = ConfusionMatrix(5).update(prediction, label).compute()
    nan = math.nan
    # the label 7 is no class: its prediction 0 still counts as predicted
    np.testing.assert_allclose(found["IoU"], [1 / 3, 2 / 3, 0, nan, 0])
    np.testing.assert_allclose(found["Acc"], [1 / 2, 1, nan, nan, 0])
    np.testing.assert_allclose(found["Precision"], [1 / 2, 2 / 3, 0, nan, nan])
    np.testing.assert_allclose(found["Recall"], found["Acc"])
    np.testing.assert_allclose(found["Dice"], [1 / 2, 4 / 5, 0, nan, 0])
    np.testing.assert_allclose(found["Fscore"], [1 / 2, 4 / 5, nan, nan, nan])
    assert found["aAcc"] == pytest.approx(3 / 5)
    assert found["mIoU"] == pytest.approx(1 / 4)
    assert found["mAcc"] == pytest.approx(1 / 2)
    assert found["mDice"] == pytest.approx(1.3 / 4)
    assert found["mFscore"] == pytest.approx(1.3 / 2)


def test_one_class_counts_agreement():
    found = ConfusionMatrix(1).update([1, 0, 1, 1, 0], [1, 0, 0, 1, 255]).compute()
    assert found["aAcc"] == found["mAcc"] == pytest.approx(3 / 4)
    assert found["mIoU"] == pytest.approx(3 / 5)


def test_nothing_counted_is_nan():
    found = ConfusionMatrix(3).update(np.zeros((2, 2), np.int64), np.full((2, 2), 255)).compute()
    assert math.isnan(found["mIoU"])
    assert math.isnan(found["aAcc"])


def test_refuses_what_it_cannot_count():
    matrix = ConfusionMatrix(3)
    with pytest.raises(UserError, match=r"prediction \(2, 3\)"):
        matrix.update(np.zeros((2, 3), np.int64), np.zeros((3, 2), np.int64))
    with pytest.raises(UserError, match="class indices"):
        matrix.update(torch.rand(2, 2), np.zeros((2, 2), np.int64))
    assert matrix.matrix.sum() == 0


VALUES = arrays(np.uint8, st.integers(1, 40), elements=st.sampled_from([0, 1, 2, 3, 4, 255]))


@given(VALUES, st.randoms(use_true_random=False), st.sampled_from([255, 0]))
def test_torchmetrics_agrees(label, random, ignore_index):
    label = np.where(label == 255, ignore_index, label)
    prediction = np.array([random.randrange(5) for _ in label])
    found = ConfusionMatrix(5, ignore_index).update(prediction, label).compute()
    pair = torch.tensor(prediction), torch.tensor(label, dtype=torch.int64)
    matrix = classification.multiclass_confusion_matrix(*pair, 5, ignore_index=ignore_index)
    shared = {"num_classes": 5, "average": "none", "ignore_index": ignore_index}
    for key, oracle in {
        "IoU": classification.multiclass_jaccard_index(*pair, **shared),
        "Acc": classification.multiclass_accuracy(*pair, **shared),
        "Dice": classification.multiclass_f1_score(*pair, **shared),
        "Precision": classification.multiclass_precision(*pair, **shared),
    }.items():
        ours = found[key]
        defined = ~ours.isnan()
        torch.testing.assert_close(ours[defined].float(), oracle[defined])
    absent = (matrix.sum(0) + matrix.sum(1)) == 0
    assert torch.equal(found["IoU"].isnan(), absent)


@given(
    st.lists(
        st.tuples(st.integers(-2, 300), st.sampled_from([-1, 0, 1, 2, 3, 18, 19, 149, 254, 255, 256])), max_size=40
    ),
    st.sampled_from([1, 2, 19, 150, 255, 256, 300]),
    st.sampled_from([255, 0, -1]),
    st.sampled_from([np.uint8, np.int32, np.int64]),
    st.sampled_from([np.uint8, np.int16, np.int64]),
)
def test_counts_are_those_of_a_loop_whatever_the_types(pairs, classes, ignore_index, p_type, g_type):
    p, g = (np.array([pair[i] for pair in pairs], np.int64).astype(t) for i, t in ((0, p_type), (1, g_type)))
    expected = np.zeros((classes + 1, classes + 1), np.int64)
    for a, b in zip(p.tolist(), g.tolist(), strict=True):
        if b != ignore_index:
            expected[b if 0 <= b < classes else classes, a if 0 <= a < classes else classes] += 1
    np.testing.assert_array_equal(ConfusionMatrix(classes, ignore_index).update(p, g).matrix, expected)


def test_counts_beyond_what_float32_holds():
    matrix = ConfusionMatrix(2).update(np.ones(2**24 + 3, np.uint8), np.zeros(2**24 + 3, np.uint8))
    assert matrix.matrix[0, 1] == matrix.matrix.sum() == 2**24 + 3


@given(VALUES, VALUES, st.randoms(use_true_random=False))
def test_parts_add_up_to_the_whole(first, second, random):
    predictions = [np.array([random.randrange(5) for _ in label]) for label in (first, second)]
    parts = [ConfusionMatrix(5).update(*pair) for pair in zip(predictions, (first, second), strict=True)]
    parts[0].merge(parts[1])
    whole = ConfusionMatrix(5).update(np.concatenate(predictions), np.concatenate([first, second]))
    streamed = ConfusionMatrix(5).update(predictions[1], second).update(predictions[0], first)
    assert torch.equal(parts[0].matrix, whole.matrix)
    assert torch.equal(streamed.matrix, whole.matrix)
    assert whole.matrix.sum() == (np.concatenate([first, second]) != 255).sum()


@pytest.mark.parametrize("case", ["city_mode", "ade151_mode", "plain_no_ignore", "large_band"])
def test_boundary_iou_equals_the_published_counts(golden, case):
    g = {k.removeprefix(f"{case}/"): v for k, v in golden("eval/golden/mbiou.npz").items() if k.startswith(case)}
    total = BoundaryIoU(int(g["num_classes"]), int(g["ignore_index"]))
    for i, (pred, label) in enumerate(zip(g["pred"], g["label"], strict=True)):
        one = BoundaryIoU(total.num_classes, total.ignore_index).update(pred, label)
        np.testing.assert_array_equal(one.intersection, g["boundary_intersect"][i])
        np.testing.assert_array_equal(one.union, g["boundary_union"][i])
        total.update(torch.from_numpy(pred), label)
    np.testing.assert_allclose(total.compute()["BIoU"], g["bIoU"], atol=1e-6)
    assert round(total.compute()["mBIoU"] * 100, 2) == pytest.approx(g["summary_percent"][-1], abs=0.01)


@pytest.mark.parametrize("classes", [3, 9000, 40000])
def test_boundaries_of_any_number_of_classes(classes):
    label = np.zeros((64, 64), np.int64)
    label[:, 32:] = classes - 1
    found = BoundaryIoU(classes, 65535).update(label, label).compute()
    assert found["BIoU"][[0, classes - 1]].tolist() == [1, 1]
    assert found["mBIoU"] == 1


def test_boundary_iou_by_hand():
    label = np.zeros((60, 80), np.uint8)  # 2 % of the diagonal of 100 pixels: a band of 2
    label[:, 40:] = 1
    metric = BoundaryIoU(3).update(label, label)
    assert metric.union.tolist() == [60 * 40 - 56 * 36] * 2 + [0]
    assert metric.compute()["BIoU"].tolist()[:2] == [1.0, 1.0]
    assert math.isnan(metric.compute()["BIoU"][2])
    assert metric.compute()["mBIoU"] == 1.0
    with pytest.raises(UserError, match="two maps"):
        metric.update(label, label[:50])


def test_areas_after_a_label_map(golden):
    g = {k.removeprefix("label_map/"): v for k, v in golden("eval/golden/metrics.npz").items()}
    table = np.arange(256, dtype=np.uint8)
    table[g["old"]] = g["new"]  # from the values as they were: nothing is replaced twice
    matrix = ConfusionMatrix(3).update(g["pred"], table[g["label"]])
    for ours, name in zip(areas(matrix), ("intersect", "pred", "label"), strict=True):
        np.testing.assert_array_equal(ours, g[f"area_{name}"])


@pytest.mark.parametrize("name", ["city19_ignore", "absent6", "only_one_present", "label_out_of_range", "ignore0_7"])
def test_counts_give_the_figures_of_the_ddrnet_seed(golden, name):
    """Its mIoU is the plain mean over all classes, absent ones counting as 0; labels beyond the classes are ignored."""
    case, seed = golden("eval/golden/metrics.npz"), golden("eval/golden/metrics_ddrnet.npz")
    classes, ignored = int(case[f"{name}/num_classes"]), int(case[f"{name}/ignore_index"])
    matrix = ConfusionMatrix(classes, ignored)
    for i, (pred, label) in enumerate(zip(case[f"{name}/pred"], case[f"{name}/label"], strict=True)):
        matrix.update(pred, np.where(label < classes, label, ignored))
        intersect, predicted, labeled = (np.array(x) for x in areas(matrix))
        union = predicted + labeled - intersect
        figures = intersect.sum() / labeled.sum(), (intersect / np.maximum(union, 2.2e-16)).mean()
        np.testing.assert_allclose(figures, seed[f"{name}/running_pixAcc_mIoU"][i], rtol=1e-6)
    np.testing.assert_array_equal(intersect, seed[f"{name}/total_inter"])
    np.testing.assert_array_equal(union, seed[f"{name}/total_union"])


def test_boundary_counts_are_added_and_bands_of_zero_hold_nothing():
    rng = np.random.RandomState(0)
    pairs = [(rng.randint(0, 4, (30, 50)), rng.randint(0, 5, (30, 50))) for _ in range(3)]
    whole, parts = BoundaryIoU(4, 0), [BoundaryIoU(4, 0).update(*pair) for pair in pairs]
    for prediction, label in pairs:
        whole.update(prediction, label)
    assert torch.equal(sum(part.counts for part in parts), whole.counts)
    assert whole.union.sum() > 0
    assert whole.union[0] == 0
    assert BoundaryIoU(4).update(np.zeros((10, 10), int), np.zeros((10, 10), int)).union.sum() == 0


def test_an_ignored_class_that_is_predicted_counts_as_zero_and_the_mean_without_it_is_there():
    label, prediction = torch.tensor([0, 1, 1, 2, 2, 2]), torch.tensor([1, 1, 0, 2, 2, 1])
    found = ConfusionMatrix(3, ignore_index=0).update(prediction, label).compute()
    assert found["IoU"].tolist() == pytest.approx([0, 1 / 3, 2 / 3])
    assert found["mIoU"] == pytest.approx(1 / 3)
    assert found["mIoU without ignored"] == pytest.approx(1 / 2)
    assert "mIoU without ignored" not in ConfusionMatrix(3).update(prediction, label).compute()
