"""The stored results of benchmarks name the command that printed them, which `nox -s benchmarks` runs again."""

import re
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").glob("*.txt"))
README = (BENCHMARKS / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", RESULTS, ids=lambda path: path.name)
def test_a_result_begins_with_its_command(file):
    command, text = file.read_text(encoding="utf-8").split("\n", 1)
    script = re.fullmatch(r"\$ python benchmarks/(\w+\.py)( --?[\w-]+( [\w.]+)?)*", command)
    assert script, command
    assert (BENCHMARKS / script[1]).is_file()
    assert text.strip()
    assert file.name in README or script[1] in README


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.name)
def test_the_page_tells_of_every_benchmark(script):
    assert script.name in README
