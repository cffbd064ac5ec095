"""Checking a data set: exact counts, every planted fault named, and class weights from the histogram."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from segcore.cli.main import main
from segcore.config.registry import load_experiment
from segcore.config.schema import DataConfig, Experiment, LossConfig, ModelConfig
from segcore.data.check import Report, check, check_headers, label_pixels, require_meaning
from segcore.data.dataset import Dataset
from segcore.data.layouts import open_dataset
from segcore.data.layouts.also import join
from segcore.data.loader import rare_class_probabilities
from segcore.data.transforms import TrainTransform
from segcore.demo import toy
from segcore.errors import UserError
from segcore.reporting import crops
from segcore.training import class_weight
from segcore.training.class_weight import balanced, rare_classes, resolve_loss, weights_are_of_row

CLASSES = ("sea", "land", "sky")


def write(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(np.uint8)).save(path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """Six training pairs of 20x30 pixels and one of 10x30; a validation image without a label."""
    rng = np.random.RandomState(0)
    for i in range(7):
        height = 10 if i == 6 else 20
        write(tmp_path / f"images/train/{i}.png", rng.randint(0, 256, (height, 30, 3)))
        write(tmp_path / f"masks/train/{i}.png", np.full((height, 30), 1 if i else 0))
    write(tmp_path / "images/val/v.png", rng.randint(0, 256, (20, 30, 3)))
    label = np.zeros((20, 30))
    label[:5] = 255
    write(tmp_path / "masks/train/0.png", label)
    return DataConfig("folder", tmp_path, val_masks="", classes=CLASSES)


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x55
    path.write_bytes(content)


def test_a_good_split_is_counted_exactly(data: DataConfig) -> None:
    report = check(data, "train", 3)
    assert (report.samples, report.labels, report.problems) == (7, 7, [])
    assert report.sizes == {(20, 30): 6, (10, 30): 1}
    assert (report.pixels, report.present, report.ignored) == ([450, 3300, 0], [1, 6, 0], 150)
    assert report.notes == [f"{data.root}: no pixel is labeled sky"]
    assert json.loads(json.dumps(report.to_json()))["sizes"] == {"10x30": 1, "20x30": 6}
    text = str(report)
    assert "20x30 (6), 10x30 (1); heights 10-20, widths 30-30" in text
    assert [line.split() for line in text.splitlines() if line.startswith("land")] == [["land", "3300", "84.615", "6"]]
    val = check(data, "val", 3)
    assert (val.samples, val.labels, val.problems) == (1, 0, [])
    assert [str(data.root) in note and "no labels" in note for note in val.notes] == [True]


def test_a_class_in_front_that_is_ignored_is_not_counted(data: DataConfig) -> None:
    report = check(replace(data, add_background_class=True), "train", 4)
    assert (report.classes[0], report.ignored) == ("background", 150)
    assert (report.pixels, report.present) == ([0, 450, 3300, 0], [0, 1, 6, 0])
    assert report.notes == [f"{data.root}: no pixel is labeled sky"]


def test_every_fault_is_reported_on_one_line(data: DataConfig) -> None:
    root = data.root
    (root / "images/train/0.png").write_bytes(b"")
    flip(root / "images/train/1.png", 900)
    write(root / "masks/train/2.png", np.full((20, 29), 1))
    write(root / "masks/train/3.png", np.full((20, 30), 77))
    (root / "masks/train/4.png").unlink()
    (root / "masks/train/5.png").write_bytes((root / "masks/train/5.png").read_bytes()[:50])
    (root / "images/train/6.png").unlink()
    write(root / "images/train/7.png", np.zeros((8, 8, 3)))
    write(root / "images/train/8.png", np.zeros((8, 8, 3)))
    (root / "masks/train/8.png").write_text("no picture")  # both files of this sample are bad
    (root / "images/train/8.png").write_text("no picture")
    report = check(data, "train", 19)
    wanted = [
        ("images/train/4.png", "images/train/*", "masks/train/*"),
        ("images/train/7.png", "data.train_masks"),
        (str(root), "3 classes", "model.num_classes is 19"),
        ("images/train/0.png", "the file is empty"),
        ("images/train/1.png", "damaged"),
        ("masks/train/2.png", "label of 20x29 pixels (height x width) for an image of 20x30"),
        ("masks/train/3.png", "label values 77", "0-2, 255", "correct the mask"),
        ("masks/train/5.png", "cannot be read as a label"),
        ("images/train/8.png", "cannot be read as an image"),
        ("masks/train/8.png", "cannot be read as a label"),
    ]
    assert len(report.problems) == len(wanted)
    for problem, parts in zip(report.problems, wanted, strict=True):
        assert all(part in problem for part in parts), problem
        assert "\n" not in problem
    assert report.notes[0] == f"{root / 'masks/train/6.png'}: a label without an image"
    words = r"4.png: .*add one, .*data.train_masks, .*data.train_list \(and 1 more; `check` lists them\)"
    with pytest.raises(UserError, match=words):
        open_dataset(data, "train")


def test_flipped_bytes_of_a_label_are_found(tmp_path: Path) -> None:
    """Pillow decodes most of them without an error, into wrong classes."""
    rng = np.random.RandomState(1)
    data = DataConfig("folder", tmp_path, classes=tuple("abcdefgh"))
    write(tmp_path / "images/train/a.png", np.zeros((64, 64, 3)))
    path = write(tmp_path / "masks/train/a.png", rng.randint(0, 8, (64, 64)))
    whole = path.read_bytes()
    first, last = whole.index(b"IDAT") + 4, whole.index(b"IEND") - 8
    for offset in rng.randint(first, last, 30):
        path.write_bytes(whole)
        flip(path, offset)
        assert len(check(data, "train").problems) == 1, offset


def test_a_missing_folder_is_a_problem_of_each_split(tmp_path: Path) -> None:
    data = DataConfig("folder", tmp_path / "nowhere", classes=CLASSES)
    for split in ("train", "val"):
        (problem,) = check(data, split).problems
        assert problem.startswith(f"{data.root}: no such folder")


def test_toy_sets_are_read_and_never_generated(tmp_path: Path) -> None:
    nowhere = DataConfig("toy", tmp_path / "tyo")
    (problem,) = check(nowhere, "train").problems
    assert problem.startswith(f"{nowhere.root}: no such folder")
    assert problem.endswith("or let `train` generate it there")
    assert not nowhere.root.exists()
    data = DataConfig("toy", tmp_path / "toy")
    toy.generate(data.root, train=2, val=1, height=32, width=64)
    image = sorted(data.root.glob("leftImg8bit/train/*/*"))[0]
    flip(image, image.stat().st_size // 2)
    gone = sorted(data.root.glob("leftImg8bit/train/*/*"))[1]
    gone.unlink()
    missing, damaged = check(data, "train").problems
    assert missing == f"{gone}: missing; `train` generates it again"
    assert damaged.startswith(f"{image}: cannot be read as an image")
    assert check(data, "val").problems == []
    assert not gone.exists()


def test_check_headers_finds_faults_visible_without_decoding(data: DataConfig) -> None:
    root, dataset = data.root, open_dataset(data, "train")
    assert check_headers(dataset) == []
    (root / "images/train/0.png").write_bytes(b"")
    write(root / "masks/train/2.png", np.full((20, 29), 1))
    (root / "masks/train/5.png").write_text("no picture")
    flip(root / "images/train/1.png", 900)  # inside the pixels: only `check` finds it
    problems = check_headers(dataset)
    assert [Path(problem.partition(":")[0]).name for problem in problems] == ["0.png", "2.png", "5.png"]


def test_check_headers_accepts_exif_rotation_and_files_that_pillow_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "images/train").mkdir(parents=True)
    photo = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    exif = photo.getexif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    photo.save(tmp_path / "images/train/a.jpg", exif=exif)
    write(tmp_path / "masks/train/a.png", np.eye(30, 20))
    np.save(tmp_path / "images/train/b.npy", np.zeros((20, 30, 3), np.uint8))
    write(tmp_path / "masks/train/b.png", np.zeros((20, 30)))
    data = DataConfig("folder", tmp_path, classes=CLASSES)
    assert check_headers(open_dataset(data, "train")) == []
    assert check(data, "train").problems == []


def test_command_lists_all_and_fails_with_their_number(data: DataConfig, tmp_path: Path, capsys) -> None:
    config = tmp_path / "mine.py"
    config.write_text(
        "from pathlib import Path\nfrom ddp_seg.configs import DDPConfig\n"
        "from segcore.config.schema import DataConfig, Experiment\n"
        f"def mine():\n    data = DataConfig('folder', Path({str(data.root)!r}), val_masks='', classes={CLASSES})\n"
        "    return Experiment('mine', DDPConfig(num_classes=3), data)\n"
    )
    words = ["check", f"{config}:mine", f"--json={tmp_path / 'report.json'}"]
    main("ddp_seg", words)
    assert "problems: none" in capsys.readouterr().out
    main("ddp_seg", [*words, "--save-images", str(tmp_path / "pages"), "--data.crop", "8", "8"])
    assert capsys.readouterr().out.endswith(f"\n\n{tmp_path / 'pages' / 'train_01.jpg'}\n")
    with pytest.raises(SystemExit):
        main("ddp_seg", [*words, "--save-images", str(config)])
    assert capsys.readouterr() == ("", f"error: --save-images {config}: is a file; name a folder\n")
    (data.root / "images/train/0.png").write_bytes(b"")
    (data.root / "images/val/v.png").write_bytes(b"")
    with pytest.raises(SystemExit) as end:
        main("ddp_seg", words)
    out, err = capsys.readouterr()
    assert end.value.code == 1
    assert err.splitlines()[-1].startswith(f"error: {data.root}: 2 problems, listed above; ")
    assert out.count("the file is empty") == 2
    found = json.loads((tmp_path / "report.json").read_text())
    assert [len(found[split]["problems"]) for split in ("train", "val")] == [1, 1]


# Pages of training crops


def test_pages_show_the_rarest_classes_first(data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mask 0 holds all of class 0; the readable masks 1 to 6 all of class 1; class 2 does not occur."""
    (data.root / "images/train/3.png").write_bytes(b"")
    captions = list[str]()
    stack = crops.hstack_panels
    monkeypatch.setattr(crops, "hstack_panels", lambda panels, names: (captions.extend(names), stack(panels, names))[1])
    data = replace(data, crop=(8, 8), flip=0.5, img_scale=(30, 20), ratio_range=(0.5, 2.0))
    [page] = crops.write_crop_pages(tmp_path / "pages", open_dataset(data, "train"), data, seed=0)
    assert [name for name in captions if ":" in name] == [
        "sea: 11.5 % of the pixels, in 1 of 7 images",
        "land: 84.6 % of the pixels, in 6 of 7 images",
    ]
    assert captions[1] == "0"
    assert "3" not in captions
    with Image.open(page) as picture:
        first = picture.copy()
    for seed, alike in ((0, True), (1, False)):
        [again] = crops.write_crop_pages(tmp_path / str(seed), open_dataset(data, "train"), data, seed=seed)
        with Image.open(again) as picture:
            assert (picture.size == first.size and picture.tobytes() == first.tobytes()) == alike


