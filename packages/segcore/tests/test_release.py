"""The checks of `nox -s release` find what they are for; the session itself runs them on real wheels."""

import importlib.util
import io
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
spec = importlib.util.spec_from_file_location("check_release", ROOT / "scripts" / "check_release.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

LICENSE = (ROOT / "LICENSE").read_bytes()
METADATA = b"""Author: A
Summary: S
Requires-Python: >=3.11
License-Expression: Apache-2.0
Project-URL: Homepage, https://example.org
Classifier: Typing :: Typed

[text](https://example.org)
"""
INFO = f"ddp_seg-{script.VERSION}.dist-info"
WHEEL = {"ddp_seg/py.typed": b"", f"{INFO}/METADATA": METADATA, f"{INFO}/licenses/LICENSE": LICENSE}
SDIST = {"src/ddp_seg/__init__.py": b"", "pyproject.toml": b"", "LICENSE": LICENSE}


def wheel(folder: Path, package: str, files: dict[str, bytes]) -> Path:
    path = folder / f"{package}-{script.VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("ddp_seg", package), content)
    return path


def sdist(folder: Path, package: str, files: dict[str, bytes]) -> Path:
    path = folder / f"{package}-{script.VERSION}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{package}-{script.VERSION}/{name.replace('ddp_seg', package)}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize(("fault", "said"), [
    ({"ddp_seg/weights.npz": b""}, "has more than code: ddp_seg/weights.npz"),
    ({"ddp_seg/tests/test_a.py": b""}, "has more than code: ddp_seg/tests/test_a.py"),
    ({"tests/test_a.py": b""}, "installs into another package: tests/test_a.py"),
    ({f"{INFO}/licenses/LICENSE": b"another"}, "has not the license of the project"),
    ({f"{INFO}/METADATA": METADATA.replace(b"Project-URL", b"X")}, "does not state Project-URL"),
    ({f"{INFO}/METADATA": METADATA.replace(b"https://example.org)", b"../ddps)")}, "lead nowhere on an index"),
])  # fmt: skip
def test_faults_of_a_wheel(fault: dict[str, bytes], said: str, tmp_path: Path) -> None:
    script.check_wheel(wheel(tmp_path, "ddp_seg", WHEEL), "ddp_seg")
    with pytest.raises(SystemExit, match=said):
        script.check_wheel(wheel(tmp_path, "ddp_seg", WHEEL | fault), "ddp_seg")
    untyped = {name: content for name, content in WHEEL.items() if not name.endswith("py.typed")}
    with pytest.raises(SystemExit, match=r"has no py\.typed"):
        script.check_wheel(wheel(tmp_path, "ddp_seg", untyped), "ddp_seg")


@pytest.mark.parametrize("name", ["tests/test_a.py", "data/a.png", "src/other/a.py"])
def test_faults_of_an_sdist(name: str, tmp_path: Path) -> None:
    script.check_sdist(sdist(tmp_path, "ddp_seg", SDIST), "ddp_seg")
    with pytest.raises(SystemExit, match=f"has more than sources: {name}"):
        script.check_sdist(sdist(tmp_path, "ddp_seg", SDIST | {name: b""}), "ddp_seg")


def test_faults_of_a_release(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A home that is none yet, other bytes in the second build, a missing package."""
    built, again = tmp_path / "built", tmp_path / "again"
    built.mkdir()
    for package in script.PACKAGES.values():
        wheel(built, package, WHEEL)
        sdist(built, package, SDIST)
    shutil.copytree(built, again)
    script.check_built(built, again, final=False)
    if script.PLACEHOLDER in capsys.readouterr().out:
        with pytest.raises(SystemExit, match="in place of the public home"):
            script.check_built(built, again, final=True)
    second = again / f"segcore-{script.VERSION}.tar.gz"
    second.write_bytes(b"other")
    with pytest.raises(SystemExit, match=f"{second.name} is not the same built again"):
        script.check_built(built, again, final=False)
    (built / second.name).unlink()
    with pytest.raises(SystemExit, match="has not one wheel and one sdist of segcore"):
        script.check_built(built, again, final=False)
