"""Files that are no whole image end in one line: special files, links to themselves, cut and damaged ones."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from segcore.cli.predict_files import plan
from segcore.config.schema import DataConfig
from segcore.data import images, video
from segcore.data.check import check, check_headers
from segcore.data.images import label_values, read_image, read_label, read_size
from segcore.data.layouts import open_dataset
from segcore.errors import UserError

RNG = np.random.RandomState(0)
RGB = RNG.randint(0, 256, (40, 50, 3)).astype(np.uint8)
MASK = RNG.randint(0, 5, (40, 50)).astype(np.uint8)
READERS: tuple[Callable[[Path], object], ...] = (read_image, read_label, read_size)


def encode(array: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG of chunks (name, content)."""
    parts = [struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
             for name, body in chunks]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def body(data: bytes, name: bytes) -> bytes:
    start = data.index(name)
    return data[start + 4 : start + 4 + int.from_bytes(data[start - 4 : start], "big")]


def refused(read: Callable[[Path], object], path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


@pytest.fixture
def special(tmp_path: Path) -> dict[str, Path]:
    """A FIFO, an endless device, a link to itself and a folder, each named like an image."""
    paths = {kind: tmp_path / "in" / f"{kind}.png" for kind in ("fifo", "device", "loop", "folder")}
    (tmp_path / "in" / "folder.png").mkdir(parents=True)
    os.mkfifo(paths["fifo"])
    paths["device"].symlink_to("/dev/zero")
    paths["loop"].symlink_to("loop.png")
    return paths


@pytest.mark.timeout(60)
def test_special_files_are_refused_and_never_opened(special: dict[str, Path], tmp_path: Path) -> None:
    for read in READERS:
        for kind, part in (
            ("fifo", "a FIFO"),
            ("device", "a device"),
            ("folder", "a folder"),
            ("loop", "symbolic link"),
        ):
            assert part in refused(read, special[kind])
    for kind in ("fifo", "device"):
        npy = tmp_path / f"{kind}.npy"
        npy.symlink_to(special[kind])
        assert "regular file" in refused(read_image, npy)


@pytest.mark.timeout(60)
def test_special_files_in_the_folders_of_a_data_set(special: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    for kind in special:
        (tmp_path / "masks" / f"{kind}.png").write_bytes(encode(MASK))
    data = DataConfig("folder", tmp_path, "in/*", "masks/*", classes=tuple("abcde"))
    found = check(data, "train")
    assert [text.split(":")[0] for text in found.problems] == [str(special[k]) for k in ("device", "fifo", "loop")]
    assert check_headers(open_dataset(data, "train")) == found.problems


@pytest.mark.timeout(60)
def test_predict_leaves_folders_out_and_reports_special_files(special: dict[str, Path], tmp_path: Path) -> None:
    assert [job.image.name for job in plan(tmp_path / "in", tmp_path / "in/out")] == [
        "device.png",
        "fifo.png",
        "loop.png",
    ]
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=r"loop: no such image or folder"):
        plan(tmp_path / "loop", tmp_path / "out")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    with pytest.raises(UserError, match=r"loop\.mp4: no such video"):
        video.plan(tmp_path / "loop.mp4", tmp_path / "out")
    os.mkfifo(tmp_path / "fifo.mp4")
    with pytest.raises(UserError, match=r"fifo\.mp4: no such video"):
        video.plan(tmp_path / "fifo.mp4", tmp_path / "out")


@pytest.mark.parametrize(
    "header",
    [
        "{'descr':'|u1','fortran_order':False,'shape':(1000000,1000000,3),}",
        "{'descr':'|u1','fortran_order':False,'shape':(" + "9" * 30 + ",3,3),}",
        "{'descr':'|u1','fortran_order':False,'shape':(-4,3,3),}",
        "{'descr':'|u1','fortran_order':False,'shape':" + "-" * 9000 + "1,}",
        "{'descr':'|O','fortran_order':False,'shape':(3,3),}",
    ],
    ids=["terabytes", "overflow", "negative", "nested", "objects"],
)
def test_a_npy_header_that_promises_what_the_file_does_not_hold(tmp_path: Path, header: str) -> None:
    path = tmp_path / "huge.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header.encode() + b"\n" + bytes(100))
    assert "cannot be read as an image" in refused(read_image, path)


@pytest.mark.parametrize(("kind", "depth"), [("u1", 8), ("i2", 16), ("f4", 32)])
def test_an_image_without_pixels_is_refused(tmp_path: Path, kind: str, depth: int) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((0, 4, 3), kind))
    assert "has no pixels (shape (0, 4, 3)); replace the file" in refused(lambda p: read_image(p, 3, depth), path)
    with pytest.raises(UserError, match="mask 3: has no pixels"):  # as a program may make one
        label_values("mask 3", np.zeros((0, 4), np.int64))


def test_the_size_limit_holds_for_npy(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, RGB)
    np.testing.assert_array_equal(read_image(path, max_pixels=2000), RGB)
    assert "it has 2000 pixels, data.max_pixels is 1999" in refused(lambda p: read_image(p, max_pixels=1999), path)
    np.save(path, np.zeros((1, 1, 8000), np.uint8))  # no pixel too many, but numbers
    assert "data.max_pixels" in refused(lambda p: read_image(p, max_pixels=1999), path)


