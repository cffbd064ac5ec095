"""What `predict` does with files, before and around the model."""

import cv2
import numpy as np
import pytest

from segcore.data.dataset import read_image
from segcore.errors import UserError
from segcore.predict import plan


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


def test_no_two_results_share_a_file(folder):
    cv2.imwrite(str(folder / "in" / "a_overlay.png"), np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(UserError, match=r"a_overlay\.png: results of two images"):
        plan(folder / "in", folder / "out")


def test_no_result_overwrites_an_image(folder):
    with pytest.raises(UserError, match="folder of the images"):
        plan(folder / "in", folder / "in")
    with pytest.raises(UserError, match="would overwrite this image"):
        plan(folder / "in" / "a.png", folder / "in" / "a.png")


def test_bytes_behind_a_jpeg_do_no_harm_but_a_cut_one_is_refused(tmp_path):
    rng = np.random.RandomState(0)
    path = tmp_path / "a.jpg"
    cv2.imwrite(str(path), rng.randint(0, 255, (32, 32, 3), np.uint8))
    whole = path.read_bytes()
    for _ in range(20):
        path.write_bytes(whole + rng.bytes(50_000))
        assert read_image(path).shape == (32, 32, 3)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut short"):
        read_image(path)
