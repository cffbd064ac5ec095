"""Uncertainty of a mask, on every path of inference, and the area under the ROC curve that judges it."""

import dataclasses
import math
from itertools import pairwise
from typing import ClassVar

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segcore.cli import predict_images
from segcore.cli.predict_files import plan
from segcore.config.schema import DataConfig, EvalConfig, Experiment, ModelConfig, TrainConfig
from segcore.data.images import read_image, read_label
from segcore.errors import UserError
from segcore.evaluation.predictor import Predictor
from segcore.evaluation.uncertainty import AUROC, predict_uncertainty
from segcore.inference import LoadedModel
from segcore.testing.tiny import Tiny, TinyStepwise

DATA = DataConfig("folder", classes=("a", "b", "c"), mean=(0.0,) * 3, std=(1.0,) * 3, photometric=False)
PATHS = {
    "whole": EvalConfig(img_scale=None),
    "slide": EvalConfig(img_scale=None, mode="slide", crop=(16, 16), stride=(10, 10)),
    "multi-scale": EvalConfig(img_scale=None, img_ratios=(0.5, 1.0), flip=True),
}


def pairs_won(score, wrong):
    """Return the share of (wrong, right) pairs whose wrong one scores higher, a tie counting half, pair by pair."""
    won = [(a > b) + 0.5 * (a == b) for a in score[wrong] for b in score[~wrong]]
    return sum(won) / len(won)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=2, max_size=40))
def test_auroc_is_the_share_of_pairs_in_order(pixels):
    score = torch.tensor([s / 20 for s, _ in pixels])
    wrong = torch.tensor([w for _, w in pixels])
    area = AUROC()
    for part in (slice(0, 5), slice(5, None)):  # over several images
        area.update(score[part], wrong[part].long(), torch.zeros(len(pixels), dtype=torch.uint8)[part])
    if wrong.all() or not wrong.any():
        assert math.isnan(area.compute())
    else:
        assert area.compute() == pytest.approx(pairs_won(score.numpy(), wrong.numpy()), abs=1e-12)


def test_auroc_leaves_out_ignored_pixels():
    area = AUROC()
    score, label = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([1, 0, 255])
    area.update(score, torch.tensor([1, 1, 1]), label)
    assert area.compute() == 1
    assert area.counts.sum() == 2


def bright(images):
    """Return logits (N, 3, H, W): class 1 where red is bright, else 0."""
    found = (images[:, :1] > 100).float()
    return torch.cat([1 - found, found, found * 0], 1) * 5


class Noisy(TinyStepwise):
    """Class 1 where red is bright; mean probabilities that fall with the blue."""

    def __init__(self):
        super().__init__(3, bright)
        self.starts = []

    def trajectory_answers(self, images, seeds=None):
        final = bright(images)
        yield "step 1", final.roll(1, 1)
        yield "step 2", final

    def log_mean_probs(self, images, seeds=None, starts=4, *, resize=True):
        self.starts.append(starts)
        other = images[:, 2:3] / 1000  # 0 to 0.255 for each of the two other classes
        return torch.where(bright(images) > 2, 1 - 2 * other, other).clamp(min=1e-8).log()

    def early_exit(self, images, percent, seeds=None, *, resize=True):
        return bright(images).roll(1, 1), [2] * len(images)


@dataclasses.dataclass(frozen=True)
class NoisyModel(ModelConfig):
    stepwise: ClassVar[bool] = True

    def build(self):
        return Noisy()


def image():
    """Return (24, 36, 3): red and blue constant in each half."""
    pixels = np.zeros((24, 36, 3), np.uint8)
    pixels[:, 18:, 0] = 200
    pixels[:, 18:, 2] = 200
    return pixels


def uncertainty(model, evaluate, classes=None, **options):
    predictor = Predictor(model, evaluate, DATA)
    [entries] = predictor.classes([image()], [0])
    mask = entries["3"] if classes is None else classes
    return predict_uncertainty(predictor, [image()], [mask], [0], **options)[0], mask