def test_a_crop_shows_the_pixels_of_the_file_and_the_color_of_the_class(data: DataConfig) -> None:
    data = replace(data, crop=(20, 40), palette=("ff0000", "00ff00", "0000ff"))
    dataset = open_dataset(data, "train")
    image, label = dataset.pair(0)
    crop = TrainTransform(data)(image, label, np.random.RandomState(0))
    plain, painted = crops.crop_panels(*crop, dataset, data)
    np.testing.assert_array_equal(plain[:, :30], image)
    assert (np.abs(plain[:, 30:].astype(int) - np.array(data.mean)) < 1).all()
    np.testing.assert_array_equal(painted[5:, :30], (image[5:] * 0.5 + np.array([127.5, 0, 0])).astype(np.uint8))
    np.testing.assert_array_equal(painted[:5, :30], (image[:5] * 0.5).astype(np.uint8))


# Class weights


@dataclass(frozen=True)
class Tiny(ModelConfig):
    def build(self):
        raise NotImplementedError


def experiment(data: DataConfig, weights) -> Experiment:
    return Experiment("tiny", Tiny(num_classes=3), data, loss=LossConfig(class_weight=weights))


def test_balanced_weights_follow_the_formula() -> None:
    weights = balanced(np.array([700, 300, 0]))
    expected = 1 / np.log(1.02 + np.array([0.7, 0.3, 0]))
    np.testing.assert_allclose(weights / weights[0], expected / expected[0])
    assert np.dot(weights, [0.7, 0.3, 0]) == pytest.approx(1)
    assert np.isfinite(balanced(np.zeros(3))).all()
    roots = balanced(np.array([700, 300, 0]), power=0.5)
    np.testing.assert_allclose(roots / roots[0], np.sqrt(weights / weights[0]))
    assert np.dot(roots, [0.7, 0.3, 0]) == pytest.approx(1)


