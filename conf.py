"""The documentation site: `nox -s docs` builds it into site/ from the Markdown pages as they stand on GitHub.

Sphinx reads the repository itself. So a page's address is its path, and a link that is right there is right here.
"""

import re
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
PYPROJECT = tomllib.loads((ROOT / "packages/segcore/pyproject.toml").read_text(encoding="utf-8"))
HOME = PYPROJECT["project"]["urls"]["Homepage"]
NAVIGATION = {
    "Use": (
        "docs/own_data",
        "docs/datasets",
        "Train <docs/train>",
        "docs/many_gpus",
        "docs/watching_a_run",
        "Evaluate <docs/evaluate>",
        "docs/results",
        "docs/report",
        "What predict writes <docs/predictions>",
        "docs/diffusion",
        "docs/large_images",
        "docs/deploy",
        "docs/web",
        "docs/troubleshooting",
    ),
    "Methods": (
        "docs/model_zoo",
        "docs/camvid",
        "docs/hub",
        "DDP <packages/ddp/README>",
        "DDPS <packages/ddps/README>",
        "DDRNet <packages/ddrnet/README>",
        "DGMN2 <packages/dgmn2/README>",
    ),
    "Coming from": (
        "MMSegmentation <docs/coming_from_mmsegmentation>",
        "The original repositories <docs/coming_from_originals>",
        "ultralytics and smp <docs/coming_from_ultralytics_smp>",
    ),
    "Extend": (
        "docs/extending",
        "Operators elsewhere <docs/operators>",
        "docs/kernels",
        "seg-cuda-ops <packages/cuda-ops/README>",
        "segcore <packages/segcore/README>",
    ),
    "Reference": ("docs/commands", "docs/python_api"),
    "Project": (
        "docs/architecture",
        "docs/testing",
        "benchmarks/README",
        "CONTRIBUTING",
        "CHANGELOG",
        "UPGRADING",
        "SECURITY",
        "CODE_OF_CONDUCT",
    ),
}
"""Captions and pages of the side bar, `TITLE <PAGE>` where the page's own title is too long for it."""

project = html_title = "Semantic segmentation"
extensions = ["myst_parser"]
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "packages/*/README.md", "benchmarks/README.md"]
exclude_patterns = [".*", "data", "dist", "runs", "site", "weights", "packages/*/*/*"]
myst_heading_anchors = 4
highlight_language = "sh"
html_theme = "furo"
html_static_path = ["docs/site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_search_summary = False  # it fetches pages, which a browser refuses for files
html_show_copyright = False
html_theme_options = {"source_repository": HOME, "source_branch": "main", "source_directory": ""}


def here(page: Path, target: str) -> str:
    """Return a link's target in the site: pages are here, folders are their READMEs; the rest is on GitHub."""
    path = re.sub(rf"^{re.escape(HOME)}/(blob|tree)/main/", "/", target)
    file = (ROOT / path[1:] if path.startswith("/") else page.parent / path).resolve()
    if file.is_dir():
        readme = (file / "README.md").is_file()
        return f"{path}/README.md" if readme else f"{HOME}/tree/main/{file.relative_to(ROOT)}"
    if file.suffix == ".md" and file.is_file() and not is_page(file.relative_to(ROOT).as_posix()):
        return f"{HOME}/blob/main/{file.relative_to(ROOT)}"
    return path


def is_page(path: str) -> bool:
    """Return whether a Markdown file is a page of the site; its path is relative to the repository."""
    return any(path.count("/") == pages.count("/") and fnmatchcase(path, pages) for pages in include_patterns)


def read(app: Any, name: str, source: list[str]) -> None:
    """Change the text of a page before it is parsed."""
    page = ROOT / f"{name}.md"
    source[0] = re.sub(r"(?<=\]\()[^)#\s]+", lambda match: here(page, match[0]), source[0])
    if name == root_doc:
        for caption, pages in NAVIGATION.items():
            source[0] += "\n".join(("\n```{toctree}", f":caption: {caption}", ":hidden:", "", *pages, "```\n"))


def write_index(app: Any, error: Exception | None) -> None:
    """Let the site's own address lead to its first page."""
    text = '<!doctype html><meta http-equiv="refresh" content="0; url=README.html"><a href="README.html">Start</a>'
    Path(app.outdir, "index.html").write_text(text, encoding="utf-8")


def setup(app: Any) -> None:
    """Connect the two functions above."""
    app.connect("source-read", read)
    app.connect("build-finished", write_index)
