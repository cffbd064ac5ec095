"""The deformable-attention operator against stored numbers, a scalar loop and numerical gradients."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from segcore import ops
from segcore.ops.ms_deform_attn import reference, reference_backward, with_gather, with_grid_sample

NAN, INF = math.nan, math.inf
pytestmark = pytest.mark.usefixtures("kernels")


def make(shapes, n=2, q=7, m=3, d=8, p=2, dtype=torch.float32, seed=0):
    """Return value, locations and weights; many of the points are outside the map."""
    generator = torch.Generator().manual_seed(seed)
    pixels = sum(height * width for height, width in shapes)
    value = torch.randn(n, pixels, m, d, generator=generator, dtype=torch.float64)
    loc = torch.rand(n, q, m, len(shapes), p, 2, generator=generator, dtype=torch.float64) * 1.8 - 0.4
    attn = torch.rand(n, q, m, len(shapes), p, generator=generator, dtype=torch.float64)
    return value.to(dtype), loc.to(dtype), attn.to(dtype)


def loop(value, shapes, loc, attn):
    """Return the output by the definition, one point at a time."""
    n, _, m, d = value.shape
    out = torch.zeros(n, loc.shape[1], m, d, dtype=value.dtype)
    start = 0
    for level, (height, width) in enumerate(shapes):
        for b, q, h, p in itertools.product(range(n), range(loc.shape[1]), range(m), range(loc.shape[4])):
            x = loc[b, q, h, level, p, 0].item() * width - 0.5
            y = loc[b, q, h, level, p, 1].item() * height - 0.5
            if not (-1 < x < width and -1 < y < height):
                continue
            for i, j in itertools.product((math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)):
                if 0 <= i < height and 0 <= j < width:
                    weight = attn[b, q, h, level, p] * (1 - abs(x - j)) * (1 - abs(y - i))
                    out[b, q, h] += weight * value[b, start + i * width + j, h]
        start += height * width
    return out.flatten(2)


def gradients(function, value, shapes, loc, attn, grad):
    leaves = [t.detach().clone().requires_grad_() for t in (value, loc, attn)]
    out = function(leaves[0], shapes, *leaves[1:])
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_near(actual, expected, tolerance):
    """The difference relative to the largest expected number, as in the notes of the stored numbers."""
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def flat(function):
    """The form with a flat list of sizes, called like the public one."""
    return lambda value, shapes, loc, attn: function(value, [s for shape in shapes for s in shape], loc, attn)


FORMS = [ops.ms_deform_attn, flat(with_gather), flat(with_grid_sample)]


@pytest.mark.parametrize("form", FORMS, ids=["op", "gather", "grid_sample"])
@pytest.mark.parametrize("case", ["msda_l1", "msda_l1_ddp", "msda_l3"])
def test_stored_numbers(golden, case, form):
    g = {k: torch.from_numpy(v) for k, v in golden(f"ops/golden/{case}.npz").items()}
    inputs = (g["value"], g["spatial_shapes"].tolist(), g["sampling_locations"], g["attention_weights"])
    actual = gradients(form, *inputs, g["grad_output"])
    names = ("output", "grad_value", "grad_sampling_locations", "grad_attention_weights")
    for name, tensor in zip(names, actual, strict=True):
        assert_near(tensor, g[name], 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_stored_numbers_in_half_precision(golden, dtype, tolerance):
    g = {k: torch.from_numpy(v) for k, v in golden("ops/golden/msda_l3.npz").items()}
    inputs = (g["value"].to(dtype), g["spatial_shapes"].tolist(), g["sampling_locations"], g["attention_weights"])
    actual = gradients(ops.ms_deform_attn, *inputs, g["grad_output"].to(dtype))
    assert [t.dtype for t in actual] == [dtype, dtype, torch.float32, torch.float32]
    names = ("output", "grad_value", "grad_sampling_locations", "grad_attention_weights")
    for name, tensor in zip(names, actual, strict=True):
        assert_near(tensor, g[name], tolerance)


@pytest.mark.parametrize("form", FORMS[:2], ids=["op", "gather"])
def test_stored_edges(golden, form):
    g = {k: torch.from_numpy(v) for k, v in golden("ops/golden/msda_edges.npz").items()}
    out = form(g["value"], g["spatial_shapes"].tolist(), g["sampling_locations"], g["attention_weights"])
    assert_near(out, g["output"], 1e-6)


def test_stored_numbers_of_the_decoder(golden):
    g = {k: torch.from_numpy(v) for k, v in golden("ddp/golden/f_msda_encoder.npz").items() if k.startswith("fn_")}
    out = ops.ms_deform_attn(g["fn_value"], [g["fn_hw"].tolist()], g["fn_locations"], g["fn_weights"])
    assert_near(out, g["fn_out"], 1e-5)


@pytest.mark.parametrize("form", FORMS, ids=["op", "gather", "grid_sample"])
@pytest.mark.parametrize("shapes", [[(5, 4)], [(4, 6), (1, 3), (2, 1), (1, 1)]], ids=["one level", "thin levels"])
@pytest.mark.parametrize("d", [1, 3, 8, 20, 32, 64])
def test_equals_the_definition(form, shapes, d):
    value, loc, attn = make(shapes, d=d)
    assert_near(form(value, shapes, loc, attn), loop(value.double(), shapes, loc.double(), attn.double()), 1e-5)


@pytest.mark.parametrize("form", FORMS[:2], ids=["op", "gather"])
def test_gradients_numerically(form):
    shapes = [(3, 4), (1, 2), (2, 1)]
    leaves = [t.requires_grad_() for t in make(shapes, n=2, q=4, m=2, d=3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda v, x, a: form(v, shapes, x, a), leaves)


@pytest.mark.parametrize("form", FORMS[:2], ids=["op", "gather"])
def test_borders_by_hand(form):
    """A map with the values 1 2 / 3 4, pixel coordinates x, y and the results: value, d/dx and d/dy in pixels."""
    value = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)
    cases = [
        (0.5, 0.5, 2.5, 1.0, 2.0),
        (0.0, 0.0, 1.0, 1.0, 2.0),  # on a pixel: the slopes to the right and below
        (1.0, 0.0, 2.0, -2.0, 2.0),  # beyond the last column is zero
        (-0.5, 0.0, 0.5, 1.0, 1.0),
        (1.5, 1.5, 1.0, -2.0, -2.0),
        (-1.0, 0.0, 0.0, 0.0, 0.0),  # exactly on the outer border, where libraries disagree about the slope
        (0.0, -1.0, 0.0, 0.0, 0.0),
        (2.0, 0.0, 0.0, 0.0, 0.0),
        (0.0, 2.0, 0.0, 0.0, 0.0),
        *((x, 0.5, 0.0, 0.0, 0.0) for x in (NAN, INF, -INF, 1e30, -1e30)),
        *((0.5, y, 0.0, 0.0, 0.0) for y in (NAN, INF, -INF, 1e30, -1e30)),
    ]
    table = torch.tensor(cases)
    loc = ((table[:, :2] + 0.5) / 2).view(1, -1, 1, 1, 1, 2)
    attn = torch.ones(1, len(cases), 1, 1, 1)
    out, grad_value, grad_loc, grad_attn = gradients(form, value, [(2, 2)], loc, attn, torch.ones(1, len(cases), 1))
    torch.testing.assert_close(out.flatten(), table[:, 2])
    torch.testing.assert_close(grad_attn.flatten(), table[:, 2])
    torch.testing.assert_close(grad_loc.view(-1, 2) / 2, table[:, 3:])
    # each of the five points inside distributes the weights of its corners
    assert grad_value.sum().item() == pytest.approx(1 + 1 + 1 + 0.5 + 0.25)


@pytest.mark.parametrize("shapes", [[(4, 5)], [(3, 4), (1, 2)]])
def test_library_conventions(shapes):
    flat_shapes = [s for shape in shapes for s in shape]
    value, loc, attn = make(shapes)
    grad = torch.randn(2, 7, 24)
    leaves = [t.requires_grad_() for t in (value, loc, attn)]
    torch.library.opcheck(torch.ops.segcore.ms_deform_attn, (leaves[0], flat_shapes, *leaves[1:]))
    detached = [t.detach() for t in leaves]
    torch.library.opcheck(torch.ops.segcore.ms_deform_attn_backward, (grad, detached[0], flat_shapes, *detached[1:]))


def test_double_backward_is_refused():
    value, loc, attn = make([(4, 5)])
    out = ops.ms_deform_attn(value.requires_grad_(), [(4, 5)], loc, attn)
    (grad,) = torch.autograd.grad(out.square().sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_for_any_number_of_queries(dynamic):
    shapes = [(4, 5), (2, 3)]
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda value, loc, attn: ops.ms_deform_attn(value, shapes, loc, attn),
        fullgraph=True,
        dynamic=dynamic,
        backend=counter,
    )
    for queries in (7, 11, 13):
        value, loc, attn = make(shapes, q=queries)
        grad = torch.randn(2, queries, 24)
        expected = gradients(ops.ms_deform_attn, value, shapes, loc, attn, grad)
        actual = gradients(lambda v, _, x, a: compiled(v, x, a), value, shapes, loc, attn, grad)
        for a, e in zip(actual, expected, strict=True):
            assert_near(a, e, 1e-5)
    assert counter.frame_count == (1 if dynamic else 3)


def test_exports_as_grid_sample():
    class Attend(torch.nn.Module):
        def forward(self, value, loc, attn):
            return ops.ms_deform_attn(value, [(4, 5), (2, 3)], loc, attn)

    inputs = make([(4, 5), (2, 3)])
    program = torch.export.export(Attend(), inputs)
    assert "grid_sampler" in str(program.graph)
    assert_near(program.module()(*inputs), Attend()(*inputs), 1e-5)


def test_mixed_dtypes():
    shapes = [(6, 7)]
    value, loc, attn = make(shapes)
    grad = torch.randn(2, 7, 24)
    exact = gradients(ops.ms_deform_attn, value.bfloat16().float(), shapes, loc, attn, grad.bfloat16().float())
    mixed = gradients(ops.ms_deform_attn, value.bfloat16(), shapes, loc, attn, grad.bfloat16())
    assert [t.dtype for t in mixed] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for a, e in zip(mixed[:2], exact[:2], strict=True):
        torch.testing.assert_close(a, e.bfloat16())  # computed in float32 and rounded once
    for a, e in zip(mixed[2:], exact[2:], strict=True):
        assert_near(a, e, 1e-6)
    half = gradients(ops.ms_deform_attn, value, shapes, loc.half(), attn.bfloat16(), grad)
    assert [t.dtype for t in half] == [torch.float32, torch.float32, torch.float16, torch.bfloat16]
    torch.testing.assert_close(half[0], ops.ms_deform_attn(value, shapes, loc.half().float(), attn.bfloat16().float()))


def test_autocast_leaves_locations_alone():
    value, loc, attn = make([(6, 7)])
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.ms_deform_attn(value.bfloat16(), [(6, 7)], loc, attn)
    torch.testing.assert_close(out, ops.ms_deform_attn(value.bfloat16(), [(6, 7)], loc, attn), rtol=0, atol=0)


def test_non_contiguous_inputs():
    shapes = [(4, 5), (2, 3)]
    inputs = make(shapes)
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in inputs]
    assert not any(t.is_contiguous() for t in strided)
    grad = torch.randn(24, 7, 2).permute(2, 1, 0)
    expected = gradients(ops.ms_deform_attn, inputs[0], shapes, *inputs[1:], grad.contiguous())
    actual = gradients(ops.ms_deform_attn, strided[0], shapes, *strided[1:], grad)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)


@pytest.mark.parametrize("sizes", [{"n": 0}, {"q": 0}])
def test_empty(sizes):
    value, loc, attn = make([(4, 5)], **sizes)
    out, *grads = gradients(ops.ms_deform_attn, value, [(4, 5)], loc, attn, torch.ones(len(value), loc.shape[1], 24))
    assert out.shape == (len(value), loc.shape[1], 24)
    assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, (value, loc, attn), strict=True))


def test_large_batch_equals_its_images():
    value, loc, attn = make([(3, 4)], n=65)
    out = ops.ms_deform_attn(value, [(3, 4)], loc, attn)
    alone = [ops.ms_deform_attn(value[i : i + 1], [(3, 4)], loc[i : i + 1], attn[i : i + 1]) for i in range(65)]
    torch.testing.assert_close(out, torch.cat(alone), rtol=0, atol=0)


def test_cuda_shapes_and_dtypes_without_a_gpu():
    with FakeTensorMode():
        value = torch.empty(2, 20, 3, 8, device="cuda", dtype=torch.bfloat16)
        loc, attn = torch.empty(2, 7, 3, 1, 2, 2, device="cuda"), torch.empty(2, 7, 3, 1, 2, device="cuda")
        out = torch.ops.segcore.ms_deform_attn(value, [4, 5], loc, attn)
        grads = torch.ops.segcore.ms_deform_attn_backward(out, value, [4, 5], loc, attn)
    assert (out.shape, out.dtype, out.device.type) == ((2, 7, 24), torch.bfloat16, "cuda")
    assert [(g.shape, g.dtype) for g in grads] == [(t.shape, t.dtype) for t in (value, loc, attn)]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda v, s, x, a: (v[0], s, x, a), "value has shape .* needs 4 dimensions"),
        (lambda v, s, x, a: (v, s, x[0], a), "sampling_locations has shape .* needs 6 dimensions"),
        (lambda v, s, x, a: (v, s, x, a[0]), "attention_weights has shape .* needs 5 dimensions"),
        (lambda v, s, x, a: (v, s, x[..., :1], a), r"last dimension must be \(x, y\)"),
        (lambda v, s, x, a: (v[:1], s, x, a), r"value \(1, 20, 3, 8\).*disagree"),
        (lambda v, s, x, a: (v[:, :, :2], s, x, a), r"value \(2, 20, 2, 8\).*disagree"),
        (lambda v, s, x, a: (v, s, x[:, :4], a), r"sampling_locations \(2, 4, 3, 1, 2, 2\).*disagree"),
        (lambda v, s, x, a: (v, s, x, a[..., :1]), r"attention_weights \(2, 7, 3, 1, 1\) disagree"),
        (lambda v, s, x, a: (v, [(2, 5), (2, 5)], x, a), "disagree for 2 levels"),
        (lambda v, s, x, a: (v, [(4, 4)], x, a), r"value has 20 pixels but spatial_shapes \[4, 4\] have 16"),
        (lambda v, s, x, a: (v, [(-4, -5)], x, a), r"spatial_shapes \[-4, -5\] must be"),
        (lambda v, s, x, a: (v, [], x, a), r"spatial_shapes \[\] must be"),
        (lambda v, s, x, a: (v.long(), s, x, a), "value is torch.int64; convert it to one of torch.float32"),
        (lambda v, s, x, a: (v, s, x.to("meta"), a), "sampling_locations is on meta but value on cpu"),
    ],
)
def test_wrong_inputs(change, text):
    value, loc, attn = make([(4, 5)])
    changed = change(value, [(4, 5)], loc, attn)
    with pytest.raises(ValueError, match=text) as error:
        ops.ms_deform_attn(*changed)
    assert "\n" not in str(error.value)
    with pytest.raises((ValueError, RuntimeError)):  # the operator itself also checks
        torch.ops.segcore.ms_deform_attn(changed[0], [s for shape in changed[1] for s in shape], *changed[2:])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_cuda_equals_cpu(dtype):
    shapes = [(9, 13), (4, 6), (1, 1)]
    value, loc, attn = make(shapes, q=50, d=32, p=4)
    value, grad = value.to(dtype), torch.randn(2, 50, 96).to(dtype)
    expected = [t.float() for t in gradients(ops.ms_deform_attn, value, shapes, loc, attn, grad)]
    for form in FORMS:
        actual = gradients(form, value.cuda(), shapes, loc.cuda(), attn.cuda(), grad.cuda())
        assert actual[0].dtype == dtype
        tolerance = 1e-2 if dtype.itemsize == 2 else 1e-5
        for a, e in zip(actual, expected, strict=True):
            assert_near(a.cpu(), e, tolerance)


def test_kernels_are_plain_functions():
    """A package of compiled kernels falls back to these two for unsupported inputs."""
    shapes = [(4, 5)]
    value, loc, attn = make(shapes)
    grad = torch.randn(2, 7, 24)
    out, *grads = gradients(flat(with_grid_sample), value, shapes, loc, attn, grad)
    assert_near(reference(value, [4, 5], loc, attn), out, 1e-5)
    for a, e in zip(reference_backward(grad, value, [4, 5], loc, attn), grads, strict=True):
        assert_near(a, e, 1e-5)


@pytest.mark.parametrize("name", ["msda_module_l1", "msda_module_l3"])
def test_inside_the_published_module(golden, name):
    """The op between its four projections, as checkpoints of Deformable-DETR's module hold them."""
    g = {k: torch.from_numpy(np.asarray(v)) for k, v in golden(f"ops/golden/{name}.npz").items()}
    shapes = [tuple(shape) for shape in g["spatial_shapes"].tolist()]
    heads, points = int(g["num_heads"]), int(g["num_points"])
    query = g["query"].requires_grad_()

    def project(layer, x):
        return F.linear(x, g[f"state.{layer}.weight"], g[f"state.{layer}.bias"])

    n, pixels, width = query.shape
    value = project("value_proj", query).view(n, pixels, heads, width // heads)
    placed = query + g["query_pos"]
    offsets = project("sampling_offsets", placed).view(n, pixels, heads, len(shapes), points, 2)
    weights = project("attention_weights", placed).view(n, pixels, heads, -1).softmax(-1)
    scale = torch.tensor([(w, h) for h, w in shapes])
    loc = g["reference_points"][:, :, None, :, None] + offsets / scale[:, None]
    attended = ops.ms_deform_attn(value, shapes, loc, weights.view(n, pixels, heads, len(shapes), points))
    output = project("output_proj", attended) + query
    output.backward(g["grad_output"])
    for ours, expected in ((output, g["output"]), (query.grad, g["grad_query"])):
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
