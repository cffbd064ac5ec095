"""Our parts against those of real MMSegmentation, 0.30 or 1.x, on the same input: no stored numbers (nox -s openmmlab).

`test_openmmlab.py` has our models inside its tools; here both sides compute the same thing by themselves.
"""

import cv2
import numpy as np
import pytest
import torch
from numpy.random import RandomState

from segcore.config.schema import DataConfig
from segcore.data.images import read_image, read_label
from segcore.data.transforms import TrainTransform

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
