"""mmcv's compiled operators beside ours and those of `segcore.ops.compat`, the same weights and inputs in each.

They run in `nox -s "openmmlab(full)"`, which builds mmcv-full. Its deformable convolutions have CPU kernels in float32
and float64. Its deformable attention has none: on a CPU mmcv itself computes it with grid_sample.
"""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

from segcore import ops
from segcore.ops.compat import mmcv as compat

theirs = pytest.importorskip("mmcv.ops", reason="mmcv.ops cannot be imported", exc_type=ImportError)
if importlib.import_module("mmcv._ext").__file__.endswith(".py"):
    pytest.skip("this mmcv has no compiled operators", allow_module_level=True)
pytestmark = [pytest.mark.openmmlab, pytest.mark.filterwarnings("ignore")]

PAGE = Path(__file__).parents[3] / "docs/operators.md"
LEVELS = [(5, 7), (3, 4)]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE)
WINDOWS = pytest.mark.parametrize(
    "window",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2, "groups": 2, "deform_groups": 3},
    ],
)


def filled(layer, dtype):
    """Return the layer with all parameters drawn at random."""
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer.to(dtype).eval()


def assert_equal(call, layers, inputs):
    """Both layers' outputs, gradients of the inputs and of every parameter; the second has the first one's weights."""
    first, second = layers
    second.load_state_dict(first.state_dict(), strict=True)
    results = []
    for layer in layers:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        out = call(layer, *leaves)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=out.dtype)
        parameters = dict(layer.named_parameters())
        grads = torch.autograd.grad(out, [*leaves, *parameters.values()], grad)
        names = [*(f"input {i}" for i in range(len(leaves))), *parameters]
        results.append({"output": out.detach(), **dict(zip(names, grads, strict=True))})
    assert set(results[0]) == set(results[1])
    for name, value in results[0].items():
        difference = (value - results[1][name]).abs().max()
        assert difference <= TOLERANCE[value.dtype] * value.abs().max(), name


# Deformable attention


def attention_arguments(coordinates, dtype):
    torch.manual_seed(0)
    query, position, value = (torch.randn(length, 2, 16, dtype=dtype) for length in (6, 6, 47))
    points = torch.rand(2, 6, 2, coordinates, dtype=dtype)
    rest = {
        "key_padding_mask": torch.rand(2, 47) < 0.3,
        "spatial_shapes": torch.tensor(LEVELS),
        "level_start_index": torch.tensor([0, 35]),
    }
    return (query, position, value, points), rest


@DTYPES
@pytest.mark.parametrize("coordinates", [2, 4])
def test_attention_layer(dtype, coordinates):
    inputs, rest = attention_arguments(coordinates, dtype)
    layers = [
        filled(module.MultiScaleDeformableAttention(16, 4, 2, 3, dropout=0.2), dtype) for module in (theirs, compat)
    ]

    def call(layer, query, position, value, points):
        return layer(query, value=value, query_pos=position, reference_points=points, **rest)

    assert_equal(call, layers, inputs)


@DTYPES
def test_attention_function(dtype):
    torch.manual_seed(1)
    inputs = [torch.randn(2, 47, 4, 8), torch.rand(2, 6, 4, 2, 3, 2) * 1.4 - 0.2, torch.rand(2, 6, 4, 2, 3)]
    functions = [
        lambda value, loc, attn: theirs.multi_scale_deform_attn.multi_scale_deformable_attn_pytorch(
            value, torch.tensor(LEVELS), loc, attn
        ),
        lambda value, loc, attn: compat.multi_scale_deformable_attn_pytorch(value, torch.tensor(LEVELS), loc, attn),
        lambda value, loc, attn: ops.ms_deform_attn(value, LEVELS, loc, attn),
    ]
    expected, *results = (results_of(function, inputs, dtype) for function in functions)
    for result in results:
        assert_all_near(result, expected, TOLERANCE[dtype])


