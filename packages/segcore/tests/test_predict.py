"""What `predict` does with files, before and around the model."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from segcore.cli import predict_images
from segcore.cli.predict import Predict
from segcore.cli.predict_files import plan, start_map
from segcore.config.schema import DataConfig, EvalConfig, Experiment, ModelConfig, TrainConfig
from segcore.data.images import read_image, read_label
from segcore.data.layouts import palette_of
from segcore.errors import UserError
from segcore.evaluation.predictor import Predictor
from segcore.inference import LoadedModel
from segcore.result import Result
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
    with pytest.raises(UserError, match="would overwrite this file"):
        plan(folder / "in" / "a.png", folder / "in" / "a.png")


def test_no_result_overwrites_a_mask_to_start_from(folder):
    (folder / "out").mkdir()
    for start in (folder / "out", folder / "out" / "a.png"):
        with pytest.raises(UserError, match=r"out.a\.png: a result would overwrite this file"):
            plan(folder / "in" / "a.png", folder / "out", start=start)
    assert plan(folder / "in", folder / "out", start=folder)[0].start == folder / "a.png"


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

    def step_answers(self, images, steps=None, seeds=None):
        self.asked.append(steps)
        return super().step_answers(images, steps, seeds)


@dataclass(frozen=True)
class AskedModel(ModelConfig):
    def build(self):
        return Asked()


def run(model, exp, jobs):
    predict_images.run(LoadedModel(exp, Predictor.of(model.eval(), exp)), jobs)


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
    jobs = plan(folder / "deep.png", folder / "out", look={"opacity": 0})
    run(Asked(), experiment(bit_depth=16), jobs)
    shown = read_image(jobs[0].overlay)
    assert (shown[0, 0, 0], shown[3, 0, 0]) == (127, 255)


PREDICTED = ["a.png", "a_confidence.png", "a_overlay.png", "a_probabilities.npz", "classes.json"]


@pytest.fixture
def predict(folder, monkeypatch):
    """Run the command `predict` on a.png, whose left half is red, with a model of two classes."""
    image = np.zeros((8, 6, 3), np.uint8)
    image[:, :3, 2] = 255
    cv2.imwrite(str(folder / "in" / "a.png"), image)
    exp = experiment()
    seg = LoadedModel(exp, Predictor.of(Asked().eval(), exp))
    monkeypatch.setattr("segcore.cli.predict.load", lambda *given: seg)

    def run(output, **options):
        given = {"input": folder / "in" / "a.png", "checkpoint": "none", **options}
        Predict(exp, output=folder / output, **given).run(None)
        return folder / output

    return run


def test_confidence_and_probabilities_lie_beside_the_same_mask(predict):
    plain, more = predict("plain"), predict("more", confidence=True, probabilities=True)
    assert sorted(path.name for path in more.iterdir()) == PREDICTED
    for name in ("a.png", "a_overlay.png", "classes.json"):
        assert (plain / name).read_bytes() == (more / name).read_bytes()
    mask = read_label(more / "a.png")
    assert mask[0].tolist() == [1, 1, 1, 0, 0, 0]
    assert (read_label(more / "a_confidence.png") == 255).all(), "the logits are at least 100 apart"
    with np.load(more / "a_probabilities.npz", allow_pickle=False) as stored:
        assert stored["names"].tolist() == ["a", "b"]
        assert (stored["values"][stored["probabilities"].argmax(0)] == mask).all()


def test_probabilities_cost_no_second_run_and_are_not_computed_unasked(predict, monkeypatch):
    runs, network = [], Asked.step_answers
    monkeypatch.setattr(Asked, "step_answers", lambda *given, **how: runs.append(1) or network(*given, **how))
    predict("out", confidence=True, probabilities=True)
    assert len(runs) == 1
    monkeypatch.setattr(Result, "probabilities", property(lambda result: pytest.fail("computed")))
    predict("plain")
    assert len(runs) == 2


@pytest.mark.parametrize(("output", "classes"), [("new", "new/classes.json"), ("x.png", "x_classes.json")])
def test_the_classes_are_listed_beside_the_masks(predict, folder, output, classes):
    predict(output)
    rows = json.loads((folder / classes).read_text())
    assert [(row["value"], row["name"]) for row in rows] == [(0, "a"), (1, "b")]
    assert len(list(folder.rglob("*classes.json"))) == 1


def test_a_list_of_someone_else_is_kept_and_nothing_is_predicted(predict, folder):
    (folder / "classes.json").write_text("{}")
    with pytest.raises(UserError, match="would be overwritten"):
        predict(".")
    assert (folder / "classes.json").read_text() == "{}"
    assert not (folder / "a.png").exists()


def test_legend_and_contours_are_in_the_overlay_only(predict):
    plain, more = predict("plain", opacity=0.0), predict("more", opacity=0.0, legend=True, contours=True)
    assert (plain / "a.png").read_bytes() == (more / "a.png").read_bytes()
    image, shown = read_image(plain / "a_overlay.png"), read_image(more / "a_overlay.png")
    colors = palette_of(experiment().data)[1]
    assert (shown[:8, 2] == colors[1]).all()
    assert (shown[:8, 3] == colors[0]).all()
    np.testing.assert_array_equal(shown[:8, [0, 1, 4, 5]], image[:, [0, 1, 4, 5]])
    below = {tuple(color) for color in shown[8:].reshape(-1, 3)}
    assert below >= {tuple(color) for color in colors}


@pytest.mark.parametrize(
    ("output", "options", "match"),
    [
        ("out.tif", {"legend": True}, "--legend, --contours and --opacity, give a folder"),
        ("out.tif", {"contours": True}, "--legend, --contours and --opacity, give a folder"),
        ("out.tif", {"opacity": 0.3}, "--legend, --contours and --opacity, give a folder"),
        ("out", {"zip": Path("a.png")}, r"--zip a\.png: does not end in \.zip; name a file that does"),
        ("out", {"zip": Path("in.zip"), "checkpoint": "in.zip"}, "would overwrite what this command reads"),
        ("out", {"frames": 3}, "--frames is for videos and cameras; leave it out"),
        ("out", {"input": Path("a.mp4"), "confidence": True}, "--confidence, --probabilities, .* not for videos"),
        ("out", {"input": Path("a.mp4"), "probabilities": True}, "--confidence, --probabilities, .* not for videos"),
    ],
)
def test_what_cannot_be_written_is_refused(predict, output, options, match):
    with pytest.raises(UserError, match=match) as caught:
        predict(output, **options)
    assert "\n" not in str(caught.value)


def test_an_archive_that_is_not_written_is_named(predict, folder):
    (folder / "in" / "bad.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"bad\.png: cannot be read .*; .*masks\.zip is not written"):
        predict("out", input=folder / "in", zip=folder / "masks.zip")
    assert not (folder / "masks.zip").exists()
    assert (folder / "out" / "a.png").is_file()


def test_background_is_no_class_of_the_mask_but_has_a_probability(tmp_path):
    exp = replace(experiment(add_background_class=True), model=AskedModel(3))
    model = TinyStepwise(3, lambda images: torch.stack([images[:, 0], images[:, 1], images[:, 2]], 1)).eval()
    image = np.zeros((4, 3, 3), np.uint8)
    image[:, [0, 1, 2], [0, 1, 2]] = 1
    result = LoadedModel(exp, Predictor.of(model, exp))(image, probabilities=True)
    mask, _, file = result.save(tmp_path, probabilities=True)
    assert read_label(mask)[0].tolist() == [255, 0, 1]
    with np.load(file, allow_pickle=False) as stored:
        assert stored["names"].tolist() == ["background", "a", "b"]
        assert (stored["values"][stored["probabilities"].argmax(0)] == read_label(mask)).all()
    rows = json.loads((tmp_path / "classes.json").read_text())
    assert [(row["value"], row["name"]) for row in rows] == [(0, "a"), (1, "b"), (255, "ignored")]


def test_a_mask_of_more_than_255_classes_starts_a_run_as_it_was_written(tmp_path):
    mask = np.array([[0, 255, 299, 65535]], np.uint16)
    cv2.imwrite(str(tmp_path / "mask.png"), mask)
    image = np.zeros((1, 4, 3), np.uint8)
    assert start_map(tmp_path / "mask.png", image, 300, True).tolist() == [[1, 256, 300, 0]]
    with pytest.raises(UserError, match=r"mask\.png: has the value 65535; give 0 to 299$"):
        start_map(tmp_path / "mask.png", image, 300, False)
    with pytest.raises(UserError, match=r"mask\.png: has the value 299; give 0 to 298, or 65535 for no class$"):
        start_map(tmp_path / "mask.png", image, 299, True)
    cv2.imwrite(str(tmp_path / "mask.png"), np.array([[0, 2, 1, 1]], np.uint8))
    assert start_map(tmp_path / "mask.png", image, 3, False).tolist() == [[0, 2, 1, 1]]
