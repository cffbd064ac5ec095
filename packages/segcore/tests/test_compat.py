"""`segcore.ops.compat` against torchvision, grid_sample and the published names; mmcv has test_openmmlab_operators."""

import importlib
import inspect
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch.nn import functional as F

from segcore import UserError
from segcore.ops.compat import deformable_detr, mmcv
from segcore.ops.compat import torchvision as compat_torchvision

pytestmark = pytest.mark.usefixtures("kernels")
PAGE = Path(__file__).parents[3] / "docs/operators.md"
LEVELS = [(5, 7), (3, 4)]
STARTS = [0, 35]


def shapes_of(layer):
    return {name: tuple(value.shape) for name, value in layer.state_dict().items()}


def near(actual, expected, tolerance=1e-5):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def gradients(out, leaves):
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def with_grid_sample(value, levels, loc, attn):
    """Return the attended values by torch's own sampling, level by level."""
    n, _, m, d = value.shape
    parts = value.split([height * width for height, width in levels], 1)
    out = 0
    for i, (size, part) in enumerate(zip(levels, parts, strict=True)):
        maps = part.permute(0, 2, 3, 1).reshape(n * m, d, *size)
        grid = (2 * loc[:, :, :, i] - 1).transpose(1, 2).flatten(0, 1)
        weight = attn[:, :, :, i].transpose(1, 2).flatten(0, 1)[:, None]
        out = out + (F.grid_sample(maps, grid, align_corners=False) * weight).sum(-1)
    return out.view(n, m * d, -1).transpose(1, 2)


def attention_inputs(n=2, q=6, m=4, d=8, p=3):
    torch.manual_seed(0)
    value = torch.randn(n, 47, m, d, dtype=torch.float64, requires_grad=True)
    loc = (torch.rand(n, q, m, 2, p, 2, dtype=torch.float64) * 1.4 - 0.2).requires_grad_()
    attn = torch.rand(n, q, m, 2, p, dtype=torch.float64, requires_grad=True)
    return value, loc, attn


# Deformable DETR


def test_extension_module_agrees_with_grid_sample():
    value, loc, attn = attention_inputs()
    expected = gradients(with_grid_sample(value, LEVELS, loc, attn), (value, loc, attn))
    shapes, starts = torch.tensor(LEVELS), torch.tensor(STARTS)
    ways = [
        deformable_detr.ms_deform_attn_forward(value, shapes, starts, loc, attn, 64),
        deformable_detr.MSDeformAttnFunction.apply(value, shapes, starts, loc, attn, 64),
        deformable_detr.ms_deform_attn_core_pytorch(value, LEVELS, loc, attn),
        mmcv.multi_scale_deformable_attn_pytorch(value, shapes, loc, attn),
        mmcv.MultiScaleDeformableAttnFunction.apply(value, LEVELS, STARTS, loc, attn, 1),
    ]
    for out in ways:
        for actual, wanted in zip(gradients(out, (value, loc, attn)), expected, strict=True):
            near(actual, wanted, 1e-10)
    grad = torch.randn_like(expected[0])
    expected = torch.autograd.grad(with_grid_sample(value, LEVELS, loc, attn), (value, loc, attn), grad)
    with torch.no_grad():
        grads = deformable_detr.ms_deform_attn_backward(value, shapes, starts, loc, attn, grad.mT.contiguous().mT, 64)
    for actual, wanted in zip(grads, expected, strict=True):
        near(actual, wanted, 1e-10)


def by_hand(layer, query, points, value, padding=None):
    """Return what Deformable DETR's layer computes, from its parameters by name."""
    state, heads, levels = dict(layer.named_parameters()), layer.n_heads, torch.tensor(LEVELS)

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    values = linear("value_proj", value)
    if padding is not None:
        values = values * ~padding[:, :, None]
    offsets = linear("sampling_offsets", query).reshape(*query.shape[:2], heads, 2, -1, 2)
    weights = linear("attention_weights", query).reshape(*query.shape[:2], heads, -1).softmax(-1)
    if points.shape[-1] == 2:
        loc = points[:, :, None, :, None] + offsets / levels.flip(1)[:, None]
    else:
        center, box = points[:, :, None, :, None].split(2, -1)
        loc = center + offsets / offsets.shape[4] * box / 2
    values = values.reshape(*value.shape[:2], heads, -1)
    return linear("output_proj", with_grid_sample(values, LEVELS, loc, weights.view(loc.shape[:-1])))


