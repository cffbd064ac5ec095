"""Our parts against those of real MMSegmentation, 0.30 or 1.x, on the same input: no stored numbers (nox -s openmmlab).

`test_openmmlab.py` has our models inside its tools; here both sides compute the same thing by themselves.
"""

import copy
import subprocess
import sys
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from numpy.random import RandomState

from segcore.config.mmseg_config import import_config
from segcore.config.schema import DataConfig, EvalConfig
from segcore.data.images import read_image, read_label
from segcore.data.layouts.ade20k import TABLE as ADE20K_TABLE
from segcore.data.transforms import TrainTransform
from segcore.evaluation.metrics import ConfusionMatrix
from segcore.evaluation.predictor import Predictor
from segcore.models.backbones import build_backbone
from segcore.models.heads import FPN
from segcore.testing.tiny import Tiny
from segcore.training.optimizer import build_optimizer
from segcore.training.schedule import learning_rate

mmseg = pytest.importorskip("mmseg", reason="MMSegmentation is not installed")
pytestmark = [pytest.mark.openmmlab, pytest.mark.filterwarnings("ignore")]

from segcore.openmmlab import ONE  # noqa: E402

# The training pipeline

NORM = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}
CROP = (64, 96)


def their_transform(scale, ratios, cat_max_ratio):
    """Return a function of an image and a label file: their training pipeline, image (3, *CROP) and label (*CROP)."""
    resize = {"type": "RandomResize", "scale": scale, "keep_ratio": True} if ONE else {"type": "Resize"}
    steps = [
        {"type": "LoadImageFromFile"},
        {"type": "LoadAnnotations"},
        {**resize, "ratio_range": ratios, **({} if ONE else {"img_scale": scale})},
        {"type": "RandomCrop", "crop_size": CROP, "cat_max_ratio": cat_max_ratio},
        {"type": "RandomFlip", "prob": 0.5},
        {"type": "PhotoMetricDistortion"},
    ]
    if ONE:
        from mmseg.models import SegDataPreProcessor
        from mmseg.registry import TRANSFORMS

        steps = [TRANSFORMS.build(step) for step in [*steps, {"type": "PackSegInputs"}]]
        preprocess = SegDataPreProcessor(**NORM, size=CROP, bgr_to_rgb=True, pad_val=0, seg_pad_val=255)

        def transform(image, label):
            results = {"img_path": image, "seg_map_path": label, "reduce_zero_label": False, "seg_fields": []}
            for step in steps:
                results = step(results)
            batch = preprocess({name: [value] for name, value in results.items()}, training=True)
            return batch["inputs"][0], batch["data_samples"][0].gt_sem_seg.data[0]

        return transform
    from mmseg.datasets.pipelines import Compose

    compose = Compose(
        [
            *steps,
            {"type": "Normalize", "to_rgb": True, **NORM},
            {"type": "Pad", "size": CROP, "pad_val": 0, "seg_pad_val": 255},
            {"type": "DefaultFormatBundle"},
        ]
    )

    def transform(image, label):
        info = {"img_info": {"filename": image}, "ann_info": {"seg_map": label}, "img_prefix": None, "seg_prefix": None}
        results = compose({**info, "seg_fields": []})
        return results["img"].data, results["gt_semantic_seg"].data[0]

    return transform


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Files of images and labels (smooth, with noise, of one class, mostly ignored) of several sizes, PNG and JPEG."""
    folder, rng, files = tmp_path_factory.mktemp("pictures"), RandomState(0), []
    for number, (height, width) in enumerate([(64, 128), (75, 101), (150, 61), (40, 300)]):
        coarse = rng.randint(0, 256, (6, 9, 3)).astype(np.uint8)
        image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        if number % 2:
            image = rng.randint(0, 256, image.shape).astype(np.uint8)
        label = rng.choice([0, 1, 18, 255], (5, 7), p=[0.7, 0.1, 0.1, 0.1]).astype(np.uint8)
        if number == 3:
            label[:] = 255
            label[0, 0] = 4
        label = cv2.resize(label, (width, height), interpolation=cv2.INTER_NEAREST)
        paths = str(folder / f"{number}{'.jpg' if number == 2 else '.png'}"), str(folder / f"{number}_label.png")
        for path, array in zip(paths, (image, label), strict=True):
            cv2.imwrite(path, array)
        files.append(paths)
    return files


@pytest.mark.parametrize("cat_max_ratio", [0.75, 1.0])
@pytest.mark.parametrize("scale", [(256, 64), (130, 90)])
def test_train_pipelines_agree_for_the_same_draws(scale, cat_max_ratio, pictures):
    """Theirs draws from numpy's global generator, ours from a generator of the same algorithm, in the same order."""
    theirs = their_transform(scale, (0.5, 2.0), cat_max_ratio)
    norm = {name: tuple(values) for name, values in NORM.items()}
    augment = {"ratio_range": (0.5, 2.0), "cat_max_ratio": cat_max_ratio, "flip": 0.5, "photometric": True}
    ours = TrainTransform(DataConfig("cityscapes", img_scale=scale, crop=CROP, **augment, **norm))
    state = np.random.get_state()
    try:
        for number, (image, label) in enumerate(pictures):
            for seed in range(30):
                np.random.seed(seed)
                expected = theirs(image, label)
                found = ours(read_image(image), read_label(label), rng := RandomState(seed))
                assert rng.rand() == np.random.rand(), (number, seed)  # as many draws
                assert torch.equal(found[1], expected[1].long()), (number, seed)
                assert torch.equal(found[0], expected[0]), (number, seed)
    finally:
        np.random.set_state(state)


