"""The table of data sets: every row opens files of its layout, with the right labels."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from segcore.config.data_sets import DATA_SETS, LayoutName, as_markdown, class_count, server_files
from segcore.config.label_rows import parse_rows
from segcore.config.schema import DataConfig, Experiment, ModelConfig
from segcore.data.check import check
from segcore.data.images import read_label
from segcore.data.layouts import LAYOUTS, open_dataset, palette_of
from segcore.errors import UserError
from segcore.inference import classes_and_palette
from segcore.reporting.label_ids import write_label_ids


@dataclass(frozen=True)
class Config(ModelConfig):
    def build(self):
        raise NotImplementedError


EXPERIMENT = Experiment("mine", Config(), DataConfig("cityscapes"))
ROWS = sorted(DATA_SETS)

FILES = {
    "camvid": "train/0001TP_006690.png trainannot/0001TP_006690.png val/0016E5_07959.png valannot/0016E5_07959.png",
    "voc2012": "JPEGImages/2007_000032.jpg SegmentationClass/2007_000032.png "
    "JPEGImages/2007_000033.jpg SegmentationClass/2007_000033.png",
    "voc2012_aug": "JPEGImages/2008_000002.jpg SegmentationClassAug/2008_000002.png "
    "JPEGImages/2007_000033.jpg SegmentationClass/2007_000033.png",
    "pascal_context_59": "JPEGImages/2008_000002.jpg SegmentationClassContext/2008_000002.png "
    "JPEGImages/2008_000003.jpg SegmentationClassContext/2008_000003.png",
    "coco_stuff": "images/train2017/000000000009.jpg annotations/train2017/000000000009.png "
    "images/val2017/000000000139.jpg annotations/val2017/000000000139.png",
    "bdd100k": "images/10k/train/0004a4c0-d4dff0ad.jpg labels/sem_seg/masks/train/0004a4c0-d4dff0ad.png "
    "images/10k/val/7d2f7975-e0c1c5a7.jpg labels/sem_seg/masks/val/7d2f7975-e0c1c5a7.png",
    "mapillary_v1_2": "training/images/Aq-1_x.jpg training/v1.2/labels/Aq-1_x.png "
    "validation/images/_bQ8.jpg validation/v1.2/labels/_bQ8.png",
    "mapillary_v2_0": "training/images/Aq-1_x.jpg training/v2.0/labels/Aq-1_x.png "
    "validation/images/_bQ8.jpg validation/v2.0/labels/_bQ8.png",
    "acdc": "rgb_anon/fog/train/GOPR0475/GOPR0475_frame_000041_rgb_anon.png "
    "gt/fog/train/GOPR0475/GOPR0475_frame_000041_gt_labelTrainIds.png "
    "rgb_anon/night/val/GOPR0356/GOPR0356_frame_000324_rgb_anon.png "
    "gt/night/val/GOPR0356/GOPR0356_frame_000324_gt_labelTrainIds.png",
    "dark_zurich": "rgb_anon/val/night/GOPR0356/GOPR0356_frame_000321_rgb_anon.png "
    "gt/val/night/GOPR0356/GOPR0356_frame_000321_gt_labelTrainIds.png",
    "loveda": "img_dir/train/0.png ann_dir/train/0.png img_dir/val/2522.png ann_dir/val/2522.png",
    "potsdam": "img_dir/train/2_10_0_0_512_512.png ann_dir/train/2_10_0_0_512_512.png "
    "img_dir/val/2_13_0_0_512_512.png ann_dir/val/2_13_0_0_512_512.png",
    "vaihingen": "img_dir/train/area1_0_0_512_512.png ann_dir/train/area1_0_0_512_512.png "
    "img_dir/val/area2_0_0_512_512.png ann_dir/val/area2_0_0_512_512.png",
    "isaid": "img_dir/train/P0000_0_896_0_896.png ann_dir/train/P0000_0_896_0_896_instance_color_RGB.png "
    "img_dir/val/P0003_0_896_0_896.png ann_dir/val/P0003_0_896_0_896_instance_color_RGB.png",
}
"""Image and mask of train, then of val, of each data set's layout."""
FILES["pascal_context_60"] = FILES["pascal_context_59"]
OTHER = {
    "coco_stuff": ["annotations/train2017/000000000009_labelTrainIds.png"],
    "voc2012": ["JPEGImages/2007_000027.jpg"],
    "bdd100k": ["labels/sem_seg/colormaps/train/0004a4c0-d4dff0ad.png"],
    "acdc": [
        "rgb_anon/fog/train_ref/GOPR0475/GOPR0475_frame_000041_rgb_ref_anon.png",
        "gt/fog/train/GOPR0475/GOPR0475_frame_000041_gt_labelColor.png",
        "gt/fog/train/GOPR0475/GOPR0475_frame_000041_gt_invIds.png",
    ],
}
"""Files that lie in the same folders and belong to no split."""
LISTS = {"voc2012": "Segmentation/train", "voc2012_aug": "Segmentation/trainaug"}


