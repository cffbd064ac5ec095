"""The transforms reproduce the published systems' numbers, given the same draws."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.random import RandomState

from segcore.config.schema import DataConfig
from segcore.data import transforms as T
from segcore.data.batch import Batch

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
SIDE = st.integers(1, 3000)
AUGMENT = {"ratio_range": (0.5, 2.0), "cat_max_ratio": 0.75, "flip": 0.5, "photometric": True}
"""The published augmentations."""


class Draws:
    """A RandomState whose `randint` and `uniform` return given values in order; `coins` are the draws from {0, 1}."""

    def __init__(self, coins, values):
        self.coins, self.values = list(coins), list(values)

    def randint(self, low, high=None):
        return self.coins.pop(0) if high is None else self.values.pop(0)

    def uniform(self, low, high):
        return self.values.pop(0)


@pytest.mark.parametrize("name", ["random", "natural"])
@pytest.mark.parametrize("factor", [0.5, 1.3, 2])
def test_resize_image_is_byte_equal(golden, name, factor):
    cases = golden("eval/golden/resize.npz")
    image, expected = cases[f"image_{name}"], cases[f"{name}_x{factor}"]
    size = T.rescale_size(*image.shape[:2], float(factor))
    assert size == expected.shape[:2]
    np.testing.assert_array_equal(T.resize_image(image, size), expected)


@pytest.mark.parametrize("size", ["97x41", "26x18", "53x37", "106x74", "53x74", "20x90"])
def test_resize_to_a_size_is_byte_equal(golden, size):
    cases, (w, h) = golden("eval/golden/resize.npz"), map(int, size.split("x"))
    np.testing.assert_array_equal(T.resize_image(cases["image_random"], (h, w)), cases[f"random_to_{size}"])
    np.testing.assert_array_equal(T.resize_label(cases["label"], (h, w)), cases[f"label_to_{size}"])


def test_resize_to_exactly_half_and_labels_by_factor(golden):
    cases = golden("eval/golden/resize.npz")
    half = T.resize_image(cases["image_even_36x52"], (18, 26))
    np.testing.assert_array_equal(half, cases["even_half_area_path"])
    for factor in ("x0.5", "x1.3", "x2"):
        expected = cases[f"label_{factor}"]
        np.testing.assert_array_equal(T.resize_label(cases["label"], expected.shape), expected)


def test_rescale_size_golden(golden):
    cases = golden("eval/golden/resize.npz")
    for scale in ((2048, 512), (2048, 1024), (2049, 1025), (2560, 640), (512, 2048)):
        sizes = [T.rescale_size(h, w, scale) for h, w in cases["keep_ratio_in_hw"].tolist()]
        np.testing.assert_array_equal(sizes, cases[f"keep_ratio_{scale[0]}x{scale[1]}_hw"])
    sizes = [T.rescale_size(int(h), int(w), float(f)) for h, w, f in cases["rescale_factor_cases"]]
    np.testing.assert_array_equal(sizes, cases["rescale_factor_hw"])


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        ((512, 683), (2048, 512), (512, 683)),
        ((300, 2000), (2048, 512), (307, 2048)),
        ((96, 1500), (2048, 512), (131, 2048)),
        ((375, 500), (2048, 1024), (1024, 1365)),
        ((1024, 2048), (2049, 1025), (1025, 2049)),
        ((1, 900), (90, 90), (1, 90)),
    ],
)
def test_rescale_size(size, scale, expected):
    assert T.rescale_size(*size, scale) == expected


@given(SIDE, SIDE, SIDE, SIDE)
def test_rescaled_image_fits_the_box_and_touches_it(height, width, a, b):
    new = T.rescale_size(height, width, (a, b))
    assert max(new) <= max(a, b)
    assert min(new) <= min(a, b)
    assert max(new) == max(a, b) or min(new) == min(a, b)
    assert new == T.rescale_size(height, width, (b, a)) == T.rescale_size(width, height, (a, b))[::-1]


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 130), st.integers(1, 130), st.integers(0, 9))
def test_resize_label_takes_floor_nearest(height, width, new_height, new_width, seed):
    label = RandomState(seed).randint(0, 256, (height, width)).astype(np.uint8)
    expected = [
        [label[y * height // new_height, x * width // new_width] for x in range(new_width)] for y in range(new_height)
    ]
    found = T.resize_label(label, (new_height, new_width))
    # 1 / (new / old) in double may fall just below an integer that i * old / new hits: the published index is one less.
    exact = (np.arange(new_height) * height % new_height != 0)[:, None] & (
        np.arange(new_width) * width % new_width != 0
    )
    np.testing.assert_array_equal(found[exact], np.array(expected)[exact])
    np.testing.assert_array_equal(found, cv2.resize(label, (new_width, new_height), interpolation=cv2.INTER_NEAREST))


def bilinear(plane, size):
    """The published fixed-point resize of one (H, W) uint8 plane, from its formula."""

    def axis(new, old):
        source = ((np.arange(new) + 0.5) * (1 / (new / old)) - 0.5).astype(np.float32)
        low = np.floor(source).astype(int)
        fraction = source - low.astype(np.float32)
        weights = np.rint(2048 * np.stack([1 - fraction, fraction])).astype(int)
        return np.clip([low, low + 1], 0, old - 1), weights, low

    (y, b, _), (x, a, low) = axis(size[0], plane.shape[0]), axis(size[1], plane.shape[1])
    a[:, (low < 0) | (low >= plane.shape[1] - 1)] = [[2048], [0]]
    rows = plane[:, x[0]].astype(int) * a[0] + plane[:, x[1]].astype(int) * a[1] >> 4
    value = (rows[y[0]] * b[0][:, None] >> 16) + (rows[y[1]] * b[1][:, None] >> 16)
    return np.clip(value + 2 >> 2, 0, 255)


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 130])
def test_resize_treats_every_channel_alike(channels):
    image = RandomState(0).randint(0, 256, (19, 23, channels)).astype(np.uint8)
    resized = T.resize_image(image, (31, 14))
    assert resized.shape == (31, 14, channels)
    for c in range(channels):
        np.testing.assert_array_equal(resized[..., c], bilinear(image[..., c], (31, 14)))


@st.composite
def boxes_of_resized_images(draw):
    """Return a size, its new size (also near it, half and double), and a box (y1, y2, x1, x2) of the latter."""
    old = draw(st.tuples(st.integers(1, 90), st.integers(1, 90)))
    half, double = tuple(max(side // 2, 1) for side in old), tuple(2 * side for side in old)
    near = st.tuples(*(st.integers(max(side - 2, 1), side + 2) for side in old))
    new = draw(st.sampled_from([old, half, double]) | near | st.tuples(st.integers(1, 200), st.integers(1, 200)))
    sides = [sorted(draw(st.tuples(st.integers(0, side - 1), st.integers(1, side)))) for side in new]
    return old, new, tuple(end for low, high in sides for end in (low, max(high, low + 1)))


@example(((90, 90), (89, 90), (0, 40, 0, 50)), (3, np.uint8))  # 42 rows at 89/90 round to 42, which OpenCV copies
@example(((90, 90), (91, 91), (0, 40, 0, 40)), (2, np.uint16))
@given(boxes_of_resized_images(), st.sampled_from([(3, np.uint8), (1, np.uint8), (2, np.uint16), (130, np.uint8)]))
def test_a_box_is_cut_from_the_resized_image_and_label(sizes, form):
    old, new, (y1, y2, x1, x2) = sizes
    channels, dtype = form
    image = RandomState(0).randint(0, np.iinfo(dtype).max + 1, (*old, channels)).astype(dtype)
    box = np.s_[y1:y2, x1:x2]
    whole = np.dstack([cv2.resize(image[..., i : i + 128], new[::-1]) for i in range(0, channels, 128)])
    found = T.resize_image(image, new, (y1, y2, x1, x2))
    assert found.shape == (y2 - y1, x2 - x1, channels)
    np.testing.assert_allclose(found.astype(int), whole[box], rtol=0, atol=int(dtype == np.uint16))
    label = image[..., 0].astype(np.uint8)
    expected = cv2.resize(label, new[::-1], interpolation=cv2.INTER_NEAREST)[box]
    np.testing.assert_array_equal(T.resize_label(label, new, (y1, y2, x1, x2)), expected)


@pytest.mark.parametrize("size", [(1024, 2047), (1024, 2049)])
def test_near_scale_1_a_crop_is_resized_and_only_an_image_of_the_same_size_is_copied(size):
    image = RandomState(0).randint(0, 256, (1024, 2048, 3)).astype(np.uint8)
    found = T.resize_image(image, size, (0, 769, 0, 769))
    np.testing.assert_array_equal(found, cv2.resize(image, size[::-1])[:769, :769])
    assert (found != image[:769, :769]).any()
    np.testing.assert_array_equal(T.resize_image(image, (1024, 2048)), image)
    np.testing.assert_array_equal(cv2.resize(image, (2048, 1024)), image)


@pytest.mark.parametrize("label", ["label0", "label1", "label2", "label3"])
def test_random_crop_golden(golden, label):
    cases = golden("eval/golden/random_crop.npz")
    crop, ratio = tuple(cases["crop_size"].tolist()), float(cases["cat_max_ratio"])
    boxes = [T.random_crop_box(cases[label], crop, ratio, RandomState(seed)) for seed in range(20)]
    height, width = cases[label].shape  # the published boxes may reach beyond a small label; slicing cuts them
    expected = np.minimum(cases[f"{label}_final_y1y2x1x2"], [height, height, width, width])
    np.testing.assert_array_equal(boxes, expected)


def test_random_crop_without_class_limit_and_its_predicate(golden):
    cases = golden("eval/golden/random_crop.npz")
    boxes = [T.random_crop_box(cases["label0"], (48, 64), 1.0, RandomState(seed)) for seed in range(20)]
    np.testing.assert_array_equal(boxes, cases["label0_plain_y1y2x1x2"])
    accepted = [T.is_varied(crop, 0.75) for crop in cases["predicate_crops"]]
    np.testing.assert_array_equal(accepted, cases["predicate_accept"])


def test_a_crop_needs_two_classes_and_the_largest_strictly_below_the_limit():
    label = np.array([[1, 1, 1, 2], [255, 255, 255, 255]], np.uint8)
    assert not T.is_varied(label, 0.75)
    assert T.is_varied(label, 0.76)
    assert not T.is_varied(np.full((4, 4), 255, np.uint8), 0.75)
    assert not T.is_varied(np.full((4, 4), 3, np.uint8), 1.0)
    nearly = np.zeros(2**24, np.uint8)  # 1.5e-8 below the limit, indistinguishable in float32
    nearly[: 2**22] = 1
    nearly[-1] = 255
    assert T.is_varied(nearly.reshape(4096, 4096), 0.75)


@given(st.integers(1, 80), st.integers(1, 80), st.tuples(st.integers(1, 80), st.integers(1, 80)), st.integers(0, 99))
def test_crop_box_lies_inside_and_has_the_crop_size_where_possible(height, width, crop, seed):
    label = RandomState(seed).randint(0, 2, (height, width)).astype(np.uint8)
    y1, y2, x1, x2 = T.random_crop_box(label, crop, 0.75, RandomState(seed))
    assert 0 <= y1 < y2 <= height
    assert 0 <= x1 < x2 <= width
    assert (y2 - y1, x2 - x1) == (min(height, crop[0]), min(width, crop[1]))


PHOTOMETRIC = {  # coins in the order of the draws: brightness, mode, (contrast), saturation, hue, (contrast)
    "none_mode1": ([0, 1, 0, 0, 0], []),
    "brightness": ([1, 1, 0, 0, 0], [20]),
    "brightness_neg60": ([1, 1, 0, 0, 0], [-60]),
    "contrast_mode1": ([0, 1, 1, 0, 0], [0.7]),
    "contrast_mode0": ([0, 0, 0, 0, 1], [0.7]),
    "contrast1.5_mode0": ([0, 0, 0, 0, 1], [1.5]),
    "saturation": ([0, 1, 0, 1, 0], [1.3]),
    "saturation1.0": ([0, 1, 0, 1, 0], [1.0]),
    "saturation0.5": ([0, 1, 0, 1, 0], [0.5]),
    "hue": ([0, 1, 0, 0, 1], [10]),
    "hue-18": ([0, 1, 0, 0, 1], [-18]),
    "hue17": ([0, 1, 0, 0, 1], [17]),
    "hue0": ([0, 1, 0, 0, 1], [0]),
}


def assert_close_levels(found, expected):
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


@pytest.mark.parametrize("case", PHOTOMETRIC)
@pytest.mark.parametrize("image", ["img16", "img16x64", "rand32"])
def test_photometric_with_given_draws(golden, image, case):
    cases = golden("eval/golden/photometric.npz")
    found = T.photometric_distortion(cases[image], Draws(*PHOTOMETRIC[case]))
    assert_close_levels(found, cases[f"{image}/{case}"])


@pytest.mark.parametrize("seed", range(10))
def test_photometric_from_numpy_seeds(golden, seed):
    cases = golden("eval/golden/photometric.npz")
    rng = RandomState(seed)
    assert_close_levels(T.photometric_distortion(cases["img16x64"], rng), cases[f"img16x64/seed{seed}"])


def test_photometric_steps_by_hand():
    image = np.array([[[0, 100, 250], [10, 10, 10]]], np.uint8)
    brighter = T.photometric_distortion(image, Draws([1, 0, 0, 0, 0], [20.7]))
    np.testing.assert_array_equal(brighter, [[[20, 120, 255], [30, 30, 30]]])  # truncated, clipped
    duller = T.photometric_distortion(image, Draws([0, 1, 1, 0, 0], [0.55]))
    np.testing.assert_array_equal(duller, [[[0, 55, 137], [5, 5, 5]]])
    turned = T.photometric_distortion(np.array([[[255, 0, 0]]], np.uint8), Draws([0, 1, 0, 0, 1], [-18]))
    np.testing.assert_allclose(turned, [[[255, 0, 153]]], atol=1)  # hue 0 - 18 wraps to 162 of 180
    assert image[0, 0, 1] == 100  # the input is unchanged


def test_normalize_is_bit_identical(golden):
    cases = golden("eval/golden/train_pipeline.npz")
    np.testing.assert_array_equal(T.normalize(cases["image"], MEAN, STD), cases["normalized"])
    gray = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2)
    np.testing.assert_array_equal(T.normalize(gray, MEAN, STD)[:, 0], cases["normalized_all256_rgb"])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3, 7, 130])
def test_normalize_any_image(channels, dtype):
    image = RandomState(1).randint(0, np.iinfo(dtype).max + 1, (5, 6, channels)).astype(dtype)
    mean, std = np.linspace(10, 200, channels), np.linspace(3, 60, channels)
    found = T.normalize(image, mean, std)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, (image.astype(np.float32) - mean.astype(np.float32)) / std.astype(np.float32))


def test_pad(golden):
    cases = golden("eval/golden/train_pipeline.npz")
    batch = Batch.of([(cases["image"], cases["label"])], (72, 140), 255, [0], 0)
    [image], [label] = batch.on("cpu", MEAN, STD)
    np.testing.assert_array_equal(image[:, -12:, -20:].permute(1, 2, 0), cases["pad_size72x140_img_corner"])
    np.testing.assert_array_equal(label, cases["pad_size72x140_label"])


@given(st.data(), st.sampled_from([np.uint8, np.uint16, np.float32]), st.integers(1, 4), st.booleans())
def test_a_batch_on_its_device_is_every_sample_normalized_then_padded(draw, dtype, channels, channels_last):
    numbers = st.floats(-1e5, 1e5, width=32)
    mean = draw.draw(st.lists(numbers, min_size=channels, max_size=channels))
    std = draw.draw(st.lists(numbers.filter(lambda x: x > 1e-3), min_size=channels, max_size=channels))
    rng = RandomState(draw.draw(st.integers(0, 99)))
    image = rng.randint(0, 1 << 16, (20, 70, channels)).astype(dtype)
    image[0] = np.arange(70)[:, None] * 3
    image[-4:] = np.arange(280).reshape(4, 70, 1)  # all of 8 bits
    label = rng.randint(0, 5, (20, 70)).astype(np.uint8)
    batch = Batch.of([(image, label), (image[:9, :8], label[:9, :8])], (20, 70), 4, [1, 2], 3)
    assert (batch.images.element_size(), batch.labels.element_size()) == (np.dtype(dtype).itemsize, 1)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images, labels = batch.on("cpu", mean, std, layout)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert images.is_contiguous(memory_format=layout)
    expected = np.zeros((2, channels, 20, 70), np.float32)
    expected[0] = T.normalize(image, mean, std).transpose(2, 0, 1)
    expected[1, :, :9, :8] = T.normalize(image[:9, :8], mean, std).transpose(2, 0, 1)
    assert images.contiguous().numpy().tobytes() == expected.tobytes()
    np.testing.assert_array_equal(labels[0], label)
    np.testing.assert_array_equal(labels[1], np.pad(label[:9, :8], [(0, 11), (0, 62)], constant_values=4))
    again, _ = batch.on("cpu", mean, std)
    assert torch.equal(again, images), "the batch itself does not change"


@pytest.mark.parametrize("seed", range(6))
def test_pipeline_golden(golden, seed):
    cases = golden("eval/golden/train_pipeline.npz")
    transform = T.TrainTransform(DataConfig(**AUGMENT, img_scale=(128, 64), crop=(48, 64)), ignore_index=255)
    image, label = transform(cases["image"], cases["label"], RandomState(seed))
    np.testing.assert_array_equal(label.numpy(), cases[f"seed{seed}_label"][0])
    levels = image.numpy().transpose(1, 2, 0) * np.float32(STD) + np.float32(MEAN)
    expected = cases[f"seed{seed}_img"].transpose(1, 2, 0) * np.float32(STD) + np.float32(MEAN)
    assert_close_levels(np.rint(levels), np.rint(expected))
    assert (image.dtype, label.dtype) == (torch.float32, torch.int64)


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """The benchmark, which contains the published pipeline in plain OpenCV."""
    path = Path(__file__).parents[3] / "benchmarks" / "train_pipeline.py"
    if not path.is_file():
        pytest.skip(f"no {path}: the plain pipeline is in the repository only")
    spec = importlib.util.spec_from_file_location("train_pipeline", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("scale", [(128, 64), (300, 100), None])
def test_every_byte_is_that_of_the_plain_opencv_pipeline(benchmark, scale):
    data = DataConfig(**AUGMENT, img_scale=scale, crop=(48, 64))
    plain, ours = benchmark.Plain(data), T.TrainTransform(data)
    image = cv2.resize(RandomState(0).randint(0, 256, (9, 17, 3)).astype(np.uint8), (160, 90))
    label = cv2.resize(RandomState(1).randint(0, 5, (3, 6)).astype(np.uint8), (160, 90), interpolation=0)
    label[label == 4] = 255
    for seed in range(40):
        expected, found = (pipeline(image, label, RandomState(seed)) for pipeline in (plain, ours))
        for a, b in zip(expected, found, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b, err_msg=f"seed {seed}")


def test_pipeline_without_a_base_scale_uses_the_images_own(golden):
    cases = golden("eval/golden/resize.npz")
    for seed, (w, h) in enumerate(cases["ratio_range_none_37x53_seed0to5"].tolist()):
        size = T.rescale_size(37, 53, (w, h))
        data = DataConfig(img_scale=None, ratio_range=(0.5, 2.0), crop=size)
        image, _ = T.TrainTransform(data)(cases["image_random"], cases["label"], RandomState(seed))
        expected = T.normalize(T.resize_image(cases["image_random"], size), MEAN, STD)
        np.testing.assert_array_equal(image.numpy().transpose(1, 2, 0), expected)


@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint8), (4, np.uint8), (3, np.uint16), (13, np.uint16)])
def test_pipeline_on_other_images(channels, dtype):
    mean, std = (1.0,) * channels, (2.0,) * channels
    augment = {**AUGMENT, "photometric": False}
    data = DataConfig(img_scale=(64, 64), crop=(80, 72), channels=channels, mean=mean, std=std, **augment)
    image = RandomState(0).randint(0, np.iinfo(dtype).max, (40, 50, channels)).astype(dtype)
    label = RandomState(0).randint(0, 5, (40, 50)).astype(np.uint8)
    first, second = (T.TrainTransform(data, ignore_index=0)(image, label, RandomState(3)) for _ in range(2))
    assert first[0].shape == (channels, 80, 72)
    assert first[1].shape == (80, 72)
    assert (first[0] == second[0]).all()
    assert (first[1] == second[1]).all()


def test_padding_is_the_mean_color_and_the_ignored_class():
    data = DataConfig(img_scale=(20, 10), ratio_range=(1.0, 1.0), crop=(16, 32), flip=0.0, photometric=False)
    image, label = T.TrainTransform(data, ignore_index=0)(
        np.full((10, 20, 3), 200, np.uint8), np.full((10, 20), 3, np.uint8), RandomState(0)
    )
    assert (image[:, 10:] == 0).all()
    assert (image[:, :, 20:] == 0).all()
    assert (image[:, :10, :20] != 0).all()
    assert (label[:10, :20] == 3).all()
    assert label.sum() == 3 * 200


def test_flip_turns_image_and_label_together():
    data = DataConfig(
        img_scale=None, ratio_range=(1, 1), crop=(10, 20), flip=1, photometric=False, mean=(0,) * 3, std=(1,) * 3
    )
    label = RandomState(0).randint(0, 19, (10, 20)).astype(np.uint8)
    image, flipped = T.TrainTransform(data)(np.repeat(label[..., None], 3, axis=2), label, RandomState(0))
    np.testing.assert_array_equal(flipped, label[:, ::-1])
    np.testing.assert_array_equal(image[0], label[:, ::-1])


def test_blur_comes_last_and_spreads_a_dot():
    dot = np.zeros((32, 32, 3), np.uint8)
    dot[16, 16] = 255
    settings = {"img_scale": (32, 32), "ratio_range": (1.0, 1.0), "crop": (32, 32), "flip": 0.0, "photometric": False}
    data = DataConfig("folder", **settings, cat_max_ratio=1.0, blur=1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    image, label = T.TrainTransform(data)(dot, dot[..., 0], RandomState(0))
    draws = RandomState(0)
    draws.random_sample(), draws.randint(0, 1), draws.randint(0, 1), draws.rand(), draws.rand()  # ratio .. blur or not
    expected = T.gaussian_blur(dot, draws.random_sample())
    assert np.array_equal(image.numpy().transpose(1, 2, 0), expected)
    assert 0 < expected[16, 17, 0] < expected[16, 16, 0] < 255
    assert np.array_equal(label, dot[..., 0])
    assert np.array_equal(T.gaussian_blur(dot, 0.0), dot)
