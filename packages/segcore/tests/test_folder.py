"""A user's own folder: label tables, lists, a held-out share, links and system files."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from segcore.config.record import settings_of
from segcore.config.registry import load_experiment
from segcore.config.schema import DataConfig, Experiment, ModelConfig
from segcore.data.dataset import Dataset, Sample
from segcore.data.layouts import open_dataset
from segcore.data.layouts.files import glob_files, list_files
from segcore.errors import UserError


@dataclass(frozen=True)
class Config(ModelConfig):
    def build(self):
        raise NotImplementedError


EXPERIMENT = Experiment("mine", Config(), DataConfig("folder"))
VALUES = np.array([[0, 1, 7], [9, 12, 255]], np.uint8)
IMAGE = np.full((6, 8, 3), 99, np.uint8)


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


def one_line(caught: pytest.ExceptionInfo[UserError], *parts: str) -> None:
    assert "\n" not in str(caught.value)
    assert [part for part in parts if part not in str(caught.value)] == []


def write_folder(root: Path) -> DataConfig:
    write(root / "images/train/a.png", IMAGE)
    write(root / "masks/train/a.png", np.zeros((6, 8)))
    return DataConfig("folder", root, classes=("sea", "land"))


def folder_of(root: Path, masks: dict[str, np.ndarray], **settings: Any) -> DataConfig:
    """Return a folder with these masks in `masks/train` and images of the same names."""
    for name, mask in masks.items():
        (root / "masks/train").mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(root / "masks/train" / name)
        write(root / "images/train" / Path(name).with_suffix(".png").name, np.full((*mask.shape[:2], 3), 99))
    return EXPERIMENT.with_overrides([f"data.root={root}", *(f"data.{k}={v}" for k, v in settings.items())]).data


def test_values_are_named_by_rows_or_a_csv_file(tmp_path: Path) -> None:
    rows = "7=road 9=road 0=ignore 12=tree 1=sky 255=ignore"
    (tmp_path / "labels.csv").write_text("value,name\n" + "\n".join(rows.replace("=", ",").split()) + "\n\n")
    for labels in (rows, tmp_path / "labels.csv"):
        data = folder_of(tmp_path, {"a.png": VALUES}, labels=labels)
        assert data.classes == ("road", "tree", "sky")
        assert data.labels == tuple(rows.split()), "a run needs the file no more"
        np.testing.assert_array_equal(open_dataset(data, "train").label(0), [[255, 2, 0], [0, 1, 255]])
    data = replace(data, classes=("sky", "road", "tree"))
    np.testing.assert_array_equal(open_dataset(data, "train").label(0), [[255, 0, 1], [1, 2, 255]])


def test_labels_set_the_number_of_classes() -> None:
    assert EXPERIMENT.with_overrides(["data.labels=0=a,255=b,3=a"]).model.num_classes == 2
    assert EXPERIMENT.with_overrides(["data.labels=0=a 255=b", "model.num_classes=5"]).model.num_classes == 5
    with pytest.raises(UserError, match=r"data\.labels is empty; quote colors"):  # a shell took `#…` for a comment
        replace(EXPERIMENT, data=replace(EXPERIMENT.data, classes=(), labels=())).with_overrides(["data.labels="])


def test_unlisted_values_are_named_or_ignored(tmp_path: Path) -> None:
    data = folder_of(tmp_path, {"a.png": VALUES}, labels="0=a 1=b")
    with pytest.raises(UserError, match=r"a.png: label values 7, 9, 12, 255 are not classes; .*data.unlisted"):
        open_dataset(data, "train").label(0)
    ignoring = replace(data, unlisted="ignore")
    np.testing.assert_array_equal(open_dataset(ignoring, "train").label(0), [[0, 1, 255], [255, 255, 255]])
    plain = DataConfig("folder", tmp_path, classes=("a", "b"), unlisted="ignore")
    np.testing.assert_array_equal(open_dataset(plain, "train").label(0), [[0, 1, 255], [255, 255, 255]])


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "P"])
def test_masks_of_colors(tmp_path: Path, kind: str) -> None:
    colors = np.array([[[128, 64, 128], [0, 0, 0]], [[70, 130, 180], [128, 64, 128]]], np.uint8)
    mask = np.array(Image.fromarray(colors).convert("RGBA")) if kind == "RGBA" else colors
    data = folder_of(tmp_path, {"a.png": mask}, labels="#804080=road #4682B4=sky #000000=ignore")
    if kind == "P":
        Image.fromarray(colors).quantize(8).save(tmp_path / "masks/train/a.png")
    dataset = open_dataset(data, "train")
    np.testing.assert_array_equal(dataset.label(0), [[0, 255], [1, 0]])
    np.testing.assert_array_equal(dataset.palette, [[128, 64, 128], [70, 130, 180]])
    fewer = folder_of(tmp_path, {"a.png": mask}, labels="#804080=road #102030=sky")
    with pytest.raises(UserError, match=r"a.png: colors #000000, #4682b4 are not classes; add them to data.labels"):
        open_dataset(fewer, "train").label(0)
    ignored = open_dataset(replace(fewer, unlisted="ignore"), "train").label(0)
    np.testing.assert_array_equal(ignored, [[0, 255], [255, 0]])


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ("0", "'0'; write value=name"),
        ("0=", "'0='"),
        ("70000=a", "'70000=a'"),
        ("-1=a", "'-1=a'"),
        ("#12=a", "'#12=a'"),
        ("0=a 0=b", "0 twice, for 'a' and 'b'"),
        ("0=a #000000=b", "both values and colors"),
        ("nowhere.csv", "nowhere.csv: cannot be read"),
    ],
)
def test_wrong_label_rows_are_refused(labels: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        EXPERIMENT.with_overrides([f"data.labels={labels}"])


def test_a_wrong_line_of_a_csv_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    for text, words in ((b"0,a\nroad,1\n", "line 2: is 'road,1'"), (b"\xff\xfe0,a", "UTF-8")):
        path.write_bytes(text)
        with pytest.raises(UserError, match=words):
            EXPERIMENT.with_overrides([f"data.labels={path}"])
    with pytest.raises(UserError, match=r"do not name the same classes: b, c; leave out data.classes"):
        DataConfig(classes=("a", "b"), labels=("0=a", "1=c"))


@pytest.mark.parametrize("kind", ["folder", "FIFO"])
def test_what_is_no_regular_file_is_not_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "labels.csv"
    if kind == "FIFO" and not hasattr(os, "mkfifo"):
        pytest.skip("this system has no FIFOs")
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(UserError, match=rf"labels.csv: is not a regular file \(a {kind}\)"):
        EXPERIMENT.with_overrides([f"data.labels={path}"])


def test_a_stored_name_of_a_csv_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "secret.csv"
    path.write_text("password\n")
    experiment = load_experiment("ddrnet_23_slim_toy")
    stored = settings_of(experiment)
    stored["data"] |= {"dataset": "folder", "labels": [str(path)]}
    (tmp_path / "experiment.json").write_text(json.dumps({"experiment": stored}))
    with pytest.raises(UserError, match=r"data\.labels is '.*secret\.csv'; stored settings hold rows") as error:
        load_experiment(tmp_path)
    assert "password" not in str(error.value)
    path.write_text("0,road\n")  # what a call names is replaced by its rows before it is stored
    named = replace(experiment, data=replace(experiment.data, dataset="folder", labels=(str(path),)))
    assert settings_of(named)["data"]["labels"] == ["0=road"]


@pytest.mark.parametrize("name", ["\x1b[31mroad", "ro\nad", "\u202eroad"])
def test_class_names_that_a_terminal_would_obey_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "labels.csv").write_text(f'0,"{name}"\n', encoding="utf-8")
    for given in ({"classes": (name, "b")}, {"labels": (f"0={name}",)}, {"labels": (str(tmp_path / "labels.csv"),)}):
        with pytest.raises(UserError, match="has control characters") as error:
            DataConfig(dataset="folder", **given)
        assert str(error.value).isprintable()


def test_more_classes_than_a_byte_holds(tmp_path: Path) -> None:
    mask = np.array([[0, 255, 256], [299, 65535, 1]], np.uint16)
    data = folder_of(tmp_path, {"a.png": mask, "b.tif": mask}, classes=" ".join(f"c{i}" for i in range(300)))
    dataset = open_dataset(data, "train")
    assert (dataset.ignore_index, dataset.label_values) == (65535, 65536)
    for i in range(2):
        assert dataset.label(i).dtype == np.uint16
        np.testing.assert_array_equal(dataset.label(i), mask)
    for count, ignored in ((254, 255), (255, 255), (256, 65535)):
        names = tuple(f"c{i}" for i in range(count))
        dataset = open_dataset(replace(data, classes=names, unlisted="ignore"), "train")
        assert dataset.ignore_index == ignored
        assert dataset.label(0).max() == ignored


def test_settings_of_a_folder_are_refused_where_they_are_not_read() -> None:
    for setting in ("labels=0=a 1=b", "classes=a b", "val_share=0.1", "train_images=photos/*", "unlisted=ignore"):
        with pytest.raises(UserError, match=r"data\.\w+ is not read with data.dataset toy; add --data.dataset folder"):
            EXPERIMENT.with_overrides([f"data.{setting}", "data.dataset=toy"])


def test_lists_name_images_or_pairs(tmp_path: Path) -> None:
    masks = {f"{n}.png": np.full((4, 4), i, np.uint8) for i, n in enumerate("abcd")}
    data = folder_of(tmp_path, masks, classes="w x y z")
    (tmp_path / "t.txt").write_text("c\n\na.png\n")
    (tmp_path / "v.txt").write_text("images/train/d.png masks/train/b.png\n")
    listed = replace(data, train_list=tmp_path / "t.txt", val_list=tmp_path / "v.txt", val_images="images/train/*")
    listed = replace(listed, val_masks="masks/train/*")
    train, val = (open_dataset(listed, split) for split in ("train", "val"))
    assert [train.name(i) for i in range(len(train))] == ["c", "a"]
    assert [(s.image.name, s.label.name) for s in val.samples if s.label] == [("d.png", "b.png")]
    for text, words in (("a\nq\n", "t.txt, line 2: 'q' is neither"), ("\n", "names no image"), ("a ../b", "line 1")):
        (tmp_path / "t.txt").write_text(text)
        with pytest.raises(UserError, match=words):
            open_dataset(listed, "train")
    with pytest.raises(UserError, match=r"nowhere.txt: no such list of images, neither here nor in "):
        open_dataset(replace(listed, train_list=Path("nowhere.txt")), "train")
    os.mkfifo(tmp_path / "fifo")
    for path, kind in ((tmp_path, "a folder"), (tmp_path / "fifo", "a FIFO"), (Path("/dev/zero"), "a device")):
        with pytest.raises(UserError, match=rf"is not a regular file \({kind}\)"):
            open_dataset(replace(listed, train_list=path), "train")


def test_lists_name_images_in_folders(tmp_path: Path) -> None:
    for folder in "ab":
        for number in "12":
            write(tmp_path / f"images/{folder}/{number}.png", IMAGE)
            if folder + number != "b2":
                write(tmp_path / f"masks/{folder}/{number}.png", np.zeros((4, 4), np.uint8))
    write(tmp_path / "images/a/only.v1.png", IMAGE)
    write(tmp_path / "masks/a/only.v1.png", np.zeros((4, 4), np.uint8))
    data = DataConfig("folder", tmp_path, classes=("w",), train_images="images/*/*.png", train_masks="masks/*/*.png")

    def named(text: str) -> list[str]:
        (tmp_path / "t.txt").write_text(text)
        found = open_dataset(replace(data, train_list=tmp_path / "t.txt"), "train")
        return [found.name(i) for i in range(len(found))]

    assert named("b/1\na/2.png\nimages/a/1\n") == ["b/1", "a/2", "a/1"]
    assert named("only.v1\nelsewhere/only.v1.png\n") == ["a/only.v1", "a/only.v1"], "one image has this stem"
    for text, words in (
        ("b/1\n1\n", r"t\.txt, line 2: '1' is the stem of .*a.1\.png and .*b.1\.png; name the folder, too"),
        ("c/1\n", "line 1: 'c/1' is neither"),
        ("b/2\n", r"b.2\.png: "),  # an image without a mask
    ):
        with pytest.raises(UserError, match=words):
            named(text)


def test_a_list_of_pairs_needs_no_patterns_and_may_lie_below_the_root(tmp_path: Path) -> None:
    masks = {f"{n}.png": np.full((4, 4), i, np.uint8) for i, n in enumerate("abcd")}
    data = replace(folder_of(tmp_path, masks, classes="w x y z"), train_images="none/*", train_masks="none/*")
    (tmp_path / "pairs.txt").write_text("images/train/d.png masks/train/b.png\nimages/train/a.png masks/train/a.png\n")
    train = open_dataset(replace(data, train_list=Path("pairs.txt")), "train")
    assert [(s.image.name, s.label.name) for s in train.samples if s.label] == [("d.png", "b.png"), ("a.png", "a.png")]
    with pytest.raises(UserError, match=r"or list the pairs in data\.train_list"):
        open_dataset(data, "train")


def test_images_outside_the_folder_of_a_list_have_names_that_stay_below_it(tmp_path: Path) -> None:
    """Also of those that lie above `data.root`, and none is that of an image inside."""
    data = write_folder(tmp_path / "data")
    rows = ["images/train/a.png", "scene1/a.png", "../out.png", "images/out.png", str(tmp_path / "far/a.png")]
    for row in rows[1:]:
        write(data.root / row, IMAGE)
    (tmp_path / "list.txt").write_text("".join(f"{row} masks/train/a.png\n" for row in rows))
    found = open_dataset(replace(data, train_list=tmp_path / "list.txt"), "train")
    names = [found.name(i) for i in range(len(found))]
    assert names == ["a", "__/__/scene1/a", "__/__/__/out", "__/out", "__/__/__/far/a"]


def test_a_share_of_the_training_images_is_held_out(tmp_path: Path) -> None:
    data = folder_of(
        tmp_path, {f"{n}.png": np.zeros((4, 4), np.uint8) for n in range(10)}, classes="a b", val_share=0.3
    )
    names = {split: [open_dataset(data, split).name(i) for i in range(n)] for split, n in (("train", 7), ("val", 3))}
    assert sorted(names["train"] + names["val"]) == [str(n) for n in range(10)]
    assert sorted(names["train"]) == names["train"]
    other = open_dataset(replace(data, val_seed=1), "val")
    assert [other.name(i) for i in range(3)] != names["val"]
    with pytest.raises(UserError, match=r"data.val_share 0.99 of 10 images leaves none"):
        open_dataset(replace(data, val_share=0.99), "train")


def test_images_and_masks_in_one_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"both/{name}.png", IMAGE)
        write(tmp_path / f"both/{name}_mask.png", np.zeros((6, 8)))
    data = DataConfig("folder", tmp_path, train_images="both/*", train_masks="both/*_mask.png", classes=("a", "b"))
    dataset = open_dataset(data, "train")
    assert [(s.image.name, s.label.name) for s in dataset.samples if s.label] == [
        ("a.png", "a_mask.png"),
        ("b.png", "b_mask.png"),
    ]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_links_are_followed_and_system_files_left_out(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "real")
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere / "x.JPG", IMAGE)
    write(elsewhere / "._x.png", IMAGE)
    write(elsewhere / ".ipynb_checkpoints/x-checkpoint.png", IMAGE)
    write(elsewhere / "@eaDir/x.png", IMAGE)
    write(elsewhere / "__MACOSX/x.png", IMAGE)
    (elsewhere / "Thumbs.db").write_bytes(b"")
    (elsewhere / "up").symlink_to(elsewhere)
    (elsewhere / "down").mkdir()
    (elsewhere / "down/up").symlink_to(elsewhere)
    images = data.root / "images/train"
    (images / "linked").symlink_to(elsewhere)
    (images / "y.png").symlink_to(images / "a.png")
    found = [path.relative_to(images).as_posix() for path in glob_files(data.root, "images/train/**/*")]
    assert found == ["a.png", "linked/x.JPG", "y.png"]
    assert [path.name for path in glob_files(data.root, "images/*/*")] == ["a.png", "y.png"]
    assert list(list_files(images, ".jpg")) == ["linked/x"]


def test_images_on_another_drive_have_names_that_stay_below_the_folder(monkeypatch) -> None:
    def no_way(path, start):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr("os.path.relpath", no_way)
    samples = (Sample(Path("/photos/a.png"), None),)
    dataset = Dataset(("a",), np.zeros((1, 3), np.uint8), 255, samples, Path("/c"), np.zeros(65536, np.uint16))
    assert dataset.name(0) == "__/photos/a"


def test_a_missing_label_names_both_patterns_and_the_settings(tmp_path: Path) -> None:
    data = write_folder(tmp_path)
    (tmp_path / "masks/train/a.png").unlink()
    (tmp_path / "masks/train/b.png").touch()
    with pytest.raises(UserError) as caught:
        open_dataset(data, "train")
    one_line(caught, "a.png", "images/train/*", "masks/train/*", "data.train_masks")
    with pytest.raises(UserError) as caught:
        open_dataset(replace(data, val_images="none/*"), "val")
    one_line(caught, "none/*", "masks/val/*", "data.val_images", "data.val_share")
    with pytest.raises(UserError) as caught:
        open_dataset(replace(data, train_images="images/train"), "train")
    one_line(caught, "images/train: is a folder; write images/train/*")


def test_folders_that_the_globs_spell_out_do_not_count(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        write(tmp_path / folder / "images/a.png", IMAGE)
        write(tmp_path / folder / "masks/a.png", np.zeros((6, 8)))
    data = folder_of(tmp_path, {}, classes="sea land", train_images="*/images/*", train_masks="*/masks/*")
    pairs = [(sample.image, sample.label) for sample in open_dataset(data, "train").samples]
    assert pairs == [(tmp_path / x / "images/a.png", tmp_path / x / "masks/a.png") for x in ("x", "y")]


def test_a_share_of_no_pair_names_the_images_without_a_label(tmp_path: Path) -> None:
    data = folder_of(tmp_path, {"a.png": np.zeros((6, 8), np.uint8)}, classes="sea land", val_share=0.3)
    with pytest.raises(UserError) as caught:
        open_dataset(replace(data, train_masks="masks/*_mask.png"), "train")
    one_line(caught, "a.png: has no label of its name in", "masks/*_mask.png")