# The test pipeline


def their_views(scale, ratios, flip):
    """Return a function of an image file: what their test pipeline, with augmentations, hands to their models.

    For each view, on 0.30 the normalized image and its meta data, on 1.x the image and its sample.
    """
    if ONE:
        from mmseg.registry import TRANSFORMS

        sizes = [{"scale_factor": ratio} for ratio in ratios]
        if scale:
            sizes = [{"scale": tuple(int(x * ratio) for x in scale)} for ratio in ratios]
        choices = [
            [{"type": "Resize", "keep_ratio": True, **size} for size in sizes],
            [{"type": "RandomFlip", "prob": prob} for prob in ((0.0, 1.0) if flip else (0.0,))],
            [{"type": "mmseg.PackSegInputs"}],
        ]
        load, augment = map(
            TRANSFORMS.build, ({"type": "LoadImageFromFile"}, {"type": "TestTimeAug", "transforms": choices})
        )

        def views(image):
            found = augment(load({"img_path": image, "reduce_zero_label": False}))
            return [*zip(found["inputs"], found["data_samples"], strict=True)]

        return views
    from mmseg.datasets.pipelines import Compose

    steps = [
        {"type": "Resize", "keep_ratio": True},
        {"type": "RandomFlip"},
        {"type": "Normalize", "to_rgb": True, **NORM},
        {"type": "ImageToTensor", "keys": ["img"]},
        {"type": "Collect", "keys": ["img"]},
    ]
    augment = {"type": "MultiScaleFlipAug", "img_scale": scale, "img_ratios": [*ratios], "flip": flip}
    compose = Compose([{"type": "LoadImageFromFile"}, {**augment, "transforms": steps}])

    def views(image):
        found = compose({"img_info": {"filename": image}, "img_prefix": None})
        return [*zip(found["img"], (meta.data for meta in found["img_metas"]), strict=True)]

    return views


def preprocessor():
    from mmseg.models import SegDataPreProcessor

    return SegDataPreProcessor(**NORM, bgr_to_rgb=True)


RATIOS = (0.5, 0.75, 1.0, 1.75)