@pytest.mark.parametrize("coordinates", [2, 4])
def test_layer_of_deformable_detr(coordinates):
    torch.manual_seed(1)
    layer = deformable_detr.MSDeformAttn(d_model=16, n_levels=2, n_heads=4, n_points=3).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    query, value = (torch.randn(2, length, 16, dtype=torch.float64, requires_grad=True) for length in (6, 47))
    points = torch.rand(2, 6, 2, coordinates, dtype=torch.float64, requires_grad=True)
    padding = torch.rand(2, 47) < 0.3
    leaves = [query, value, points, *layer.parameters()]
    out = layer(query, points, value, torch.tensor(LEVELS), torch.tensor(STARTS), padding)
    expected = gradients(by_hand(layer, query, points, value, padding), leaves)
    for actual, wanted in zip(gradients(out, leaves), expected, strict=True):
        near(actual, wanted, 1e-9)


def test_layers_have_the_published_parameters_and_initial_values():
    layer = deformable_detr.MSDeformAttn()
    assert shapes_of(layer) == shapes_of(mmcv.MultiScaleDeformableAttention()) == {
        "sampling_offsets.weight": (256, 256), "sampling_offsets.bias": (256,),
        "attention_weights.weight": (128, 256), "attention_weights.bias": (128,),
        "value_proj.weight": (256, 256), "value_proj.bias": (256,),
        "output_proj.weight": (256, 256), "output_proj.bias": (256,),
    }  # fmt: skip
    bias = layer.sampling_offsets.bias.view(8, 4, 4, 2)
    torch.testing.assert_close(bias[1, 2], torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [4.0, 4.0]]))
    torch.testing.assert_close(bias[4, 0, 1], torch.tensor([-2.0, 0.0]))
    assert not layer.sampling_offsets.weight.any()
    assert not layer.attention_weights.weight.any()
    assert 0 < layer.value_proj.weight.abs().max() <= math.sqrt(6 / 512)


# mmcv


@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_of_mmcv(batch_first):
    torch.manual_seed(2)
    layer = mmcv.MultiScaleDeformableAttention(16, 4, 2, 3, batch_first=batch_first, value_proj_ratio=0.5)
    layer.double().eval()
    assert layer.value_proj.weight.shape == (8, 16)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    query, position, value = (torch.randn(2, length, 16, dtype=torch.float64) for length in (6, 6, 47))
    points, padding = torch.rand(2, 6, 2, 2, dtype=torch.float64), torch.rand(2, 47) < 0.3
    expected = query + by_hand(layer, query + position, points, value, padding)
    order = (lambda x: x) if batch_first else (lambda x: x.transpose(0, 1))
    geometry = {"reference_points": points, "spatial_shapes": torch.tensor(LEVELS), "key_padding_mask": padding}
    out = layer(order(query), None, order(value), query_pos=order(position), level_start_index=STARTS, **geometry)
    near(order(out), expected, 1e-9)
    near(order(layer(order(query), value=order(value), identity=order(position), **geometry)),
         position + by_hand(layer, query, points, value, padding), 1e-9)  # fmt: skip
    itself = {"reference_points": torch.rand(2, 47, 2, 2).double(), "spatial_shapes": LEVELS}
    near(order(layer(order(value), **itself)), value + by_hand(layer, value, itself["reference_points"], value), 1e-9)


def test_dropout_of_mmcv_spares_the_identity():
    layer = mmcv.MultiScaleDeformableAttention(16, 4, 2, 3, dropout=1.0)
    query = torch.randn(47, 2, 16)
    assert torch.equal(layer(query, reference_points=torch.rand(2, 47, 2, 2), spatial_shapes=LEVELS), query)


WINDOWS = [
    {"kernel_size": 3, "padding": 1, "groups": 2, "deform_groups": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2), "dilation": (2, 1), "deform_groups": 3},
]


