"""The pages: each block of code runs, in `nox -s docs`, or a mark says why not; the built site looks as it should.

A page's blocks run from top to bottom in a folder with small files of the kinds that pages name: street.jpg, photos/,
data/, a run in runs/mine … Commands are as they stand on the page; docs_program.py lets them end soon, and gives them
random weights for published ones. `pip` does nothing, since all is installed.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch

import segcore
from segcore.checkpoints import run_checkpoint
from segcore.config.record import describe
from segcore.demo import toy

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("packages/*/README.md")), *sorted(ROOT.glob("docs/*.md"))]
PAGES = [page for page in PAGES if page.name != "python_api.md"]  # whose code shows signatures
SHELL, CODE, DATA = ("", "sh", "bash"), ("python", "diff"), ("text", "json", "toml", "yaml", "csv", "bibtex")
"""Languages of commands, of Python (of a diff, what it leads to), and of blocks that are no code."""
PROGRAMS = ("segcore", "ddp-seg", "ddps-seg", "ddrnet-seg", "dgmn2-seg")
SITE = ROOT / "site"
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


class Block(NamedTuple):
    """A block of code: its line on the page, its language, its text, and why it does not run, if so."""

    line: int
    language: str
    text: str
    why_not: str


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page, fenced or indented; `<!-- not run: WHY -->` in the line before marks one."""
    MarkdownIt = pytest.importorskip("markdown_it").MarkdownIt
    found, why = [], ""
    for token in MarkdownIt("gfm-like", {"linkify": False}).parse(page.read_text(encoding="utf-8")):
        if token.type in ("fence", "code_block"):
            found.append(Block(token.map[0] + 1, token.info.partition(" ")[0], token.content, why))
        if token.type not in ("paragraph_open", "list_item_open"):
            mark = re.fullmatch(r"<!-- not run: (.+) -->\n?", token.content) if token.type == "html_block" else None
            why = mark[1] if mark else ""
    return found


@by_page
def test_each_block_runs_or_is_marked(page):
    text = page.read_text(encoding="utf-8")
    found = blocks(page)
    assert len([block for block in found if block.why_not]) == text.count("<!-- not run:"), "a mark without a block"
    for block in found:
        assert block.language in (*SHELL, *CODE, *DATA), f"{page}:{block.line}: {block.language}"
        if not block.why_not and block.language in CODE:
            compile(python_of(block), f"{page}:{block.line}", "exec")


def python_of(block: Block) -> str:
    """Return the Python of a block; of a diff, what it leads to."""
    if block.language != "diff":
        return block.text
    return "".join(line[1:] or "\n" for line in block.text.splitlines(keepends=True) if not line.startswith("-"))


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """A folder with the programs that commands on pages name."""
    folder = tmp_path_factory.mktemp("bin")
    helper = Path(__file__).with_name("docs_program.py")
    for name in PROGRAMS:
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "{helper}" {name} "$@"\n')
    (folder / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / "pip").write_text("#!/bin/sh\n")
    for file in folder.iterdir():
        file.chmod(0o755)
    return folder


def make_files(folder: Path, page: str) -> None:
    """Write what pages name, below `folder`, as small as possible."""
    spec = importlib.util.spec_from_file_location("own_data", Path(__file__).with_name("test_examples_own_data.py"))
    own_data = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own_data)
    own_data.make_files(folder)
    for name in ("examples", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("data/toy", "data/cityscapes"):
        if f'generate(Path("{name}")' not in page:  # else the page makes it
            toy.generate(folder / name, train=4, val=2, height=64, width=128)
    shutil.copytree(folder / "CamVid", folder / "data/CamVid")
    shutil.copytree(folder / "data/mine", folder / "mydata")
    for split in ("training", "validation"):
        for name in "ab":
            own_data.write(
                folder / f"data/ade/ADEChallengeData2016/images/{split}/{name}.jpg",
                folder / f"data/ade/ADEChallengeData2016/annotations/{split}/{name}.png",
                range(1, 151),
            )
    own_data.write(folder / "street.jpg")
    own_data.write(folder / "scene.tif")
    own_data.write(folder / "photos/a.png")
    if ".onnx" in page:  # of one size, that of the scenes
        for photo in (folder / "photos").iterdir():
            cv2.imwrite(str(photo), np.zeros((64, 128, 3), np.uint8))
    if "clip.mp4" in page:
        av = pytest.importorskip("av")
        with av.open(str(folder / "clip.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", width=128, height=64, pix_fmt="yuv420p")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 128, 3), np.uint8), format="rgb24")))
            container.mux(stream.encode())
    ddp = re.search(r"ddp-seg \w+ runs/mine", page)
    exp = segcore.load_experiment("ddp_resnet18_toy" if ddp else "ddrnet_23_slim_toy")
    exp = exp.with_overrides(["evaluate.img_scale=128 64", "data.workers=0"])
    torch.manual_seed(0)
    state = exp.model.build().state_dict()
    torch.save(state, folder / "weights.pth")
    if not re.search(r"train \w+ --work-dir runs/mine", page):  # else the page trains it
        checkpoint = run_checkpoint.folder_of(folder / "runs/mine", 1)
        run_checkpoint.save(checkpoint, state, {}, describe(exp))
        shutil.copy(checkpoint / "experiment.json", folder / "runs/mine")


@pytest.mark.docs
@pytest.mark.timeout(1200)
@by_page
def test_blocks_run(page, programs, tmp_path):
    todo = [block for block in blocks(page) if not block.why_not and block.language not in DATA]
    if not todo:
        pytest.skip("no code, or none that runs")
    make_files(tmp_path, page.read_text(encoding="utf-8"))
    env = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SEGCORE_WEIGHTS": str(programs.parent / "weights"),
        "HOME": str(tmp_path),
        "PYTHONPATH": ":".join(filter(None, [os.environ.get("PYTHONPATH"), str(tmp_path)])),
    }
    for block in todo:
        words = ["bash", "-euo", "pipefail", "-c", block.text]
        if block.language in CODE:
            words = [sys.executable, str(Path(__file__).with_name("docs_program.py")), "-c", python_of(block)]
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{page}:{block.line}\n{block.text}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


@pytest.fixture(scope="module")
def open_pages(browser):
    """A function that opens a page of the site at a width, and returns it with what went wrong."""
    if not SITE.is_dir():
        pytest.skip("`nox -s docs -- build` has not built the site")

    def open_page(path: Path, width: int):
        page, wrong = browser.new_page(viewport={"width": width, "height": 900}), []
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("requestfailed", lambda request: wrong.append(request.url))
        page.on("request", lambda request: None if request.url.startswith(SITE.as_uri()) else wrong.append(request.url))
        page.goto(path.as_uri())
        return page, wrong

    return open_page


@pytest.mark.docs
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_in_a_browser(open_pages, width):
    """Nothing is asked of a network, nothing fails, and a phone need not scroll sideways."""
    index = SITE / "index.html"  # leads to another page at once
    found = [path for path in sorted(SITE.rglob("*.html")) if "_static" not in path.parts and path != index]
    assert len(found) > len(PAGES)
    for path in found:
        page, wrong = open_pages(path, width)
        wide = page.evaluate("document.documentElement.scrollWidth") - width
        page.close()
        assert not wrong, path
        assert wide <= 0, f"{path} is {wide} pixels too wide"


@pytest.mark.docs
def test_search_finds_an_option_in_files_alone(open_pages):
    page, wrong = open_pages(SITE / "search.html", 1280)
    page.goto((SITE / "search.html").as_uri() + "?q=early-exit-threshold")
    page.wait_for_selector("#search-results li a")
    assert not wrong