@pytest.mark.parametrize(
    ("scale", "ratios", "flip"),
    [
        ((256, 64), (1.0,), False),
        ((130, 90), RATIOS, True),
        # with `scale_factor`, 1.x rounds the sizes for other ratios half up, where 0.30 and we cut off
        (None, (1.0, 2.0) if ONE else RATIOS, True),
    ],
)
def test_test_pipelines_agree(scale, ratios, flip, pictures):
    norm = {name: tuple(values) for name, values in NORM.items()}
    data, evaluate = DataConfig("cityscapes", **norm), EvalConfig(img_scale=scale, img_ratios=ratios, flip=flip)
    predictor, views = Predictor(Tiny(2), evaluate, data), their_views(scale, ratios, flip)
    for image, _ in pictures:
        expected, found = views(image), []

        def network(batch, _, found=found):
            found.append(batch)
            return [("final", batch[:, :2])]

        predictor.probabilities([read_image(image)], [0], network=network)
        assert len(found) == len(expected) == len(ratios) * (1 + flip)
        for batch, (view, sample) in zip(found, expected, strict=True):
            if ONE:
                view = preprocessor()({"inputs": [view], "data_samples": [sample]})["inputs"][0]
            assert torch.equal(batch[0], view)


# Metrics

METRICS = ["mIoU", "mDice", "mFscore"]


def random_maps(seed, values, labels=None):
    """Return predictions and labels of three sizes, int64, of the given values, equal in about half of the pixels."""
    rng, pairs = RandomState(seed), []
    for shape in ((20, 30), (7, 50), (31, 11)):
        label = rng.choice(values if labels is None else labels, shape)
        other = rng.choice(values, shape)
        pairs.append((np.where((rng.rand(*shape) < 0.5) & np.isin(label, values), label, other), label))
    return [list(maps) for maps in zip(*pairs, strict=True)]


ALL = np.arange(19)
CASES = {  # classes, predicted values, labels
    "all": (19, ALL, [*ALL, 255]),
    "absent class": (19, np.delete(ALL, [0, 7]), [*np.delete(ALL, [0, 7]), 255]),
    "only predicted": (19, ALL, [*np.delete(ALL, [3, 18]), 255]),
    "only labeled": (19, np.delete(ALL, [3, 18]), [*ALL, 255]),
    "all ignored": (19, ALL, [255]),
    "never right": (4, [0, 1], [2, 3]),
    "beyond the classes": (5, np.arange(8), [*range(9), 254, 255]),
    "many": (150, np.arange(150), [*range(150), 255]),
    "two": (2, [0, 1], [0, 1, 255]),
    "one": (1, [0, 1], [0, 1, 255]),
}


def their_metrics(predictions, labels, num_classes, **settings):
    """Return their values per class, and 1.x's means as it reports them."""
    if not ONE:
        from mmseg.core.evaluation.metrics import eval_metrics

        return eval_metrics(predictions, labels, num_classes, 255, METRICS, **settings), {}
    from mmseg.evaluation import IoUMetric

    metric = IoUMetric(iou_metrics=METRICS)
    metric.dataset_meta = {"classes": [f"class {i}" for i in range(num_classes)]}
    maps = [[torch.from_numpy(array)[None] for array in arrays] for arrays in (predictions, labels)]
    samples = [{"pred_sem_seg": {"data": p}, "gt_sem_seg": {"data": g}} for p, g in zip(*maps, strict=True)]
    metric.process({}, samples)
    areas = map(sum, zip(*metric.results, strict=True))
    return metric.total_area_to_metrics(*areas, METRICS), metric.compute_metrics(metric.results)


