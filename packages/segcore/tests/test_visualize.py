"""Overlays, class PNGs, panels and legends."""

import numpy as np
import pytest
from PIL import Image

from segcore.errors import UserError
from segcore.reporting import figures
from segcore.reporting.figures import hstack_panels

PALETTE = np.array([(200, 0, 10), (0, 255, 0), (3, 2, 1)], np.uint8)


def test_overlay_truncates_as_published():
    image = np.full((1, 3, 3), 101, np.uint8)
    classes = np.array([[0, 1, 255]])
    # 101 * 0.5 + 200 * 0.5 = 150.5, 101 * 0.5 + 0 = 50.5, 101 * 0.5 + 10 * 0.5 = 55.5, …: truncated, not rounded
    assert figures.overlay(image, classes, PALETTE).tolist() == [[[150, 50, 55], [50, 178, 50], [50, 50, 50]]]
    # 101 * 0.7 = 70.7 and + 200 * 0.3 = 130.7
    assert figures.overlay(image, classes, PALETTE, 0.3)[0, 0].tolist() == [130, 70, 73]
    np.testing.assert_array_equal(figures.overlay(image, classes, PALETTE, 0), image)
    np.testing.assert_array_equal(figures.overlay(image, classes, PALETTE, 1), figures.colorize(classes, PALETTE))


def test_overlay_refuses_sizes_and_opacities_that_do_not_fit():
    image = np.zeros((2, 3, 3), np.uint8)
    with pytest.raises(UserError, match=r"size \(.*\) .* size \(.*\); resize one"):
        figures.overlay(image, np.zeros((3, 2), int), PALETTE)
    with pytest.raises(UserError, match=r"opacity is 1\.5"):
        figures.overlay(image, np.zeros((2, 3), int), PALETTE, 1.5)


def test_colorize_paints_the_ignored_black():
    classes = np.array([[0, 1, 2], [255, 3, -1]], np.int64)
    expected = [[[200, 0, 10], [0, 255, 0], [3, 2, 1]], [[0, 0, 0]] * 3]
    assert figures.colorize(classes, PALETTE).tolist() == expected
    assert figures.colorize(classes, PALETTE, ignore_index=0)[0, 0].tolist() == [0, 0, 0]
    assert figures.colorize(classes[:1].astype(np.uint8), PALETTE.tolist()).tolist() == expected[:1]


@pytest.mark.parametrize("palette", [None, PALETTE])
def test_class_png_holds_the_indices(tmp_path, palette):
    classes = np.random.RandomState(0).randint(0, 256, (7, 5))
    classes[0, :3] = 0, 1, 2
    path = tmp_path / "new" / "mask.png"
    figures.write_class_png(path, classes, palette)
    with Image.open(path) as picture:
        assert picture.mode == ("L" if palette is None else "P")
        np.testing.assert_array_equal(np.array(picture), classes)
        if palette is not None:
            assert np.array(picture.convert("RGB"))[0, :3].tolist() == palette.tolist()


def test_class_png_refuses_values_beyond_8_bits(tmp_path):
    path = tmp_path / "mask.png"
    for wrong in (256, -1):
        with pytest.raises(UserError, match=r"mask\.png: classes .* do not fit"):
            figures.write_class_png(path, np.array([[0, wrong]]))
    with pytest.raises(UserError, match=r"mask\.png: 257 colors do not fit"):
        figures.write_class_png(path, np.array([[0]]), np.zeros((257, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_images_are_written_unchanged(tmp_path):
    image = np.random.RandomState(1).randint(0, 256, (6, 9, 3), np.uint8)
    figures.write_image(tmp_path / "a" / "b.png", image)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.png"]
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "a" / "b.png")), image)


