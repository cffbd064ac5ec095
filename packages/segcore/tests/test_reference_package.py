"""The package of reference numbers: what is in it, and where tests find it; `nox -s reference` builds the real one."""

import hashlib
import importlib.util
import io
import json
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[3]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load(ROOT / "scripts" / "build_reference.py")
PHOTOGRAPH, OURS = np.full((9, 9, 3), 7, np.uint8), np.arange(5)


@pytest.fixture
def source(tmp_path):
    """A reference folder with one array that may be given away and one that may not."""
    golden = tmp_path / "source" / "eval" / "golden"
    golden.mkdir(parents=True)
    np.savez_compressed(golden / "resize.npz", image_natural=PHOTOGRAPH, image_random=OURS)
    (tmp_path / "source" / "fill.py").write_text("filled = dict\n", encoding="utf-8")
    return tmp_path / "source"


def test_the_bytes_follow_from_the_content(source):
    first = build.wheel(source, "1")
    os.utime(source / "fill.py", (1, 1))
    (source / "__pycache__").mkdir()
    (source / "__pycache__" / "fill.cpython-311.pyc").write_bytes(b"left by Python")
    assert build.wheel(source, "1") == first
    (source / "fill.py").write_text("filled = list\n", encoding="utf-8")
    assert build.wheel(source, "1") != first


@pytest.mark.parametrize("name", ["eval/golden/street.jpg", "weights.pth", "eval/golden/more/a.npz", "ddp/swin.py"])
def test_files_of_unknown_kind_end_the_build(source, name):
    (source / name).parent.mkdir(parents=True, exist_ok=True)
    (source / name).write_bytes(b"")
    with pytest.raises(SystemExit, match=rf"{name} is of no known kind"):
        build.wheel(source, "1")


def test_photographs_stay_behind(source):
    with zipfile.ZipFile(io.BytesIO(build.wheel(source, "1"))) as wheel:
        assert json.loads(wheel.read("segcore_reference/left_out.json")) == {
            "eval/golden/resize.npz": ["image_natural"]
        }
        with np.load(io.BytesIO(wheel.read("segcore_reference/eval/golden/resize.npz"))) as arrays:
            assert list(arrays) == ["image_random"]
            np.testing.assert_array_equal(arrays["image_random"], OURS)


def is_picture(array):
    """Return whether an array of numbers has three channels, last or before two larger sides, and is smooth there.

    Noise, which our inputs are, has neighbors that are not alike; those of a photograph are.
    """
    for axis in (-1, -3):
        if array.ndim >= 3 and array.shape[axis] == 3 and array.dtype.kind in "uif":
            pixels = np.moveaxis(array, axis, 0).astype(np.float64)
            if min(pixels.shape[-2:]) >= 16:
                pairs = (pixels[..., 1:, :], pixels[..., :-1, :]), (pixels[..., 1:], pixels[..., :-1])
                if all(np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.3 for a, b in pairs):
                    return True
    return False


@pytest.mark.parametrize("shape", ["HWC", "NHWC", "CHW", "NCHW", "float"])
def test_what_is_a_picture(shape):
    smooth = np.add.outer(np.arange(40), np.arange(30))[..., None].repeat(3, 2).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, smooth.shape, np.uint8)
    for array, expected in ((smooth, True), (noise, False)):
        array = array.transpose(2, 0, 1) if "CHW" in shape else array
        array = array[None].repeat(2, 0) if shape[0] == "N" else array
        assert is_picture(array.astype(np.float32) if shape == "float" else array) == expected


def test_no_array_of_the_real_package_is_a_picture(reference):
    """Whoever adds a smooth array of three channels must look at it; these are made by us, or three label maps."""
    ours = {
        "ddp/golden/a_convnext_t_cityscapes.npz": ("ddim3_argmax",),
        "ddp/golden/b_swin_t_ade20k.npz": ("ddim3_argmax",),
        "ddps/golden/ddps_b0_slide.npz": ("simple_test_pred",),
        "ddps/golden/ddps_b2.npz": ("simple_test_pred",),
        "ddps/golden/train_multistep.npz": ("gt",),
        "eval/golden/metrics.npz": ("city19_ignore/", "ade150_reduce_zero/"),
        "eval/golden/photometric.npz": ("rand32/hsv",),
        "eval/golden/resize.npz": ("random_",),
    }
    for path in sorted(reference.glob("*/golden/*.npz")):
        name = path.relative_to(reference).as_posix()
        kept, _ = build.without_photographs(name, path.read_bytes())
        with np.load(io.BytesIO(kept)) as arrays:
            pictures = [key for key in arrays if is_picture(arrays[key]) and not key.startswith(ours.get(name, ()))]
        assert pictures == [], name


def test_the_hash_of_another_content_is_refused(source, tmp_path, monkeypatch, capsys):
    stated = tmp_path / "reference.txt"
    found = hashlib.sha256(build.wheel(source, "3")).hexdigest()
    line = "segcore-reference @ https://example.org/a/segcore_reference-3-py3-none-any.whl --hash=sha256:"
    stated.write_text(line + found, encoding="utf-8")
    monkeypatch.setattr(build, "REFERENCE", stated)
    build.main(source, tmp_path / "out")
    (source / "README.md").write_text("more", encoding="utf-8")
    with pytest.raises(SystemExit, match=f"has changed: reference.txt states sha256 {found}"):
        build.main(source, tmp_path / "out")
    assert found in capsys.readouterr().out


def test_where_the_tests_look(source, tmp_path, monkeypatch):
    """A folder that is named, then what reference.txt fetched, then an installed package; else a skip that helps."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    conftest = load(ROOT / "packages" / "conftest.py")
    monkeypatch.setattr(conftest, "__file__", str(tmp_path / "clone" / "packages" / "conftest.py"))
    monkeypatch.delenv("SEG_REFERENCE", raising=False)
    monkeypatch.setitem(sys.modules, "segcore_reference", None)  # as if it were not installed
    with pytest.raises(
        pytest.skip.Exception, match=r"pip install --no-deps --upgrade --target \.reference -r reference\.txt"
    ):
        conftest.find_reference()
    monkeypatch.delitem(sys.modules, "segcore_reference")
    for folder in ("site", "clone/.reference"):
        zipfile.ZipFile(io.BytesIO(build.wheel(source, "1"))).extractall(tmp_path / folder)
        importlib.invalidate_caches()
        assert conftest.find_reference() == tmp_path / folder / "segcore_reference"
        assert (conftest.find_reference() / "fill.py").is_file()
    monkeypatch.setenv("SEG_REFERENCE", str(source))
    assert conftest.find_reference() == source
    monkeypatch.setenv("SEG_REFERENCE", str(source / "none"))
    with pytest.raises(pytest.fail.Exception, match="which is no folder"):
        conftest.find_reference()
