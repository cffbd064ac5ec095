"""The linear pixel classifier: which classes it can separate, and that its likelihood is maximal."""

import numpy as np
import pytest

from segcore.demo.baseline import fit_linear
from segcore.errors import UserError


def noise(seed, size=(40, 60, 3)):
    return np.random.RandomState(seed).randint(0, 256, size, np.uint8)


def test_separates_colors_that_a_parabola_separates():
    image = noise(0)
    x = image.astype(float) / 255 - 0.5
    label = (x[..., 0] ** 2 + x[..., 1] * x[..., 2] > 0.06).astype(np.uint8)
    classifier = fit_linear([image], [label], 2, 255, position=False)
    assert (classifier.predict(image) == label).mean() > 0.99
    other = noise(1)
    x = other.astype(float) / 255 - 0.5
    assert (classifier.predict(other) == (x[..., 0] ** 2 + x[..., 1] * x[..., 2] > 0.06)).mean() > 0.97


def test_position_is_used_only_when_asked_for():
    image = noise(2)
    rows, columns = np.indices(image.shape[:2])
    label = ((rows < 20) ^ (columns < 30)).astype(np.int64)  # needs the cross term x * y
    by_place = fit_linear([image], [label], 2, 255, position=True).predict(image)
    by_color = fit_linear([image], [label], 2, 255, position=False).predict(image)
    assert (by_place == label).mean() > 0.98
    assert (by_color == label).mean() < 0.6
    assert by_place.shape == (40, 60)
    assert by_place.dtype == np.int64


def test_fit_maximizes_the_likelihood():
    """At the maximum, the expected and the observed sums of every term are equal per class."""
    image = noise(3, (50, 50, 3))
    label = np.random.RandomState(4).choice(4, (50, 50), p=[0.6, 0.2, 0.15, 0.05])
    label[image[..., 0] > 200] = 3
    classifier = fit_linear([image], [label], 4, 255, position=False, pixels=2500)
    r, g, b = image.reshape(-1, 3).T / 255
    terms = np.stack([r, g, b, r * r, r * g, r * b, g * g, g * b, b * b], 1)
    scores = terms @ classifier.weight + classifier.bias
    probability = np.exp(scores - scores.max(1, keepdims=True))
    probability /= probability.sum(1, keepdims=True)
    error = probability - np.eye(4)[label.reshape(-1)]
    assert np.abs(error.mean(0)).max() < 1e-3
    assert np.abs(terms.T @ error / len(terms)).max() < 1e-3
    likelihood = probability[np.arange(2500), label.reshape(-1)]
    frequency = np.bincount(label.reshape(-1)) / 2500
    assert -np.log(likelihood).mean() < 0.9 * -(frequency * np.log(frequency)).sum(), "better than the frequencies"


def test_same_seed_same_classifier_and_a_sample_is_enough():
    images = [noise(seed, (100, 100, 3)) for seed in range(3)]
    labels = [image[..., 1] // 86 for image in images]
    a, b = (fit_linear(images, labels, 3, 255, position=True, seed=7, pixels=3000) for _ in range(2))
    c = fit_linear(images, labels, 3, 255, position=True, seed=8, pixels=3000)
    np.testing.assert_array_equal(a.weight, b.weight)
    assert not np.array_equal(a.weight, c.weight)
    assert (a.predict(images[0]) == labels[0]).mean() > 0.95


def test_ignored_pixels_and_absent_classes_are_excluded():
    image, black = noise(5), np.zeros((40, 60, 3), np.uint8)
    label = np.where(image[..., 0] > 127, 2, 4)
    label[:3] = 255
    label[3] = -1  # neither a class nor the ignored value
    unlabeled = np.full((40, 60), 255)
    classifier = fit_linear([image, black], [label, unlabeled], 19, 255, position=False)
    assert classifier.classes.tolist() == [2, 4]
    assert (classifier.predict(image)[4:] == label[4:]).mean() > 0.98
    renamed = fit_linear([image], [np.where(label == 255, 0, label)], 19, 0, position=False)
    assert renamed.classes.tolist() == [2, 4], "the ignored value may be a class index"


def test_images_of_any_size_and_depth():
    images = [noise(6, (20, 30, 5)), noise(7, (33, 17, 5))]
    labels = [(image[..., 4] > 127).astype(np.uint8) for image in images]
    classifier = fit_linear(images, labels, 2, 255, position=True)
    for image, label in zip(images, labels, strict=True):
        assert (classifier.predict(image) == label).mean() > 0.98


@pytest.mark.parametrize("count", [0, 2])
def test_images_without_labels_are_refused(count):
    with pytest.raises(UserError, match=f"{count} training images without a labeled pixel"):
        fit_linear([noise(8)] * count, [np.full((40, 60), 255)] * count, 19, 255, position=True)
