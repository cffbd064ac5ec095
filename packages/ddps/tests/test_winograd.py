"""3x3 convolutions of the UNet by Winograd's method, which goldens pinned to MKL's products do not take."""

import pytest
import torch
from torch.nn import functional as F

from ddps_seg import unet


@torch.inference_mode()
@pytest.mark.parametrize("strip", [1, 64, 2048])
def test_equals_the_convolution(strip, monkeypatch):
    monkeypatch.setattr(unet, "STRIP", strip)
    x, weight, bias = torch.randn(2, 6, 14, 10), torch.randn(5, 6, 3, 3), torch.randn(5)
    expected = F.conv2d(x, weight, bias, padding=1)
    for layout in torch.contiguous_format, torch.channels_last:
        answer = unet.winograd(x.contiguous(memory_format=layout), unet.winograd_weight(weight), bias)
        torch.testing.assert_close(answer, expected, atol=2e-5, rtol=0)
        assert answer.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("library", "side", "used"), [("onednn", 16, 1), ("onednn", 15, 0), ("onednn", 8, 0), ("mkl", 16, 0)]
)
def test_rule_is_fixed(library, side, used, monkeypatch):
    monkeypatch.setenv("SEG_LINEAR", library)
    calls = []
    monkeypatch.setattr(unet, "winograd", lambda *arguments: calls.append(arguments) or arguments[0])
    conv, x = unet.StandardConv(64, 64).eval(), torch.randn(1, 64, side, side)
    with torch.no_grad():
        conv(x)
        assert len(calls) == used
        conv.double()(x.double())
        with torch.autocast("cpu"):
            conv.float()(x)
    conv(x)  # recorded by autograd
    assert len(calls) == used


def test_changed_weights_are_used(monkeypatch):
    monkeypatch.setenv("SEG_LINEAR", "onednn")
    conv, x = unet.StandardConv(64, 8).eval(), torch.randn(1, 64, 16, 16)
    with torch.no_grad():
        before = conv(x)
        conv.weight[0, 0] += 1
        after = conv(x)
        torch.testing.assert_close(
            after, F.conv2d(x, unet.standardize(conv.weight), conv.bias, padding=1), atol=1e-4, rtol=0
        )
    assert not torch.allclose(before, after)