def write_set(name: str, root: Path) -> None:
    """Write a data set's layout, each mask with all its values, in a row: classes in order, then the ignored ones."""
    row = DATA_SETS[name]
    values = [*(row.values or range(class_count(name) or 0)), *row.ignored]
    files = FILES[name].split()
    for index, file in enumerate([*files, *OTHER.get(name, ())]):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        mask = index < len(files) and index % 2
        pixels = np.array([values], np.uint8) if mask else np.full((1, len(values), 3), 99, np.uint8)
        Image.fromarray(pixels).save(root / file)
    for pattern, list_file in row.patterns.items():
        if pattern.endswith("_list"):
            (root / list_file).parent.mkdir(parents=True, exist_ok=True)
            (root / list_file).write_text(Path(files[0 if "train" in pattern else -2]).stem + "\n")


@pytest.mark.parametrize("name", ROWS)
def test_every_row_opens_its_layout(name: str, tmp_path: Path) -> None:
    row, count = DATA_SETS[name], class_count(name)
    write_set(name, tmp_path)
    names, palette = palette_of(DataConfig(name))
    assert (len(names), palette.shape) == (count, (count, 3))
    for split, (image, mask) in {"train": FILES[name].split()[:2], "val": FILES[name].split()[-2:]}.items():
        if split == "train" and "train_images" not in row.patterns:
            continue
        dataset = open_dataset(DataConfig(name, tmp_path), split)  # type: ignore[arg-type]
        assert [(str(s.image), str(s.label)) for s in dataset.samples] == [
            (f"{tmp_path}/{image}", f"{tmp_path}/{mask}")
        ]
        assert (dataset.classes, dataset.ignore_index, dataset.unmatched_labels[1:]) == (names, 255, ())
        np.testing.assert_array_equal(dataset.palette, palette)
        np.testing.assert_array_equal(dataset.label(0), [[*range(count or 0), *(255 for _ in row.ignored)]])


def test_names_are_known_everywhere() -> None:
    assert set(get_args(LayoutName)) == set(LAYOUTS)
    assert set(FILES) == set(DATA_SETS)
    assert [class_count(name) for name in ("cityscapes", "toy", "ade20k", "camvid")] == [19, 19, 150, 11]
    assert [class_count(name) for name in ("folder", "my.py:open_split")] == [None, None]


@pytest.mark.parametrize("name", ROWS)
def test_class_names_are_distinct_and_like_those_of_other_sets(name: str) -> None:
    names, _ = palette_of(DataConfig(name))
    assert len({*names}) == len(names)
    assert [text for text in names if text != text.lower() or "_" in text or text == "ignore"] == []
    assert len(parse_rows(DATA_SETS[name].labels(names))) == len(names) + len(DATA_SETS[name].ignored)


def test_the_number_of_classes_follows_from_the_data_set() -> None:
    for name in (*ROWS, "ade20k", "toy"):
        assert EXPERIMENT.with_overrides([f"data.dataset={name}"]).model.num_classes == class_count(name)
    background = ["data.dataset=camvid", "data.add_background_class=True"]
    assert EXPERIMENT.with_overrides(background).model.num_classes == 12
    assert EXPERIMENT.with_overrides(["data.dataset=camvid", "model.num_classes=5"]).model.num_classes == 5
    own = replace(EXPERIMENT, model=Config(num_classes=4))
    assert own.with_overrides(["data.dataset=cityscapes"]).model.num_classes == 4, "the same data set"


