"""Build the wheel of reference numbers, which `nox -s reference` calls:

python scripts/build_reference.py FOLDER OUT

FOLDER is the reference folder. What of it is given away stands in TAKEN and PHOTOGRAPHS alone. Everything is stored
without compression (the arrays are packed already) and without dates, so that the bytes follow from the folder; they
must have the hash that reference.txt states. Another hash means that the content changed and wants to be looked at.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "reference.txt"
PACKAGE = "segcore_reference"
TAKEN = (
    "README.md", "fill.py", "published.json",  # our texts, our code, figures with their addresses
    "*/SPEC.md", "ddps/STOCK.md", "*/golden/README.md",  # our texts
    "eval/ade20k.json", "eval/cityscapes.json", "eval/extra_datasets.json",  # names, colors and folders of data sets
    "*/manifests/*.json",  # names and shapes of parameters
    "*/golden/*.npz",  # numbers that the published systems answered for random inputs
)  # fmt: skip
"""Patterns of files that may be given away; all others end the build."""
IGNORED = ("__pycache__/*",)
PHOTOGRAPHS = {
    "eval/golden/inference.npz": ["image_rgb_uint8", "*input*", "*logits*", "*probs*", "*_pred"],
    "eval/golden/photometric.npz": ["img16*"],
    "eval/golden/resize.npz": ["*natural*"],
    "eval/golden/train_pipeline.npz": ["image", "normalized", "*_img_corner", "seed*_rgb", "seed*_img"],
}
"""Arrays that hold photographs whose terms nobody stated, or show what is on them. They stay behind."""


def names(folder: Path) -> list[str]:
    """Return the files to take, relative to `folder`, in order."""
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    found = [name for name in found if not any(fnmatch(name, pattern) for pattern in IGNORED)]
    for name in found:
        if not any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in TAKEN):
            sys.exit(f"reference: {folder / name} is of no known kind; TAKEN in scripts/build_reference.py lists them")
    return found


def archive(members: dict[str, bytes]) -> bytes:
    """Return a zip file whose bytes depend on names and contents alone."""
    with zipfile.ZipFile(packed := io.BytesIO(), "w") as file:
        for name, content in members.items():
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o644 << 16  # Unix, also when built elsewhere
            file.writestr(info, content)
    return packed.getvalue()


def without_photographs(name: str, content: bytes) -> tuple[bytes, list[str]]:
    """Return a file, and the arrays that were taken out of it."""
    if name not in PHOTOGRAPHS:
        return content, []
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        arrays = {member: file.read(member) for member in file.namelist()}
    out = [
        member
        for member in arrays
        if any(fnmatch(member.removesuffix(".npy"), pattern) for pattern in PHOTOGRAPHS[name])
    ]
    kept = {member: array for member, array in arrays.items() if member not in out}
    return archive(kept), [member.removesuffix(".npy") for member in out]


def wheel(folder: Path, version: str) -> bytes:
    """Return a wheel with what of `folder` is given away."""
    files = {"__init__.py": b'"""Reference numbers that the tests of segcore compare with: data, and fill.py."""\n'}
    left_out = {}
    for name in names(folder):
        files[name], out = without_photographs(name, (folder / name).read_bytes())
        left_out |= {name: out} if out else {}
    files["left_out.json"] = json.dumps(left_out, indent=1).encode()
    info = f"{PACKAGE}-{version}.dist-info"
    metadata = (
        f"Metadata-Version: 2.4\nName: segcore-reference\nVersion: {version}\n"
        "Summary: What the published systems compute: the numbers that segcore's tests compare with\n"
        "License-Expression: Apache-2.0\nLicense-File: LICENSE\n"
    )
    members = {f"{PACKAGE}/{name}": content for name, content in files.items()} | {
        f"{info}/METADATA": metadata.encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: build_reference\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/licenses/LICENSE": (ROOT / "LICENSE").read_bytes(),
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip('=')},{len(content)}\n"
        for name, content in members.items()
    )
    return archive(members | {f"{info}/RECORD": f"{record}{info}/RECORD,,\n".encode()})


def main(folder: Path, out: Path) -> None:
    stated = re.search(r"/(\w+-(\d+)-py3-none-any\.whl) --hash=sha256:(\w+)", REFERENCE.read_text(encoding="utf-8"))
    assert stated, f"{REFERENCE} states no wheel with its hash"
    name, version, expected = stated.groups()
    built = wheel(folder, version)
    out.mkdir(parents=True, exist_ok=True)
    (out / name).write_bytes(built)
    found = hashlib.sha256(built).hexdigest()
    print(f"{len(built):,} bytes  sha256 {found}  {out / name}")
    if found != expected:
        sys.exit(
            f"reference: the content of {name} has changed: reference.txt states sha256 {expected}; "
            "if that is wanted, raise the version there, build again and state the hash that is printed"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