def test_panels_are_captioned_images_side_by_side():
    a, b = np.full((30, 40, 3), 10, np.uint8), np.full((60, 20, 3), 99, np.uint8)
    picture = hstack_panels([a, b], ["left", ""], gap=6)
    head = picture.shape[0] - 30
    assert picture.shape == (head + 30, 40 + 6 + 10, 3)
    assert (picture[head:, :40] == 10).all()
    assert (picture[head:, 46:] == 99).all()
    assert (picture[:, 40:46] == 255).all()
    assert picture[:head, :40].min() < 100, "the caption is black on white"
    assert (picture[:head, 46:] == 255).all()
    with pytest.raises(ValueError, match="zip"):
        hstack_panels([a, b], ["one"])


def test_a_caption_is_never_cut_off():
    panels = [np.zeros((20, 30, 3), np.uint8), np.zeros((20, 200, 3), np.uint8)]
    short, long = (
        hstack_panels(panels, ["a", "b"]),
        hstack_panels(panels, ["3 steps: 12.5% changed", "b"]),
    )
    assert short.shape[1] == 30 + 6 + 200
    assert long.shape[1] > 150 + 6 + 200
    gap = long[:22, 150 : long.shape[1] - 206]
    assert (gap < 128).any(), "the end of the caption"
    assert (long[22:, 31 : long.shape[1] - 206] == 255).all(), "white beside the image"


@pytest.mark.parametrize(
    ("entry", "by", "title"),
    [("1", "steps", "1 step"), ("10", "steps", "10 steps"), ("0", "timestep", "timestep 0"), ("3", "", "3"),
     ("final", "steps", "final"), ("until 4%", "steps", "until 4%")],
)  # fmt: skip
def test_entry_titles(entry, by, title):
    assert figures.step_title(entry, by) == title


def test_legend_shows_every_color_and_name():
    table = figures.legend(["road", "sky", "car"], PALETTE, columns=2, cell=80)
    assert table.shape[1] == 160
    for color in PALETTE:
        assert (table == color).all(-1).any()
    half = table.shape[0] // 2
    assert (table[half:, 80:] == 255).all(), "the fourth cell is empty"
    assert (table[:half, 110:].min(-1) < 100).any(), "the second name is written"
    wide = figures.legend(["a long name of a class", "car"], PALETTE[:2], columns=2)
    half = wide.shape[1] // 2
    assert (wide[:, half - 9 : half] == 255).all(), "the longest name is complete"


@pytest.mark.parametrize(("size", "letters"), [((200, 300), 12), ((1024, 2048), 29), ((1600, 900), 24)])
def test_the_letters_of_a_legend_grow_with_the_image(size, letters):
    image = np.zeros((*size, 3), np.uint8)
    shown = figures.add_legend(image, ["road", "sky"], PALETTE[:2])
    assert shown.shape[1] == size[1]
    assert (shown[: size[0]] == 0).all()
    ink = (shown[size[0] :, 2 * letters : 4 * letters] < 128).all(-1).any(1)  # "road" is as high as its d
    assert 0.6 * letters < ink.sum() < letters
    every = figures.add_legend(image, [f"class {k}" for k in range(150)], np.resize(PALETTE, (150, 3)))
    assert every.shape[1] == size[1]


def test_a_legend_widens_an_image_that_is_narrower_than_a_name_and_may_be_empty():
    image = np.zeros((100, 30, 3), np.uint8)
    shown = figures.add_legend(image, ["a long name of a class", "car"], PALETTE[:2])
    assert shown.shape[1] > 100
    assert (shown[:100, 30:] == 255).all()
    assert figures.add_legend(image, [], PALETTE[:0]) is image


def test_contours_are_lines_on_both_sides_of_a_border_in_the_colors_of_the_classes():
    image, classes = np.full((6, 10, 3), 100, np.uint8), np.zeros((6, 10), np.int64)
    classes[:, 5:] = 1
    assert figures.borders(classes).tolist() == [[x in (4, 5) for x in range(10)]] * 6
    drawn = figures.overlay(image, classes, PALETTE, 0, contours=True)
    assert drawn[0].tolist() == [[100] * 3] * 4 + PALETTE[:2].tolist() + [[100] * 3] * 4
    large = np.zeros((1024, 2048), np.uint8)
    large[:, 1000:] = 255
    assert figures.borders(large)[0].sum() == 4