def test_a_named_set_replaces_the_settings_of_a_folder(tmp_path: Path) -> None:
    write_set("camvid", tmp_path)
    folder = EXPERIMENT.with_overrides(["data.dataset=folder", "data.labels=3=a 4=b", "data.val_images=x/*"])
    data = folder.with_overrides(["data.dataset=camvid", f"data.root={tmp_path}"]).data
    assert open_dataset(data, "val").classes[:2] == ("sky", "building")


def test_patterns_and_labels_of_a_row_can_be_replaced(tmp_path: Path) -> None:
    write_set("camvid", tmp_path)
    (tmp_path / "val").rename(tmp_path / "test")
    (tmp_path / "valannot").rename(tmp_path / "testannot")
    test = ["data.val_images=test/*", "data.val_masks=testannot/*"]
    merged = "data.labels=0=sky 1=rest 2=rest 3=road 11=ignore"
    exp = EXPERIMENT.with_overrides(
        ["data.dataset=camvid", f"data.root={tmp_path}", merged, "data.unlisted=ignore", *test]
    )
    dataset = open_dataset(exp.data, "val")
    assert (exp.model.num_classes, dataset.classes) == (3, ("sky", "rest", "road"))
    np.testing.assert_array_equal(dataset.label(0), [[0, 1, 1, 2, *[255] * 8]])


def test_a_set_without_training_labels_says_so(tmp_path: Path) -> None:
    write_set("dark_zurich", tmp_path)
    with pytest.raises(UserError, match="Dark Zurich has no training labels"):
        open_dataset(DataConfig("dark_zurich", tmp_path), "train")


