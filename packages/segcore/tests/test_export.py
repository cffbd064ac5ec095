"""Exports of a small network: what is written answers as the model does, or nothing is written."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from segcore.config.schema import DataConfig, Experiment, ModelConfig
from segcore.deploy import export
from segcore.errors import UserError
from segcore.testing.tiny import Tiny, TinyStepwise


class Half(Tiny):
    """Two convolutions, the second at half the size."""

    size_divisor = 2
    min_size = 4

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(19, nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 19, 1)))


class Forgetful(Half):
    """What it gives to export does not stay the same."""

    def exportable(self, images, *, dynamic):
        return Drifting(self)


class Drifting(nn.Module):
    """Answers differently from call to call, outside a traced program."""

    def __init__(self, model):
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, images):
        self.calls += not torch.compiler.is_exporting()
        return self.model(images) + 0.01 * self.calls


class HalfConfig(ModelConfig):
    def build(self):
        return Half()


SMALL = export.Settings(12, 16)
EXP = Experiment("tiny", HalfConfig(), DataConfig("toy"))


def run(path, images):
    """The answer of what was written, read by itself, and the description that goes along."""
    if path.suffix == ".onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(str(path))
        text = session.get_modelmeta().custom_metadata_map["segcore"]
        return session.run(["logits"], {"images": images.numpy()})[0], json.loads(text)
    extra = {"segcore.json": ""}
    program = torch.export.load(path, extra_files=extra)
    return program.module()(images).detach().numpy(), json.loads(extra["segcore.json"])


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_round_trip(tmp_path, suffix, dynamic):
    if suffix == ".onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name)
    model, path = Half().eval(), tmp_path / "new" / f"tiny{suffix}"
    checks = export.export(model, EXP, path, export.Settings(12, 16, dynamic=dynamic))
    assert [check.shape for check in checks] == [(1, 3, 12, 16)] + [(2, 3, 14, 18)] * dynamic
    assert all(check.difference <= 1e-5 and check.agreement == 1 for check in checks)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    for shape in [(1, 3, 12, 16)] + [(3, 3, 40, 4)] * dynamic:
        images = torch.randn(shape)
        logits, about = run(path, images)
        np.testing.assert_allclose(logits, model(images).detach().numpy(), atol=1e-5)
    assert about["mean"] == list(EXP.data.mean)
    assert about["classes"][0] == "road"
    assert about["size_divisor"] == (2 if dynamic else None)


def test_a_stepwise_model_that_draws_only_its_start(tmp_path):
    model, path = TinyStepwise(noise=0.1).eval(), tmp_path / "tiny.pt2"
    export.export(model, replace(EXP, data=replace(EXP.data, dataset="folder", classes=("a", "b", "c"))), path, SMALL)
    images = torch.randn(1, 3, 12, 16)
    np.testing.assert_allclose(run(path, images)[0], model(images).detach().numpy(), atol=1e-5)


def test_what_answers_differently_is_not_written(tmp_path):
    path = tmp_path / "tiny.pt2"
    with pytest.raises(UserError, match=r"not written.*1x3x12x16"):
        export.export(Forgetful().eval(), EXP, path, export.Settings(12, 16))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("a.pth", export.Settings(12, 16), ".onnx (ONNX) or .pt2"),
        ("a.pt2", export.Settings(13, 16, dynamic=True), "multiples of 2"),
        ("a.pt2", export.Settings(12, 16, batch=0), "--batch 0"),
        ("a.pt2", export.Settings(2, 16), "at least 4"),
    ],
)
def test_wrong_wishes(tmp_path, name, settings, said):
    with pytest.raises(UserError) as error:
        export.export(Half().eval(), EXP, tmp_path / name, settings)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "said"), [("folder.pt2", "is a folder"), ("file/a.pt2", "cannot be written")])
def test_where_nothing_can_be_written_nothing_is_exported(tmp_path, monkeypatch, name, said):
    (tmp_path / "folder.pt2").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.delattr(torch.export, "export")
    with pytest.raises(UserError, match=said):
        export.export(Half().eval(), EXP, tmp_path / name, SMALL)


def test_onnx_without_its_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs onnx, onnxruntime, onnxscript; install segcore\[export\]"):
        export.export(Half().eval(), EXP, Path(tmp_path / "a.onnx"), export.Settings(12, 16))


class Square(nn.Module):
    """Products along the rows of a square map, and a table that is resized to it: ONNX exporters got both wrong."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 15, generator=torch.Generator().manual_seed(0)))

    def forward(self, images):
        side = images.shape[2]
        wide = nn.functional.interpolate(self.table[None, :, :, None], (side + 8, 1), mode="bilinear")[0, :, :, 0]
        rows = wide[:, torch.arange(side)[:, None] + torch.arange(9)].permute(1, 0, 2)  # (side, 3, 9)
        by_row = images.permute(2, 0, 3, 1).clone(memory_format=torch.contiguous_format)
        products = torch.bmm(by_row.flatten(1, 2), rows).unflatten(1, (-1, side)).permute(1, 3, 0, 2)
        mean = images.mean((2, 3), keepdim=True)  # as a buffer of the normalization is called
        return torch.cat([products, products, images[:, :1] - mean[:, :1]], 1)


def test_products_and_resizes_of_square_maps_as_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    settings = export.Settings(13, 13, batch=2, normalize=True)
    [check] = export.export(Tiny(19, Square()).eval(), EXP, tmp_path / "a.onnx", settings)
    assert check.difference <= 1e-5