def weights_of(exp: Experiment, dataset: Dataset, work_dir: Path) -> tuple[float, ...]:
    loss = resolve_loss(exp, dataset, work_dir)
    assert isinstance(loss.class_weight, tuple)
    assert replace(loss, class_weight=exp.loss.class_weight) == exp.loss
    return loss.class_weight


def test_given_weights_stay_unchanged(data: DataConfig, tmp_path: Path) -> None:
    dataset = open_dataset(data, "train")
    for weights in (None, (1.0, 2.0, 0.5)):
        exp = experiment(data, weights)
        assert resolve_loss(exp, dataset, tmp_path / "run") == exp.loss
    assert not (tmp_path / "run").exists()


def test_another_number_of_weights_than_classes_is_refused(data: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"loss.class_weight has 2 values for 3 classes; give one per class, auto"):
        resolve_loss(experiment(data, (1.0, 2.0)), open_dataset(data, "train"), tmp_path / "run")


def test_weights_that_a_row_states_for_its_classes_are_left_out_for_others(data: DataConfig, tmp_path: Path) -> None:
    row = load_experiment("ddrnet_23_slim_cityscapes_pyradd")
    assert isinstance(row.loss.class_weight, tuple)
    other = replace(row, model=replace(row.model, num_classes=3))
    assert weights_are_of_row(other)
    assert not weights_are_of_row(row)
    loss = resolve_loss(other, open_dataset(data, "train"), tmp_path / "run")
    assert loss == replace(row.loss, class_weight=None)