@pytest.mark.parametrize("path", PATHS)
def test_uncertainty_is_the_probability_of_another_class_than_the_masks(path):
    model = Noisy()
    found, mask = uncertainty(model, PATHS[path], starts=7)
    assert set(model.starts) == {7}
    assert found.shape == mask.shape == (24, 36)
    assert mask[0, [0, -1]].tolist() == [0, 1]
    torch.testing.assert_close(found[:, :14], torch.zeros(24, 14), atol=1e-4, rtol=0)
    torch.testing.assert_close(found[:, 22:], torch.full((24, 14), 0.4), atol=1e-4, rtol=0)
    other, _ = uncertainty(model, PATHS[path], classes=torch.full((24, 36), 2))
    torch.testing.assert_close(other[:, 22:], torch.full((24, 14), 0.8), atol=1e-4, rtol=0)


@pytest.fixture
def photo(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), image()[..., ::-1])
    return tmp_path / "a.png"


@dataclasses.dataclass(frozen=True)
class SureModel(ModelConfig):
    def build(self):
        return Tiny(3, bright)


def experiment(kind=NoisyModel, **evaluate):
    return Experiment(
        "noisy", kind(3), DATA, train=TrainConfig(precision="fp32"), evaluate=EvalConfig(None, **evaluate)
    )


def run(model, exp, jobs):
    colors = jobs[0].image.with_name("colors.txt")
    colors.write_text("255 0 0\n0 255 0\n0 0 255\n")
    predict_images.run(LoadedModel(exp, Predictor.of(model.eval(), exp), str(colors)), jobs)


def test_predict_writes_uncertainty_and_steps_beside_the_same_mask(photo, tmp_path):
    plain, more = plan(photo, tmp_path / "plain"), plan(photo, tmp_path / "more", uncertainty=True, steps=True)
    for jobs in (plain, more):
        run(Noisy(), experiment(), jobs)
    assert sorted(p.name for p in (tmp_path / "plain").iterdir()) == ["a.png", "a_overlay.png"]
    names = ["a.png", "a_overlay.png", "a_steps.png", "a_uncertainty.png"]
    assert sorted(p.name for p in (tmp_path / "more").iterdir()) == names
    for name in names[:2]:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "more" / name).read_bytes()
    levels = read_label(tmp_path / "more" / "a_uncertainty.png")
    assert (levels.shape, levels.dtype) == ((24, 36), np.uint8)
    assert levels[0, [0, -1]].tolist() == [0, round(0.4 * 255)]
    strip = read_image(tmp_path / "more" / "a_steps.png")
    white = [True, *(strip[-1] == 255).all(1)]
    starts = [x for x, (before, here) in enumerate(pairwise(white)) if before and not here]
    colors = [[0, 0, 0], [0, 255, 0], [255, 0, 0], [255, 0, 0]]  # input, two steps and the answer
    assert [strip[-1, x].tolist() for x in starts] == colors


def test_predict_early_exit_threshold_answers_with_the_early_result(photo, tmp_path, capsys):
    run(Noisy(), experiment(early_exit_threshold=1.0), plan(photo, tmp_path / "out"))
    assert read_label(tmp_path / "out" / "a.png")[0, [0, -1]].tolist() == [1, 2]
    assert "2.00 denoising steps on average" in capsys.readouterr().out


class Bright(Noisy):
    """Takes one step for an image without red, else nine."""

    def early_exit(self, images, percent, seeds=None, *, resize=True):
        return bright(images), [9 if image[0].max() > 100 else 1 for image in images]


def test_early_exit_gives_each_image_of_a_list_its_own_number_of_steps():
    exp = experiment(early_exit_threshold=1.0, batch_size=3)
    seg = LoadedModel(exp, Predictor.of(Bright().eval(), exp))
    results = seg([image(), image() * 0, image()[:, :24], image()])
    assert [result.steps_used for result in results] == [9, 1, 9, 9]


@pytest.mark.parametrize("what", ["uncertainty", "steps", "early_exit_threshold"])
def test_other_methods_say_that_they_cannot(photo, tmp_path, what):
    early = {"early_exit_threshold": 1.0} if what == "early_exit_threshold" else {}
    files = {} if early else {what: True}
    with pytest.raises(UserError, match="Tiny does not denoise in steps; leave out uncertainty, steps") as caught:
        run(Tiny(3, bright), experiment(SureModel, **early), plan(photo, tmp_path / "out", **files))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_no_result_of_any_kind_overwrites_another(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.png", "a_steps.png"):
        cv2.imwrite(str(folder / name), image())
    assert len(plan(folder, tmp_path / "out", uncertainty=True)) == 2
    with pytest.raises(UserError, match=r"a_steps\.png: results of two images"):
        plan(folder, tmp_path / "out", steps=True)