def test_a_missing_folder_says_where_to_get_the_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none: no such folder; .* camvid dataset \(folder CamVid of https://github"):
        open_dataset(DataConfig("camvid", tmp_path / "none"), "val")


def test_every_set_lends_its_colors() -> None:
    data = DataConfig("folder", classes=("a", "b"))
    for name in (*ROWS, "ade20k"):
        names, colors = classes_and_palette(data, name)
        assert names == ("a", "b")
        np.testing.assert_array_equal(colors, palette_of(DataConfig(name))[1][:2])


def test_further_sets_count_by_class_name(tmp_path: Path) -> None:
    write_set("camvid", tmp_path / "a")
    write_set("acdc", tmp_path / "b")
    data = DataConfig("camvid", tmp_path / "a", also=(f"acdc={tmp_path / 'b'}",))
    joined, names = pickle.loads(pickle.dumps(open_dataset(data, "train"))), palette_of(data)[0]
    alone = open_dataset(DataConfig("camvid", tmp_path / "a"), "train")
    assert (len(joined), joined.classes, joined.ignore_index) == (2, names, 255)
    assert (joined.name(0), joined.name(1)) == (alone.name(0), "fog/train/GOPR0475/GOPR0475_frame_000041_rgb_anon")
    np.testing.assert_array_equal(joined.label(0), alone.label(0))
    expected = [names.index(name) if name in names else 255 for name in palette_of(DataConfig("acdc"))[0]]
    np.testing.assert_array_equal(joined.pair(1)[1], [[*expected, 255]])
    assert sorted(expected)[:6] == [0, 1, 2, 3, 7, 8], "sky, building, pole, road, fence, car"
    assert len(open_dataset(data, "val")) == 1, "validation is that of the first set"
    with_background = open_dataset(replace(data, add_background_class=True), "train")
    np.testing.assert_array_equal(
        with_background.label(1), [[0 if value == 255 else value + 1 for value in [*expected, 255]]]
    )
    assert check(data, "train", 11).samples == 2
    (tmp_path / "b" / FILES["acdc"].split()[1]).unlink()
    with pytest.raises(UserError, match=r"frame_000041_rgb_anon\.png: has no label"):
        open_dataset(data, "train")


@pytest.mark.parametrize("entry", ["camvid", "camvid=", "folder=x", "nothing=x", "=x"])
def test_a_wrong_further_set_is_refused(entry: str) -> None:
    with pytest.raises(UserError, match="write NAME=FOLDER"):
        DataConfig("camvid", also=(entry,))
    with pytest.raises(UserError, match="join the sets in that function"):
        DataConfig("my.py:open_split", also=("camvid=x",))


@pytest.mark.parametrize(("name", "splits"), [("loveda", "train val"), ("potsdam", "val"), ("vaihingen", "val")])
def test_real_pairs(real_data: Path, name: str, splits: str) -> None:
    for split in splits.split():
        dataset = open_dataset(DataConfig(name, real_data / name), split)  # type: ignore[arg-type]
        image, label = dataset.pair(0)
        raw = read_label(dataset.samples[0].label)  # type: ignore[arg-type]
        assert (len(dataset), image.shape[:2]) == (1, raw.shape)
        np.testing.assert_array_equal(label, np.where(raw == 0, 255, raw - 1))


def test_check_counts_a_row(tmp_path: Path) -> None:
    write_set("camvid", tmp_path)
    report = check(DataConfig("camvid", tmp_path), "train", 11)
    assert (report.problems, report.pixels, report.ignored) == ([], [1] * 11, 1)


def test_the_page_has_the_table() -> None:
    page = (Path(__file__).parents[3] / "docs/datasets.md").read_text(encoding="utf-8")
    assert as_markdown() in page, "python -m segcore.config.data_sets prints the table for docs/datasets.md"


@pytest.mark.parametrize(
    ("dataset", "name", "file", "mode", "values"),
    [
        ("cityscapes", "ulm/ulm_000001_000019_leftImg8bit", "ulm/ulm_000001_000019_pred_labelIds.png", "L", (7, 33)),
        ("ade20k", "ADE_test_00000001", "ADE_test_00000001.png", "L", (1, 150)),
        ("loveda", "4191", "4191.png", "L", (0, 6)),
        ("voc2012", "2008_000006", "results/VOC2012/Segmentation/comp6_test_cls/2008_000006.png", "P", (0, 20)),
    ],
)
def test_files_of_servers(tmp_path, dataset, name, file, mode, values):
    """A value for every class, under the server's name; pixels without a class are 0."""
    files = server_files(dataset)
    assert files.path(name) == file
    assert len(files.values) == class_count(dataset)
    assert len(set(files.values)) == len(files.values)
    write_label_ids(tmp_path / file, np.array([[0, len(files.values) - 1, 255]], np.uint8), dataset)
    written = Image.open(tmp_path / file)
    assert written.mode == mode
    assert np.array(written).tolist() == [[*values, 0]]
    if mode == "P":
        assert written.convert("RGB").getpixel((1, 0)) == (0, 64, 128)


@pytest.mark.parametrize(
    ("dataset", "files", "name"),
    [
        ("cityscapes", ["leftImg8bit/test/bonn/bonn_1_2_leftImg8bit.png"], "bonn/bonn_1_2_leftImg8bit"),
        ("ade20k", ["images/testing/ADE_test_00000001.jpg"], "ADE_test_00000001"),
        ("loveda", ["img_dir/test/4191.png"], "4191"),
        ("voc2012", ["JPEGImages/2008_000006.jpg", "JPEGImages/2007_000033.jpg"], "2008_000006"),
        ("bdd100k", ["images/10k/test/a.jpg"], "a"),
        ("acdc", ["rgb_anon/fog/test/GOPR0475/G_1_rgb_anon.png"], "fog/test/GOPR0475/G_1_rgb_anon"),
    ],
)
def test_images_without_labels(tmp_path, dataset, files, name):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 2)).save(tmp_path / file)
    if dataset == "voc2012":
        (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
        (tmp_path / "ImageSets/Segmentation/test.txt").write_text("2008_000006\n")
    held_out = {} if dataset in ("cityscapes", "ade20k") else {"val_share": 0.5}  # it is of the training images
    data = DataConfig(dataset, tmp_path, add_background_class=dataset == "ade20k", **held_out)
    found = open_dataset(data, "test")
    assert [found.name(i) for i in range(len(found))] == [name]
    assert found.pair(0)[1] is None
    assert len(found.classes) == (class_count(dataset) or 0) + (dataset == "ade20k")
