"""`import coco`: outlines as pycocotools decodes them, a folder that `check` accepts, and a line for each fault."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from segcore.cli.main import main
from segcore.config.label_rows import parse_rows
from segcore.config.schema import DataConfig
from segcore.data import coco
from segcore.data.check import check
from segcore.data.import_coco import import_coco, link
from segcore.errors import UserError

coco_mask = pytest.importorskip("pycocotools.mask")
RANDOM = np.random.default_rng(0)
H, W = 20, 30
SQUARE = [[4, 3, 14.5, 3, 14.5, 13, 4, 13]]


def lengths(mask: np.ndarray) -> list[int]:
    """Return the uncompressed counts of a mask, by their definition."""
    flat = np.concatenate([[0], mask.ravel(order="F"), [2]])
    ends = np.flatnonzero(np.diff(flat))
    return np.diff([0, *ends]).tolist()


def ring() -> np.ndarray:
    mask = np.zeros((H, W), np.uint8)
    mask[2:18, 3:25] = 1
    mask[6:12, 8:15] = 0
    return mask


def rle(mask: np.ndarray, compressed: bool) -> dict[str, Any]:
    text = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
    return {"size": [H, W], "counts": text if compressed else lengths(mask)}


def write(
    folder: Path, outlines: list[Any], names: tuple[str, ...] = ("a.png",), ids: tuple[int, ...] = (2, 9)
) -> Path:
    """Write images and a file in which outline i is of category `ids[i % 2]`, on each image; return the file."""
    images = []
    for number, name in enumerate(names, 1):
        path = folder / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RANDOM.integers(0, 256, (H, W, 3), dtype=np.uint8)).save(path)
        images.append({"id": number, "file_name": name, "height": H, "width": W})
    annotations = [
        {
            "id": 100 * image["id"] + i,
            "image_id": image["id"],
            "category_id": ids[i % len(ids)],
            "segmentation": outline,
        }
        for image in images
        for i, outline in enumerate(outlines)
    ]
    categories = [{"id": number, "name": f"class {number}"} for number in reversed(ids)]
    path = folder / "file.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def mask_of(folder: Path, name: str = "a.png", split: str = "train") -> np.ndarray:
    return np.array(Image.open(folder / "masks" / split / name))


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.02, 0.3, 1.0]), st.integers(1, 40), st.integers(1, 40))
def test_run_lengths_are_read_as_pycocotools_writes_them(seed: int, share: float, height: int, width: int) -> None:
    mask = (np.random.default_rng(seed).random((height, width)) < share).astype(np.uint8)
    text = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
    assert coco.decompressed(text) == lengths(mask)
    for counts in (text, lengths(mask)):
        found = coco.encode("", {"segmentation": {"size": [height, width], "counts": counts}}, (height, width))
        np.testing.assert_array_equal(coco_mask.decode(found), mask)


def test_long_runs_are_read_as_pycocotools_reads_them() -> None:
    counts = [0, 5, 1 << 28, 3, 2, 1 << 27, 7]
    height = sum(counts)
    text = coco_mask.frPyObjects({"size": [height, 1], "counts": counts}, height, 1)["counts"].decode()
    assert coco.decompressed(text) == counts


@pytest.mark.parametrize("background", ["background", "ignore", "class 2", "wall"])
def test_outlines_of_every_kind(tmp_path: Path, background: str) -> None:
    """Of overlapping ones the smaller is on top, whatever their order; a hole shows what is below."""
    small, two = [[9.0, 7, 12, 7, 12, 10, 9, 10]], [[0, 0, 5, 0, 5, 5, 0, 5], [20, 10, 33, 10, 33, 25, 20, 25]]
    outlines = [small, rle(ring(), True), SQUARE, rle(ring() * (RANDOM.random((H, W)) < 0.1), False), two]
    path = write(tmp_path, outlines)
    out = tmp_path / "out"
    done = import_coco({"train": (path, tmp_path / "photos")}, out, background)
    wanted = np.full((H, W), {"background": 2, "ignore": 255, "class 2": 0, "wall": 2}[background])
    decoded = [
        coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(o, H, W)))
        if isinstance(o, list)
        else coco_mask.decode(o if isinstance(o["counts"], str) else coco_mask.frPyObjects(o, H, W))
        for o in outlines
    ]
    for i in sorted(range(5), key=lambda i: -int(decoded[i].sum())):
        wanted[decoded[i] > 0] = i % 2
    np.testing.assert_array_equal(mask_of(out), wanted)
    assert len({int(decoded[i].sum()) for i in range(5)}) == 5
    assert done.free == pytest.approx(1 - np.any(decoded, 0).mean())
    assert done.classes == ("class 2", "class 9", *({background} - {"class 2", "ignore"}))


def test_a_folder_that_check_accepts(tmp_path: Path, capsys) -> None:
    path = write(tmp_path, [SQUARE, rle(ring(), True)], ("a.png", "sub/b.jpg", "c.tif", "d.JPG"))
    (tmp_path / "other").mkdir()
    validation = write(tmp_path / "other", [SQUARE], ("v.png",), ids=(9,))
    words = [path, tmp_path / "photos", tmp_path / "new" / "out", "--val", validation]
    main(None, ["import", "coco", *map(str, words), "--val-images", str(tmp_path / "other/photos")])
    out, said = tmp_path / "new/out", capsys.readouterr().out
    assert f"{out}: 4 images in train, 1 images in val; 3 classes: class 2, class 9, background" in said
    assert sorted(file.name for file in (out / "images/train").iterdir()) == ["a.png", "c.tif", "d.JPG", "sub_b.jpg"]
    assert (out / "images/train/a.png").samefile(tmp_path / "photos/a.png"), "a hard link"
    assert mask_of(out, "v.png", "val").max() == 2, "the values are those of the training file's classes"
    assert 1 in mask_of(out, "v.png", "val")
    options = shlex.split(said.splitlines()[-1].partition(": ")[2])
    given_words = dict(zip(options[::2], options[1::2], strict=True))
    assert [*given_words] == ["--data.dataset", "--data.root", "--data.labels"]
    data = DataConfig("folder", Path(given_words["--data.root"]), labels=(given_words["--data.labels"],))
    assert [row.name for row in parse_rows(data.labels)] == ["class 2", "class 9", "background", "ignore"]
    for split, count in (("train", 4), ("val", 1)):
        report = check(data, split, 3)  # type: ignore[arg-type]
        assert (report.samples, report.labels, report.problems) == (count, count, [])


def test_without_validation_images_a_share_is_named(tmp_path: Path, capsys) -> None:
    path = write(tmp_path, [SQUARE], ids=(1, 5))
    main(None, ["import", "coco", str(path), str(tmp_path / "photos"), str(tmp_path / "out"), "--background", "ignore"])
    said = capsys.readouterr().out
    assert "--data.val-share 0.1" in said
    assert "note: no annotation is of class 5" in said
    assert "have no annotation and are ignored" in said


def test_names_of_categories(tmp_path: Path) -> None:
    """Equal names are one class, `ignore` leaves pixels out, and what CSV must quote comes back."""
    path = write(tmp_path, [SQUARE, rle(ring(), True)])
    data = json.loads(path.read_text())
    data["categories"] = [{"id": i, "name": n} for i, n in enumerate(('a "b", c', " d  e=f", "ignore", "d e=f"))]
    for number, annotation in enumerate(data["annotations"], 2):
        annotation["category_id"] = number
    path.write_text(json.dumps(data))
    done = import_coco({"train": (path, tmp_path / "photos")}, tmp_path / "out", "background")
    assert done.classes == ('a "b", c', "d e=f", "background")
    assert np.unique(mask_of(tmp_path / "out")).tolist() == [1, 2, 255]
    rows = parse_rows((str(tmp_path / "out/labels.csv"),))
    assert [tuple(row) for row in rows] == [(0, 'a "b", c'), (1, "d e=f"), (2, "background"), (255, "ignore")]


def test_more_classes_than_a_byte_holds(tmp_path: Path) -> None:
    path = write(tmp_path, [SQUARE] * 2, ids=tuple(range(300)))
    done = import_coco({"train": (path, tmp_path / "photos")}, tmp_path / "out", "ignore")
    mask = mask_of(tmp_path / "out")
    assert (mask.dtype, np.unique(mask).tolist(), len(done.classes)) == (np.uint16, [1, 65535], 300)
    labels = (str(tmp_path / "out/labels.csv"),)
    assert check(DataConfig("folder", tmp_path / "out", labels=labels), "train").pixels[1] == (mask == 1).sum()


def test_photos_are_of_the_size_that_viewers_show(tmp_path: Path) -> None:
    path = write(tmp_path, [SQUARE], ("a.jpg",))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (H, W)).save(tmp_path / "photos/a.jpg", exif=exif)  # shown with H rows
    import_coco({"train": (path, tmp_path / "photos")}, tmp_path / "out", "background")
    assert check(DataConfig("folder", tmp_path / "out", classes=("a", "b", "c")), "train").problems == []


def change(key: str, value: Any, kind: str = "annotations"):
    return lambda data: data[kind][0].__setitem__(key, value)


def outline(**how: Any):
    return change("segmentation", {**rle(ring(), False), **how})


FAULTS = {
    "no outline": (change("segmentation", []), r"annotation 100: has no outline .*segmentation is \[\]"),
    "a box": (lambda d: d["annotations"][0].pop("segmentation"), r"annotation 100: has no outline .*missing.*a box"),
    "odd numbers": (change("segmentation", [[1, 2, 3, 4, 5, 6, 7]]), r"annotation 100: a polygon is 7 numbers"),
    "four numbers": (change("segmentation", [[1, 2, 3, 4]]), r"annotation 100: a polygon is 4 numbers"),
    "flat": (change("segmentation", [1, 2, 3, 4, 5, 6]), r"annotation 100: a polygon is 1; three"),
    "far away": (change("segmentation", [[1e9, 2, 3, 4, 5, 6]]), r"annotation 100: .*coordinate 1000000000.0 .*20x30"),
    "text": (change("segmentation", [["1", 2, 3, 4, 5, 6]]), r"annotation 100: .*coordinate '1'"),
    "true": (change("segmentation", [[True, 2, 3, 4, 5, 6]]), r"annotation 100: .*coordinate True"),
    "size": (outline(size=[W, H]), r"annotation 100: its RLE is of size \[30, 20\], the image of \[20, 30\]"),
    "no size": (outline(size=None), r"annotation 100: its RLE is of size missing"),
    "sum": (outline(counts=[5, 6]), r"annotation 100: .*add up to 11, not to 600 pixels"),
    "no counts": (outline(counts=[]), r"annotation 100: .*add up to 0, not to 600"),
    "negative": (outline(counts=[-600, 1200]), r"annotation 100: .*hold -600"),
    "gigantic": (outline(counts=[10**19, 600]), r"annotation 100: .*add up to 10000000000000000600"),
    "fraction": (outline(counts=[600.0]), r"annotation 100: .*hold 600.0"),
    "damaged": (outline(counts="a\u00e4b"), r"annotation 100: .*damaged \(character 1"),
    "cut": (outline(counts="ooo"), r"annotation 100: .*damaged \(the last number has no end\)"),
    "long number": (outline(counts="o" * 9 + "0"), r"annotation 100: .*damaged \(character 7"),
    "bytes": (outline(counts={"a": 1}), r"annotation 100: the counts of its RLE are \{'a': 1\}"),
    "image id": (change("image_id", 77), r"annotation 100: image_id is 77, but there is no such image"),
    "category id": (change("category_id", 77), r"annotation 100: category_id is 77, but there is no such category"),
    "no category": (lambda d: d["annotations"][0].pop("category_id"), r"annotation 100: category_id is missing"),
    "twice": (lambda d: d["categories"].append(d["categories"][0]), r"category 9 is there twice"),
    "no id": (change("id", None), r"annotation number 1: id is missing"),
    "text as id": (change("id", "7", "images"), r"image number 1: id is '7', not a whole number"),
    "two images": (
        lambda d: d["images"].append({**d["images"][0], "id": 5}),
        r"image 5: a.png and a.png have",
    ),
    "above": (change("file_name", "../a.png", "images"), r"image 1: file_name is '../a.png'; write it relative"),
    "above there": (change("file_name", "x\\..\\..\\a.png", "images"), r"image 1: file_name is .*; write it relative"),
    "absolute": (change("file_name", "/etc/passwd", "images"), r"image 1: file_name is '/etc/passwd'; write it"),
    "drive": (change("file_name", "C:a.png", "images"), r"image 1: file_name is 'C:a.png'; write it relative"),
    "zero byte": (change("file_name", "a\0.png", "images"), r"image 1: file_name is 'a\\x00.png'"),
    "hidden": (change("file_name", "x/.a.png", "images"), r"image 1: file_name is 'x/.a.png', a hidden"),
    "the folder": (change("file_name", ".", "images"), r"image 1: file_name is '.'"),
    "no name": (change("file_name", 5, "images"), r"image 1: file_name is 5"),
    "missing file": (change("file_name", "b.png", "images"), r"image 1: there is no file .*b.png; give the folder"),
    "no image": (change("file_name", "file.txt", "images"), r"image 1: .*file.txt is none of .png"),
    "other size": (
        change("height", 21, "images"),
        r"image 1: .*a.png has 20x30 pixels .*annotations are of 21x30",
    ),
    "no height": (change("height", None, "images"), r"image 1: height is missing"),
    "zero height": (change("height", 0, "images"), r"image 1: height is 0"),
    "large": (lambda d: d["images"][0].update(height=1 << 20, width=1 << 20), r"image 1: has 1048576x1048576 pixels"),
    "escape": (change("name", "a\x1b[31m", "categories"), r"category 9: name is 'a\\x1b\[31m'; name the class"),
    "name of a class": (change("name", " ", "categories"), r"category 9: name is ' '; name the class"),
    "no classes": (lambda d: d.update(categories=[], annotations=[]), r"has 0 categories and 1 images"),
    "no list": (lambda d: d.update(images={}), r"'images' is not a list of objects"),
    "nothing": (lambda d: d.pop("annotations"), r"'annotations' is missing"),
    "entries": (lambda d: d["annotations"].append(5), r"'annotations' is not a list of objects"),
}


def assert_refused(tmp_path: Path, path: Path, capsys, expected: str) -> None:
    """The command ends with one line that begins with the file, and leaves nothing."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as end:
        main(None, ["import", "coco", str(path), str(tmp_path / "photos"), str(tmp_path / "out")])
    out, err = capsys.readouterr()
    [line] = [line for line in err.splitlines() if not line.startswith("writing the masks")]
    assert (end.value.code, out, sorted(tmp_path.iterdir())) == (1, "", before)
    assert line.startswith(f"error: {path}: ")
    assert re.search(expected, line), line


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_file_is_one_line(tmp_path: Path, capsys, name: str) -> None:
    path = write(tmp_path, [rle(ring(), False), SQUARE])
    (tmp_path / "photos/file.txt").touch()
    data = json.loads(path.read_text())
    FAULTS[name][0](data)
    path.write_text(json.dumps(data))
    assert_refused(tmp_path, path, capsys, FAULTS[name][1])


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"images": NaN}', '{"a": 1e999}', "[" * 100_000, '"\\ud800"', '{"a": ' + "9" * 30 + "}"]
)
def test_what_is_no_annotation_file(tmp_path: Path, capsys, text: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    assert_refused(tmp_path, path, capsys, r"damaged \(.*\); export the annotations again")
    path.write_bytes(b"\xff\xfe{}")
    assert_refused(tmp_path, path, capsys, r"damaged \(not UTF-8\)")


def test_an_outline_cannot_take_all_memory(tmp_path: Path) -> None:
    zigzag = [0, 0, 3000, 3000] * 3000
    with pytest.raises(UserError, match=r"annotation 1: the outline of a polygon has 18000000 pixels"):
        coco.encode("annotation 1", {"segmentation": [zigzag]}, (3000, 3000))


def test_splits_have_the_same_classes(tmp_path: Path) -> None:
    first, second = write(tmp_path / "1", [SQUARE]), write(tmp_path / "2", [SQUARE], ids=(2, 5))
    sources = {"train": (first, tmp_path / "1/photos"), "val": (second, tmp_path / "2/photos")}
    with pytest.raises(UserError, match=r"2/file.json: .*1/file.json has no category 'class 5'"):
        import_coco(sources, tmp_path / "out", "background")


def test_names_that_windows_wrote(tmp_path: Path) -> None:
    path = write(tmp_path, [SQUARE], ("JPEGImages/a.png",))
    path.write_text(path.read_text().replace("JPEGImages/a", r"JPEGImages\\a"))
    import_coco({"train": (path, tmp_path / "photos")}, tmp_path / "out", "background")
    assert (tmp_path / "out/images/train/JPEGImages_a.png").samefile(tmp_path / "photos/JPEGImages/a.png")


def test_names_that_are_one_file_on_other_systems(tmp_path: Path) -> None:
    path = write(tmp_path, [SQUARE], ("img/1.png", "IMG_1.png"))
    with pytest.raises(UserError, match=r"image 2: IMG_1\.png and img/1\.png have the same stem; rename one"):
        import_coco({"train": (path, tmp_path / "photos")}, tmp_path / "out", "background")


def test_an_existing_link_is_not_written_through(tmp_path: Path) -> None:
    """The target may be another image's own file, under a name that the file system takes for the same."""
    for name in ("a", "b", "link"):
        (tmp_path / name).write_text(name)
    with pytest.raises(FileExistsError):
        link(tmp_path / "a", tmp_path / "link")
    assert (tmp_path / "link").read_text() == "link"


def test_what_to_install_is_named(monkeypatch, capsys) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        main(None, ["import", "coco", "a.json", "b", "c"])
    assert (end.value.code, capsys.readouterr().err) == (
        1,
        "error: COCO's format needs pycocotools; pip install 'segcore[coco]'\n",
    )


def test_nothing_is_overwritten_and_links_are_optional(tmp_path: Path, monkeypatch) -> None:
    path, out = write(tmp_path, [SQUARE]), tmp_path / "out"
    sources = {"train": (path, tmp_path / "photos")}
    out.mkdir()

    def no_link(self: Path, target: Path) -> None:
        raise OSError("no links on this file system")

    monkeypatch.setattr(Path, "hardlink_to", no_link)
    import_coco(sources, out, "background")
    assert (out / "images/train/a.png").read_bytes() == (tmp_path / "photos/a.png").read_bytes()
    assert not (out / "images/train/a.png").samefile(tmp_path / "photos/a.png")
    with pytest.raises(UserError, match="out: is there already and not empty; name a new folder"):
        import_coco(sources, out, "background")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(-1e4, 1e4)
    | st.text("0aoP`_~/.\\", max_size=9),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.sampled_from(["size", "counts", "id"]), inner),
    max_leaves=12,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    st.sampled_from(["segmentation", "size", "counts", "polygon", "image_id", "id", "file_name", "height", "name"]),
    JSON,
)
def test_any_value_anywhere_is_read_or_one_line(tmp_path: Path, key: str, value: Any) -> None:
    path = write(tmp_path, [rle(ring(), True), SQUARE])
    data = json.loads(path.read_text())
    first, second = data["annotations"]
    if key in ("size", "counts"):
        first["segmentation"][key] = value
    elif key == "polygon":
        second["segmentation"] = [[1, 2, 3, 4], value] if isinstance(value, list) else [value]
    else:
        data[{"file_name": "images", "height": "images", "name": "categories"}.get(key, "annotations")][0][key] = value
    path.write_text(json.dumps(data))
    said = f"{path}: nothing"
    try:
        for image in coco.read_coco(path).images:
            coco.paint(image, {2: 0, 9: 1}, 255, path)
    except UserError as error:
        said = str(error)
    assert said.startswith(f"{path}: ")
    assert len(said.splitlines()) == 1
