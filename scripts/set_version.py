"""Write the version in VERSION wherever a package states it: edit that file, then `python scripts/set_version.py`.

Every package states it itself, so that its sdist builds alone and its metadata can be read without a build.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = ("CITATION.cff", "packages/*/pyproject.toml", "packages/*/src/*/__init__.py")
WHOLE = r'(?m)^((?:__)?version(?:__)?(?: = |: )"?)[^"\s]+'
"""`version = "0.1.0"`, `__version__ = "0.1.0"` and `version: 0.1.0`."""
SERIES = r"\b((?:segcore|seg-cuda-ops)==)[\d.]+\*"
"""`segcore==0.1.*`: packages of one series fit each other."""


def texts() -> dict[Path, str]:
    """Return the files that state the version, with the text that they should have."""
    version = (ROOT / "VERSION").read_text(encoding="utf-8").strip()
    series = ".".join(version.split(".")[:2])
    found = {}
    for path in (path for pattern in FILES for path in ROOT.glob(pattern)):
        text = re.sub(WHOLE, rf"\g<1>{version}", path.read_text(encoding="utf-8"))
        found[path] = re.sub(SERIES, rf"\g<1>{series}.*", text)
    return found


if __name__ == "__main__":
    for path, text in texts().items():
        path.write_text(text, encoding="utf-8", newline="\n")