def assert_same_metrics(matrix, theirs):
    found, (classes, reported) = matrix.compute(), theirs
    assert {"aAcc", "IoU", "Acc", "Dice", "Fscore", "Precision", "Recall"} == set(classes)
    for name, values in classes.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, atol=1e-7, err_msg=name)
        if name != "aAcc":
            np.testing.assert_allclose(found[f"m{name}"], np.nanmean(values), rtol=1e-6, atol=1e-7, err_msg=name)
    for name, percent in reported.items():
        np.testing.assert_allclose(100 * found[name], percent, atol=0.0051, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_metrics_agree(case):
    num_classes, values, labels = CASES[case]
    for seed in range(10):
        maps = random_maps(seed, values, labels)
        matrix = ConfusionMatrix(num_classes)
        for prediction, label in zip(*maps, strict=True):
            matrix.update(prediction, label)
        assert_same_metrics(matrix, their_metrics(*maps, num_classes))


def test_metrics_agree_where_the_zero_label_is_reduced(tmp_path):
    """0.30 reduces it when it evaluates, and both lines when they load a label file."""
    predictions, labels = random_maps(0, np.arange(150), [*range(151), 255])
    labels = [label.astype(np.uint8) for label in labels]
    matrix, loaded = ConfusionMatrix(150), []
    for prediction, label in zip(predictions, labels, strict=True):
        cv2.imwrite(str(tmp_path / "label.png"), label)
        reduced = ADE20K_TABLE[read_label(tmp_path / "label.png")]
        loaded.append(their_label(str(tmp_path / "label.png")))
        np.testing.assert_array_equal(reduced, loaded[-1])
        matrix.update(prediction, reduced)
    assert_same_metrics(matrix, their_metrics(predictions, [label.astype(np.int64) for label in loaded], 150))
    if not ONE:
        assert_same_metrics(matrix, their_metrics(predictions, labels, 150, reduce_zero_label=True))


def their_label(path):
    """Return a label file as they load it with `reduce_zero_label`."""
    if ONE:
        from mmseg.registry import TRANSFORMS

        load = TRANSFORMS.build({"type": "LoadAnnotations"})
        return load({"seg_map_path": path, "reduce_zero_label": True, "seg_fields": []})["gt_seg_map"]
    from mmseg.datasets.pipelines import LoadAnnotations

    load = LoadAnnotations(reduce_zero_label=True)
    return load({"ann_info": {"seg_map": path}, "seg_prefix": None, "seg_fields": []})["gt_semantic_seg"]


# Published files of theirs, read by them and by us

CONFIGS = Path(mmseg.__path__[0], ".mim", "configs")
FILES = {
    "segformer": ("segformer_mit-b0_512x512_160k_ade20k", "segformer_mit-b0_8xb2-160k_ade20k-512x512"),
    "deeplabv3plus": (
        "deeplabv3plus_r50-d8_512x1024_80k_cityscapes",
        "deeplabv3plus_r50-d8_4xb2-80k_cityscapes-512x1024",
    ),
    "mobilenet_v2": (
        "deeplabv3plus_m-v2-d8_512x1024_80k_cityscapes",
        "mobilenet-v2-d8_deeplabv3plus_4xb2-80k_cityscapes-512x1024",
    ),
}
if ONE:
    FILES["ddrnet"] = None, "ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024"


def both(folder):
    """Return one published file as their Config and as our Experiment."""
    if ONE:
        from mmengine import Config
    else:
        from mmcv import Config
    path = CONFIGS / folder / f"{FILES[folder][ONE]}.py"
    return Config.fromfile(str(path)), import_config(path).experiment


# Learning rates


def groups(base):
    """Return an optimizer of theirs with two learning rates."""
    parts = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (base, 10 * base)]
    return torch.optim.SGD(parts, lr=base)


def rates_of_zero(settings, base, total, iterations):
    """Return the rates that 0.30's hook sets at these iterations of a run."""
    from mmcv.runner.hooks import lr_updater

    assert settings.pop("policy") == "poly"
    hook = lr_updater.PolyLrUpdaterHook(**settings)
    runner = SimpleNamespace(optimizer=groups(base), max_iters=total)
    hook.before_run(runner)
    for runner.iter in iterations:
        hook.before_train_iter(runner)
        yield [group["lr"] for group in runner.optimizer.param_groups]


def rates_of_one(schedulers, base, iterations):
    """Return the rates that 1.x's schedulers set in the first iterations of a run."""
    from mmengine.registry import PARAM_SCHEDULERS

    optimizer = groups(base)
    schedulers = [PARAM_SCHEDULERS.build({**each, "optimizer": optimizer}) for each in schedulers]
    for _ in range(iterations):
        yield [group["lr"] for group in optimizer.param_groups]
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()


