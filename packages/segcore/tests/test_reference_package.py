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


def test_no_array_of_the_real_package_is_a_picture(reference):
    """Three channels of bytes are random or made by us: whoever adds others must look at them."""
    ours = ("random", "rand32", "even_", "image_even", "seed_palette", "cityscapes_palette")
    for path in sorted(reference.glob("*/golden/*.npz")):
        name = path.relative_to(reference).as_posix()
        kept, _ = build.without_photographs(name, path.read_bytes())
        with np.load(io.BytesIO(kept)) as arrays:
            for key in [key for key in arrays if not key.removeprefix("image_").startswith(ours)]:
                shape = arrays[key].shape
                assert not (arrays[key].dtype == np.uint8 and shape[2:] == (3,)), f"{name}: {key} {shape}"


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