@pytest.mark.parametrize("window", WINDOWS)
def test_convolutions_of_mmcv_agree_with_torchvision(window):
    torch.manual_seed(3)
    x = torch.randn(3, 6, 8, 9, dtype=torch.float64, requires_grad=True)
    for pack, per_tap in ((mmcv.DeformConv2dPack, 2), (mmcv.ModulatedDeformConv2dPack, 3)):
        layer = pack(6, 4, **window).double()
        torch.nn.init.normal_(layer.conv_offset.weight, std=0.2)
        torch.nn.init.normal_(layer.conv_offset.bias)
        predicted, taps = layer.conv_offset(x), layer.deform_groups * math.prod(layer.kernel_size)
        assert predicted.shape[1] == per_tap * taps
        offset, mask = predicted.split([2 * taps, (per_tap - 2) * taps], 1)
        args = [layer.stride, layer.padding, layer.dilation, mask.sigmoid() if per_tap == 3 else None]
        expected = torchvision.ops.deform_conv2d(x, offset, layer.weight, layer.bias, *args)
        leaves = [x, *layer.parameters()]
        for actual, wanted in zip(gradients(layer(x), leaves), gradients(expected, leaves), strict=True):
            near(actual, wanted, 1e-9)
        plain = pack.__mro__[1](6, 4, **window).double()
        plain.load_state_dict({key: value for key, value in layer.state_dict().items() if "offset" not in key})
        near(plain(x, offset, *args[3:][: per_tap - 2]), expected, 1e-9)


def test_convolutions_of_mmcv_have_its_names_and_initial_values():
    v1, v2 = mmcv.DeformConv2dPack(6, 4, 3, groups=2, deform_groups=3), mmcv.ModulatedDeformConv2dPack(6, 4, 3)
    offsets = {"conv_offset.weight": (54, 6, 3, 3), "conv_offset.bias": (54,)}
    assert shapes_of(v1) == {"weight": (4, 3, 3, 3), **offsets}
    offsets = {"conv_offset.weight": (27, 6, 3, 3), "conv_offset.bias": (27,)}
    assert shapes_of(v2) == {"weight": (4, 6, 3, 3), "bias": (4,), **offsets}
    assert set(mmcv.ModulatedDeformConv2d(6, 4, 3, bias=False).state_dict()) == {"weight"}
    others = [parameter for layer in (v1, v2) for name, parameter in layer.named_parameters() if name != "weight"]
    assert not any(parameter.any() for parameter in others)
    assert 0 < v2.weight.abs().max() <= 1 / math.sqrt(6 * 9)
    assert 0 < v1.weight.abs().max() <= math.sqrt(6 / (3 * 9))
    torch.nn.init.ones_(v1.conv_offset.bias)
    torch.nn.init.ones_(v2.conv_offset.bias)
    v1.init_offset()
    v2.init_weights()
    assert not any(layer.conv_offset.bias.any() for layer in (v1, v2))
    x = torch.randn(2, 6, 8, 8)
    torch.testing.assert_close(v2(x), F.conv2d(x, v2.weight, v2.bias) / 2)  # masks of a half


# torchvision


@pytest.mark.parametrize("masked", [False, True])
def test_torchvision_layer(masked):
    torch.manual_seed(4)
    args = (6, 4, 3, 2, 1, 2, 2)
    ours, theirs = compat_torchvision.DeformConv2d(*args), torchvision.ops.DeformConv2d(*args)
    theirs.load_state_dict(ours.state_dict())
    x, offset = torch.randn(2, 6, 9, 9, requires_grad=True), torch.randn(2, 36, 4, 4, requires_grad=True)
    mask = torch.rand(2, 18, 4, 4, requires_grad=True) if masked else None
    leaves = [leaf for leaf in (x, offset, mask) if leaf is not None]
    actual = gradients(ours(x, offset, mask), [*leaves, *ours.parameters()])
    expected = gradients(theirs(x, offset, mask), [*leaves, *theirs.parameters()])
    for a, b in zip(actual, expected, strict=True):
        near(a, b)
    window = ((2, 2), (1, 1), (2, 2))
    near(compat_torchvision.deform_conv2d(x, offset, ours.weight, ours.bias, *window, mask), expected[0])
    half = compat_torchvision.deform_conv2d(x.bfloat16(), offset, ours.weight.bfloat16(), None, *window)
    near(half.float(), theirs(x, offset) - ours.bias.view(-1, 1, 1), 2e-2)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_torchvision_signatures():
    def signature(function):
        return [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]

    for name in ("deform_conv2d", "DeformConv2d"):
        assert signature(getattr(compat_torchvision, name)) == signature(getattr(torchvision.ops, name))


