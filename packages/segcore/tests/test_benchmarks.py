"""The stored results of benchmarks name the command that printed them; targets on a GPU are judged as they say."""

import importlib
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

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


@pytest.fixture
def targets(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("ops_targets")


@pytest.fixture
def ops_gpu(targets) -> ModuleType:
    return importlib.import_module("ops_gpu")


def test_every_target_has_a_case(ops_gpu):
    assert {target.case for target in ops_gpu.TARGETS} <= ops_gpu.cases(small=True).keys()
    assert ops_gpu.cases(small=True).keys() == ops_gpu.cases(small=False).keys()


def test_bytes_of_an_operator(ops_gpu):
    value, loc, attn = (4 * 8 * 8 * numbers for numbers in (32 * 2, 4 * 2 * 4, 4 * 4))  # queries, heads; bf16, fp32
    inputs = sum(t.nbytes for t in ops_gpu.attention(4, 8, dtype=torch.bfloat16).tensors)
    assert inputs == value + loc + attn
    assert ops_gpu.moved(inputs, value, "forward") == inputs + value  # the output is as large as the values
    assert ops_gpu.moved(inputs, value, "backward") == 2 * inputs + value


@pytest.mark.parametrize(
    ("target", "times", "expected"),
    [
        ((0.1,), {"compiled": (9, 1e-4)}, "0.100 ms / at most 0.10 ms / yes   graph, 25% of a copy's bandwidth"),
        ((0.1,), {"compiled": (9, 1.1e-4)}, "0.110 ms / at most 0.10 ms / no   graph, 23% of"),
        ((0.1,), {"compiled": (2e-4,)}, "0.200 ms / at most 0.10 ms / no   eager, as there is no graph, 12% of"),
        ((1.5, "tv"), {"compiled": (9, 1e-3), "tv": (9, 1.5e-3)}, "1.50x / at least 1.5x tv / yes   graph, 2%"),
        ((1.5, "tv"), {"compiled": (9, 1e-3), "tv": (1.4e-3,)}, "1.40x / at least 1.5x tv / no   graph, 2%"),
        ((1.5, "tv"), {"compiled": (9, 1e-3)}, "– / at least 1.5x tv, which did not run / no   graph, 2%"),
    ],
)
def test_line_of_a_target(targets, target, times, expected):
    times = {name: targets.Time(*seconds) for name, seconds in times.items()}
    line = targets.verdict(targets.Target("a case", "forward", *target), times, moved=10**8, bandwidth=4e12)
    name, step, rest = line.partition("forward")
    assert (name, step) == ("a case, ", "forward")
    assert rest.strip().startswith(expected)


def test_eager_times_stand_in_for_a_graph_visibly(ops_gpu, monkeypatch, capsys):
    def refuse(run):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(ops_gpu, "seconds", lambda run, repeats, scratch: run())
    on_gpu = SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(ops_gpu, "captured", lambda run: lambda: 1e-3)
    assert str(ops_gpu.timed(lambda: 2e-3, 1, on_gpu)) == "1.000 ms (eager 2.000)"
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(ops_gpu, "captured", refuse)
    assert str(ops_gpu.timed(lambda: 2e-3, 1, on_gpu)) == "2.000 ms (no graph)"
    assert "stands in: operation not permitted when stream is capturing\n" in capsys.readouterr().out


def test_instructions_of_a_warp_count_loops_as_often_as_they_run(targets):
    line = f"{'local_attn bf16 8 8 1':34}{64:10}{32:7}{11392:8}{955:7}  33 82 111; 9 LDG.128, 1 STG.128"
    assert targets.instructions(line, [2, 0, 9]) == 955 - 33 - 82 - 111 + 2 * 33 + 9 * 111


def test_estimates_name_what_they_are_made_of(ops_gpu, targets):
    for target in targets.KERNELS:
        line = targets.estimate(target, ops_gpu.cases(small=True)[target.case]())
        assert re.search(r"target 0\.\d\d ms, estimate (\d\.\d{3}) to \d\.\d{3} ms: \d+ instructions x \d+ warps", line)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"plain": 9.0, "fast": 4.0, "graph": 3.0}, "3.00x (graph) / at least 3.0x plain / yes"),
        ({"plain": 9.0, "fast": 4.0}, "2.25x (fast) / at least 3.0x plain / no"),
        ({"fast": 4.0}, "– / at least 3.0x plain, which did not run / no"),
    ],
)
def test_line_of_a_model(monkeypatch, times, expected):
    monkeypatch.syspath_prepend(BENCHMARKS)
    assert importlib.import_module("models_gpu").verdict(times, 3.0) == expected
