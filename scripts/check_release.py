"""Checks of a release, which `nox -s release` calls; each ends the program with what is wrong.

python scripts/check_release.py built FOLDER AGAIN [--final]   # the wheels and sdists, and those built again
python scripts/check_release.py installed NAME                 # the environment after `pip install NAME`
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
VERSION = (ROOT / "VERSION").read_text(encoding="utf-8").strip()
METHODS = {f"{method}-seg": f"{method}_seg" for method in ("ddp", "ddps", "ddrnet", "dgmn2")}
PACKAGES = {"segcore": "segcore", "seg-cuda-ops": "seg_cuda_ops", **METHODS}
"""Distributions with their import packages."""
ENDINGS = {"py", "pyi", "typed", "json", "txt", "css", "js", "html", "so", "pyd"}
"""Those of a package's own files; weights, arrays, photographs and archives have others."""
BESIDE = {"LICENSE", "PKG-INFO", "README.md", "pyproject.toml", ".gitignore", "CMakeLists.txt"}
"""What an sdist has beside its sources."""
LARGEST = 3_000_000
"""Bytes of a wheel or sdist."""
PLACEHOLDER = "HOME_OWNER"
"""In addresses, before the project has a public home."""


def check(right: object, *wrong: object) -> None:
    if not right:
        sys.exit(f"release: {' '.join(map(str, wrong))}")


def contents(path: Path) -> dict[str, bytes]:
    """Return the files of a wheel, or those of an sdist below its one folder."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist()}
    found = {}
    with tarfile.open(path) as sdist:
        for member in sdist:
            check(member.isfile(), path.name, "has more than plain files:", member.name)
            top, _, name = member.name.partition("/")
            check(f"{top}.tar.gz" == path.name, path.name, "has another top folder:", member.name)
            file = sdist.extractfile(member)
            assert file is not None
            found[name] = file.read()
    return found


def check_wheel(path: Path, package: str) -> None:
    files, info = contents(path), f"{package}-{VERSION}.dist-info"
    check(f"{package}/py.typed" in files, path.name, "has no py.typed")
    license = files.get(f"{info}/licenses/LICENSE")
    check(license == (ROOT / "LICENSE").read_bytes(), path.name, "has not the license of the project")
    for name in map(PurePosixPath, files):
        check(name.parts[0] in (package, info), path.name, "installs into another package:", name)
        if name.parts[0] == package:
            check(name.suffix[1:] in ENDINGS and "tests" not in name.parts, path.name, "has more than code:", name)
    metadata = message_from_bytes(files[f"{info}/METADATA"])
    for field in ("Author", "Summary", "Requires-Python", "License-Expression", "Project-URL", "Classifier"):
        check(metadata[field], path.name, "does not state", field)
    check("](.." not in str(metadata.get_payload()), path.name, "has links in its README that lead nowhere on an index")


def check_sdist(path: Path, package: str) -> None:
    files = contents(path)
    check(files["LICENSE"] == (ROOT / "LICENSE").read_bytes(), path.name, "has not the license of the project")
    for name in map(PurePosixPath, files):
        right = str(name) in BESIDE or name.parts[:2] == ("src", package) or name.parts[0] == "csrc"
        check(right and "tests" not in name.parts, path.name, "has more than sources:", name)


def check_built(folder: Path, again: Path, *, final: bool) -> None:
    """Check the wheel and sdist of every package in `folder`, and that those in `again` have the same bytes."""
    for package in PACKAGES.values():
        wheels, sdist = list(folder.glob(f"{package}-{VERSION}-*.whl")), folder / f"{package}-{VERSION}.tar.gz"
        check(len(wheels) == 1 and sdist.is_file(), folder, "has not one wheel and one sdist of", package, VERSION)
        check_wheel(wheels[0], package)
        check_sdist(sdist, package)
        compiled = package == "seg_cuda_ops"
        for path in [sdist] if compiled else [sdist, *wheels]:
            second = again / path.name
            check(
                second.is_file() and second.read_bytes() == path.read_bytes(), path.name, "is not the same built again"
            )
    for path in sorted(folder.glob("*-*")):
        print(f"{path.stat().st_size:>9,} bytes  {path.name}")
        check(path.stat().st_size <= LARGEST, path.name, f"is larger than {LARGEST:,} bytes")
    check(f"\n## {VERSION}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), "CHANGELOG.md has no", VERSION)
    if PLACEHOLDER in (ROOT / "packages/segcore/pyproject.toml").read_text(encoding="utf-8"):
        check(not final, f"addresses have {PLACEHOLDER} in place of the public home (CONTRIBUTING.md, Releases)")
        print(f"rehearsal: addresses have {PLACEHOLDER} in place of the public home")


def check_installed(name: str) -> None:
    """Check an environment in which `pip install NAME` was run: what it has of ours, imports and commands."""
    found = {dist.name for dist in importlib.metadata.distributions()} & set(PACKAGES)
    check(found == {name} | ({"segcore"} if name in METHODS else set()), f"pip install {name} brought", found)
    for each in found:
        module = importlib.import_module(PACKAGES[each])
        check(Path(str(module.__file__)).is_relative_to(sys.prefix), each, "is imported from", module.__file__)
        versions = {module.__version__, importlib.metadata.version(each)}
        check(versions == {VERSION}, each, "is of version", versions, "not", VERSION)
        if each != "seg-cuda-ops":
            program = Path(sysconfig.get_path("scripts"), each)
            shown = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
            check(VERSION in shown.stdout, program, "--version prints", shown.stdout, shown.stderr)
    if name in METHODS:
        import segcore

        names = [row for row in segcore.experiments() if row.endswith("_toy")]
        check(names, name, "adds no configuration")
        for row in names:
            segcore.load_experiment(row).model.build()
    print(f"pip install {name}: {', '.join(sorted(found))}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    built = commands.add_parser("built")
    built.add_argument("folder", type=Path)
    built.add_argument("again", type=Path)
    built.add_argument("--final", action="store_true")
    installed = commands.add_parser("installed")
    installed.add_argument("name", choices=PACKAGES)
    arguments = parser.parse_args()
    if arguments.command == "built":
        check_built(arguments.folder, arguments.again, final=arguments.final)
    else:
        check_installed(arguments.name)
