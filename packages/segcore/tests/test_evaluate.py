"""A model over a data set on disk: the same answer however it is batched, and clear words where it cannot be."""

import dataclasses
import gc
import math
import weakref

import cv2
import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassCalibrationError

from segcore.config.schema import DataConfig, EvalConfig
from segcore.data.dataset import Dataset, Sample
from segcore.data.labels import label_lut
from segcore.errors import UserError
from segcore.evaluation.calibration import BINS, CalibrationError
from segcore.evaluation.evaluate import Results, evaluate
from segcore.evaluation.metrics import ConfusionMatrix
from segcore.evaluation.predictor import Predictor
from segcore.evaluation.scores import averaged
from segcore.evaluation.uncertainty import AUROC
from segcore.reporting.tables import summary
from segcore.seeds import evaluation_seed, window_seed
from segcore.testing.tiny import Tiny, TinyStepwise

DATA = DataConfig(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
PLAIN = EvalConfig(img_scale=None)


def draw(seed, size):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


class Redness(TinyStepwise):
    """Class k where red is nearest to 10 k; `noise` times the step count disturbs the red, drawn by seed."""

    def __init__(self, noise=0.0):
        centers = 10 * torch.arange(4.0).view(1, 4, 1, 1)
        super().__init__(4, lambda images: -(images[:, :1] - centers).abs(), noise=noise)
        self.norm.eval()

    def draw(self, features, seeds, **options):
        assert not self.training
        assert not self.dropout.training
        return super().draw(features, seeds, **options)


@pytest.fixture
def dataset(tmp_path):
    """Five images of two sizes whose red channel is ten times the label; 255 is ignored and class 3 never occurs."""
    samples = []
    for i, size in enumerate([(12, 16), (12, 16), (16, 12), (12, 16), (12, 16)]):
        label = np.random.RandomState(i).choice(np.array([0, 1, 2, 255], np.uint8), size)
        sample = Sample(tmp_path / f"{i}.png", tmp_path / f"{i}_label.png")
        red = np.where(label == 255, 0, label * 10).astype(np.uint8)
        cv2.imwrite(str(sample.image), np.dstack([red * 0, red * 0, red]))  # OpenCV writes BGR
        cv2.imwrite(str(sample.label), label)
        samples.append(sample)
    palette = np.zeros((4, 3), np.uint8)
    return Dataset(("sky", "road", "car", "pole"), palette, 255, tuple(samples), tmp_path, label_lut(4))


def run(model, dataset, config=PLAIN, **options):
    return evaluate(Predictor(model, config, DATA), dataset, **options)


def test_a_perfect_model(dataset):
    results = run(Redness(), dataset)
    assert results.images == 5
    assert list(results.entries) == ["3"]
    assert results.final["mIoU"] == results.final["aAcc"] == 1
    np.testing.assert_array_equal(results.final["IoU"], [1, 1, 1, math.nan])


def test_noise_follows_the_seed_and_the_index(dataset):
    results = run(Redness(noise=6.0), dataset, seed=3)
    matrix = ConfusionMatrix(4)
    for i in range(len(dataset)):
        red = torch.from_numpy(dataset.image(i)[..., 0]).float()
        red += 3 * 6.0 * draw(window_seed(evaluation_seed(3, i), 0, 0), (3, *red.shape))[0]
        matrix.update((red / 10).round().clamp(0, 3).long(), dataset.label(i))
    assert results.final["aAcc"] == matrix.compute()["aAcc"] < 1
    assert torch.equal(results.final["IoU"], matrix.compute()["IoU"])


@pytest.mark.parametrize("settings", [{}, {"flip": True}, {"mode": "slide", "crop": (8, 8), "stride": (5, 5)}])
def test_batches_do_not_change_results(dataset, settings):
    config = dataclasses.replace(PLAIN, **settings)
    one = run(Redness(noise=6.0), dataset, config)
    model = Redness(noise=6.0)
    three = run(model, dataset, dataclasses.replace(config, batch_size=3))
    assert one.to_json() == three.to_json()
    assert sorted({len(images) for images, _ in model.calls}) == [1, 2]  # consecutive images of one size: 2, 1, 2


def test_step_entries(dataset):
    results = run(Redness(noise=4.0), dataset, dataclasses.replace(PLAIN, steps=(1, 20)))
    assert list(results.entries) == ["1", "20"]
    assert results.final is results.entries["20"]
    assert results.entries["1"]["mIoU"] > results.final["mIoU"]


def test_only_the_main_entry_has_a_matrix_of_every_image(dataset, monkeypatch):
    """With thousands of classes a matrix costs more than the counting."""
    made, start = [], ConfusionMatrix.__init__
    monkeypatch.setattr(ConfusionMatrix, "__init__", lambda *args: (made.append(1), start(*args))[1])
    results = run(Redness(), dataset, dataclasses.replace(PLAIN, steps=(1, 2, 3)))
    assert len(results.entries) == 3
    assert len(made) == 3 + len(dataset)
    assert all(matrix.sum() == results.confusion["3"].sum() for matrix in results.confusion.values())


def test_an_entry_that_stops_early(dataset):
    class Early(Redness):
        def early_exit(self, images, percent, seeds=None, *, resize=True):
            assert percent == 2.5
            return self.predict_steps(images, (20,), seeds)["20"], [1 + len(images)] * len(images)

    config = dataclasses.replace(PLAIN, steps=(1, 5), early_exit_threshold=2.5, batch_size=2)
    results = run(Early(noise=4.0), dataset, config)
    assert list(results.entries) == ["1", "5", "until 2.5%"]
    assert results.entries["until 2.5%"]["mIoU"] < results.entries["5"]["mIoU"]
    assert results.final_step == "5", "an entry that stops early decides nothing"
    assert results.steps_taken == results.to_json()["steps_taken"] == (3 + 3 + 2 + 3 + 3) / 5
    assert "until 2.5%: denoising took 2.80 steps on average" in summary(results)
    assert [image.steps_used for image in results.per_image] == [3, 3, 2, 3, 3]
    with pytest.raises(UserError, match="Tiny does not denoise in steps; leave out early_exit_threshold"):
        run(Tiny(4), dataset, config)
    assert list(run(Tiny(4), dataset, dataclasses.replace(PLAIN, steps=(1, 5))).entries) == ["final"]


def test_modes_come_back(dataset):
    model = Redness().train()
    model.norm.eval()
    run(model, dataset)
    assert (model.training, model.dropout.training, model.norm.training) == (True, True, False)
    with pytest.raises(UserError):
        run(model, dataclasses.replace(dataset, samples=(dataclasses.replace(dataset.samples[0], label=None),)))
    assert (model.training, model.dropout.training, model.norm.training) == (True, True, False)


def test_limit_and_progress(dataset):
    seen = []
    results = run(
        Redness(), dataset, dataclasses.replace(PLAIN, batch_size=2), limit=3, on_progress=lambda *x: seen.append(x)
    )
    assert seen == [(2, 3), (3, 3)]
    assert results.images == 3
    assert run(Redness(), dataset, limit=9).images == 5
    with pytest.raises(UserError, match="limit 0"):
        run(Redness(), dataset, limit=0)


def test_nothing_of_a_prediction_is_kept(dataset, monkeypatch):
    made, alive = [], []  # weak references to all predictions, the pictures they are of; how many are left each time
    predict = Predictor.reduced

    def watched(predictor, images, seeds, reduce, **options):
        predictions = predict(predictor, images, seeds, reduce, **options)
        made.extend(weakref.ref(classes) for by_entry in predictions for classes in by_entry.values())
        made.extend(weakref.ref(image) for image in images)
        return predictions

    def count(done, total):
        alive.append(sum(reference() is not None for reference in made))

    monkeypatch.setattr(Predictor, "reduced", watched)
    many = dataclasses.replace(dataset, samples=dataset.samples[:2] * 6)
    run(Redness(), many, dataclasses.replace(PLAIN, batch_size=2), on_progress=count)
    assert len(made) == 2 * 12
    assert len(alive) == 6
    assert max(alive) <= 2 * 4  # this batch and what is left of the one before
    gc.collect()
    assert not any(reference() is not None for reference in made)


def test_json_is_plain(dataset):
    found = run(Redness(), dataset).to_json()
    assert found["images"] == 5
    assert found["classes"] == ["sky", "road", "car", "pole"]
    assert found["entries"]["3"]["IoU"] == [1.0, 1.0, 1.0, None]
    third = Results(("a",), {"final": {"mIoU": 1 / 3, "IoU": torch.tensor([1 / 3], dtype=torch.float64)}}, 1)
    assert third.to_json()["entries"]["final"] == {"mIoU": 1 / 3, "IoU": [1 / 3]}


def test_says_what_does_not_fit(dataset):
    with pytest.raises(UserError, match="4 classes but the data set 2"):
        run(Redness(), dataclasses.replace(dataset, classes=("a", "b")))
    with pytest.raises(UserError, match="ignores label 255 but the data set 0"):
        run(Redness(), dataclasses.replace(dataset, ignore_index=0))
    bare = dataclasses.replace(dataset.samples[0], label=None)
    with pytest.raises(UserError, match=r"0\.png: has no label"):
        run(Redness(), dataclasses.replace(dataset, samples=(bare,)))


def test_images_outside_the_image_folder_have_figures(dataset, tmp_path):
    results = run(Redness(), dataclasses.replace(dataset, image_root=tmp_path / "images"))
    assert [image.name for image in results.per_image] == [f"__/{i}" for i in range(5)]


def test_figures_of_every_image_add_up_to_the_total(dataset):
    """An image's figures are those of a data set of this image alone."""
    results = run(Redness(noise=6.0), dataset, dataclasses.replace(PLAIN, batch_size=2, steps=(1, 3)), seed=3)
    matrix = torch.zeros(5, 5, dtype=torch.int64)
    for figures, image in zip(results.per_image, range(5), strict=True):
        alone = run(Redness(noise=6.0), dataset, dataclasses.replace(PLAIN, steps=(1, 3)), seed=3, limit=image + 1)
        before = run(Redness(noise=6.0), dataset, seed=3, limit=image).confusion["3"] if image else 0
        own = ConfusionMatrix(4)
        own.matrix += alone.confusion["3"] - before
        matrix += own.matrix
        expected = own.compute()
        assert (figures.index, figures.name, figures.steps_used) == (image, str(image), None)
        assert (figures.height, figures.width) == dataset.image(image).shape[:2]
        assert (figures.pixels, figures.miou, figures.aacc) == (own.matrix.sum(), expected["mIoU"], expected["aAcc"])
        np.testing.assert_array_equal(figures.iou, expected["IoU"].float())
    assert torch.equal(matrix, results.confusion["3"])
    assert results.calibration is None


class Unsure(Redness):
    """The same classes at lower confidence, and wrong ones through noise."""

    def network(self, images, seeds, draws=None):
        return super().network(images, seeds, draws) / 8


VIEWS = {"flip": True, "img_ratios": (0.5, 1.0)}


@pytest.mark.parametrize("settings", [{}, {"mode": "slide", "crop": (8, 8), "stride": (5, 5)}, VIEWS, {"steps": (1,)}])
@pytest.mark.parametrize("ensemble", [False, True])
def test_calibration_equals_that_of_torchmetrics(dataset, settings, ensemble):
    """With the probabilities of `Predictor.probabilities`, of the configured output."""
    oracle = MulticlassCalibrationError(4, n_bins=BINS, norm="l1", ignore_index=255)
    config = dataclasses.replace(PLAIN, **settings, batch_size=2)
    predictor = Predictor(Unsure(noise=6.0), config, DATA, (Unsure().eval(),) if ensemble else ())
    found = evaluate(predictor, dataset, seed=3, calibration=True)
    predictor.model.eval()
    for i in range(len(dataset)):
        [by_entry] = predictor.probabilities([dataset.image(i)], [evaluation_seed(3, i)])
        oracle.update(by_entry[found.final_step][None], torch.from_numpy(dataset.label(i)).long()[None])
    assert found.calibration.ece == pytest.approx(oracle.compute().item(), abs=1e-6)
    assert found.calibration.ece > 0.01
    assert sum(found.calibration.counts) == sum(image.pixels for image in found.per_image)
    plain = evaluate(predictor, dataset, seed=3)
    assert plain.to_json() == found.to_json()


def test_labels_of_16_bits_are_compared_with_classes_of_any_type():
    label = torch.tensor([[0, 300, 65535]], dtype=torch.int32).to(torch.uint16)
    for kind in (torch.uint8, torch.int32, torch.int64):
        prediction, error, area = torch.tensor([[0, 7, 7]]).to(kind), CalibrationError(65535), AUROC(65535)
        error.update(torch.tensor([[1.0, 0.5, 0.5]]), prediction, label)
        area.update(torch.tensor([[0.0, 0.5, 0.5]]), prediction, label)
        assert (sum(error.compute().counts), error.compute().accuracy[7], area.compute()) == (2, 0, 1)


def test_calibration_of_edges_and_of_one_class():
    error = CalibrationError()
    error.update(torch.tensor([0.0, 1.0, 0.5, 0.5]), torch.tensor([0, 1, 2, 3]), torch.tensor([1, 1, 2, 255]))
    found = error.compute()
    assert (found.counts[0], found.counts[7], found.counts[14], sum(found.counts)) == (1, 1, 1, 3)
    assert (found.accuracy[0], found.accuracy[7], found.accuracy[14]) == (0, 1, 1)
    assert found.ece == pytest.approx(0.5 / 3)
    assert found.to_json()["accuracy"][1] is None
    classes, confidence = averaged(torch.tensor([[[[0.25, 0.75]]]])).classes_and_confidence()
    assert (classes.tolist(), confidence.tolist()) == ([[[0, 1]]], [[[0.75, 0.75]]])