def test_an_infinite_label_is_refused_and_reported(tmp_path: Path) -> None:
    for folder, array in (("images", RGB), ("masks", np.full((40, 50), np.inf, np.float32))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.tif").write_bytes(encode(array, "TIFF"))
    line = refused(read_label, tmp_path / "masks/a.tif")
    assert "not whole, such as inf; save class indices" in line
    found = check(DataConfig("folder", tmp_path, "images/*", "masks/*", classes=tuple("abcde")), "train")
    assert found.problems == [line]


def test_a_file_that_does_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    (tmp_path / "a.png").write_bytes(encode(RGB))
    monkeypatch.setattr(images, "decode", full)
    assert "MemoryError" in refused(read_image, tmp_path / "a.png")


@pytest.mark.parametrize("read", [read_image, read_label])
def test_a_png_cut_anywhere_is_an_error(tmp_path: Path, read: Callable[[Path], object]) -> None:
    """Pillow fills what is missing at the end with zeros, which is a class."""
    whole, path = encode(MASK, compress_level=9), tmp_path / "a.png"
    for length in range(1, len(whole), 7):
        path.write_bytes(whole[:length])
        refused(read, path)
    path.write_bytes(whole[:-4])
    assert "the file is truncated" in refused(read, path)


@given(st.data())
def test_a_png_with_a_changed_byte_is_an_error_or_the_same(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole, path = encode(MASK), tmp_path_factory.getbasetemp() / "changed.png"
    offset = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[offset] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed)
    for read, expected in ((read_label, MASK), (read_image, np.repeat(MASK[..., None], 3, 2))):
        try:
            found = read(path)
        except UserError:
            continue
        np.testing.assert_array_equal(found, expected)


def test_zeros_in_the_middle_and_a_lost_part(tmp_path: Path) -> None:
    whole, path = encode(RGB), tmp_path / "a.png"
    for content in (whole[:1000] + bytes(800) + whole[1800:], whole[:1000] + whole[1500:]):
        path.write_bytes(content)
        for read in (read_image, read_label):
            refused(read, path)


def test_what_does_not_concern_the_pixels_is_left_out(tmp_path: Path) -> None:
    whole = encode(np.dstack([RGB, RGB[..., 0]]))
    parts = [(name, body(whole, name)) for name in (b"IHDR", b"IDAT", b"IEND")]
    other = [(b"iCCP", b"x\0\0no profile"), (b"tEXt", b""), (b"gAMA", bytes(4))]
    path = tmp_path / "a.png"
    path.write_bytes(png(parts[0], *other, *parts[1:]) + b"more")
    np.testing.assert_array_equal(read_image(path), RGB)
    np.testing.assert_array_equal(read_image(path, channels=4)[..., 3], RGB[..., 0])
    palette = Image.fromarray(MASK, "L").convert("P")
    palette.save(path, transparency=0, exif=b"Exif\0\0")
    np.testing.assert_array_equal(read_label(path), np.array(palette))


CHATTER = """
import sys
from segcore.data.images import read_image, read_label, read_size
for path in sys.argv[1:]:
    for read in (read_image, read_label, read_size):
        try:
            read(path)
        except ValueError:
            pass
"""


def test_libraries_print_nothing_about_damaged_files(tmp_path: Path) -> None:
    """Each of these files makes libpng, libjpeg or libtiff print a line of its own."""
    head, pixels = body(encode(RGB), b"IHDR"), zlib.decompress(body(encode(RGB), b"IDAT"))
    jpeg, tiff = encode(RGB, "JPEG"), bytearray(encode(RGB, "TIFF", compression="tiff_lzw"))
    tiff[1000:1400] = bytes(400)
    files = {
        "long.png": png((b"IHDR", head), (b"IDAT", zlib.compress(pixels + bytes(99))), (b"IEND", b"")),
        "short.png": png((b"IHDR", head), (b"IDAT", zlib.compress(pixels[:3000])), (b"IEND", b"")),
        "profile.png": png((b"IHDR", head), (b"iCCP", b"x\0\0"), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")),
        "zeros.jpg": jpeg[:1000] + bytes(500) + jpeg[1500:],
        "zeros.tif": bytes(tiff),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    paths = [str(tmp_path / name) for name in files]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHATTER, *paths], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    closed = [sys.executable, "-W", "ignore", "-c", CHATTER, *paths]
    subprocess.run(["sh", "-c", 'exec "$0" "$@" 2>&-', *closed], check=True)


def test_standard_error_is_back_after_threads_have_decoded(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(encode(RGB))
    (tmp_path / "b.png").write_bytes(b"no image")

    def read(number: int) -> None:
        if number % 2:
            refused(read_image, tmp_path / "b.png")
        read_image(tmp_path / "a.png")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(200)))
    os.write(2, b"here")
    assert capfd.readouterr().err == "here"


def test_decoding_is_that_of_opencv(tmp_path: Path) -> None:
    for kind in ("png", "jpg", "webp", "bmp"):
        (tmp_path / f"a.{kind}").write_bytes(encode(RGB, {"jpg": "JPEG"}.get(kind, kind.upper())))
        np.testing.assert_array_equal(
            read_image(tmp_path / f"a.{kind}"), cv2.imread(str(tmp_path / f"a.{kind}"))[..., ::-1]
        )
