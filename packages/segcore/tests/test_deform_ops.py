"""Deformable unfold, convolution and local attention against stored numbers, a scalar loop and numerical gradients."""

import importlib
import itertools
import math
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from segcore import ops
from segcore.ops import registry

NAN, INF = math.nan, math.inf
pytestmark = pytest.mark.usefixtures("kernels")
GENERATOR = torch.Generator()


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


@dataclass
class Case:
    """An operator with its inputs by name, in float64 and None for an absent one, its window and scale."""

    op: str
    tensors: dict[str, Any]
    window: list[int]
    rest: tuple[Any, ...] = ()

    def inputs(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
        return {k: None if t is None else t.to(device, dtype, copy=True) for k, t in self.tensors.items()}

    def operator(self, tensors: dict[str, Any]) -> torch.Tensor:
        """The registered operator with positional arguments, as every device's kernel is called."""
        return getattr(torch.ops.segcore, self.op)(*tensors.values(), self.window, *self.rest)

    def gather(self, tensors: dict[str, Any]) -> torch.Tensor:
        module = {"deform_conv2d": "deform_conv", "deform_local_attn": "local_attention"}.get(self.op, self.op)
        return importlib.import_module(f"segcore.ops.{module}").with_gather(*tensors.values(), self.window, *self.rest)

    def public(self, tensors: dict[str, Any]) -> torch.Tensor:
        if self.op == "deform_local_attn":
            height, width, *kernel = self.window
            more = {"height": height, "width": width, "kernel_size": kernel, "scale": self.rest[0]}
        else:
            names = ("kernel_size", "stride", "padding", "dilation")
            more = {name: self.window[2 * i : 2 * i + 2] for i, name in enumerate(names)}
            if self.op == "deform_conv2d":
                del more["kernel_size"]
        return getattr(ops, self.op)(**tensors, **more)


def window_case(op: str, window: list[int], n=2, channels=6, size=(5, 6), groups=1, offset_groups=2, mask=True) -> Case:
    kernel, stride, padding, dilation = (window[i : i + 2] for i in (0, 2, 4, 6))
    taps = kernel[0] * kernel[1]
    out = [(size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)]
    tensors = {
        "input": normal(n, channels, *size),
        "offset": 1.5 * normal(n, offset_groups * 2 * taps, *out),
        "weight": normal(4, channels // groups, *kernel),
        "mask": normal(n, offset_groups * taps, *out) if mask else None,
    }
    if op == "deform_unfold":
        del tensors["weight"]
    return Case(op, tensors, window)


def attention_case(b=2, height=4, width=5, m=3, d=4, kernel=(3, 3), bias=True) -> Case:
    n, taps = height * width, kernel[0] * kernel[1]
    tensors = {name: normal(b, n, m, d) for name in "qkv"}
    tensors["offset"] = 1.5 * normal(b, n, m, 2 * taps)
    tensors["bias"] = normal(b, m, n, taps) if bias else None
    return Case("deform_local_attn", tensors, [height, width, *kernel], (0.4,))


def cases() -> dict[str, Case]:
    GENERATOR.manual_seed(0)
    plain, odd = [3, 3, 1, 1, 1, 1, 1, 1], [3, 2, 1, 2, 2, 1, 2, 1]
    return {
        "unfold": window_case("deform_unfold", plain, mask=False),
        "unfold mask groups": window_case("deform_unfold", odd),
        "unfold thin": window_case("deform_unfold", plain, size=(1, 6), offset_groups=1),
        "conv v1": window_case("deform_conv2d", plain, mask=False),
        "conv v2 groups": window_case("deform_conv2d", odd, groups=2, offset_groups=3),
        "conv 1x1": window_case("deform_conv2d", [1, 1, 1, 1, 0, 0, 1, 1], offset_groups=1),
        "attention": attention_case(),
        "attention plain": attention_case(b=1, m=1, d=3, bias=False),
        "attention 1x5": attention_case(height=1, kernel=(1, 5)),
    }


CASES = cases()
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
one_of_each = pytest.mark.parametrize(
    "case",
    [CASES[k] for k in ("unfold mask groups", "conv v2 groups", "attention")],
    ids=["unfold", "conv", "attention"],
)
FORMS = ["operator", "gather"]


def test_a_bias_of_another_dtype_has_a_gradient():
    case = attention_case()
    tensors = [t.float().requires_grad_() for t in case.tensors.values()]
    tensors[-1] = tensors[-1].detach().double().requires_grad_()
    found = torch.ops.segcore.deform_local_attn(*tensors, case.window, *case.rest)
    found.sum().backward()
    assert found.dtype == torch.float32
    assert tensors[-1].grad is not None
    assert tensors[-1].grad.dtype == torch.float64


def bilinear(image: torch.Tensor, y: float, x: float) -> torch.Tensor:
    """Return the sample (C,) of an image (C, H, W) by the definition."""
    _, height, width = image.shape
    out = torch.zeros(image.shape[0], dtype=image.dtype)
    if -1 < y < height and -1 < x < width:
        for i, j in itertools.product((math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)):
            if 0 <= i < height and 0 <= j < width:
                out += image[:, i, j] * (1 - abs(y - i)) * (1 - abs(x - j))
    return out


def unfold_loop(input, offset, mask, window):
    n, channels, *_ = input.shape
    kernel, stride, padding, dilation = (window[i : i + 2] for i in (0, 2, 4, 6))
    taps, (height, width) = kernel[0] * kernel[1], offset.shape[2:]
    groups = offset.shape[1] // (2 * taps)
    out = torch.zeros(n, groups, channels // groups, taps, height, width, dtype=input.dtype)
    for b, g, i, j, oy, ox in itertools.product(*map(range, (n, groups, *kernel, height, width))):
        tap = i * kernel[1] + j
        dy, dx = offset[b, 2 * (g * taps + tap) : 2 * (g * taps + tap) + 2, oy, ox].tolist()
        y = oy * stride[0] - padding[0] + i * dilation[0] + dy
        x = ox * stride[1] - padding[1] + j * dilation[1] + dx
        value = bilinear(input[b].unflatten(0, (groups, -1))[g], y, x)
        out[b, g, :, tap, oy, ox] = value * (1 if mask is None else mask[b, g * taps + tap, oy, ox])
    return out.flatten(1, 3).flatten(2)


def attention_loop(q, k, v, offset, bias, window, scale):
    (b, n, m, _), (height, width, kh, kw) = q.shape, window
    out = torch.zeros_like(q)
    images = [t.transpose(1, 3).unflatten(3, (height, width)) for t in (k, v)]  # (B, D, M, H, W)
    for i, token, head in itertools.product(range(b), range(n), range(m)):
        keys, values = [], []
        for tap in range(kh * kw):
            dy, dx = offset[i, token, head, 2 * tap : 2 * tap + 2].tolist()
            y, x = token // width + tap // kw - kh // 2 + dy, token % width + tap % kw - kw // 2 + dx
            keys.append(bilinear(images[0][i, :, head], y, x))
            values.append(bilinear(images[1][i, :, head], y, x))
        logits = scale * torch.stack(keys) @ q[i, token, head] + (0 if bias is None else bias[i, head, token])
        out[i, token, head] = logits.softmax(0) @ torch.stack(values)
    return out


def definition(case: Case) -> torch.Tensor:
    tensors = case.inputs(torch.float64)
    if case.op == "deform_local_attn":
        return attention_loop(*tensors.values(), case.window, *case.rest)
    columns = unfold_loop(tensors["input"], tensors["offset"], tensors["mask"], case.window)
    if case.op == "deform_unfold":
        return columns
    weight = tensors["weight"]
    groups = tensors["input"].shape[1] // weight.shape[1]
    out = weight.flatten(1).unflatten(0, (groups, -1)) @ columns.unflatten(1, (groups, -1))
    return out.flatten(1, 2).unflatten(2, tensors["offset"].shape[2:])


def gradients(function: Callable, tensors: dict[str, Any], grad: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Return the output and the gradients of all present tensors; the shape determines the incoming gradient."""
    leaves = {k: None if t is None else t.detach().requires_grad_() for k, t in tensors.items()}
    out = function(leaves)
    if grad is None:
        grad = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape)
    given = [leaf for leaf in leaves.values() if leaf is not None]
    return [out.detach(), *torch.autograd.grad(out, given, grad.to(out))]


def assert_near(actual, expected, tolerance):
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def stored(arrays: dict[str, np.ndarray], case: str) -> Case:
    """Return a golden file as a case; its expected numbers are `output` and `grad_<name>`."""
    g = {k: torch.from_numpy(np.asarray(v)) for k, v in arrays.items()}
    if case.startswith("dla"):
        tensors = {short: g[name] for short, name in zip("qkv", ("query", "key", "value"), strict=True)}
        tensors |= {"offset": g["offset"], "bias": g["bias"]}
        return Case("deform_local_attn", tensors, [int(g["height"]), int(g["width"]), 3, 3], (float(g["scale"]),))
    window = [int(i) for name in ("kernel", "stride", "padding", "dilation") for i in g[name].flatten()]
    names = ("input", "offset", "weight", "mask") if case.startswith("dcn") else ("input", "offset", "mask")
    return Case(f"deform_{'conv2d' if 'weight' in names else 'unfold'}", {k: g.get(k) for k in names}, window)


GOLDEN = [
    *("unfold", "unfold_mask_groups", "dla_h1", "dla_h3", "dcn_v1", "dcn_v2", "dcn_v2_groups", "dcn_v2_rect"),
    *("dcn_v2_1x1", "dcn_v2_zero_offset"),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str
)
def test_stored_numbers(golden, name, form, dtype, tolerance):
    arrays = golden(f"ops/golden/{name}.npz")
    case = stored(arrays, name)
    tensors = {k: t if t is None or k in ("offset", "mask", "bias") else t.to(dtype) for k, t in case.tensors.items()}
    out, *grads = gradients(getattr(case, form), tensors, torch.from_numpy(arrays["grad_output"]))
    bias = torch.from_numpy(arrays["bias"]).view(-1, 1, 1) if name.startswith("dcn") else 0
    assert_near(out + bias, arrays["output"], tolerance)
    long = {"q": "query", "k": "key", "v": "value"}
    for (short, tensor), grad in zip([item for item in tensors.items() if item[1] is not None], grads, strict=True):
        assert grad.dtype == tensor.dtype
        if f"grad_{long.get(short, short)}" in arrays:  # none if all offsets are exactly on the border
            assert_near(grad, arrays[f"grad_{long.get(short, short)}"], tolerance)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tag", ["normal", "groups2", "zero", "integer", "far", "wide"])
def test_stored_unfolds_of_dgmn2(golden, tag, form):
    """They include zero offsets and offsets on pixels: the slope at -1 is 0, elsewhere the right-hand one."""
    g = {k.removeprefix(f"{tag}_"): v for k, v in golden("dgmn2/golden/deform_unfold.npz").items()}
    tensors = {"input": torch.from_numpy(g["input"]), "offset": torch.from_numpy(g["offset"]), "mask": None}
    kernel, stride, padding, dilation, _ = g["cfg"].tolist()
    case = Case("deform_unfold", tensors, [kernel] * 2 + [stride] * 2 + [padding] * 2 + [dilation] * 2)
    actual = gradients(getattr(case, form), tensors, torch.from_numpy(g["grad_columns"]))
    for tensor, name in zip(actual, ("columns", "grad_input", "grad_offset"), strict=True):
        assert_near(tensor, g[name], 1e-5)


@every_case
@pytest.mark.parametrize("form", [*FORMS, "public"])
def test_equals_the_definition(case, form):
    assert_near(getattr(case, form)(case.inputs()), definition(case), 1e-5)


@one_of_each
def test_coordinates_far_outside_or_nan(case):
    wild = torch.tensor([NAN, INF, -INF, 1e30, -1e30, -1.0, 1e9, 0.25])
    tensors = case.inputs()
    tensors["offset"].view(-1)[: 8 * 12] = wild.repeat(12)
    moved = Case(case.op, tensors, case.window, case.rest)
    expected = definition(moved)
    for form in FORMS:
        out, *grads = gradients(getattr(moved, form), tensors)
        assert_near(out, expected, 1e-5)
        assert all(grad.isfinite().all() for grad in grads)


@every_case
@pytest.mark.parametrize("form", FORMS)
def test_gradients_numerically(case, form):
    tensors = case.inputs(torch.float64)
    # numerical differences must not cross a pixel's center, where the slope jumps
    tensors["offset"] = tensors["offset"].floor() + 0.1 + 0.8 * (tensors["offset"] - tensors["offset"].floor())
    names = [k for k, t in tensors.items() if t is not None]

    def function(*leaves):
        return getattr(case, form)({**tensors, **dict(zip(names, leaves, strict=True))})

    assert torch.autograd.gradcheck(function, [tensors[k].requires_grad_() for k in names], fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
def test_without_offsets_they_are_the_plain_operators(form):
    GENERATOR.manual_seed(1)
    case = window_case("deform_conv2d", [3, 3, 2, 1, 1, 2, 1, 2], groups=2)
    tensors = case.inputs()
    tensors |= {"offset": torch.zeros_like(tensors["offset"]), "mask": None}
    window = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}
    conv = F.conv2d(tensors["input"], tensors["weight"], groups=2, **window)
    assert_near(getattr(case, form)(tensors), conv, 1e-5)
    columns = Case("deform_unfold", {}, case.window)
    del tensors["weight"]
    assert torch.equal(getattr(columns, form)(tensors), F.unfold(tensors["input"], 3, **window))


@one_of_each
def test_library_conventions(case):
    tensors = case.inputs()
    out = case.operator(tensors)
    leaves = [t.detach().requires_grad_() for t in tensors.values()]
    torch.library.opcheck(getattr(torch.ops.segcore, case.op), (*leaves, case.window, *case.rest))
    backward = getattr(torch.ops.segcore, f"{case.op}_backward")
    torch.library.opcheck(backward, (out, *tensors.values(), case.window, *case.rest))
    optional = list(tensors.values())
    optional[-1] = None
    torch.library.opcheck(backward, (out, *optional, case.window, *case.rest))


@one_of_each
def test_double_backward_is_refused(case):
    tensors = case.inputs()
    first = next(iter(tensors.values())).requires_grad_()
    (grad,) = torch.autograd.grad(case.operator(tensors).square().sum(), first, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{case.op} does not support double backward"):
        grad.sum().backward()


@one_of_each
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles(case, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(case.public, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    tensors = case.inputs()
    for batch in (2, 1):
        part = {k: t if k == "weight" else t[:batch].clone() for k, t in tensors.items()}
        for a, e in zip(gradients(compiled, part), gradients(case.operator, part), strict=True):
            assert_near(a, e, 1e-5)


@one_of_each
def test_exports(case):
    class Layer(torch.nn.Module):
        def forward(self, *tensors):
            return case.public(dict(zip(case.tensors, tensors, strict=True)))

    inputs = tuple(case.inputs().values())
    program = torch.export.export(Layer(), inputs)
    assert "segcore" not in str(program.graph)  # plain PyTorch, which other runtimes support
    assert_near(program.module()(*inputs), Layer()(*inputs), 1e-5)


@one_of_each
def test_non_contiguous_inputs(case):
    tensors = case.inputs()
    strided = {k: t.transpose(0, -1).contiguous().transpose(0, -1) for k, t in tensors.items()}
    assert not any(t.is_contiguous() for t in strided.values())
    out = case.operator(tensors)
    grad = torch.randn(out.shape[::-1]).permute(*reversed(range(out.dim())))
    expected = gradients(case.operator, tensors, grad.contiguous())
    for a, e in zip(gradients(case.operator, strided, grad), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)
        assert a.is_contiguous()


@one_of_each
def test_empty_batch(case):
    tensors = {k: t if k == "weight" else t[:0] for k, t in case.inputs().items()}
    out, *grads = gradients(case.operator, tensors)
    assert out.shape == (0, *case.operator(case.inputs()).shape[1:])
    assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, tensors.values(), strict=True))


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_empty_maps_count_as_zero(size):
    """Samples in the padding of a map without pixels."""
    offset = torch.full((1, 2, size[0] + 2, size[1] + 2), 0.5, requires_grad=True)
    image, weight = torch.zeros(1, 4, *size, requires_grad=True), torch.randn(3, 4, 1, 1, requires_grad=True)
    columns = ops.deform_unfold(image, offset, kernel_size=1, padding=1)
    assert columns.shape == (1, 4, offset[0, 0].numel())
    out = ops.deform_conv2d(image, offset, weight, padding=1)
    (columns.sum() + out.sum()).backward()
    assert not any(t.any() for t in (columns, out, offset.grad, weight.grad))


def test_autocast_leaves_float64_alone_as_convolutions_do():
    tensors = {k: t.double() for k, t in CONV.inputs().items()}
    with torch.autocast("cpu", torch.bfloat16):
        assert CONV.operator(tensors).dtype == torch.float64


@one_of_each
def test_cuda_shapes_and_dtypes_without_a_gpu(case):
    out = case.operator(case.inputs())
    with FakeTensorMode():
        tensors = {
            k: torch.empty(t.shape, device="cuda", dtype=torch.float32 if k == "offset" else torch.bfloat16)
            for k, t in case.tensors.items()
        }
        fake = case.operator(tensors)
        backward = getattr(torch.ops.segcore, f"{case.op}_backward")
        grads = backward(fake, *tensors.values(), case.window, *case.rest)
    assert (fake.shape, fake.dtype, fake.device.type) == (out.shape, torch.bfloat16, "cuda")
    assert [(g.shape, g.dtype) for g in grads] == [(t.shape, t.dtype) for t in tensors.values()]


def test_local_attention_keeps_only_its_inputs():
    """The backward pass saves only the inputs, and nothing nine times as large."""
    tensors = {k: t.requires_grad_() for k, t in CASES["attention"].inputs().items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        CASES["attention"].operator(tensors)
    assert sorted(kept) == sorted(t.data_ptr() for t in tensors.values())


def test_autocast_casts_the_convolution_but_not_its_offsets():
    case = CASES["conv v2 groups"]
    tensors = case.inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = case.public(tensors)
    half = {k: t.bfloat16() if k in ("input", "weight") else t for k, t in tensors.items()}
    torch.testing.assert_close(out, case.operator(half), rtol=0, atol=0)


def test_layers():
    torch.manual_seed(0)
    image = torch.randn(2, 6, 7, 8)
    layer = ops.ModulatedDeformConv2d(6, 4, 3, stride=2, padding=1, groups=2, offset_groups=3)
    plain = torch.nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("conv_offset")})
    half_masks = (plain(image) - plain.bias.view(-1, 1, 1)) / 2 + plain.bias.view(-1, 1, 1)
    assert_near(layer(image).detach(), half_masks.detach(), 1e-5)
    first = ops.DeformConv2d(6, 4, (3, 1), padding=(1, 0), bias=False)
    assert_near(first(image, torch.zeros(2, 6, 7, 8)), F.conv2d(image, first.weight, padding=(1, 0)).detach(), 1e-5)
    with pytest.raises(ValueError, match="groups 4 must divide 6 and 4"):
        ops.DeformConv2d(6, 4, 3, groups=4)


CONV, UNFOLD, ATTENTION = (CASES[k] for k in ("conv v2 groups", "unfold mask groups", "attention"))


@pytest.mark.parametrize(
    ("case", "change", "window", "text"),
    [
        (UNFOLD, {"input": lambda t: t[0]}, {}, "deform_unfold: input has shape .* needs 4 dimensions"),
        (UNFOLD, {"input": lambda t: t.int()}, {}, "input is torch.int32; convert it to one of torch.float32"),
        (UNFOLD, {"offset": lambda t: t.to("meta")}, {}, "offset is on meta but input on cpu"),
        (UNFOLD, {"offset": lambda t: t[:, :-1]}, {}, r"offset has 23 channels; it needs a multiple of 2 \* 6 taps"),
        (UNFOLD, {"offset": lambda t: t[:1]}, {}, r"offset has shape \(1, 24, 5, 4\); it must be \(2, 24, 5, 4\)"),
        (UNFOLD, {"offset": lambda t: t[..., :-1]}, {}, r"offset has shape \(2, 24, 5, 3\); it must be"),
        (UNFOLD, {"mask": lambda t: t[:, :-1]}, {}, r"mask has shape \(2, 11, 5, 4\); it must be \(2, 12, 5, 4\)"),
        (UNFOLD, {"input": lambda t: t[:, :5]}, {}, "input has 5 channels, which 2 offset groups do not divide"),
        (UNFOLD, {}, {0: 9}, r"an input of \[5, 6\] gives an output of -7 x 4; pad it"),
        (UNFOLD, {}, {2: 0}, r"stride \[0, 2\] must be >= 1"),
        (UNFOLD, {}, {5: -1}, r"padding \[2, -1\] must be >= 0"),
        (UNFOLD, {}, {7: 0}, r"dilation \[2, 0\] must be >= 1"),
        (CONV, {"weight": lambda t: t[:, :2]}, {}, "weight .* does not fit an input of 6 channels"),
        (CONV, {"weight": lambda t: t[:3]}, {}, "weight .* does not fit an input of 6 channels"),
        (CONV, {"weight": lambda t: t.double()}, {}, "weight is torch.float64 but input torch.float32"),
        (CONV, {"bias": lambda t: torch.zeros(4, dtype=torch.int64)}, {}, "bias is torch.int64; convert it to one of"),
        (CONV, {"bias": lambda t: torch.zeros(4, device="meta")}, {}, "bias is on meta but input on cpu"),
        (CONV, {"bias": lambda t: torch.zeros(3)}, {}, r"bias has shape \(3,\); it must be \(4,\)"),
        (ATTENTION, {"k": lambda t: t[:1]}, {}, "must have one shape and dtype"),
        (ATTENTION, {"v": lambda t: t.half()}, {}, "must have one shape and dtype"),
        (ATTENTION, {"offset": lambda t: t[..., :-1]}, {}, r"offset has shape \(2, 20, 3, 17\); it must be"),
        (ATTENTION, {"bias": lambda t: t[:, :1]}, {}, r"bias has shape \(2, 1, 20, 9\); it must be \(2, 3, 20, 9\)"),
        (ATTENTION, {}, {0: 3}, "q has 20 tokens but height 3 and width 5 give 15"),
        (ATTENTION, {}, {2: 2}, r"kernel_size \[2, 3\] must be one or two odd numbers"),
    ],
)
def test_wrong_inputs(case, change, window, text):
    tensors = case.inputs()
    tensors |= {name: function(tensors.get(name)) for name, function in change.items()}
    changed = Case(case.op, {}, [window.get(i, size) for i, size in enumerate(case.window)], case.rest)
    with pytest.raises(ValueError, match=text) as error:
        changed.public(tensors)
    assert "\n" not in str(error.value)
    if "bias" not in change or case is ATTENTION:  # the operator itself also checks
        with pytest.raises((ValueError, RuntimeError)):
            changed.operator(tensors)


def test_kernels_reports_the_kernel_of_an_operator(monkeypatch):
    """A package of compiled kernels is used; the environment disables it; one that fails is skipped."""
    calls = []

    def register(library, defaults):
        def kernel(*args):
            calls.append(args)
            return defaults["deform_unfold"](*args)

        library.impl("deform_unfold", kernel, "CPU")
        return {"cpu": "", "cuda": "no driver"}

    class Entry:
        value, dist = "package:register", None

        def __init__(self, function, name=registry.SCHEMA):
            self.load, self.name = lambda: function, name

    case, names = CASES["unfold"], {"deform_conv2d", "deform_local_attn", "deform_unfold", "ms_deform_attn"}
    ops.unload()
    expected = case.operator(case.inputs())
    try:
        monkeypatch.delenv("SEG_KERNELS", raising=False)
        monkeypatch.setattr(registry, "entry_points", lambda group: [Entry(register)])
        ops.load()
        assert set(ops.kernels()) >= names
        assert ops.kernels()["deform_unfold"] == {
            "cpu": "package:register",
            "cuda": "plain PyTorch: package:register: no driver",
        }
        assert torch.equal(case.operator(case.inputs()), expected)
        assert len(calls) == 1
        ops.load()  # a second call changes nothing
        monkeypatch.setenv("SEG_KERNELS", "0")
        ops.load()
        assert "SEG_KERNELS is 0" in ops.kernels()["ms_deform_attn"]["cpu"]
        assert torch.equal(case.operator(case.inputs()), expected)
        assert len(calls) == 1
        monkeypatch.delenv("SEG_KERNELS")
        monkeypatch.setattr(registry, "entry_points", lambda group: [Entry(lambda library, defaults: 1 // 0)])
        with pytest.warns(UserWarning, match="package:register failed"):
            ops.load()
        assert torch.equal(case.operator(case.inputs()), expected)
        monkeypatch.setattr(registry, "entry_points", lambda group: [Entry(register, "schema_0")])
        with pytest.warns(
            UserWarning, match=f"package:register is made for schema_0 of the operators, not {registry.SCHEMA}"
        ):
            ops.load()
        assert "schema_0" in ops.kernels()["deform_unfold"]["cpu"]
        assert torch.equal(case.operator(case.inputs()), expected)
        assert len(calls) == 1
    finally:
        monkeypatch.undo()
        ops.load()


def test_schema_is_that_of_the_compiled_kernels():
    """Other arguments than these need another SCHEMA: wheels of the old one are installed beside a new segcore."""
    schemas = {name: getattr(torch.ops.segcore, name).default._schema for name in ops.kernels()}
    signatures = {name: [argument.name for argument in schema.arguments] for name, schema in schemas.items()}
    assert registry.SCHEMA == "schema_1"
    assert signatures == {
        "deform_conv2d": ["input", "offset", "weight", "mask", "window"],
        "deform_local_attn": ["q", "k", "v", "offset", "bias", "window", "scale"],
        "deform_unfold": ["input", "offset", "mask", "window"],
        "ms_deform_attn": ["value", "spatial_shapes", "sampling_locations", "attention_weights"],
        "resize_argmax": ["logits", "size", "crop", "align_corners", "confidence"],
    }
    project = tomllib.loads((Path(__file__).parents[2] / "cuda-ops/pyproject.toml").read_text())["project"]
    assert list(project["entry-points"]["segcore.kernels"]) == [registry.SCHEMA]


@pytest.mark.gpu
@one_of_each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_cuda_equals_cpu(case, dtype):
    tensors = {k: t if k in ("offset", "mask", "bias") else t.to(dtype) for k, t in case.inputs().items()}
    expected = gradients(case.operator, tensors)
    for form in FORMS:
        actual = gradients(getattr(case, form), {k: t.cuda() for k, t in tensors.items()})
        for a, e in zip(actual, expected, strict=True):
            assert_near(a.cpu(), e, 1e-2 if dtype.itemsize == 2 else 1e-5)