def results_of(function, inputs, dtype):
    """Return the output and the gradients of all inputs."""
    leaves = [tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in inputs]
    out = function(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_all_near(actual, expected, tolerance):
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


# Deformable convolution


@DTYPES
@WINDOWS
@pytest.mark.parametrize("name", ["DeformConv2dPack", "ModulatedDeformConv2dPack"])
def test_convolutions_that_predict_offsets(name, window, dtype):
    torch.manual_seed(2)
    layers = [filled(getattr(module, name)(6, 4, **window), dtype) for module in (theirs, compat)]
    x = torch.randn(3, 6, 8, 9, dtype=dtype)
    assert_equal(lambda layer, x: layer(x), layers, [x])


@DTYPES
@WINDOWS
def test_convolutions_and_functions(window, dtype):
    torch.manual_seed(3)
    groups = window.get("deform_groups", 1)
    size = (8, 9) if groups == 1 else (4, 5)
    x, offset = torch.randn(3, 6, 8, 9), torch.randn(3, groups * 18, *size)
    mask = torch.rand(3, groups * 9, *size)
    for name, inputs in (("DeformConv2d", (x, offset)), ("ModulatedDeformConv2d", (x, offset, mask))):
        layers = [filled(getattr(module, name)(6, 4, **window), dtype) for module in (theirs, compat)]
        assert_equal(lambda layer, *args: layer(*args), layers, [tensor.to(dtype) for tensor in inputs])

    weight, bias = torch.randn(4, 6 // window.get("groups", 1), 3, 3), torch.randn(4)
    geometry = {key: window.get(key, default) for key, default in (("stride", 1), ("padding", 0), ("dilation", 1))}
    numbers = (*geometry.values(), window.get("groups", 1), groups)
    v1 = [
        lambda x, offset, weight: theirs.deform_conv2d(x, offset, weight, *numbers, False, 1),
        lambda x, offset, weight: compat.deform_conv2d(x, offset, weight, *numbers, False, 1),
        lambda x, offset, weight: ops.deform_conv2d(x, offset, weight, **geometry),
    ]
    v2 = [
        lambda *tensors: theirs.modulated_deform_conv2d(*tensors, *numbers),
        lambda *tensors: compat.modulated_deform_conv2d(*tensors, *numbers),
        lambda x, offset, mask, weight, bias: ops.deform_conv2d(x, offset, weight, bias, mask=mask, **geometry),
    ]
    for functions, inputs in ((v1, (x, offset, weight)), (v2, (x, offset, mask, weight, bias))):
        expected, *results = (results_of(function, inputs, dtype) for function in functions)
        for result in results:
            assert_all_near(result, expected, TOLERANCE[dtype])


def test_at_its_initial_offsets_mmcv_has_our_gradient():
    """Offsets of zero and padding: some taps lie exactly one pixel outside, where torchvision's slope differs."""
    torch.manual_seed(4)
    x, offset, weight = torch.randn(2, 4, 5, 5), torch.zeros(2, 18, 5, 5), torch.randn(4, 4, 3, 3)
    expected = results_of(lambda x, offset: theirs.deform_conv2d(x, offset, weight, 1, 1), (x, offset), torch.float32)
    actual = results_of(lambda x, offset: compat.deform_conv2d(x, offset, weight, 1, 1), (x, offset), torch.float32)
    assert_all_near(actual, expected, 1e-5)


# The interface


def test_signatures_and_initial_values():
    for name in ("MultiScaleDeformableAttention", "DeformConv2d", "ModulatedDeformConv2d"):
        for method in ("__init__", "forward"):
            wanted = inspect.signature(getattr(getattr(theirs, name), method)).parameters
            got = inspect.signature(getattr(getattr(compat, name), method)).parameters
            assert [key for key in got if key != "value_proj_ratio"] == list(wanted)  # which mmcv 2.x added
            assert all(got[key].default == wanted[key].default for key in wanted)
    for name in ("deform_conv2d", "modulated_deform_conv2d"):
        wanted = list(inspect.signature(getattr(theirs, name).__self__.forward).parameters.values())[1:]
        got = list(inspect.signature(getattr(compat, name)).parameters.values())
        assert [(p.name, p.default) for p in got] == [(p.name, p.default) for p in wanted]
    for name, args in (("DeformConv2dPack", (6, 4, 3)), ("ModulatedDeformConv2dPack", (6, 4, 3)),
                       ("MultiScaleDeformableAttention", ())):  # fmt: skip
        layers = [getattr(module, name)(*args) for module in (theirs, compat)]
        for (key, wanted), (same, got) in zip(*(layer.state_dict().items() for layer in layers), strict=True):
            assert key == same
            if key == "weight" or "proj.weight" in key:  # drawn at random from one range
                assert abs(got.abs().max() / wanted.abs().max() - 1) < 0.1
            else:
                torch.testing.assert_close(got, wanted)


def test_backbone_with_our_convolutions_in_mmcvs_registry():
    """The page's recipe: a configuration with DCNv2 builds ours, and has the weights and outputs of mmcv's."""
    from mmcv.cnn import CONV_LAYERS
    from mmseg.models import build_backbone

    config = {"type": "ResNet", "depth": 50, "base_channels": 8, "num_stages": 2, "strides": (1, 2),
              "dilations": (1, 1), "out_indices": (1,), "stem_channels": 8,
              "dcn": {"type": "DCNv2", "deform_groups": 1, "fallback_on_stride": False},
              "stage_with_dcn": (False, True)}  # fmt: skip
    originals = {name: CONV_LAYERS.get(name) for name in ("DCN", "DCNv2")}
    expected = build_backbone(config)
    [code] = re.findall(r"(?s)```python\n(from mmcv.cnn .+?)```", PAGE.read_text(encoding="utf-8"))
    try:
        exec(code, {})
        ours = build_backbone(config)
    finally:
        for name, module in originals.items():
            CONV_LAYERS.register_module(name, module=module, force=True)
    assert sum(isinstance(module, compat.ModulatedDeformConv2dPack) for module in ours.modules()) == 4
    for parameter in expected.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ours.load_state_dict(expected.state_dict(), strict=True)
    x = torch.randn(2, 3, 40, 48)
    ours.eval(), expected.eval()  # which do not return the backbone, there
    assert_all_near(ours(x), expected(x), 1e-4)


def test_snippet_of_the_page_runs_with_mmcv_as_it_was():
    [before] = re.findall(r"(?s)```diff\n([^`]+?from mmcv[^`]+?)```", PAGE.read_text(encoding="utf-8"))
    exec(re.sub(r"(?m)^[- ]", "", re.sub(r"(?m)^\+.*\n", "", before)), {})
