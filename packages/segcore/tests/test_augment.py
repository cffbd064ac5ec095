"""`data.augment`, vertical flips and quarter turns."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import RandomState

from segcore.config.schema import DataConfig
from segcore.data.layouts import open_dataset
from segcore.data.loader import train_batches
from segcore.data.transforms import TrainTransform
from segcore.errors import UserError

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "crop": (12, 20)}
LABEL = RandomState(0).randint(0, 5, (40, 50)).astype(np.uint8)
IMAGE = np.repeat(LABEL[..., None], 3, axis=2)
DRAWS = {"ratio_range": (0.5, 2.0), "flip": 0.5, "photometric": True, "blur": 0.5, "cat_max_ratio": 0.9}

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write the function `f(image, mask, rng)` with this body, and return how to name it."""

    def write(body: str) -> str:
        path = tmp_path / f"own_{len([*tmp_path.iterdir()])}.py"
        path.write_text(f"import numpy as np\n\ndef f(image, mask, rng):\n    {body}\n")
        return f"{path}:f"

    return write


@given(st.integers(0, 2**32 - 1), st.tuples(st.integers(1, 60), st.integers(1, 60)))
def test_turns_and_flips_keep_the_crop_and_move_image_and_label_alike(seed: int, crop: tuple[int, int]) -> None:
    data = DataConfig(**{**PLAIN, "crop": crop}, flip=0.5, vertical_flip=0.5, quarter_turns=True)
    image, label = TrainTransform(data)(IMAGE, LABEL, RandomState(seed))
    assert (image.shape, label.shape) == ((3, *crop), crop)
    seen = label != 255
    assert torch.equal(image[0][seen], label[seen].float())
    assert (image[0][~seen] == 0).all()
    assert seen.sum().item() in {min(crop[0], h) * min(crop[1], w) for h, w in ((40, 50), (50, 40))}


def test_every_turn_and_flip_occurs() -> None:
    square = np.arange(16, dtype=np.uint8).reshape(4, 4)
    data = DataConfig(**{**PLAIN, "crop": (4, 4)}, vertical_flip=0.5, quarter_turns=True)
    found = {
        TrainTransform(data)(np.repeat(square[..., None], 3, 2), square, RandomState(seed))[1].numpy().tobytes()
        for seed in range(80)
    }
    expected = {np.rot90(part, k).astype(np.int64).tobytes() for part in (square, square[::-1]) for k in range(4)}
    assert found == expected


def test_the_published_steps_draw_as_without_a_function(write: Write) -> None:
    for seed in range(5):
        image = RandomState(seed).randint(0, 256, (40, 50, 3)).astype(np.uint8)
        plain, own = (
            TrainTransform(DataConfig(**PLAIN, **DRAWS, augment=augment))(image, LABEL, RandomState(seed))
            for augment in (None, write("rng.rand(); return image, mask"))
        )
        assert all(map(torch.equal, plain, own))


def test_any_number_of_workers_gives_the_same_samples(write: Write, tmp_path: Path) -> None:
    """The function draws, changes its arguments, returns fewer pixels, and its data set hands out its own arrays."""
    (tmp_path / "data.py").write_text(
        "import numpy as np\nfrom segcore.data.pairs import from_pairs\n"
        "PAIRS = [(np.random.RandomState(i).randint(0, 256, (16, 24, 3)).astype(np.uint8),"
        " np.full((16, 24), i % 3)) for i in range(5)]\n"
        "def open_split(data, split):\n    return from_pairs(PAIRS, ('a', 'b', 'c'))\n"
    )
    body = "image[:] = rng.randint(256); mask[0] = 255; n = rng.randint(8, 12); return image[:n], mask[:n]"
    data = DataConfig(f"{tmp_path / 'data.py'}:open_split", **PLAIN, flip=0.5, quarter_turns=True, augment=write(body))
    how = {"batch": 4, "micro": 2, "seed": 1, "start": 0, "stop": 4}
    runs = []
    for workers in (0, 2, 0):
        dataset = open_dataset(data, "train")
        transform = TrainTransform(data, dataset.ignore_index, 3)
        runs.append(list(train_batches(dataset, transform, workers=workers, **how)))
    for batches in zip(*runs, strict=True):
        for name in ("images", "labels"):
            first, *others = (getattr(batch, name) for batch in batches)
            assert all(torch.equal(first, other) for other in others)
    assert len({batch.images[0, 0, 0, 0].item() for batch in runs[0]}) > 4
    assert (runs[0][0].labels[:, 11] == 255).all()


def test_a_transform_pickles_without_the_function(write: Write) -> None:
    transform = TrainTransform(DataConfig(**PLAIN, augment=write("return image // 2, mask")), 255, 5)
    again = pickle.loads(pickle.dumps(transform))
    for one, other in zip(*(t(IMAGE, LABEL, RandomState(0)) for t in (transform, again)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("return image", "returned ndarray; return two numpy arrays"),
        ("pass", "returned NoneType; return two numpy arrays"),
        ("return image, mask.tolist()", "returned ['ndarray', 'list']"),
        ("return image / 255, mask", "an image (12, 20, 3) of float64"),
        ("return image[..., :1], mask", "an image (12, 20, 1) of uint8"),
        ("return image, mask.astype(float)", "a mask (12, 20) of float64"),
        ("return image, mask[1:]", "a mask (11, 20)"),
        ("return image[:0], mask[:0]", "an image (0, 20, 3)"),
        (
            "return image.transpose(1, 0, 2), mask.T",
            "returned 20x12 pixels (height x width); return at most data.crop, 12x20",
        ),
        ("return image, mask + 100", "mask values 100-104, which are neither a class, 0-4, nor the ignored 255"),
        ("return image, mask.astype(int) - 1", "mask values -1, "),
        ("return image[99], mask", "cannot be run, line 4: IndexError"),
    ],
)
def test_a_function_that_returns_something_else(write: Write, body: str, text: str) -> None:
    reference = write(body)
    with pytest.raises(UserError) as caught:
        TrainTransform(DataConfig(**PLAIN, augment=reference), 255, 5)(IMAGE, LABEL, RandomState(0))
    assert text in str(caught.value)
    assert reference.removesuffix(":f") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_function_that_is_not_there(write: Write) -> None:
    path = write("pass").removesuffix(":f")
    with pytest.raises(
        UserError, match=r"own_0\.py:g: name the function as .*own_0\.py:FUNCTION with FUNCTION one of f"
    ):
        TrainTransform(DataConfig(augment=f"{path}:g"))
    with pytest.raises(UserError, match=r"data\.augment none\.py:g: there is no file none\.py"):
        TrainTransform(DataConfig(augment="none.py:g"))
