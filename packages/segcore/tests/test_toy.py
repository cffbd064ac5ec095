"""The generated street scenes: layout, determinism, interruption; color alone does not solve them."""

import json
import subprocess
import sys

import numpy as np
import pytest

from segcore.config.schema import DataConfig
from segcore.data.images import read_label
from segcore.data.layouts import cityscapes
from segcore.demo import toy
from segcore.demo.baseline import fit_linear
from segcore.errors import UserError
from segcore.evaluation.metrics import ConfusionMatrix

SMALL = {"train": 2, "val": 1, "height": 32, "width": 64}


def contents(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.png")}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """30 training and 12 validation scenes at half the default size, as (images, labels) per split."""
    root = tmp_path_factory.mktemp("toy")
    toy.generate(root, train=30, val=12, height=128, width=256)
    splits = {split: cityscapes.open_split(DataConfig("cityscapes", root), split) for split in toy.SPLITS}
    return {
        split: ([data.image(i) for i in range(len(data))], [data.label(i) for i in range(len(data))])
        for split, data in splits.items()
    }


def test_layout_is_that_of_cityscapes(tmp_path):
    toy.generate(tmp_path, **SMALL)
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    expected = {"toy.json"}
    for split, index in (("train", 0), ("train", 1), ("val", 0)):
        stem = f"{split}/toytown/toytown_{index:06d}_000000"
        kinds = ("labelIds", "labelTrainIds")
        expected |= {f"leftImg8bit/{stem}_leftImg8bit.png", *(f"gtFine/{stem}_gtFine_{kind}.png" for kind in kinds)}
    assert names == expected
    data = cityscapes.open_split(DataConfig("cityscapes", tmp_path), "train")
    assert len(data) == 2
    assert data.image(0).shape == (32, 64, 3)
    assert data.label(0).shape == (32, 64)


def test_raw_ids_and_train_ids_agree(tmp_path):
    toy.generate(tmp_path, **SMALL)
    for train_ids in tmp_path.rglob("*_gtFine_labelTrainIds.png"):
        raw = read_label(train_ids.with_name(train_ids.name.replace("TrainIds", "Ids")))
        expected = np.full_like(raw, 255)
        for index, raw_id in enumerate(cityscapes.RAW_IDS):
            expected[raw == raw_id] = index
        np.testing.assert_array_equal(read_label(train_ids), expected)
        assert (raw[expected == 255] == 1).all()
        assert (raw[-1] == 1).mean() > 0.5, "the own car's hood lies along the lower edge"


def test_same_seed_same_bytes_and_a_smaller_set_is_a_prefix(tmp_path):
    toy.generate(tmp_path / "a", **SMALL)
    toy.generate(tmp_path / "b", **SMALL | {"train": 3})
    toy.generate(tmp_path / "c", **SMALL | {"seed": 1})
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a.items() < b.items()
    assert a.keys() == c.keys()
    assert all(a[name] != c[name] for name in a if "leftImg8bit" in name)
    images = [data for name, data in b.items() if "leftImg8bit" in name]
    assert len(set(images)) == len(images) == 4


def test_interrupted_generation_is_continued(tmp_path):
    def interrupt(done, total):
        assert total == 3
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy.generate(tmp_path / "cut", **SMALL, progress=interrupt)
    assert not toy.is_complete(tmp_path / "cut")
    (tmp_path / "cut" / "notes.txt").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").rglob("*.png")}
    assert len(before) == 6

    steps = []
    toy.generate(tmp_path / "cut", **SMALL, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert toy.is_complete(tmp_path / "cut")
    assert (tmp_path / "cut" / "notes.txt").read_text() == "mine"
    assert all(path.stat().st_mtime_ns == then for path, then in before.items()), "what was there is not drawn again"
    toy.generate(tmp_path / "whole", **SMALL)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_missing_file_makes_the_set_incomplete_and_is_drawn_again(tmp_path):
    toy.generate(tmp_path, **SMALL)
    before = contents(tmp_path)
    next(tmp_path.rglob("*_labelIds.png")).unlink()
    assert not toy.is_complete(tmp_path)
    toy.generate(tmp_path, **SMALL)
    assert toy.is_complete(tmp_path)
    assert contents(tmp_path) == before


def test_a_set_is_completed_by_its_own_parameters(tmp_path, capsys, monkeypatch):
    toy.generate(tmp_path / "own", **SMALL)
    before = contents(tmp_path / "own")
    gone = next((tmp_path / "own").glob("gtFine/val/*/*_labelIds.png"))
    gone.unlink()
    assert toy.missing_files(tmp_path / "own") == toy.missing_files(tmp_path / "own", ["val"]) == [gone]
    assert toy.missing_files(tmp_path / "own", ["train"]) == []
    toy.generate_missing(tmp_path / "own")
    assert capsys.readouterr().err.startswith(f"{tmp_path / 'own'}: 1 of its files are missing; generating")
    assert contents(tmp_path / "own") == before
    toy.generate_missing(tmp_path / "own")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(toy, "generate", lambda root, progress: (root / "begun").mkdir(parents=True))
    toy.generate_missing(tmp_path / "new")
    assert capsys.readouterr().err == f"{tmp_path / 'new'}: missing; generating 250 street scenes\n"
    with pytest.raises(UserError, match=r"new: .*another folder.* data\.root"):
        toy.generate_missing(tmp_path / "new")


def test_an_empty_folder_is_not_complete(tmp_path):
    assert not toy.is_complete(tmp_path)
    assert not toy.is_complete(tmp_path / "missing")


def test_other_parameters_are_refused_and_change_nothing(tmp_path):
    toy.generate(tmp_path, **SMALL)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"toy\.json: .* other parameters; delete"):
        toy.generate(tmp_path, **SMALL | {"seed": 5})
    assert contents(tmp_path) == before
    assert toy.is_complete(tmp_path)


HUGE = '{"train": 1000000000000, "val": 1}'


@pytest.mark.parametrize("text", ["", "[1, 2]", "{}", '{"train": "2", "val": 1}', json.dumps({"train": 2}), HUGE])
def test_damaged_marker_is_named(tmp_path, text):
    (tmp_path / "toy.json").write_text(text)
    for call in (toy.is_complete, toy.generate):
        with pytest.raises(UserError, match=r"toy\.json: .*delete the folder"):
            call(tmp_path)


@pytest.mark.parametrize("wrong", [{"train": 0}, {"val": 0}, {"height": 31}, {"width": 0}])
def test_impossible_parameters_are_named(tmp_path, wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"toy {name} is {wrong[name]}; it must be at least"):
        toy.generate(tmp_path / "toy", **SMALL | wrong)
    assert not (tmp_path / "toy").exists()


def test_every_class_but_two_has_a_meaningful_share(scenes):
    for _, labels in scenes.values():
        share = np.mean([np.bincount(label.ravel(), minlength=256) / label.size for label in labels], axis=0)
        missing = {cityscapes.CLASSES[k] for k in range(19) if share[k] == 0}
        assert missing == {"train", "motorcycle"}
        assert all(share[k] > 0.003 for k in range(19) if share[k])
        assert share[19:255].sum() == 0
        assert 0.03 < share[255] < 0.1


def test_color_alone_does_not_solve_it(scenes):
    (images, labels), (val_images, val_labels) = scenes["train"], scenes["val"]
    classifier = fit_linear(images, labels, 19, 255, position=False, pixels=10_000)
    confusion = ConfusionMatrix(19)
    for image, label in zip(val_images, val_labels, strict=True):
        confusion.update(classifier.predict(image), label)
    metrics = confusion.compute()
    assert metrics["mIoU"] < 0.25
    assert metrics["aAcc"] > 0.3, "the classifier did learn: the largest class alone is less"


def test_imports_no_torch():
    code = "import sys, segcore.demo.toy, segcore.reporting.figures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
