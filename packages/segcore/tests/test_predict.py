"""What `predict` does with files, before and around the model."""

from dataclasses import dataclass

import cv2
import numpy as np
import pytest
import torch

from segcore.cli import predict_images
from segcore.cli.predict_files import plan
from segcore.config.schema import DataConfig, EvalConfig, Experiment, ModelConfig, TrainConfig
from segcore.data.images import read_image, read_label
from segcore.errors import UserError
from segcore.evaluation.predictor import Predictor
from segcore.inference import LoadedModel
from segcore.testing.tiny import TinyStepwise


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in" / "below").mkdir(parents=True)
    for name in ("a.png", "below/b.jpg"):
        cv2.imwrite(str(tmp_path / "in" / name), np.zeros((4, 4, 3), np.uint8))
    return tmp_path


def test_the_structure_of_a_folder_is_kept(folder):
    jobs = plan(folder / "in", folder / "out")
    assert [job.mask for job in jobs] == [folder / "out" / "a.png", folder / "out" / "below" / "b.png"]
    assert jobs[1].overlay == folder / "out" / "below" / "b_overlay.png"


def test_results_of_an_earlier_run_are_no_input(folder):
    (folder / "in" / "out").mkdir()
    cv2.imwrite(str(folder / "in" / "out" / "a.png"), np.zeros((4, 4, 3), np.uint8))
    assert [job.image.name for job in plan(folder / "in", folder / "in" / "out")] == ["a.png", "b.jpg"]


def test_results_may_go_above_the_images(folder):
    assert [job.image.name for job in plan(folder / "in", folder)] == ["a.png", "b.jpg"]


def test_a_file_name_is_for_one_image_and_says_what_it_holds(folder):
    for name in ("all.png", "all.jpg"):
        with pytest.raises(UserError, match=r"one file for all images of the folder .*; give a folder"):
            plan(folder / "in", folder / name)
    with pytest.raises(UserError, match=r"one\.tif: results are written as \.png or \.jpg"):
        plan(folder / "in" / "a.png", folder / "one.tif")


def test_no_two_results_share_a_file(folder):
    cv2.imwrite(str(folder / "in" / "a_overlay.png"), np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(UserError, match=r"a_overlay\.png: results of two images"):
        plan(folder / "in", folder / "out")


def test_no_result_overwrites_an_image(folder):
    with pytest.raises(UserError, match="folder of the images"):
        plan(folder / "in", folder / "in")
    with pytest.raises(UserError, match="would overwrite this image"):
        plan(folder / "in" / "a.png", folder / "in" / "a.png")


def test_bytes_behind_a_jpeg_do_no_harm_but_a_cut_one_is_refused(tmp_path):
    rng = np.random.RandomState(0)
    path = tmp_path / "a.jpg"
    cv2.imwrite(str(path), rng.randint(0, 255, (32, 32, 3), np.uint8))
    whole = path.read_bytes()
    for _ in range(20):
        path.write_bytes(whole + rng.bytes(50_000))
        assert read_image(path).shape == (32, 32, 3)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.jpg: .*truncated"):
        read_image(path)


class Asked(TinyStepwise):
    """Answers 1 where red is above 100, and notes which steps it was asked for."""

    min_size = 4

    def __init__(self):
        super().__init__(2, lambda images: torch.cat([100 - images[:, :1], images[:, :1] - 100], 1))
        self.asked = []

    def predict_steps(self, images, steps=None, seeds=None):
        self.asked.append(steps)
        return super().predict_steps(images, steps, seeds)


@dataclass(frozen=True)
class AskedModel(ModelConfig):
    def build(self):
        return Asked()


def run(model, exp, jobs, **options):
    predict_images.run(LoadedModel(exp, Predictor.of(model.eval(), exp)), jobs, **options)


def experiment(**data):
    data = DataConfig("folder", classes=("a", "b"), mean=(0.0,) * 3, std=(1.0,) * 3, photometric=False, **data)
    return Experiment(
        "asked", AskedModel(2), data, train=TrainConfig(precision="fp32"), evaluate=EvalConfig(None, steps=(1, 5))
    )


def test_an_image_that_is_too_small_is_named_and_the_others_are_written(folder):
    cv2.imwrite(str(folder / "in" / "aa.png"), np.zeros((3, 4, 3), np.uint8))
    with pytest.raises(UserError, match=r"aa\.png: an image of 3x4 pixels is too small") as caught:
        run(Asked(), experiment(), plan(folder / "in", folder / "out"))
    assert "\n" not in str(caught.value)
    assert read_label(folder / "out" / "below" / "b.png").shape == (4, 4)


def test_the_model_is_asked_for_its_configured_steps(folder):
    model = Asked()
    run(model, experiment(), plan(folder / "in", folder / "out"))
    assert model.asked == [None, None]


def test_the_overlay_of_a_10_bit_image_is_as_bright_as_of_an_8_bit_one(folder):
    image = np.full((4, 4, 3), 1023, np.uint16)
    image[:2] = 512
    cv2.imwrite(str(folder / "deep.png"), image)
    jobs = plan(folder / "deep.png", folder / "out")
    run(Asked(), experiment(bit_depth=16), jobs, opacity=0)
    shown = read_image(jobs[0].overlay)
    assert (shown[0, 0, 0], shown[3, 0, 0]) == (127, 255)
