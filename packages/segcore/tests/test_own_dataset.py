"""`data.dataset file.py:function`: what it may return, what goes wrong, and what a run stores of it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segcore.config.record import ConfigDiff, from_plain, settings_of
from segcore.config.registry import experiments
from segcore.config.schema import DataConfig
from segcore.config.user_code import Stored
from segcore.data.check import check, check_headers
from segcore.data.dataset import Dataset
from segcore.data.layouts import cityscapes, open_dataset, palette_of
from segcore.data.pairs import from_pairs
from segcore.errors import UserError
from segcore.inference import classes_and_palette
from segcore.training.setup import with_names

IMAGE = np.random.RandomState(0).randint(0, 256, (6, 8, 3)).astype(np.uint8)
MASK = np.array([[0, 1, 2, 255] * 2] * 6)
HEAD = """
import numpy as np
from pathlib import Path
from segcore.data.pairs import from_pairs
IMAGE = np.zeros((6, 8, 3), np.uint8)
MASK = np.array([[0, 1, 2, 255] * 2] * 6)
CLASSES = ("a", "b", "c")
"""

Own = Callable[..., DataConfig]


@pytest.fixture
def own(tmp_path: Path) -> Own:
    """Write `open_split(data, split)` with this body, and return the data settings that name it."""

    def write(body: str, **settings: object) -> DataConfig:
        path = tmp_path / f"own_{len([*tmp_path.iterdir()])}.py"
        path.write_text(f"{HEAD}\ndef open_split(data, split):\n    {body}\n")
        return DataConfig(f"{path}:open_split", tmp_path / "nowhere", **settings)

    return write


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        (IMAGE, MASK),
        (Image.fromarray(IMAGE), Image.fromarray(MASK.astype(np.uint8))),
        (torch.from_numpy(IMAGE).permute(2, 0, 1), torch.from_numpy(MASK)[None]),
        (IMAGE, MASK.astype(np.float32)),
    ],
    ids=["arrays", "PIL", "tensors", "float mask"],
)
def test_pairs_of_every_kind(image: object, mask: object) -> None:
    dataset = from_pairs([(image, mask)], ("a", "b", "c"))
    found, label = dataset.pair(0)
    np.testing.assert_array_equal(found, IMAGE)
    np.testing.assert_array_equal(label, MASK)
    assert (found.dtype, label.dtype, dataset.name(0)) == (np.uint8, np.uint8, "0")
    np.testing.assert_array_equal(dataset.image(0), IMAGE)
    np.testing.assert_array_equal(dataset.label(0), MASK)


def test_gray_palettes_and_many_classes() -> None:
    gray = Image.fromarray(IMAGE[..., 0])
    many = np.full((6, 8), 299)
    image, label = from_pairs([(gray, many)], [str(i) for i in range(300)]).pair(0)
    np.testing.assert_array_equal(image, np.repeat(IMAGE[..., :1], 3, axis=2))
    assert (label == 299).all()


def test_a_function_opens_the_splits_and_names_the_classes(own: Own) -> None:
    body = "return from_pairs([(IMAGE, MASK)] * (3 if split == 'train' else 2), CLASSES, [(1, 2, 3)] * 3)"
    data = own(body)
    assert [len(open_dataset(data, split)) for split in ("train", "val")] == [3, 2]
    names, palette = palette_of(data)
    assert (names, palette.tolist()) == (("a", "b", "c"), [[1, 2, 3]] * 3)
    report = check(data, "train", num_classes=3)
    assert (report.samples, report.sizes, report.problems) == (3, {(6, 8): 3}, [])
    assert check_headers(open_dataset(data, "train")) == []
    with_background = open_dataset(own(body, add_background_class=True), "train")
    assert with_background.classes == ("background", "a", "b", "c")
    np.testing.assert_array_equal(with_background.label(0)[0, :4], [1, 2, 3, 0])


def test_pairs_alone_take_their_classes_from_the_settings(own: Own) -> None:
    body = "return [(IMAGE, MASK)]"
    assert open_dataset(own(body, classes=("x", "y", "z")), "val").classes == ("x", "y", "z")
    with pytest.raises(
        UserError, match=r"own_1\.py:open_split: returned list, which names no classes; set data\.classes"
    ):
        open_dataset(own(body), "val")
    exp = next(iter(experiments().values()))()
    changed = exp.with_overrides([f"data.dataset={own(body).dataset}", "data.classes=x y"])
    assert changed.model.num_classes == 2


def test_palette_of_the_settings(own: Own) -> None:
    data = own("return from_pairs([(IMAGE, MASK)], CLASSES)", palette=("010203", "ff0000", "00FF00"))
    expected = [[1, 2, 3], [255, 0, 0], [0, 255, 0]]
    assert open_dataset(data, "val").palette.tolist() == palette_of(data)[1].tolist() == expected
    for palette, text in (
        ((), ""),
        (("010203",), "1 colors, for 3"),
        (("red", "0", "0"), "such as 'red', for 3 classes"),
    ):
        folder = DataConfig("folder", classes=("a", "b", "c"), palette=palette)
        if palette:
            with pytest.raises(UserError, match=text):
                palette_of(folder)
    data = DataConfig("folder", classes=("a", "b"), palette=("010203", "ff0000"))
    assert classes_and_palette(data)[1].tolist() == expected[:2]
    assert classes_and_palette(data, "cityscapes")[1].tolist() == cityscapes.PALETTE[:2].tolist()


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("return 3", "returned int; return pairs"),
        ("return from_pairs([], CLASSES)", "the split 'train' has no sample"),
        ("return from_pairs([(IMAGE, MASK)], ())", "has 0 classes and 0 colors"),
        ("return from_pairs([(IMAGE, MASK)], CLASSES, [(0, 0, 0)])", "has 3 classes and 1 colors"),
        ("raise KeyError('x')", "cannot be run, line 10: KeyError: 'x'"),
        ("return 1 / 0", "cannot be run, line 10: ZeroDivisionError"),
    ],
)
def test_a_function_that_returns_something_else(own: Own, body: str, text: str) -> None:
    data = own(body)
    with pytest.raises(UserError) as caught:
        open_dataset(data, "train")
    assert text in str(caught.value)
    assert "own_0.py" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert check(data, "train").problems == [str(caught.value)]


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ("IMAGE", "is ndarray; give a pair"),
        ("(IMAGE.astype(np.float32) / 255, MASK)", "type float32; give an array (H, W, 3)"),
        ("(IMAGE[..., 0], MASK)", "of shape (6, 8, 1)"),
        ("(IMAGE, MASK + 1)", "label values 3, 256 are not classes"),
        ("(IMAGE, MASK - 1)", "label values -1 to 254"),
        ("(IMAGE, MASK[:3])", "label of 3x8 pixels"),
        ("(IMAGE, MASK / 2)", "not whole"),
        ("(IMAGE, None)", "label of shape ()"),
        ("(None, MASK)", "an image of shape ()"),
    ],
)
def test_an_item_that_is_no_pair(own: Own, item: str, text: str) -> None:
    data = own(f"return from_pairs([{item}], CLASSES)")
    with pytest.raises(UserError) as caught:
        open_dataset(data, "val").pair(0)
    assert text in str(caught.value)
    assert "own_0.py:open_split/val/0" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(check(data, "val").problems) >= 1


def test_images_are_not_cut_into_tiles(own: Own) -> None:
    data = own("return from_pairs([(IMAGE, MASK)], CLASSES)", tile=2)
    with pytest.raises(UserError, match=r"data\.tile 2: .*:open_split gives images, not files; cut them"):
        open_dataset(data, "train")


def test_wrong_references() -> None:
    for setting in ("dataset", "augment"):
        with pytest.raises(UserError, match=rf"data\.{setting} is 'my'; it must be .*file\.py:function"):
            DataConfig(**{setting: "my"})
    with pytest.raises(UserError, match=r"data\.dataset no/such\.py:f: there is no file no/such\.py"):
        open_dataset(DataConfig("no/such.py:f"), "val")


def test_another_process_opens_it_again(own: Own) -> None:
    data = own("return from_pairs(type('Open', (list,), {'file': open(__file__)})([(IMAGE, MASK)]), CLASSES)")
    dataset = open_dataset(data, "val")
    again: Dataset = pickle.loads(pickle.dumps(dataset))
    assert again is not dataset
    assert (again.classes, again.samples) == (dataset.classes, dataset.samples)
    np.testing.assert_array_equal(again.label(0), MASK)


def test_a_stored_function_is_text_until_it_is_named_again(own: Own, tmp_path: Path) -> None:
    data = own(
        "Path(__file__).with_name('imported').touch(); return from_pairs([(IMAGE, MASK)], CLASSES, [(9, 9, 9)] * 3)"
    )
    exp = next(iter(experiments().values()))().with_overrides([f"data.dataset={data.dataset}"])
    record = settings_of(with_names(exp, open_dataset(exp.data, "train")))
    (tmp_path / "imported").unlink()
    (tmp_path / "experiment.json").write_text(json.dumps({"experiment": record}))
    assert ConfigDiff.of(tmp_path, exp).options == ""  # the classes that the function states are no other setting

    stored = from_plain(DataConfig, json.loads(json.dumps(record))["data"], "data")
    assert isinstance(stored.dataset, Stored)
    names, palette = palette_of(stored)
    assert (names, palette.tolist()) == (("a", "b", "c"), [[9, 9, 9]] * 3)
    with pytest.raises(UserError, match=r"is stored in the run, .*: add --data\.dataset .*own_0\.py:open_split"):
        open_dataset(stored, "val")
    assert not (tmp_path / "imported").exists()
    assert len(open_dataset(DataConfig(str(stored.dataset), classes=stored.classes), "val")) == 1
    assert (tmp_path / "imported").exists()


def test_a_wrong_pair_is_one_problem(own: Own) -> None:
    problems = check(own("return from_pairs([(IMAGE, MASK), (IMAGE / 2, MASK)], CLASSES)"), "train").problems
    assert [problem.partition(": ")[0].endswith("/train/1") for problem in problems] == [True]


def test_messages_about_a_whole_split_name_the_function(own: Own) -> None:
    data = own("return from_pairs([(IMAGE, MASK * 0)], CLASSES)")
    (problem,) = check(data, "train").problems
    assert problem.startswith(f"data.dataset {data.dataset}: only 'a' has pixels in train")