# All


def test_what_cannot_be_done_is_refused_in_one_line():
    value, loc, attn = attention_inputs()
    one_level = (loc[:, :, :, :1], attn[:, :, :, :1])
    backward = deformable_detr.ms_deform_attn_backward
    x, weight = torch.randn(1, 6, 5, 5), torch.randn(4, 3, 3, 3)
    offset = torch.zeros(1, 18, 3, 3)
    layer = mmcv.MultiScaleDeformableAttention(16, 4, 2, 3)
    query, points = torch.randn(6, 2, 16), torch.rand(2, 6, 2, 3)
    refused = {
        r"level_start_index is \[0, 40\]": lambda: deformable_detr.sizes(LEVELS, torch.tensor([0, 40])),
        "value has 47 pixels": lambda: backward(value, LEVELS[:1], None, *one_level, value),
        r"grad_output has shape \(2, 47, 4, 8\); it must be \(2, 6, 32\)": lambda: backward(
            value, LEVELS, STARTS, loc, attn, value
        ),
        "3 heads do not divide a width of 16": lambda: deformable_detr.MSDeformAttn(16, n_heads=3),
        "do not divide values of 6": lambda: mmcv.MultiScaleDeformableAttention(16, 4, value_proj_ratio=0.4),
        "last dimension must be": lambda: layer(query, reference_points=points, spatial_shapes=LEVELS, value=query),
        "write identity": lambda: layer(query, reference_points=points, spatial_shapes=LEVELS, residual=query),
        "needs reference_points": lambda: layer(query),
        "no bias in mmcv; use": lambda: mmcv.DeformConv2d(6, 4, 3, bias=True),
        "no bias in mmcv; add": lambda: mmcv.deform_conv2d(x, offset, weight, groups=2, bias=True),
        "groups=1 and deform_groups=1 need 3 and 18": lambda: mmcv.deform_conv2d(x, offset, weight),
        "groups=2 and deform_groups=2 need 6 and 36": lambda: mmcv.modulated_deform_conv2d(
            x, offset, offset[:, :9], weight, groups=2, deform_groups=2),
    }  # fmt: skip
    for message, call in refused.items():
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_layers_compile_to_one_graph():
    """Sizes are given as a list, which needs no graph of its own to be read."""
    torch.manual_seed(5)
    attention = mmcv.MultiScaleDeformableAttention(16, 4, 2, 3).eval()
    query, points = torch.randn(47, 2, 16), torch.rand(2, 47, 2, 2)
    given = {"reference_points": points, "spatial_shapes": LEVELS, "level_start_index": STARTS}
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(query, **given), attention(query, **given))
    conv, x = mmcv.ModulatedDeformConv2dPack(4, 4, 3, padding=1), torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(torch.compile(conv, fullgraph=True, backend="eager")(x), conv(x))


SNIPPETS = re.findall(r"(?s)```diff\n(.+?)```", PAGE.read_text(encoding="utf-8"))


def test_page_has_a_snippet_per_origin():
    assert [re.findall(r"compat\.(\w+)|compat import (\w+)", snippet)[0] for snippet in SNIPPETS] == [
        ("deformable_detr", ""), ("mmcv", ""), ("torchvision", "")
    ]  # fmt: skip


def test_extension_of_the_page_is_what_other_code_imports(monkeypatch):
    monkeypatch.setitem(sys.modules, "MultiScaleDeformableAttention", None)
    [code] = re.findall(r"(?s)```python\n(import sys\n.+?)```", PAGE.read_text(encoding="utf-8"))
    exec(code, {})
    assert importlib.import_module("MultiScaleDeformableAttention").ms_deform_attn_backward


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_of_the_page_run(snippet):
    exec(re.sub(r"(?m)^[+ ]", "", re.sub(r"(?m)^-.*\n", "", snippet)), {})
