"""Whole, sliding-window and multi-scale inference against published numbers and against exact properties."""

import dataclasses
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from segcore import environment
from segcore.config.schema import DataConfig, EvalConfig, multi_scale
from segcore.data.transforms import normalize, resize_image
from segcore.errors import UserError
from segcore.evaluation.predictor import (
    Predictor,
    check_ensemble,
    view_sizes,
    window_boxes,
)
from segcore.evaluation.scores import to_probabilities
from segcore.models.stepwise import average_entries, predict_entries
from segcore.seeds import window_seed
from segcore.testing.tiny import Tiny, TinyStepwise

PLAIN = EvalConfig(img_scale=None)
RAW = DataConfig(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


class Pooled(Tiny):
    """The reference case's network: a convolution, means of 4x4 blocks, back up; padded to multiples of `divisor`."""

    def __init__(self, case, align_corners=False, divisor=1):
        super().__init__(4, self.pool)
        self.weight, self.bias = (torch.from_numpy(case[f"conv_{name}"]) for name in ("weight", "bias"))
        self.align_corners, self.pad_to = align_corners, divisor

    def pool(self, images):
        return F.avg_pool2d(F.conv2d(images, self.weight, self.bias, padding=1), 4, ceil_mode=True)


class Pixels(TinyStepwise):
    """Logits are the pixels themselves, plus noise by seed; records what it is called with."""

    num_inference_steps = 1

    def __init__(self, noise=0.0):
        super().__init__(3, lambda images: images / 50, noise=50 * noise)


def predict(model, images, evaluate=PLAIN, data=RAW, seeds=None, ensemble=()):
    seeds = list(range(len(images))) if seeds is None else seeds
    return Predictor(model, evaluate, data, tuple(ensemble)).probabilities(images, seeds)


def random_image(height, width, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


def assert_same_classes(classes, probabilities, published):
    """Compare where the two best classes are clearly apart."""
    best = probabilities.topk(2, dim=0).values
    clear = best[0] - best[1] > 1e-4
    assert clear.float().mean() > 0.9
    assert torch.equal(classes[clear], torch.from_numpy(published).long()[clear])


SLIDE = {
    "slide32_24": {"mode": "slide", "crop": (32, 32), "stride": (24, 24)},
    "slide48x64_31x43": {"mode": "slide", "crop": (48, 64), "stride": (31, 43)},
}


@pytest.mark.parametrize(
    ("key", "settings", "rows"),
    [
        ("whole_logits", {}, 70),
        ("whole_logits_ac1", {}, 70),
        *((f"{key}_logits{suffix}", settings, 70) for key, settings in SLIDE.items() for suffix in ("", "_ac1")),
        ("slide_small_h20_logits", SLIDE["slide32_24"], 20),
    ],
)
def test_published_logits(golden, key, settings, rows):
    case = golden("eval/golden/inference.npz")
    model = Pooled(case, align_corners=key.endswith("_ac1"))
    (found,) = predict(model, [case["image_rgb_uint8"][:rows]], EvalConfig(img_scale=None, **settings), DataConfig())
    torch.testing.assert_close(found["final"], torch.from_numpy(case[key]).softmax(0), atol=1e-5, rtol=0)
    windows = {"slide32_24_logits": "slide32_24_windows", "slide_small_h20_logits": "slide_small_windows"}.get(key)
    if windows:
        assert [list(x.shape[-2:]) for x, _ in model.calls] == case[windows].tolist()


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_published_multi_scale_and_flip(golden, mode):
    case = golden("eval/golden/inference.npz")
    model, image = Pooled(case), case["image_rgb_uint8"]
    evaluate = EvalConfig((110, 70), mode, crop=(32, 32), stride=(24, 24), img_ratios=(0.5, 1.0, 1.5), flip=True)
    views = view_sizes(70, 110, evaluate)
    assert views == [
        (*s, f) for s, f in zip(case["aug_shapes"][:, 2:].tolist(), case["aug_flip"].tolist(), strict=True)
    ]
    (found,) = predict(model, [image], evaluate, DataConfig())
    expected = torch.from_numpy(case[f"aug_{mode}_mean_probs"])
    torch.testing.assert_close(found["final"], expected, atol=1e-5, rtol=0)
    (classes,) = Predictor(model, evaluate, DataConfig()).classes([image], [0])
    assert classes["final"].dtype == torch.int64
    assert_same_classes(classes["final"], found["final"], case[f"aug_{mode}_pred"])
    if mode == "whole":
        for view in (0, 1):
            torch.testing.assert_close(
                model.calls[view][0][0], torch.from_numpy(case[f"aug_input_{view}"]), atol=1e-5, rtol=0
            )


@pytest.mark.parametrize("key", ["pad16_whole", "pad16_whole_ac1", "aug_pad16_whole"])
def test_published_padding_by_the_model(golden, key):
    case = golden("eval/golden/inference.npz")
    evaluate = (
        EvalConfig((83, 53)) if key.startswith("pad") else EvalConfig((110, 70), img_ratios=(0.5, 1.0, 1.5), flip=True)
    )
    model = Pooled(case, align_corners="ac1" in key, divisor=16)
    (found,) = predict(model, [case["image_rgb_uint8"]], evaluate, DataConfig())
    published = case.get(f"{key}_probs", case.get(f"{key}_mean_probs"))
    tolerance = 1e-3 if published.dtype == np.float16 else 1e-5
    torch.testing.assert_close(found["final"], torch.from_numpy(published).float(), atol=tolerance, rtol=0)
    assert_same_classes(found["final"].argmax(0), found["final"], case[f"{key}_pred"])


@pytest.mark.parametrize(
    ("key", "size", "crop", "stride"),
    [
        ("32_24", (70, 110), (32, 32), (24, 24)),
        ("769_513_1025x2049", (1025, 2049), (769, 769), (513, 513)),
        ("512x1024_341x683_1024x2048", (1024, 2048), (512, 1024), (341, 683)),
    ],
)
def test_published_windows(golden, key, size, crop, stride):
    expected = golden("eval/golden/inference.npz")[f"window_boxes_{key}"]
    assert window_boxes(*size, crop, stride) == [tuple(box) for box in expected.tolist()]


def test_windows_by_hand():
    assert window_boxes(5, 10, (4, 6), (3, 4)) == [(0, 0, 4, 6), (0, 4, 4, 10), (1, 0, 5, 6), (1, 4, 5, 10)]
    assert window_boxes(3, 4, (8, 8), (5, 5)) == [(0, 0, 3, 4)]
    with pytest.raises(UserError, match="leave gaps"):
        window_boxes(64, 64, (16, 16), (16, 17))


SIDE = st.integers(1, 90)


@given(SIDE, SIDE, st.tuples(SIDE, SIDE), st.data())
def test_windows_cover_everything_in_order(height, width, crop, data):
    stride = data.draw(st.tuples(st.integers(1, crop[0]), st.integers(1, crop[1])))
    boxes = window_boxes(height, width, crop, stride)
    covered = np.zeros((height, width), bool)
    for y1, x1, y2, x2 in boxes:
        covered[y1:y2, x1:x2] = True
        assert (y2 - y1, x2 - x1) == (min(crop[0], height), min(crop[1], width))
    assert covered.all()
    assert len(set(boxes)) == len(boxes)
    assert boxes == sorted(boxes)
    rows, columns = (max(-(-(n - c) // s), 0) + 1 for n, c, s in zip((height, width), crop, stride, strict=True))
    assert len(boxes) == rows * columns


def test_views_by_hand():
    assert view_sizes(375, 500, EvalConfig(img_scale=(2048, 512))) == [(512, 683, False)]
    assert view_sizes(300, 2000, EvalConfig(img_scale=(2048, 512))) == [(307, 2048, False)]
    assert view_sizes(500, 375, EvalConfig(img_scale=(2048, 1024))) == [(1365, 1024, False)]
    assert view_sizes(33, 21, dataclasses.replace(PLAIN, img_ratios=(1.0, 0.5))) == [(33, 21, False), (16, 10, False)]
    views = view_sizes(1024, 2048, multi_scale(EvalConfig()))
    assert len(views) == 12
    assert views[:3] == [(512, 1024, False), (512, 1024, True), (768, 1536, False)]


def test_pixelwise_model_does_not_see_windows_and_flips():
    image = random_image(21, 34)
    expected = (torch.from_numpy(image).permute(2, 0, 1).float() / 50).softmax(0)
    for evaluate in (
        PLAIN,
        EvalConfig(None, "slide", (8, 10), (5, 7)),
        EvalConfig(None, flip=True),
        EvalConfig((34, 21)),
    ):
        (found,) = predict(Pixels(), [image], evaluate)
        torch.testing.assert_close(found["1"], expected, atol=1e-6, rtol=0)
        assert found["1"].dtype == torch.float32


def test_softmax_follows_the_resize_and_views_are_averaged_after_it():
    model = Pixels()
    (found,) = predict(model, [random_image(20, 30)], EvalConfig((30, 20), img_ratios=(0.5, 1.0)))
    small, large = (images / 50 for images, *_ in model.calls)
    assert small.shape == (1, 3, 10, 15)
    up = F.interpolate(small, size=(20, 30), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found["1"], ((up.softmax(1) + large.softmax(1)) / 2)[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("evaluate", [EvalConfig(None, flip=True), EvalConfig(None, "slide", (12, 12), (8, 8))])
def test_answer_does_not_depend_on_the_other_images(evaluate):
    images = [random_image(*size, seed=i) for i, size in enumerate([(16, 20), (20, 16), (16, 20), (16, 20)])]
    together = predict(Pixels(noise=1.0), images, evaluate, seeds=[7, 8, 9, 7])
    for image, seed, found in zip(images, [7, 8, 9, 7], together, strict=True):
        (alone,) = predict(Pixels(noise=1.0), [image], evaluate, seeds=[seed])
        torch.testing.assert_close(found["1"], alone["1"], atol=1e-6, rtol=0)
    model = Pixels()
    predict(model, images, evaluate, seeds=[7, 8, 9, 7])
    assert sorted({len(call[0]) for call in model.calls}) == [1, 3]


def test_every_view_and_window_has_its_own_seed():
    model = Pixels()
    predict(model, [random_image(16, 20)] * 2, EvalConfig(None, "slide", (16, 12), (16, 8), flip=True), seeds=[3, 4])
    expected = [[window_seed(3, view, window), window_seed(4, view, window)] for view in (0, 1) for window in (0, 1)]
    assert [seeds for _, seeds in model.calls] == expected


def test_one_entry_per_step():
    (found,) = predict(Pixels(), [random_image(8, 8)], dataclasses.replace(PLAIN, steps=(1, 3, 10), flip=True))
    assert list(found) == ["1", "3", "10"]
    assert not torch.allclose(found["1"], found["10"])
    (found,) = predict(Pixels(), [random_image(8, 8)])
    assert list(found) == ["1"]


class Constant(TinyStepwise):
    """The same logits everywhere."""

    num_inference_steps = 1

    def __init__(self, *logits, background=False):
        self.constant = torch.tensor(logits)
        super().__init__(len(logits), lambda images: self.constant[None, :, None, None] + 0 * images[:, :1])
        self.ignore_index = 0 if background else 255


def test_an_ensemble_averages_the_probabilities_of_each_entry():
    model, others = Constant(1.0, 2.0, 4.0), [Constant(0.0, 3.0, 0.0), Constant(2.0, 0.0, 1.0)]
    settings = dataclasses.replace(PLAIN, steps=(1, 2), flip=True)
    (found,) = predict(model, [random_image(4, 6)], settings, ensemble=others)
    for step in (1, 2):
        expected = torch.stack([step * model.constant, *(other.constant for other in others)]).softmax(1).mean(0)
        torch.testing.assert_close(found[str(step)], expected[:, None, None].expand(3, 4, 6))


def test_a_member_without_background_says_it_has_none():
    model, other = Constant(1.0, 2.0, 4.0, background=True), Constant(3.0, 0.0)
    (found,) = predict(model, [random_image(4, 6)], ensemble=[other])
    expected = (model.constant.softmax(0) + torch.cat([torch.zeros(1), other.constant.softmax(0)])) / 2
    torch.testing.assert_close(found["1"][:, 0, 0], expected)


@pytest.mark.parametrize(
    ("model", "other"),
    [
        (Constant(1.0, 2.0, 4.0), Constant(1.0, 2.0)),
        (Constant(1.0, 2.0, 4.0, background=True), Constant(1.0)),
        (Constant(1.0), Constant(1.0)),
    ],
)
def test_an_ensemble_needs_the_same_classes(model, other):
    with pytest.raises(UserError, match="name models of the same classes"):
        check_ensemble(model, [other])


def test_entries_accumulate():
    settings = dataclasses.replace(PLAIN, steps=(1, 3, 10))
    (single,) = predict(Pixels(), [random_image(8, 8)], settings)
    (running,) = predict(Pixels(), [random_image(8, 8)], dataclasses.replace(settings, ensemble_steps=True))
    parts = list(single.values())
    for count, found in enumerate(running.values(), 1):
        torch.testing.assert_close(found, torch.stack(parts[:count]).mean(0))


class Coarse(TinyStepwise):
    """Steps at a quarter of the size, of images padded to multiples of 8; the logits that are still in memory."""

    num_inference_steps = 1

    def __init__(self, num_classes=3, pad_to=8, align_corners=False, background=False):
        weight = torch.randn(num_classes, 3, 4, 4, generator=torch.Generator().manual_seed(num_classes))
        super().__init__(num_classes, lambda images: F.conv2d(images / 500, weight, stride=4), noise=20.0)
        self.pad_to, self.align_corners, self.ignore_index = pad_to, align_corners, 0 if background else 255
        self.kept, self.most = [], 0

    def step_answers(self, images, steps=None, seeds=None):
        for entry, logits in super().step_answers(images, steps, seeds):
            self.kept = [x for x in (*self.kept, weakref.ref(logits)) if x() is not None]
            self.most = max(self.most, len(self.kept))
            yield entry, logits


SETTINGS = [
    {},
    {"img_scale": (40, 30)},
    {"mode": "slide", "crop": (24, 24), "stride": (16, 16)},
    {"flip": True},
    {"flip": True, "img_scale": (40, 30)},
    {"flip": True, "img_ratios": (0.5, 1.5), "mode": "slide", "crop": (24, 24), "stride": (16, 16)},
    {"ensemble_steps": True, "flip": True},
]


def former(predictor, image, seed):
    """The probabilities by entry as they were once computed: all entries, views and windows as whole maps."""
    settings, model = predictor.evaluate, predictor.model
    size, views = image.shape[:2], view_sizes(*image.shape[:2], settings)

    def view(model, number, batch):
        if settings.mode == "whole":
            return predict_entries(model, batch, settings.steps, [window_seed(seed, number, 0)])
        total, count = {}, torch.zeros(batch.shape[2:])
        boxes = window_boxes(*batch.shape[2:], settings.crop, settings.stride)
        for window, (y1, x1, y2, x2) in enumerate(boxes):
            count[y1:y2, x1:x2] += 1
            part = predict_entries(model, batch[..., y1:y2, x1:x2], settings.steps, [window_seed(seed, number, window)])
            for entry, logits in part.items():
                total.setdefault(entry, torch.zeros(1, model.num_classes, *batch.shape[2:]))
                total[entry][..., y1:y2, x1:x2] += logits
        return {entry: logits / count for entry, logits in total.items()}

    mean = {}
    for number, (h, w, flip) in enumerate(views):
        array = normalize(resize_image(image, (h, w)), predictor.data.mean, predictor.data.std)
        batch = torch.from_numpy(array).permute(2, 0, 1)[None]
        for entry, logits in view(model, number, batch.flip(-1) if flip else batch).items():
            p = to_probabilities(logits, size, model.align_corners)
            mean[entry] = mean.get(entry, 0) + (p.flip(-1) if flip else p) / len(views)
    if settings.ensemble_steps:
        average_entries(mean)
    return {entry: p[0] for entry, p in mean.items()}


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda x: " ".join(x) or "plain")
@pytest.mark.parametrize("model", [{}, {"pad_to": 1, "align_corners": True}, {"num_classes": 1}], ids=str)
@torch.no_grad()
def test_classes_and_confidence_are_those_of_whole_maps_of_probabilities(settings, model):
    """Also what `probabilities` gives; and no entry is there any more when the next one is computed."""
    settings = dataclasses.replace(EvalConfig(img_scale=None, steps=(1, 2, 5)), **settings)
    model, image = Coarse(**model).eval(), random_image(44, 57)
    predictor = Predictor(model, settings, RAW)
    expected = former(predictor, image, 3)
    model.kept, model.most = [], 0
    [classes] = predictor.classes([image], [3])
    views = len(view_sizes(44, 57, settings))
    windows = 1 if settings.mode == "whole" else 30
    assert model.most <= views * windows, "more than one entry at a time"
    [both] = predictor.classes_and_confidence([image], [3])
    [probabilities] = predictor.probabilities([image], [3])
    assert list(classes) == list(both) == list(probabilities) == list(expected) == ["1", "2", "5"]
    for entry, p in expected.items():
        torch.testing.assert_close(probabilities[entry], p, atol=1e-6, rtol=0)
        best = p.topk(2, dim=0).values if len(p) > 1 else torch.stack([p[0], 1 - p[0]]).sort(0, descending=True).values
        torch.testing.assert_close(both[entry][1], best[0], atol=2e-5, rtol=0)
        clear = best[0] - best[1] > 1e-5
        assert clear.float().mean() > 0.99
        wanted = p.argmax(0) if len(p) > 1 else (p[0] > 0.5).long()
        assert classes[entry].dtype == both[entry][0].dtype == torch.int64
        assert torch.equal(classes[entry][clear], wanted[clear])
        assert torch.equal(classes[entry], both[entry][0])


def test_one_entry_at_a_time():
    """At 20 entries no more logits are in memory than at one: those of the entry, or of an entry of each view."""
    image = random_image(44, 57)
    for settings, most in (({}, 2), ({"flip": True}, 3)):  # one is there while the next one comes
        model = Coarse().eval()
        evaluate = dataclasses.replace(EvalConfig(img_scale=None, steps=tuple(range(1, 21))), **settings)
        Predictor(model, evaluate, RAW).classes([image], [0])
        assert model.most <= most


def test_an_ensemble_of_coarse_models():
    models = [Coarse(4, background=True).eval(), Coarse(3).eval(), Coarse(4, pad_to=16).eval()]
    evaluate = dataclasses.replace(EvalConfig(img_scale=None, steps=(1, 2)), flip=True)
    image = random_image(44, 57)
    found = Predictor(models[0], evaluate, RAW, tuple(models[1:])).probabilities([image], [3])[0]
    single = [former(Predictor(x, dataclasses.replace(evaluate, steps=()), RAW), image, 3)["1"] for x in models[1:]]
    own = former(Predictor(models[0], evaluate, RAW), image, 3)
    for entry, p in own.items():
        total = p + F.pad(single[0], (0, 0, 0, 0, 1, 0)) + single[1]
        torch.testing.assert_close(found[entry], total / 3, atol=1e-6, rtol=0)


def test_one_class_is_thresholded():
    one = Tiny(1, lambda images: images[:, :1] - 100)
    image = np.array([[[90, 0, 0], [100, 0, 0], [110, 0, 0]]], np.uint8)
    (probabilities,) = predict(one, [image])
    torch.testing.assert_close(probabilities["final"], torch.tensor([[[-10.0, 0.0, 10.0]]]).sigmoid())
    (classes,) = Predictor(one, PLAIN, RAW).classes([image], [0])
    assert classes["final"].tolist() == [[0, 0, 1]]


def test_equal_probabilities_give_the_first_class():
    image = np.full((2, 2, 3), 9, np.uint8)
    image[0, 0] = (0, 200, 200)
    (classes,) = Predictor(Pixels(), PLAIN, RAW).classes([image], [0])
    assert classes["1"].tolist() == [[1, 0], [0, 0]]


@pytest.mark.parametrize("channels_last", [False, True])
def test_network_precision_and_layout(channels_last):
    calls = []

    def answer(images):
        calls.append((images, torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        return F.conv2d(images, torch.ones(2, 3, 1, 1))

    model = Tiny(2, answer)
    evaluate = EvalConfig(None, "slide", (8, 8), (6, 6), precision="bf16", channels_last=channels_last)
    (found,) = predict(model, [random_image(9, 13)], evaluate)
    assert found["final"].dtype == torch.float32
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert all(images.is_contiguous(memory_format=layout) for images, *_ in calls)
    assert all(flags == [False, False] for _, *flags in calls)
    torch.testing.assert_close(found["final"], torch.full_like(found["final"], 0.5))


@pytest.mark.parametrize("hardware", [False, True])
def test_auto_precision_is_that_of_the_hardware(hardware, monkeypatch):
    monkeypatch.setattr(environment, "has_bfloat16", lambda device: hardware)
    dtypes = []

    def answer(images):
        dtypes.append(F.conv2d(images, torch.ones(2, 3, 1, 1)).dtype)
        return images[:, :2]

    predict(Tiny(2, answer), [random_image(9, 13)], EvalConfig(None, precision="auto"))
    assert dtypes == [torch.bfloat16 if hardware else torch.float32]


def test_images_of_16_bits():
    image = random_image(6, 8)
    deep = DataConfig(bit_depth=16, mean=(0.0, 0.0, 0.0), std=(256.0, 256.0, 256.0))
    (found,) = predict(Pixels(), [image.astype(np.uint16) * 256], data=deep)
    torch.testing.assert_close(found, predict(Pixels(), [image])[0])
