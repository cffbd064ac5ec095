"""The `bench` command: its table, its JSON, what it counts, and what it says to bad input."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from segcore import ops
from segcore.cli.main import main
from segcore.config.schema import DataConfig, Experiment, ModelConfig
from segcore.deploy import bench
from segcore.errors import UserError
from segcore.testing.tiny import Tiny

CPU = torch.device("cpu")
ONCE = {"warmup": 1, "repeats": 2}


class ConvNet(Tiny):
    """One convolution, 3 -> 5 channels, 3x3."""

    min_size = 8

    def __init__(self, fail=None, kernel=3):
        super().__init__(5, nn.Conv2d(3, 5, kernel, padding=kernel // 2))
        self.fail = fail

    def logits(self, images, seeds=None):
        if self.fail and len(images) > 1:
            raise self.fail
        return super().logits(images, seeds)


class Fusable(ConvNet):
    def fuse(self):
        return ConvNet(kernel=1)


def cells(model, **settings):
    return list(bench.measure(model, 3, bench.Settings(**ONCE, **settings), CPU))


def test_flops_of_a_convolution():
    found = cells(ConvNet(), sizes=((16, 32), (8, 8)), batches=(1, 2))
    assert [(c["height"], c["batch"]) for c in found] == [(16, 1), (16, 2), (8, 1), (8, 2)]
    assert [c["gflops"] * 1e9 for c in found] == pytest.approx(
        [2 * 27 * 5 * h * w for h, w in [(16, 32)] * 2 + [(8, 8)] * 2]
    )
    for cell in found:
        assert cell["error"] is None
        assert 0 < cell["p10_ms"] <= cell["latency_ms"] <= cell["p90_ms"]
        assert cell["images_per_s"] == pytest.approx(cell["batch"] / cell["latency_ms"] * 1e3)


ATTN = (torch.rand(2, 12, 4, 8), torch.rand(2, 7, 4, 1, 3, 2), torch.rand(2, 7, 4, 1, 3))
MAP, OFFSET, WEIGHT = torch.rand(2, 8, 5, 6), torch.rand(2, 18, 5, 6), torch.rand(4, 2, 3, 3)
TOKENS = [torch.rand(2, 30, 2, 8) for _ in range(3)] + [torch.rand(2, 30, 2, 18)]
SAMPLES = 8 * 2 * 8 * 9 * 30


@pytest.mark.parametrize(
    ("op", "inputs", "expected"),
    [
        (lambda v, loc, attn: ops.ms_deform_attn(v, [(3, 4)], loc, attn), ATTN, 8 * 2 * 7 * 4 * 3 * 8),
        (lambda x, off: ops.deform_unfold(x, off, kernel_size=3, padding=1), (MAP, OFFSET), SAMPLES),
        (
            lambda x, off, w: ops.deform_conv2d(x, off, w, padding=1),
            (MAP, OFFSET, WEIGHT),
            SAMPLES + 2 * 2 * 4 * 2 * 9 * 30,
        ),
        (lambda *t: ops.deform_local_attn(*t, height=5, width=6), TOKENS, 20 * 2 * 30 * 2 * 9 * 8),
    ],
)
def test_flops_of_our_operators(op, inputs, expected):
    leaves = [t.clone().requires_grad_() for t in inputs]
    with FlopCounterMode(display=False) as counter:
        out = op(*leaves)
    assert counter.get_total_flops() == expected
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(out.sum(), leaves)
    assert counter.get_total_flops() == 2 * expected


def test_a_model_that_can_be_fused_is_measured_both_ways():
    model = Fusable()
    found = cells(model, sizes=((8, 8),), channels_last=(False, True))
    assert [(c["fused"], c["channels_last"]) for c in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert found[0]["gflops"] == pytest.approx(9 * found[2]["gflops"])
    assert model.answer.kernel_size == (3, 3)  # the caller's model is as it was


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (RuntimeError("no kernel\nmore"), "failed: no kernel"),
    ],
)
def test_a_cell_that_fails_says_so_and_the_others_go_on(fault, says):
    found = cells(ConvNet(fault), sizes=((8, 8),), batches=(2, 1))
    assert [c["error"] for c in found] == [says, None]
    assert found[0]["latency_ms"] is None
    assert says in bench.as_line(found[0])


class TinyConfig(ModelConfig):
    def build(self):
        return ConvNet()


def test_runtimes_side_by_side(monkeypatch):
    """Those that are not installed say how to install them."""
    pytest.importorskip("onnxscript")
    exp = Experiment("tiny", TinyConfig(5), DataConfig("folder", classes=tuple("abcde")))
    settings = bench.Settings(sizes=((8, 16),), dtypes=("fp32", "bf16"), **ONCE)
    monkeypatch.setitem(sys.modules, "openvino", None)
    found = list(bench.measure_runtimes(ConvNet(), exp, settings))
    assert [(c["runtime"], c["dtype"]) for c in found] == [
        ("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16")
    ]  # fmt: skip
    assert found[0]["error"] is None
    assert found[0]["latency_ms"] > 0
    assert "ONNX Runtime  " in bench.as_line(found[0])
    assert bench.as_line(found[1]).endswith("OpenVINO                  needs openvino; install segcore[openvino]")


def test_memory_is_the_peak_and_not_what_stays():
    def run():
        a = torch.ones(24 * 2**20 // 4)
        del a
        return torch.ones(1)

    grown = bench.peak_memory(run, CPU)
    if grown is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert 20 * 2**20 < grown < 40 * 2**20


def run_bench(*words):
    main("ddp_seg", ["bench", "ddp_resnet18_toy", "--device=cpu", *words])


def test_command(tmp_path, capsys):
    pytest.importorskip("ddp_seg")
    path = tmp_path / "bench.json"
    options = ["--sizes", "64x128", "--dtypes", "fp32", "bf16", "--steps", "1", "--warmup=1", "--repeats=2"]
    run_bench(*options, "--channels-last=both", f"--json={path}")
    report, text = json.loads(path.read_text()), capsys.readouterr().out
    keys = {"name", "device", "torch", "threads", "parameters", "git", "note", "steps", "cells"}
    assert set(report) == keys
    assert (report["name"], report["torch"], report["steps"]) == ("ddp_resnet18_toy", torch.__version__, [1])
    assert report["parameters"] > 1e7
    assert [(c["dtype"], c["channels_last"]) for c in report["cells"]] == [
        ("fp32", False), ("fp32", True), ("bf16", False), ("bf16", True)
    ]  # fmt: skip
    measured = {"latency_ms", "p10_ms", "p90_ms", "images_per_s", "memory_mib", "gflops", "error"}
    setting = {"height", "width", "batch", "dtype", "runtime", "compile", "channels_last", "fused"}
    assert all(set(c) == measured | setting for c in report["cells"])
    assert text.count("64x128") == 4
    assert "multiply-add counts 2" in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--sizes", "64"], "--sizes 64"),
        (["--sizes", "0x64"], "--sizes 0x64"),
        (["--sizes", "64x64", "--repeats", "0"], "--repeats is 0"),
        (["--sizes", "64x64", "--batches", "0"], "--batches 0"),
        (["--sizes", "64x64", "--runtimes", "--steps", "1"], "--steps is for models in PyTorch"),
        (["--sizes", "16x64", "--model.backbone", "convnext_t"], "an image of 16x64 pixels is too small"),
    ],
)
def test_wrong_input_is_one_line(words, says, capsys):
    pytest.importorskip("ddp_seg")
    with pytest.raises(SystemExit) as end:
        run_bench(*words)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 1
    assert line.startswith("error: ")
    assert says in line


def test_settings_are_refused_without_a_model_too():
    with pytest.raises(UserError, match="--repeats is 0; it must be at least 1"):
        bench.check(bench.Settings(((64, 64),), repeats=0))
    with pytest.raises(UserError, match="--batches -1 is too small"):
        bench.check(bench.Settings(((64, 64),), batches=(1, -1)))


def test_an_exported_file_that_fails_says_so(monkeypatch):
    def fails(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("segcore.deploy.bench.load_exported", fails)
    cell = bench.measure_exported(Path("model.onnx"), "cpu", "fp32", (1, 3, 64, 64), bench.Settings(((64, 64),)))
    assert (cell["error"], cell["latency_ms"]) == ("out of memory", None)