def shorten(config, exp, total, warmup):
    """Return our Experiment with the learning rates of a shorter run, to which their Config is changed."""
    if ONE:
        ends = {exp.schedule.iterations: total, exp.schedule.warmup_iterations: warmup}
        for each in config.param_scheduler:
            each.update(begin=ends.get(each.begin, 0), end=ends[each.end])
    else:
        assert config.runner.max_iters == exp.schedule.iterations
        config.runner.max_iters = total
        config.lr_config.update({"warmup_iters": warmup} if warmup else {})
    return replace(exp, schedule=replace(exp.schedule, iterations=total, warmup_iterations=warmup))


def our_rate(schedule, base, i):
    """Return our learning rate; 1.x's arrives one iteration earlier, at the end of the warm-up and of the run."""
    if ONE:
        warmup = schedule.warmup_iterations
        schedule = replace(schedule, iterations=schedule.iterations - 1, warmup_iterations=warmup - (i < warmup))
    return learning_rate(schedule, base, i)


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("folder", FILES)
def test_learning_rates_agree(folder, short):
    """The first 100 iterations of the published run, 0.30's also up to its end; and a run of 100 in all."""
    config, exp = both(folder)
    steps, base = [*range(100)], exp.optimizer.lr
    if short:
        exp = shorten(config, exp, 100, min(exp.schedule.warmup_iterations, 30))
    if ONE:
        theirs = rates_of_one(config.param_scheduler, base, len(steps))
    else:
        steps += [] if short else [*range(100, exp.schedule.iterations, 1111), exp.schedule.iterations - 1]
        theirs = rates_of_zero(dict(config.lr_config), base, config.runner.max_iters, steps)
    for i, found in zip(steps, theirs, strict=True):
        expected = [our_rate(exp.schedule, lr, i) for lr in (base, 10 * base)]
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-16, err_msg=str(i))


# Models


def build_theirs(config):
    """Return their model with random weights, batch norm's statistics among them, and plain batch norm."""
    if ONE:
        from mmengine.model import revert_sync_batchnorm
        from mmseg.registry import MODELS

        build = MODELS.build
    else:
        from mmcv.cnn.utils import revert_sync_batchnorm
        from mmseg.models import build_segmentor as build
    config.model.pop("data_preprocessor", None)
    torch.manual_seed(0)
    model = revert_sync_batchnorm(build(config.model))
    for tensor in model.state_dict().values():
        if tensor.ndim == 1:
            tensor.uniform_(0.5, 1.5)
    return model


def without_drops(model):
    for module in model.modules():
        for name in ("p", "drop_prob", "rate"):  # of Dropout, their and our DropPath
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model.double().train()


def their_batch(images, labels):
    """Return a batch as their loaders give it to their model."""
    meta = {"img_shape": images.shape[2:], "ori_shape": images.shape[2:], "pad_shape": images.shape[2:]}
    if not ONE:
        return {"img": images, "img_metas": [meta] * len(images), "gt_semantic_seg": labels[:, None]}
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    samples = [SegDataSample(metainfo=meta, gt_sem_seg=PixelData(data=label[None])) for label in labels]
    return {"inputs": images, "data_samples": samples}


@pytest.fixture(params=FILES)
def models(request):
    """Their model and ours with the same weights, our Experiment and their Config."""
    config, exp = both(request.param)
    if request.param == "ddrnet":
        weights = [round(64 * weight) / 64 for weight in exp.loss.class_weight]  # exact in float32, as ours are
        exp = replace(exp, loss=replace(exp.loss, ohem_min_kept=3000, ohem_threshold=0.05, class_weight=tuple(weights)))
        for loss in config.model.decode_head.loss_decode:
            loss.update(min_kept=3000, thres=0.05, class_weight=weights)
    theirs, ours = build_theirs(config), exp.model.build()
    report = ours.load_official(theirs.state_dict())
    assert not report.dropped
    assert not report.ignored
    if request.param != "ddrnet":  # which we publish under its authors' names, not under those of 1.x
        theirs.load_state_dict(ours.official_state(), strict=True)
    return theirs, ours, exp, config