def test_auto_reads_the_labels_once(data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exp, run = experiment(data, "auto"), tmp_path / "run"
    weights = weights_of(exp, open_dataset(data, "train"), run)
    np.testing.assert_allclose(weights, balanced(np.array([450, 3300, 0])))
    with monkeypatch.context() as patch:
        patch.setattr(class_weight, "label_pixels", lambda *_, **__: pytest.fail("the labels are read again"))
        assert weights_of(exp, open_dataset(data, "train"), run) == weights
    roots = weights_of(experiment(data, "auto_sqrt"), open_dataset(data, "train"), tmp_path / "other")
    np.testing.assert_allclose(roots, balanced(np.array([450, 3300, 0]), power=0.5))
    histogram = run / class_weight.HISTOGRAM
    record = json.loads(histogram.read_text())
    with monkeypatch.context() as patch:  # a list of 17 MiB, as of millions of images
        histogram.write_text(json.dumps(record) + " " * (17 << 20))
        patch.setattr(class_weight, "label_pixels", lambda *_, **__: pytest.fail("the labels are read again"))
        assert weights_of(exp, open_dataset(data, "train"), run) == weights
    for pixels in ("a", [450, 3300], [450, 3300, -1], [450, 3300, 1e300], [[], [], []]):  # damaged: read again
        histogram.write_text(json.dumps(record | {"pixels": pixels}))
        assert weights_of(exp, open_dataset(data, "train"), run) == weights
        assert json.loads(histogram.read_text()) == record
    (data.root / "images/train/0.png").unlink()  # another data set: read again
    assert weights_of(exp, open_dataset(data, "train"), run) != weights


def test_counts_of_labels_that_meant_something_else_are_not_reused(data: DataConfig, tmp_path: Path) -> None:
    exp, gray = experiment(data, "auto"), open_dataset(data, "train")
    table = gray.table.copy()
    table[3] = 255
    colors = np.array([[0] * 3, [1] * 3, [2] * 3, [255] * 3], np.uint8)
    for rows, counts in (([0, 1, 2, 3], [450, 3300, 0]), ([1, 0, 2, 3], [3300, 450, 0])):
        dataset = replace(gray, table=table, colors=colors[rows])
        np.testing.assert_allclose(weights_of(exp, dataset, tmp_path / "run"), balanced(np.array(counts)))
    table = gray.table.copy()
    table[1] = 2
    for other, counts in ((gray, [900, 6600, 0]), (replace(gray, table=table), [900, 3300, 3300])):
        weights = weights_of(exp, join(gray, [other]), tmp_path / "joined")
        np.testing.assert_allclose(weights, balanced(np.array(counts)))


def test_rare_classes_know_the_images_of_each_class(data: DataConfig, tmp_path: Path) -> None:
    dataset = open_dataset(data, "train")
    assert rare_classes(experiment(data, None), dataset, tmp_path) is None
    exp = experiment(replace(data, rare_class_sampling=0.1), None)
    rare = rare_classes(exp, dataset, tmp_path / "run")
    assert rare is not None
    np.testing.assert_allclose(rare.probabilities, rare_class_probabilities(np.array([450, 3300]), 0.1))
    labels = [dataset.label(index) for index in range(len(dataset))]
    assert [found.tolist() for found in rare.images] == [
        [index for index, label in enumerate(labels) if (label == k).any()] for k in range(2)
    ]
    again = rare_classes(exp, dataset, tmp_path / "run")
    assert again is not None
    assert [found.tolist() for found in again.images] == [found.tolist() for found in rare.images]


def test_rare_classes_without_a_readable_label(data: DataConfig, tmp_path: Path) -> None:
    for path in (data.root / "masks/train").iterdir():
        path.write_bytes(b"no image")
    data = replace(data, rare_class_sampling=0.1, on_error="skip")
    assert rare_classes(experiment(data, None), open_dataset(data, "train"), tmp_path) is None


def test_auto_leaves_ignored_pixels_out_behind_a_background(data: DataConfig, tmp_path: Path) -> None:
    data = replace(data, add_background_class=True)
    exp = Experiment("tiny", Tiny(num_classes=4), data, loss=LossConfig(class_weight="auto"))
    weights = weights_of(exp, open_dataset(data, "train"), tmp_path)
    np.testing.assert_allclose(weights, balanced(np.array([0, 450, 3300, 0])))


def test_auto_names_labels_that_cannot_be_used(data: DataConfig, tmp_path: Path) -> None:
    write(data.root / "masks/train/3.png", np.full((20, 30), 77))
    write(data.root / "masks/train/5.png", np.full((20, 30), 78))
    dataset = open_dataset(data, "train")
    assert len(label_pixels(dataset)[1]) == 2
    with pytest.raises(UserError, match=r"3.png: label values 77 .* to ignore \(and 1 more; `check` lists them\)"):
        resolve_loss(experiment(data, "auto"), dataset, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_real_labels_are_counted_as_opencv_does(real_data: Path) -> None:
    dataset = open_dataset(DataConfig("cityscapes", real_data / "cityscapes"), "val")
    counted, problems = label_pixels(dataset)
    labels = [dataset.label(i) for i in range(len(dataset))]
    expected = sum(cv2.calcHist([label], [0], None, [256], [0, 256]).ravel() for label in labels)
    assert problems == []
    np.testing.assert_array_equal(counted, expected)


# Labels from which nothing can be learned

TWO = ("sea", "land")


def mask_set(root: Path, *masks: np.ndarray, **settings: Any) -> DataConfig:
    """Return a folder whose training and validation masks are these, with gray images."""
    for split in ("train", "val"):
        for i, mask in enumerate(masks):
            write(root / f"masks/{split}/{i}.png", mask)
            write(root / f"images/{split}/{i}.png", np.full((*mask.shape, 3), 99))
    return DataConfig("folder", root, **{"classes": TWO, **settings})


HALF = np.repeat([0, 1], 20)[None].repeat(8, 0)


@pytest.mark.parametrize(
    ("mask", "settings", "words"),
    [
        (HALF * 255, {}, "only 0 and 255, which is ignored.*--data.labels 0=sea 255=land"),
        (
            HALF * 7,
            {"classes": (), "labels": ("7=sea", "9=land"), "unlisted": "ignore"},
            "only 'sea' has pixels in train",
        ),
        (HALF * 200, {"unlisted": "ignore"}, "only 'sea' has pixels in train"),  # 200 is ignored, too
        (HALF * 0, {}, "only 'sea' has pixels in train"),
        (HALF * 0 + 1, {}, "only 'land' has pixels in train"),
        (HALF * 0 + 255, {}, "every label pixel of train is ignored; .*data.labels"),
        (HALF * 0, {"classes": ("sea",)}, "'sea' is the only class"),
    ],
)
def test_training_that_would_mean_nothing_is_a_problem(tmp_path: Path, mask, settings, words: str) -> None:
    data = mask_set(tmp_path, mask, mask, **settings)
    [problem] = check(data, "train").problems
    assert re.search(words, problem), problem
    assert problem.startswith(f"{tmp_path}: ")
    with pytest.raises(UserError, match=words):
        require_meaning(open_dataset(data, "train"), "train", data.root)


def test_a_few_suspicious_labels_of_many_are_no_problem(tmp_path: Path) -> None:
    dataset = open_dataset(mask_set(tmp_path, HALF * 255, HALF * 255, HALF), "train")
    assert require_meaning(dataset, "train", tmp_path, most=1) == []
    assert require_meaning(dataset, "val", tmp_path) == []


def test_doubtful_labels_are_remarked_by_name(tmp_path: Path) -> None:
    data = mask_set(tmp_path, HALF, np.full((8, 80), 255), classes=(*TWO, "ice"))
    report = check(data, "val")
    assert report.problems == []
    assert report.notes == [f"{tmp_path}: no pixel is labeled ice", f"{tmp_path}: 67% of the label pixels are ignored"]
    remarks = require_meaning(open_dataset(data, "val"), "val", tmp_path)
    assert remarks == [note.replace(": ", ": val: ", 1) for note in report.notes]


def test_many_problems_are_counted_and_the_first_are_shown() -> None:
    report = Report("train", problems=[f"{i}.png: empty" for i in range(60)])
    lines = str(report).splitlines()
    assert "problems: 60" in lines
    assert lines[-1] == "  and 10 more; --json FILE has all"
    assert len(lines) == 53
    assert len(report.to_json()["problems"]) == 60


def test_validation_images_that_are_trained_on_are_noted(tmp_path: Path) -> None:
    data = replace(mask_set(tmp_path, HALF, HALF), val_images="images/train/*", val_masks="masks/train/*")
    note = f"{tmp_path}: 2 of 2 validation images are training images, which makes figures on them too good"
    assert check(data, "val").notes == [note]
    assert not check(data, "val").problems
    assert not any("training images" in line for line in check(replace(data, val_share=0.5), "val").notes)
