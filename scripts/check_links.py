#!/usr/bin/env python3
"""Check the links in this repository's Markdown pages that lead to its own files and headings; no network."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
HOME = re.compile(r"https://(?:raw\.githubusercontent|github)\.com/[^/]+/segcore/(?:(?:blob|tree|raw)/)?main/")
"""How pages that are also shown elsewhere, as on the Python index, begin links to this repository's files."""


def tokens(page: Path) -> list[Token]:
    return MarkdownIt("gfm-like", {"linkify": False}).parse(page.read_text(encoding="utf-8"))


def anchors(page: Path) -> Iterator[str]:
    """Yield the anchors of a page's headings, as GitHub makes them."""
    seen: Counter[str] = Counter()
    parsed = tokens(page)
    for before, token in pairwise(parsed):
        if before.type == "heading_open":
            title = "".join(part.content for part in token.children or ()).strip().lower()
            anchor = re.sub(r"[^\w\- ]", "", title).replace(" ", "-")
            yield f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor
            seen[anchor] += 1


def links(page: Path) -> Iterator[tuple[int, str]]:
    """Yield line and target of a page's links and images."""
    for token in tokens(page):
        for part in token.children or ():
            if target := part.attrGet("href") or part.attrGet("src"):
                yield (token.map or [0])[0] + 1, str(target)


def broken(page: Path) -> Iterator[str]:
    """Yield a line for each link of a page to a file or a heading that is not there."""
    for line, target in links(page):
        parts = urlsplit(HOME.sub(f"{ROOT.as_posix()}/", target))
        if parts.scheme or parts.netloc:
            continue
        file = page.parent / unquote(parts.path) if parts.path else page
        if not file.exists():
            yield f"{page}:{line}: {target}: there is no such file"
        elif parts.fragment and file.suffix == ".md" and unquote(parts.fragment) not in anchors(file):
            yield f"{page}:{line}: {target}: the page has no such heading"


if __name__ == "__main__":
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    sys.exit("\n".join(line for name in filter(None, names) for line in broken(ROOT / name)) or None)