def batch(exp, dtype=torch.float64, seed=1):
    """Return images and labels."""
    count, size = 2, (49, 67)
    if exp.name.startswith("ddrnet"):  # ours would pad; and batch norm of two pooled images multiplies differences
        count, size = 4, (64, 96)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(exp.model.num_classes, (count, *size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    return torch.randn(count, 3, *size, generator=generator, dtype=dtype), labels


def test_logits_agree(models):
    theirs, ours, exp = (*(model.eval() for model in models[:2]), models[2])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        images, _ = batch(exp, dtype)
        meta = [{"img_shape": images.shape[2:]}] * len(images)
        with torch.no_grad():
            expected = theirs.to(dtype).encode_decode(images, meta)
            largest = float(expected.abs().max())
            torch.testing.assert_close(ours.to(dtype)(images), expected, rtol=0, atol=tolerance * largest)
        assert expected.std() > 0.01 * largest


def their_probabilities(model, views):
    """Return their probabilities (K, H, W) for the views of an image, and the classes (H, W) that they predict."""
    if ONE:
        from mmseg.models import SegTTAModel

        model.data_preprocessor = preprocessor()
        found = [model.test_step({"inputs": [view], "data_samples": [sample]})[0] for view, sample in views]
        mean = sum(sample.seg_logits.data.softmax(0) for sample in found) / len(found)
        return mean, SegTTAModel(module=model).merge_preds([found])[0].pred_sem_seg.data.squeeze(0)
    images, metas = [view[None] for view, _ in views], [[meta] for _, meta in views]
    [probabilities], [classes] = model.aug_test_logits(images, metas), model.aug_test(images, metas)
    return torch.from_numpy(probabilities), torch.from_numpy(classes)


MODES = {  # windows, sizes, flips
    "whole": ("whole", (256, 64), (1.0,), False),
    "slide": ("slide", (130, 90), (1.0,), False),
    "views": ("whole", None, (1.0, 2.0), True),
    "windows of views": ("slide", (128, 72), (0.75, 1.25), True),
}


@pytest.mark.parametrize(
    ("models", "case"), [*(("segformer", case) for case in MODES), ("mobilenet_v2", "views")], indirect=["models"]
)
def test_probabilities_agree(models, case, pictures):
    """From the image file to probabilities at its size: whole, in windows, and the mean over scales and flips."""
    mode, scale, ratios, flip = MODES[case]
    theirs, ours, exp = (*(model.eval() for model in models[:2]), models[2])
    theirs.test_cfg.update(mode=mode, crop_size=CROP, stride=(40, 50))
    views = {"img_scale": scale, "img_ratios": ratios, "flip": flip}
    plain = {"precision": "fp32", "channels_last": False}
    predictor = Predictor.of(ours, exp).using(mode=mode, crop=CROP, stride=(40, 50), **views, **plain)
    for image, _ in pictures[:2]:
        with torch.no_grad():
            expected, classes = their_probabilities(theirs, their_views(scale, ratios, flip)(image))
        array = read_image(image)
        [found] = predictor.probabilities([array], [0])
        assert expected.shape[1:] == array.shape[:2]
        torch.testing.assert_close(found["final"], expected, rtol=0, atol=2e-6)
        first, second = expected.topk(2, 0).values
        clear = first - second > 4e-6
        assert clear.float().mean() > 0.99
        assert torch.equal(found["final"].argmax(0)[clear], classes[clear])


def test_parameter_groups_agree(models):
    """Each parameter's learning rate and weight decay, written into it and loaded under our names."""
    theirs, ours, exp, config = models
    if ONE:
        from mmengine.optim import build_optim_wrapper

        optimizer = build_optim_wrapper(theirs, config.optim_wrapper).optimizer
    else:
        from mmcv.runner import build_optimizer as build

        optimizer = build(theirs, config.optimizer)
    own, loaded = build_optimizer(ours, exp.optimizer), copy.deepcopy(ours)
    assert type(own) is type(optimizer)
    for name in ("betas", "momentum", "eps", "nesterov", "amsgrad"):
        assert {group.get(name) for group in own.param_groups} == {group.get(name) for group in optimizer.param_groups}
    missing = set()  # the biases before batch norm that the published DDRNet has, and 1.x's has not, load as 0
    for name in ("present", "lr", "weight_decay"):
        with torch.no_grad():
            for group in (*own.param_groups, *optimizer.param_groups):
                for parameter in group["params"]:
                    parameter.fill_(group.get(name, 1.0))
        loaded.load_official(theirs.state_dict())
        for (key, found), expected in zip(ours.named_parameters(), loaded.parameters(), strict=True):
            if name == "present" and not expected.any():
                missing.add(key)
            assert key in missing or torch.equal(found, expected), (key, name)
    assert all(key.endswith(".bias") for key in missing)
    assert not missing or exp.name.startswith("ddrnet")


def test_losses_gradients_and_statistics_agree(models):
    theirs, ours, exp = (*map(without_drops, models[:2]), models[2])
    images, labels = batch(exp)
    losses = theirs(**their_batch(images, labels), **({"mode": "loss"} if ONE else {}))
    expected = sum(loss for name, loss in losses.items() if "loss" in name)
    found = ours.losses(images, labels, loss=exp.loss)["loss"]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    expected.backward()
    found.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    loaded = exp.model.build().double()  # their gradients and statistics under our names
    loaded.load_official({**theirs.state_dict(), **gradients})
    found = {name: parameter.grad for name, parameter in ours.named_parameters()}
    largest = max(float(gradient.abs().max()) for gradient in found.values())
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(
            found.get(name, ours.state_dict()[name]), tensor, rtol=1e-8, atol=1e-10 * largest,
            msg=lambda m, name=name: f"{name}: {m}",
        )  # fmt: skip


@pytest.mark.parametrize("name", ["swin_t", "convnext_t"])
def test_features_agree(name):
    """Backbone and feature pyramid of DDP. ConvNeXt is mmcls's, on 1.x that of its successor mmpretrain."""
    torch.manual_seed(0)
    if name == "swin_t":
        from mmseg.models.backbones import SwinTransformer

        theirs = SwinTransformer(depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24))
    else:
        package = "mmpretrain" if ONE else "mmcls"
        backbones = pytest.importorskip(f"{package}.models.backbones", reason=f"{package} is not installed")
        theirs = backbones.ConvNeXt(layer_scale_init_value=1.0, gap_before_final_norm=False, out_indices=(0, 1, 2, 3))
        for layer in theirs.downsample_layers[1:]:  # mmpretrain has 1e-6; we, as DDP's authors, what mmcls has
            layer[0].eps = 1e-5
    from mmseg.models import necks

    ours = build_backbone(name)
    neck = necks.FPN([*ours.channels], 64, 4, norm_cfg={"type": "GN", "num_groups": 32})
    for module in (theirs, neck):
        for name, tensor in module.state_dict().items():
            if tensor.ndim == 1:
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("position_bias_table"):
                tensor.normal_()
    ours.load_pretrained(theirs.state_dict())
    fpn = FPN(ours.channels, 64)
    renamed = {"lateral_convs": "lateral", "fpn_convs": "output", "gn": "norm"}
    names = {name: ".".join(renamed.get(part, part) for part in name.split(".")) for name in neck.state_dict()}
    fpn.load_state_dict({names[name]: tensor for name, tensor in neck.state_dict().items()})
    for module in (theirs, neck, ours, fpn):
        module.eval()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        images = torch.randn(2, 3, 61, 99, generator=torch.Generator().manual_seed(1), dtype=dtype)
        with torch.no_grad():
            maps = theirs.to(dtype)(images), ours.to(dtype)(images)
            pyramids = neck.to(dtype)(maps[0]), fpn.to(dtype)(maps[1])
        for expected, found in (*zip(*maps, strict=True), *zip(*pyramids, strict=True)):
            atol = tolerance * float(expected.abs().max())
            torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def run_theirs(model, config, batches, folder):
    """Train with their runner, optimizer and schedule; return the losses."""
    losses, step = [], model.train_step

    def train_step(*args, **settings):
        found = step(*args, **settings)
        losses.append(float(found["loss"]))
        return found

    model.train_step = train_step
    loader = torch.utils.data.DataLoader([their_batch(*each) for each in batches], collate_fn=itemgetter(0))
    if ONE:
        from mmengine.runner import Runner

        model.init_weights = lambda: None  # it has its weights
        train = {"by_epoch": False, "max_iters": len(batches)}
        schedule = {"optim_wrapper": config.optim_wrapper, "param_scheduler": config.param_scheduler}
        Runner(
            model, str(folder), loader, train_cfg=train, **schedule, default_hooks={"checkpoint": None},
            default_scope="mmseg", experiment_name=folder.name,
        ).train()  # fmt: skip
    else:
        from mmcv import runner as runners
        from mmseg.utils import get_root_logger

        optimizer = runners.build_optimizer(model, config.optimizer)
        runner = runners.IterBasedRunner(
            model, optimizer=optimizer, logger=get_root_logger(), max_iters=len(batches), work_dir=str(folder), meta={}
        )
        runner.register_training_hooks(config.lr_config, {"grad_clip": None})
        runner.run([loader], [("train", 1)])
    return losses


@pytest.mark.parametrize("models", [name for name in FILES if name in ("segformer", "ddrnet")], indirect=True)
def test_runs_of_20_iterations_agree(models, tmp_path, monkeypatch):
    """Optimizer, parameter groups, learning rates and losses, in float64, where small differences do not grow."""
    if ONE:  # a description of the machine for the log, which takes seconds
        monkeypatch.setattr("mmengine.runner.runner.collect_env", dict)
    theirs, ours, exp, config = (*map(without_drops, models[:2]), *models[2:])
    exp = shorten(config, exp, 20, min(exp.schedule.warmup_iterations, 5))
    batches = [batch(exp, seed=seed) for seed in range(20)]
    optimizer, found = build_optimizer(ours, exp.optimizer), []
    for i, (images, labels) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = our_rate(exp.schedule, group["initial_lr"], i)
        loss = ours.losses(images, labels, loss=exp.loss)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss))
    np.testing.assert_allclose(found, run_theirs(theirs, config, batches, tmp_path), rtol=1e-8)
    loaded = exp.model.build().double()
    loaded.load_official(theirs.state_dict())
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(
            ours.state_dict()[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.skipif(not ONE, reason="the benchmark is of MMSegmentation 1.x")
def test_the_benchmark_trains_both_alike(tmp_path):
    """benchmarks/mmseg_ddrnet.py: the same losses within rounding, as weights, batches and schedule are the same."""
    rng = np.random.default_rng(0)
    for folder, values, shape in (("train", 256, (96, 128, 3)), ("trainannot", 12, (96, 128))):
        (tmp_path / folder).mkdir()
        for name in "abcd":
            cv2.imwrite(str(tmp_path / folder / f"{name}.png"), rng.integers(0, values, shape, dtype=np.uint8))
    script = Path(__file__).parents[3] / "benchmarks/mmseg_ddrnet.py"
    small = ("data.img_scale=128 96", "data.crop=64 64", "train.batch_size=4", "train.log_every=1")
    words = (f"--data={tmp_path}", f"--results={tmp_path}", "--iterations=3", *small)
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "mmseg_ddrnet.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith(("| 1 ", "| 2 ", "| 3 "))]
    assert len(rows) == 3
    for _, theirs, ours, _ in rows:
        assert float(theirs) == pytest.approx(float(ours), rel=1e-3)
