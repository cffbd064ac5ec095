"""Tables of measured figures in READMEs and docs are those that the benchmarks printed."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks/results"
pytestmark = pytest.mark.skipif(not RESULTS.is_dir(), reason="the benchmarks are not beside the tests")


def table(page: str, pattern: str) -> dict[str, str]:
    """Return what follows the name in the rows of a page's table, by name."""
    rows = re.findall(rf"^\| `({pattern})`(.*)\|$", (ROOT / page).read_text(), re.MULTILINE)
    assert rows, f"no table in {page}"
    return dict(rows)


def test_figures_of_the_operators():
    printed = re.split(
        r"^(\w+) .*$", (RESULTS / "ops_cpu.txt").read_text().split("seg-cuda-ops")[1], flags=re.MULTILINE
    )
    for name, lines in zip(printed[1::2], printed[2::2], strict=True):
        speed = re.findall(r"compiled .* ([\d.]+x)$", lines, re.MULTILINE)
        plain = re.findall(r"plain .*? ([\d.]+x)", lines)
        threads = re.findall(r"on 2, ([\d.]+x)$", lines, re.MULTILINE)
        cells = table("packages/cuda-ops/README.md", "\\w+")[name].split(" | ")
        assert cells[-4:-1] == [" / ".join(plain), *speed], name
        assert cells[-1].strip() == " / ".join(threads), name


def test_figures_of_training_memory():
    printed = (RESULTS / "training_memory.txt").read_text()
    for name, cells in table("docs/extending.md", "(?:ddrnet|fpn|ddp|ddps)_\\w+").items():
        [line] = [line for line in printed.splitlines() if line.split()[:1] == [name]]
        numbers = [part.strip() for part in re.split(r"MiB \([\d.]+\)| s \(", line.removeprefix(name))][:2]
        assert [re.sub(" +", " ", part) for part in numbers] == [part.strip() for part in cells.strip(" |").split("|")]


def test_figures_of_a_backbone():
    printed = (RESULTS / "dgmn2_cpu.txt").read_text().split("\n\n")[1]
    columns = [re.split("  +", line)[1::2][:2] for line in printed.splitlines()[2:]]  # forward, both
    usual, _, plain, compiled = columns
    page = (ROOT / "docs/kernels.md").read_text()
    assert f"takes {usual[0]} ms in the usual form, {plain[0]} ms here and {compiled[0]} ms with the package" in page
    assert f"forward and backward {usual[1]}, {plain[1]} and {compiled[1]} ms" in page


def test_figures_of_camvid():
    rows = (RESULTS / "camvid/table.md").read_text().split("\n\n")[0]
    page, readme = (ROOT / "docs/camvid.md").read_text(), (ROOT / "README.md").read_text()
    assert rows in page, "paste benchmarks/results/camvid/table.md"
    assert (RESULTS / "camvid/ablations.md").read_text().rpartition("\n\n")[0] in page
    assert (RESULTS / "camvid/mmseg_ddrnet.md").read_text().split("\n\n")[1] in page
    for file in (RESULTS / "camvid").glob("*_camvid.json"):
        found = json.loads(file.read_text())
        val, test = (100 * found[split]["entries"][found[split]["main"]]["mIoU"] for split in ("val", "test"))
        line = f"| {sum(found['minutes']):.0f} | {val:.2f} | {test:.2f} |"
        assert f"| `{file.stem}` {line}" in readme
        assert line in page.partition("## What was tried")[2], "the row's setting"


def test_figures_of_the_configurations_to_choose_from():
    zoo = table("docs/model_zoo.md", "[-\\w]+")
    readme = (ROOT / "README.md").read_text()
    chosen = re.findall(r"\| `([-\w]+)` \| (?:Cityscapes|ADE20K) ([\d.]+) \| ([\d.]+ M) \|", readme)
    assert len(chosen) == 6
    for name, miou, parameters in chosen:
        cells = [cell.strip() for cell in zoo[name].split("|")]
        assert (cells[1], cells[3]) == (miou, parameters), name


def test_figures_of_the_benchmarks_at_a_glance():
    page = (ROOT / "benchmarks/README.md").read_text()
    rows = re.findall(r"^\| (.*) \| `results/(\w+\.txt)` \|$", page, re.MULTILINE)
    assert len(rows) == 7
    for cells, file in rows:
        figures = re.findall(r"\d+\.?\d*", cells.split(" | ", 1)[1])
        assert len(figures) == 3, cells
        assert set(figures) <= set(re.findall(r"\d+\.?\d*", (RESULTS / file).read_text())), cells
