"""Data set readers: layouts, label tables, and a one-line error for every bad file."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys

import cv2
import numpy as np
import pytest
from PIL import Image

from segcore.config.schema import DataConfig
from segcore.data.images import read_image, read_label
from segcore.data.layouts import ade20k, cityscapes, open_dataset, palette_of
from segcore.data.layouts.folder import distinct_colors
from segcore.errors import UserError


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)
    return path


IMAGE = np.random.RandomState(0).randint(0, 256, (6, 8, 3)).astype(np.uint8)


def write_cityscapes(root, kinds=("labelIds",), stems=("aachen/a", "ulm/b"), value=7, split="train"):
    for stem in stems:
        write(root / f"leftImg8bit/{split}/{stem}_leftImg8bit.png", IMAGE)
        for kind in kinds:
            write(root / f"gtFine/{split}/{stem}_gtFine_{kind}.png", np.full((6, 8), value))
    return DataConfig("cityscapes", root)


def write_folder(root, masks=None, images=None):
    for name, image in (images or {"images/train/a.png": IMAGE}).items():
        write(root / name, image)
    for name, mask in (masks or {"masks/train/a.png": np.zeros((6, 8))}).items():
        write(root / name, mask)
    return DataConfig("folder", root, classes=("sea", "land"))


def one_line(caught, *parts):
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert str(part) in text


# Layouts


def test_cityscapes_raw_ids(tmp_path):
    data = write_cityscapes(tmp_path)
    raw = np.array([[0, 7, 8, 11, 12, 13, 17, 33], [255, 19, 6, 26, 29, 30, 31, 32]] * 3)
    write(tmp_path / "gtFine/train/aachen/a_gtFine_labelIds.png", raw)
    dataset = open_dataset(data, "train")
    expected = [[255, 0, 1, 2, 3, 4, 5, 18], [255, 6, 255, 13, 255, 255, 16, 17]] * 3
    np.testing.assert_array_equal(dataset.label(0), expected)
    assert [dataset.name(i) for i in range(len(dataset))] == ["aachen/a_leftImg8bit", "ulm/b_leftImg8bit"]
    assert (len(dataset.classes), dataset.palette.shape, dataset.ignore_index) == (19, (19, 3), 255)
    np.testing.assert_array_equal(dataset.image(1), IMAGE)


def test_cityscapes_prefers_complete_train_ids(tmp_path):
    data = write_cityscapes(tmp_path, ("labelIds", "labelTrainIds"), value=11)
    assert (open_dataset(data, "train").label(0) == 11).all()  # the same value as a raw id is class 2
    (tmp_path / "gtFine/train/ulm/b_gtFine_labelTrainIds.png").unlink()
    assert (open_dataset(data, "train").label(0) == 2).all()
    (tmp_path / "gtFine/train/ulm/b_gtFine_labelIds.png").unlink()
    with pytest.raises(UserError) as caught:
        open_dataset(data, "train")
    one_line(caught, "ulm/b_leftImg8bit.png", "labelTrainIds.png")


def test_label_tables_golden(golden):
    cases = golden("eval/golden/labels.npz")
    raw_table = cityscapes.TABLES["_gtFine_labelIds.png"]
    np.testing.assert_array_equal(raw_table[cases["cityscapes_raw_image"]], cases["cityscapes_train_image"])
    np.testing.assert_array_equal(
        raw_table[cases["cityscapes_raw_id"].astype(np.uint8)], cases["cityscapes_train_id_as_png_uint8"]
    )
    allowed = [*range(151), 255]  # other values are not classes: the published reduction passes them through, we raise
    known = np.isin(cases["ade_raw"], allowed)
    np.testing.assert_array_equal(ade20k.TABLE[cases["ade_raw"][known]], cases["ade_reduced"][known])
    np.testing.assert_array_equal(ade20k.TABLE[allowed], cases["reduce_zero_label_lut256"][allowed])


@pytest.mark.parametrize("module", [cityscapes, ade20k])
def test_classes_and_colors(reference, module):
    stated = json.loads((reference / f"eval/{module.__name__.rsplit('.')[-1]}.json").read_text())["classes"]
    assert list(module.CLASSES) == [entry["name"].strip() for entry in stated]
    np.testing.assert_array_equal(module.PALETTE, [entry["rgb"] for entry in stated])


def test_a_few_classes_and_colors():
    assert (cityscapes.CLASSES[0], cityscapes.CLASSES[6], cityscapes.CLASSES[18]) == (
        "road",
        "traffic light",
        "bicycle",
    )
    assert cityscapes.PALETTE[6].tolist() == [250, 170, 30]
    assert (len(ade20k.CLASSES), ade20k.CLASSES[7], ade20k.CLASSES[149]) == (150, "bed", "flag")
    assert ade20k.PALETTE[6].tolist() == ade20k.PALETTE[48].tolist() == [140, 140, 140]


def write_ade20k(root, label):
    for split in ("training", "validation"):
        write(root / f"images/{split}/ADE_1.jpg", IMAGE)
        write(root / f"annotations/{split}/ADE_1.png", label)
    return DataConfig("ade20k", root)


def test_ade20k_reduces_zero(tmp_path):
    data = write_ade20k(tmp_path, np.repeat([[0, 1, 2, 150]], 6, axis=0).repeat(2, axis=1))
    for split in ("train", "val"):
        dataset = open_dataset(data, split)
        assert dataset.label(0)[0].tolist() == [255, 255, 0, 0, 1, 1, 149, 149]
        assert dataset.name(0) == "ADE_1"


def test_background_in_front(tmp_path):
    data = write_ade20k(tmp_path / "ade", np.repeat([[0, 1, 2, 150]], 6, axis=0).repeat(2, axis=1))
    dataset = open_dataset(DataConfig("ade20k", data.root, add_background_class=True), "val")
    assert dataset.label(0)[0].tolist() == [0, 0, 1, 1, 2, 2, 150, 150]  # raw labels, as DDPS keeps them
    assert (len(dataset.classes), dataset.classes[0], dataset.ignore_index) == (151, "background", 0)
    assert dataset.palette[:2].tolist() == [[0, 0, 0], [120, 120, 120]]
    city = write_cityscapes(tmp_path / "city", value=26)
    assert (open_dataset(DataConfig("cityscapes", city.root, add_background_class=True), "train").label(0) == 14).all()


@pytest.mark.parametrize("name", ["cityscapes", "ade20k", "folder"])
@pytest.mark.parametrize("background", [False, True])
def test_palette_of_needs_no_files(tmp_path, name, background):
    write_cityscapes(tmp_path)
    write_ade20k(tmp_path, np.zeros((6, 8)))
    write_folder(tmp_path)
    own = {"classes": ("sea", "land")} if name == "folder" else {}
    dataset = open_dataset(DataConfig(name, tmp_path, add_background_class=background, **own), "train")
    classes, palette = palette_of(DataConfig(name, tmp_path / "nowhere", add_background_class=background, **own))
    assert classes == dataset.classes
    np.testing.assert_array_equal(palette, dataset.palette)


def test_folder_pairs_by_stem_without_common_endings(tmp_path):
    images = {f"images/train/{name}": IMAGE for name in ("b_rgb.png", "a-1_rgb.jpg", "c.tif")}
    masks = {f"masks/train/{stem}.png": np.full((6, 8), i) for i, stem in enumerate(("b_mask", "a-1_labelIds", "c"))}
    data = write_folder(tmp_path, masks, images)
    (tmp_path / "images/train/.hidden.png").write_bytes(b"")
    (tmp_path / "images/train/notes.txt").write_text("no image")
    dataset = open_dataset(DataConfig("folder", data.root, classes=("a", "b", "c")), "train")
    assert [dataset.name(i) for i in range(3)] == ["a-1_rgb", "b_rgb", "c"]
    assert [int(dataset.label(i)[0, 0]) for i in range(3)] == [1, 0, 2]


def test_folder_with_sub_folders(tmp_path):
    images = {f"images/{folder}/train/a.png": IMAGE for folder in "xy"}
    data = write_folder(tmp_path, {f"masks/{folder}/train/a.png": np.eye(6, 8) for folder in "xy"}, images)
    nested = DataConfig("folder", data.root, "images/*/train/*", "masks/**/*", classes=data.classes)
    dataset = open_dataset(nested, "train")
    assert [dataset.name(i) for i in range(2)] == ["x/train/a", "y/train/a"]
    assert "/y/" in str(dataset.samples[1].label)
    twice = DataConfig("folder", data.root, "images/*/train/*", "m*/x/train/*", classes=data.classes)
    with pytest.raises(UserError, match=r"x/train/a.png: .*data.train_list \(and 1 more; `check` lists them\)"):
        open_dataset(twice, "train")


def test_files_that_cannot_be_masks_are_left_out(tmp_path):
    data = write_folder(tmp_path)
    for suffix in (".npy", ".jpg"):
        (tmp_path / f"masks/train/a{suffix}").touch()  # JPEG counts only where there is nothing better
    assert open_dataset(data, "train").samples[0].label == tmp_path / "masks/train/a.png"


def test_folder_without_validation_masks(tmp_path):
    data = write_folder(tmp_path)
    dataset = open_dataset(
        DataConfig("folder", data.root, val_images="images/train/*", val_masks="", classes=data.classes), "val"
    )
    image, label = dataset.pair(0)
    assert image.shape == (6, 8, 3)
    assert label is None
    with pytest.raises(UserError, match="no label file"):
        dataset.label(0)


def test_colors_of_a_folder_are_distinct_and_stable():
    colors = distinct_colors(40)
    np.testing.assert_array_equal(colors[:5], distinct_colors(5))
    lab = cv2.cvtColor(colors[None].astype(np.float32) / 255, cv2.COLOR_RGB2Lab)[0]
    difference = np.linalg.norm(lab[:, None] - lab, axis=2) + 1000 * np.eye(40)
    assert difference.min() >= 26  # 2.3 is just noticeable
    assert colors[:2].tolist() == [[0, 114, 178], [230, 159, 0]]
    for count, distinct in (253, 253), (518, 518), (600, 518):
        found = distinct_colors(count)
        assert len(found) == count
        assert len(np.unique(found, axis=0)) == distinct
        assert found.any(axis=1).all()  # black is the color of ignored pixels


def test_toy_is_generated_once_and_read_as_cityscapes(tmp_path, monkeypatch):
    from segcore.demo import toy

    calls = []
    monkeypatch.setattr(toy, "is_complete", lambda root: bool(calls))
    monkeypatch.setattr(
        toy, "generate", lambda root, progress: calls.append(root) or write_cityscapes(root, split="val")
    )
    for _ in range(2):
        toy.generate_missing(tmp_path / "toy")
        dataset = open_dataset(DataConfig("toy", tmp_path / "toy"), "val")
    assert calls == [tmp_path / "toy"]
    assert (len(dataset), dataset.classes) == (2, cityscapes.CLASSES)


def test_datasets_pickle_and_need_no_torch(tmp_path):
    dataset = open_dataset(write_cityscapes(tmp_path), "train")
    copy = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(copy.label(1), dataset.label(1))
    code = (
        "import sys, segcore.data.dataset, segcore.data.layouts.folder, segcore.data.layouts.ade20k\n"
        "import segcore.data.layouts.cityscapes;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Real files


def test_real_cityscapes(real_data, tmp_path):
    dataset = open_dataset(DataConfig("cityscapes", real_data / "cityscapes"), "val")
    image, label = dataset.pair(0)
    assert (image.shape, label.shape) == ((128, 256, 3), (128, 256))
    assert dataset.name(0) == "frankfurt/frankfurt_000000_000294_leftImg8bit"
    np.testing.assert_array_equal(label, read_label(dataset.samples[0].label))  # labelTrainIds, unchanged
    raw = cityscapes.TABLES["_gtFine_labelIds.png"]
    folder = real_data / "cityscapes/gtFine/val/frankfurt"
    by_raw = raw[read_label(folder / "frankfurt_000000_000294_gtFine_labelIds.png")]
    assert (by_raw != label).sum() == 77  # the two files were shrunk separately


def test_real_ade20k(real_data):
    dataset = open_dataset(DataConfig("ade20k", real_data / "ade20k"), "val")
    assert len(dataset) == 2
    for i in range(2):
        image, label = dataset.pair(i)
        np.testing.assert_array_equal(image, np.array(Image.open(dataset.samples[i].image)))
        raw = np.array(Image.open(dataset.samples[i].label))
        np.testing.assert_array_equal(label, np.where(raw == 0, 255, raw - 1))


def test_real_potsdam_as_a_folder(real_data):
    names = ("border", "impervious", "building", "low vegetation", "tree", "car")
    data = DataConfig("folder", real_data / "potsdam", "img_dir/**/*", "ann_dir/**/*", classes=names)
    image, label = open_dataset(data, "train").pair(0)
    assert image.shape == (512, 512, 3)
    assert set(np.unique(label)) <= set(range(6))


# Types of images


def test_color_images_as_the_published_systems_decode_them(tmp_path):
    gray = write(tmp_path / "gray.png", IMAGE[..., 0])
    np.testing.assert_array_equal(read_image(gray), np.repeat(IMAGE[..., :1], 3, axis=2))
    alpha = write(tmp_path / "alpha.png", np.dstack([IMAGE, IMAGE[..., 0]]))
    np.testing.assert_array_equal(read_image(alpha), IMAGE)
    exif = Image.Exif()
    exif[0x0112] = 6  # displayed rotated by 90 degrees clockwise
    Image.fromarray(IMAGE).save(tmp_path / "turned.jpg", exif=exif, quality=100, subsampling=0)
    assert read_image(tmp_path / "turned.jpg").shape == (8, 6, 3)


def test_gray_sixteen_bit_and_many_bands(tmp_path):
    gray = write(tmp_path / "gray.png", IMAGE[..., 0])
    np.testing.assert_array_equal(read_image(gray, channels=1), IMAGE[..., :1])
    deep = IMAGE.astype(np.uint16) * 257
    cv2.imwrite(str(tmp_path / "deep.png"), deep[..., ::-1])
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png", bit_depth=16), deep)
    cv2.imwrite(str(tmp_path / "deep_gray.png"), deep[..., 1])
    np.testing.assert_array_equal(read_image(tmp_path / "deep_gray.png", 1, 16), deep[..., 1:2])
    four = np.dstack([IMAGE, IMAGE[..., 1]])
    np.testing.assert_array_equal(read_image(write(tmp_path / "four.png", four), channels=4), four)
    bands = np.random.RandomState(1).randint(0, 60000, (6, 8, 7)).astype(np.uint16)
    cv2.imwritemulti(str(tmp_path / "bands.tif"), list(bands.transpose(2, 0, 1)))
    np.testing.assert_array_equal(read_image(tmp_path / "bands.tif", 7, 16), bands)
    np.save(tmp_path / "bands.npy", bands)
    np.testing.assert_array_equal(read_image(tmp_path / "bands.npy", 7, 16), bands)


def test_an_image_of_another_type_names_the_setting(tmp_path):
    rgb = write(tmp_path / "rgb.png", IMAGE)
    cv2.imwrite(str(tmp_path / "deep.png"), IMAGE.astype(np.uint16))
    for path, channels, depth in ((rgb, 1, 8), (rgb, 4, 8), (rgb, 3, 16), (tmp_path / "deep.png", 3, 8)):
        with pytest.raises(UserError) as caught:
            read_image(path, channels, depth)
        one_line(caught, path, "data.channels", "data.bit_depth", "shape")


# Bad files


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".npy"])
def test_damaged_images(tmp_path, suffix, capfd):
    image = np.random.RandomState(0).randint(0, 256, (60, 80, 3)).astype(np.uint8)
    good = tmp_path / f"good{suffix}"
    if suffix == ".npy":
        np.save(good, image)
    else:
        cv2.imwrite(str(good), image)
    assert read_image(good).shape == image.shape
    whole, bad = good.read_bytes(), tmp_path / f"bad{suffix}"
    for content in (b"", b"hello", whole[: len(whole) // 2], whole[:40]):
        bad.write_bytes(content)
        with pytest.raises(UserError) as caught:
            read_image(bad)
        one_line(caught, bad, "replace the file")
    with pytest.raises(UserError) as caught:
        read_image(tmp_path / f"missing{suffix}")
    one_line(caught, "missing", "No such file")


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_with_a_thumbnail_with_trailing_bytes_and_truncated(tmp_path, progressive):
    small, whole, path = io.BytesIO(), io.BytesIO(), tmp_path / "a.jpg"
    image = np.random.RandomState(0).randint(0, 256, (60, 80, 3)).astype(np.uint8)
    Image.fromarray(IMAGE).save(small, "JPEG")
    thumbnail = b"Exif\0\0" + small.getvalue()
    Image.fromarray(image).save(whole, "JPEG", exif=thumbnail, progressive=progressive)
    data = whole.getvalue()
    assert data.count(b"\xff\xd9") == 2
    tables = data.index(b"\xff\xdb", data.index(thumbnail) + len(thumbnail))
    # fill bytes may precede a marker
    for content in (data, data + b"video\xff\xda more", data[:tables] + b"\xff" * 3 + data[tables:]):
        path.write_bytes(content)
        assert read_image(path).shape == image.shape
    for share in (2, 3, 4):
        path.write_bytes(data[: -len(data) // share])
        with pytest.raises(UserError, match=r"a\.jpg: .*truncated.*replace the file"):
            read_image(path)


def test_npy_is_never_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path / "sprung").touch, ()

    np.save(tmp_path / "trap.npy", np.array([Trap()], object), allow_pickle=True)
    with pytest.raises(UserError, match=r"trap\.npy"):
        read_image(tmp_path / "trap.npy")
    assert not (tmp_path / "sprung").exists()


def test_palette_labels_and_invalid_labels(tmp_path):
    values = np.arange(48, dtype=np.uint8).reshape(6, 8)
    palette = Image.frombytes("P", (8, 6), values.tobytes())
    palette.putpalette(list(range(255, -1, -1)) * 3)
    palette.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_label(tmp_path / "palette.png"), values)
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read_label(tmp_path / "deep.png"), values)
    large = values.astype(np.uint16) + 250
    Image.fromarray(large).save(tmp_path / "large.png")
    np.testing.assert_array_equal(read_label(tmp_path / "large.png"), large)
    for name, number in (("half", 0.5), ("nan", np.nan), ("negative", -1.0), ("huge", 70000.0)):
        Image.fromarray(np.full((6, 8), number, np.float32)).save(tmp_path / f"{name}.tif")
    Image.fromarray(np.full((6, 8), 3, np.float32)).save(tmp_path / "whole.tif")
    np.testing.assert_array_equal(read_label(tmp_path / "whole.tif"), np.full((6, 8), 3))
    write(tmp_path / "color.png", IMAGE)
    (tmp_path / "cut.png").write_bytes((tmp_path / "palette.png").read_bytes()[:-30])
    for name, part in (
        ("color.png", "data.labels"),
        ("cut.png", "replace"),
        ("none.png", "No such file"),
        ("half.tif", "not whole, such as 0.5"),
        ("nan.tif", "not whole, such as nan"),
        ("negative.tif", "-1 to -1"),
        ("huge.tif", "70000"),
    ):
        with pytest.raises(UserError) as caught:
            read_label(tmp_path / name)
        one_line(caught, name, part)


def test_label_values_and_sizes_are_checked(tmp_path):
    wrong = np.zeros((6, 8))
    wrong[0, :4] = 2, 3, 4, 90
    dataset = open_dataset(write_folder(tmp_path, {"masks/train/a.png": wrong}), "train")
    with pytest.raises(UserError) as caught:
        dataset.label(0)
    one_line(caught, "masks/train/a.png", "2-4, 90", "0-1, 255")
    write(tmp_path / "masks/train/a.png", np.zeros((6, 9)))
    with pytest.raises(UserError) as caught:
        dataset.pair(0)
    one_line(caught, "masks/train/a.png", "6x9", "6x8", "images/train/a.png")


def test_missing_folders_and_empty_splits(tmp_path):
    for name in ("cityscapes", "ade20k", "folder"):
        own = {"classes": ("a",)} if name == "folder" else {}
        with pytest.raises(UserError) as caught:
            open_dataset(DataConfig(name, tmp_path / "nowhere", **own), "train")
        one_line(caught, tmp_path / "nowhere", "data.root")
        with pytest.raises(UserError) as caught:
            open_dataset(DataConfig(name, tmp_path, **own), "train")
        one_line(caught, tmp_path, "train")
    (tmp_path / "leftImg8bit/val").mkdir(parents=True)
    (tmp_path / "gtFine/val").mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        open_dataset(DataConfig("cityscapes", tmp_path), "val")
    one_line(caught, "no images found", "_leftImg8bit.png")


def test_folder_needs_classes_one_file_per_stem_and_a_pattern(tmp_path):
    data = write_folder(tmp_path, images={"images/train/a.png": IMAGE, "images/train/a.jpg": IMAGE})
    with pytest.raises(UserError, match=r"data\.classes has 0 names"):
        open_dataset(DataConfig("folder", data.root), "train")
    with pytest.raises(UserError, match=r"a\.jpg and .*a\.png: .*'a'; narrow the pattern"):
        open_dataset(data, "train")
    for pattern in ("", "/tmp/*"):
        with pytest.raises(UserError, match="write it like images/train"):
            open_dataset(DataConfig("folder", data.root, train_images=pattern, classes=("a",)), "train")
