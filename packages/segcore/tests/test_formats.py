"""Image formats: TIFF bands, damaged JPEGs, the size limit, numbers of 32 bits."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from segcore.config.schema import DataConfig
from segcore.data.images import read_image, read_label
from segcore.errors import UserError

RANDOM = np.random.default_rng(0)
DEPTHS = {"uint8": 8, "uint16": 16, "int16": 16, "float32": 32}


def scene(channels: int, dtype: str = "uint8", size: tuple[int, int] = (48, 80)) -> np.ndarray:
    return RANDOM.integers(0, 200, (*size, channels)).astype(dtype)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 8, 12])
@pytest.mark.parametrize("dtype", DEPTHS)
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_tiff_with_bands_side_by_side(tmp_path: Path, channels: int, dtype: str, planar: str) -> None:
    image, path = scene(channels, dtype), tmp_path / "a.tif"
    stored = image.transpose(2, 0, 1) if planar == "separate" and channels > 1 else image.squeeze()
    more = {"planarconfig": planar} if channels > 1 else {}
    tifffile.imwrite(path, stored, photometric="minisblack", **more)
    np.testing.assert_array_equal(read_image(path, channels, DEPTHS[dtype]), image)


@pytest.mark.parametrize(
    "how",
    [
        {"bigtiff": True},
        {"byteorder": ">"},
        {"tile": (16, 32)},
        {"compression": "zlib"},
        {"compression": "lzw"},
        {"compression": "lzw", "predictor": True},
        {"compression": "zstd", "tile": (16, 16)},
        {"compression": "packbits"},
    ],
    ids=str,
)
def test_tiff_as_programs_write_it(tmp_path: Path, how) -> None:
    for channels, dtype in ((3, "uint8"), (5, "uint16")):
        image, path = scene(channels, dtype), tmp_path / "a.tif"
        tifffile.imwrite(path, image, photometric="minisblack", planarconfig="contig", **how)
        np.testing.assert_array_equal(read_image(path, channels, DEPTHS[dtype]), image)


def test_tiff_pages_are_bands_or_the_first_image_counts(tmp_path: Path) -> None:
    image, path = scene(3), tmp_path / "a.tif"
    tifffile.imwrite(path, image.transpose(2, 0, 1).copy(), photometric="minisblack")
    np.testing.assert_array_equal(read_image(path), image)
    tifffile.imwrite(path, np.stack([image, 255 - image]), photometric="rgb")
    np.testing.assert_array_equal(read_image(path), image)
    tifffile.imwrite(path, image, photometric="rgb")
    np.testing.assert_array_equal(read_image(path), image)
    tifffile.imwrite(path, np.dstack([image, image[..., :1]]), photometric="rgb", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(read_image(path), image)
    assert read_image(path, 4).shape == (48, 80, 4)


def test_a_tiff_that_cannot_be_read_right_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(scene(3)).convert("CMYK").save(path)
    with pytest.raises(UserError, match=r"a.tif: .*SEPARATED: convert it to RGB"):
        read_image(path)
    Image.fromarray(scene(3)).convert("LAB").save(path)
    with pytest.raises(UserError, match=r"a.tif: .*CIELAB: convert it to RGB"):
        read_image(path)
    tifffile.imwrite(path, scene(5), photometric="minisblack", planarconfig="separate")
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(UserError, match=r"a.tif: .*truncated"):
        read_image(path, 5)
    tifffile.imwrite(path, scene(4, "float32"), photometric="minisblack", planarconfig="contig")
    with pytest.raises(UserError, match=r"a.tif: holds float32 .*data.bit_depth 8"):
        read_image(path, 4)


def test_numbers_of_32_bits(tmp_path: Path) -> None:
    image = RANDOM.normal(size=(20, 30, 2)).astype(np.float32)
    np.save(tmp_path / "a.npy", image)
    np.testing.assert_array_equal(read_image(tmp_path / "a.npy", 2, 32), image)
    image[3, 4] = np.nan
    np.save(tmp_path / "a.npy", image)
    with pytest.raises(UserError, match=r"a.npy: .*not finite"):
        read_image(tmp_path / "a.npy", 2, 32)
    np.save(tmp_path / "a.npy", -scene(1, "int16"))
    with pytest.raises(UserError, match=r"a.npy: holds int16"):
        read_image(tmp_path / "a.npy", 1, 16)
    assert read_image(tmp_path / "a.npy", 1, 32).min() < 0
    with pytest.raises(UserError, match=r"data.mean and data.std are those of 8-bit images; .* 32-bit"):
        DataConfig(bit_depth=32)


def jpeg(image: np.ndarray, **how) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", **how)
    return file.getvalue()


SMOOTH = cv2.GaussianBlur(scene(3, size=(128, 160)), (0, 0), 3)


@pytest.mark.parametrize(
    "how", [{"quality": 95}, {"quality": 40, "subsampling": 2}, {"progressive": True}, {"subsampling": 0}], ids=str
)
def test_jpeg_is_decoded_as_opencv_does(tmp_path: Path, how) -> None:
    for image, channels in ((SMOOTH, 3), (SMOOTH[..., 0], 3), (SMOOTH[..., 0], 1)):
        data = jpeg(image, **how)
        (tmp_path / "a.jpg").write_bytes(data)
        wanted = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        np.testing.assert_array_equal(read_image(tmp_path / "a.jpg", channels), wanted[..., :channels])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_jpeg_is_turned_as_viewers_show_it(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "a.jpg").write_bytes(data := jpeg(SMOOTH, exif=exif))
    wanted = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg"), wanted)
    assert wanted.shape[:2] == ((128, 160) if orientation < 5 else (160, 128))


def test_damage_inside_a_jpeg_is_reported(tmp_path: Path, capfd) -> None:
    data = bytearray(jpeg(scene(3, size=(128, 128))))
    middle = len(data) // 2
    data[middle : middle + 100] = bytes(100)
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(UserError, match=r"a.jpg: .*the file is damaged: .*replace the file"):
        read_image(tmp_path / "a.jpg")
    assert capfd.readouterr() == ("", "")
    Image.fromarray(SMOOTH).convert("CMYK").save(tmp_path / "b.jpg")
    with pytest.raises(UserError, match=r"b.jpg: .*CMYK.*convert it to RGB"):
        read_image(tmp_path / "b.jpg")


@pytest.mark.parametrize("how", [{}, {"progressive": True}, {"restart_marker_blocks": 4}], ids=str)
def test_two_jpegs_in_one_file(tmp_path: Path, how) -> None:
    """The first counts, as viewers show it; where it is cut, the second would fill it with gray."""
    first, second = jpeg(SMOOTH, **how), jpeg(255 - SMOOTH, quality=50)
    (tmp_path / "a.jpg").write_bytes(first)
    wanted = read_image(tmp_path / "a.jpg")
    for whole in (first + second, first + bytes(10) + first, first + b"....ftypmp42 a film"):
        (tmp_path / "a.jpg").write_bytes(whole)
        np.testing.assert_array_equal(read_image(tmp_path / "a.jpg"), wanted)
    for kept in (0.5, 0.9):
        for after in (second, first, second + first[len(first) // 2 :]):
            (tmp_path / "a.jpg").write_bytes(first[: int(kept * len(first))] + after)
            for read in (read_image, read_label):
                with pytest.raises(UserError, match=r"a.jpg: .*damaged: another JPEG begins before its end"):
                    read(tmp_path / "a.jpg")


def test_one_size_limit_for_images_and_labels_of_all_formats(tmp_path: Path) -> None:
    gray = np.zeros((20, 30), np.uint8)
    for suffix in (".png", ".jpg", ".bmp", ".tif", ".webp", ".gif"):
        path = tmp_path / f"a{suffix}"
        Image.fromarray(gray).save(path)
        for read in (lambda p, n: read_image(p, 3, 8, n), read_label):
            with pytest.raises(UserError, match=r"it has 600 pixels, data.max_pixels is 599: raise that"):
                read(path, 599)
        assert read_image(path, 3, 8, 600).shape == (20, 30, 3)


@pytest.mark.filterwarnings("error")
def test_a_label_beyond_pillows_own_limit(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((13_500, 13_500), np.uint8)).save(tmp_path / "a.png", compress_level=1)
    assert read_label(tmp_path / "a.png").shape == (13_500, 13_500)
