"""The compiled kernels against segcore's plain ones, which its own tests hold to the reference numbers."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("seg_cuda_ops", reason="the package of compiled kernels is not installed")
ops = pytest.importorskip("segcore.ops", reason="segcore is not installed")
from seg_cuda_ops import _cpu, kernels, registration  # noqa: E402
from segcore.ops import registry  # noqa: E402

OPS = ["ms_deform_attn", "deform_unfold", "deform_conv2d", "deform_local_attn"]
SETS = ["baseline", "avx2"]
INPUTS = {
    "ms_deform_attn": ["value", "spatial_shapes", "sampling_locations", "attention_weights"],
    "deform_unfold": ["input", "offset", "mask"],
    "deform_conv2d": ["input", "offset", "weight", "mask"],
    "deform_local_attn": ["query", "key", "value", "offset", "bias"],
}
STORED = {
    "ms_deform_attn": ["msda_l1", "msda_l1_ddp", "msda_l3"],
    "deform_unfold": ["unfold", "unfold_mask_groups"],
    "deform_conv2d": ["dcn_v1", "dcn_v2", "dcn_v2_groups", "dcn_v2_rect", "dcn_v2_1x1", "dcn_v2_zero_offset"],
    "deform_local_attn": ["dla_h1", "dla_h3"],
}
"""Files of reference/ops/golden by operator, and the inputs in them in the operator's order."""


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    threads = torch.get_num_threads()
    if ops.kernels()["ms_deform_attn"]["cpu"].startswith("plain"):
        pytest.skip(f"no compiled kernels: {ops.kernels()['ms_deform_attn']['cpu']}")
    yield
    torch.set_num_threads(threads)
    _cpu.use_instruction_set("")


def make(op: str, d: int = 8, n: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Any]:
    """Return the positional inputs of an operator; values in `dtype`, places and weights in float32 or float64."""
    generator = torch.Generator().manual_seed(seed)
    exact = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, dtype: torch.dtype = exact) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    if op == "ms_deform_attn":
        loc = (0.5 + 0.5 * normal(n, 11, 3, 2, 5, 2)).to(exact)
        return [normal(n, 26, 3, d, dtype=dtype), [4, 6, 1, 2], loc, normal(n, 11, 3, 2, 5)]
    if op == "deform_local_attn":
        q, k, v = (normal(n, 20, 3, d, dtype=dtype) for _ in range(3))
        return [q, k, v, 1.5 * normal(n, 20, 3, 18), normal(n, 3, 20, 9), [4, 5, 3, 3], 0.3]
    window, groups = [3, 2, 2, 1, 1, 1, 1, 2], 2
    more = [normal(4, d, 3, 2, dtype=dtype)] if op == "deform_conv2d" else []
    offset, mask = 1.5 * normal(n, groups * 12, 3, 6), normal(n, groups * 6, 3, 6)
    return [normal(n, groups * d, 5, 6, dtype=dtype), offset, *more, mask, window]


def run(op: str, inputs: list[Any], plain: bool = False) -> list[torch.Tensor]:
    """Return the output and all gradients, by the compiled kernels or the plain ones."""
    forward, backward = (
        registry.defaults[name] if plain else getattr(torch.ops.segcore, name) for name in (op, f"{op}_backward")
    )
    out = forward(*inputs)
    grad = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(out.dtype)
    return [out, *backward(grad, *inputs)]


def assert_near(actual: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (e.shape, e.dtype, e.stride())
        if e.numel():
            assert (a.double() - e.double()).abs().max() <= tolerance * e.double().abs().max()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("d", [1, 3, 8, 20, 32, 64, 100])
def test_equals_the_plain_kernels(op, name, d):
    try:
        assert _cpu.use_instruction_set(name) == _cpu.instruction_set() == name
    except ValueError as error:
        pytest.skip(str(error))
    inputs = make(op, d)
    assert_near(run(op, inputs), run(op, inputs, plain=True), 1e-5)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str
)
def test_dtypes(op, dtype, tolerance):
    inputs = make(op, 16, dtype=dtype)
    assert_near(run(op, inputs), run(op, inputs, plain=True), tolerance)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("n", [0, 1, 65])
def test_batches_and_no_mask_or_bias(op, n):
    inputs = make(op, 4, n)
    assert_near(run(op, inputs), run(op, inputs, plain=True), 1e-5)
    if op != "ms_deform_attn":
        inputs[4 if op == "deform_local_attn" else -2] = None
        assert_near(run(op, inputs), run(op, inputs, plain=True), 1e-5)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("classes", [2, 19, 151, 256, 300])
@pytest.mark.parametrize("corners", [False, True])
def test_resize_argmax_equals_the_plain_kernel(name, classes, corners):
    try:
        _cpu.use_instruction_set(name)
    except ValueError as error:
        pytest.skip(str(error))
    logits = 3 * torch.randn(2, classes, 23, 37, generator=torch.Generator().manual_seed(classes))
    for size, crop in (([70, 150], [67, 149]), ([11, 30], [11, 30]), ([23, 60], [23, 60]), ([23, 37], [20, 37])):
        found, confidence = torch.ops.segcore.resize_argmax(logits, size, crop, corners, True)
        plain, expected = registry.defaults["resize_argmax"](logits, size, crop, corners, True)
        assert (found.dtype, found.shape) == (plain.dtype, plain.shape)
        assert (found != plain).sum() <= 2  # ties up to rounding
        torch.testing.assert_close(confidence, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("n", [1, 3])
def test_threads_change_no_bit(op, n):
    inputs, answers = make(op, 64, n), []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        answers.append(run(op, inputs))
    for others in answers[1:]:
        for one, other in zip(answers[0], others, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("op", OPS)
def test_every_element_is_written(op):
    """Where places are no numbers nothing is sampled; fresh memory is poisoned, so it would show."""
    inputs = make(op)
    place = {"ms_deform_attn": 2, "deform_local_attn": 3}.get(op, 1)
    expected = run(op, inputs)
    torch.use_deterministic_algorithms(True)  # fills empty tensors with NaN
    try:
        assert torch.empty(3).isnan().all()
        assert_near(run(op, inputs), expected, 1e-6)
        inputs[place] = torch.full_like(inputs[place], torch.nan)
        answers = run(op, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(answer.isfinite().all() for answer in answers)
    assert not answers[0].any()


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_another_shape_are_refused(op):
    inputs = make(op)
    out = getattr(torch.ops.segcore, op)(*inputs)
    with pytest.raises(ValueError, match=f"{op}: the gradient has shape"):
        getattr(torch.ops.segcore, f"{op}_backward")(out[:1], *inputs)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in STORED.items() for name in names])
def test_stored_numbers(reference, op, name, device):
    """The published operators' answers, without the detour over the plain kernels."""
    with np.load(reference / "ops" / "golden" / f"{name}.npz") as arrays:
        stored = {key: torch.from_numpy(np.asarray(value)) for key, value in arrays.items()}
    inputs: list[Any] = [stored.get(key) for key in INPUTS[op]]
    if op == "ms_deform_attn":
        inputs[1] = inputs[1].flatten().tolist()
    elif op == "deform_local_attn":
        inputs += [[int(stored["height"]), int(stored["width"]), 3, 3], float(stored["scale"])]
    else:
        inputs.append([int(n) for key in ("kernel", "stride", "padding", "dilation") for n in stored[key]])
    if device == "cuda":
        inputs = on_device(inputs)
    out = getattr(torch.ops.segcore, op)(*inputs)
    grads = getattr(torch.ops.segcore, f"{op}_backward")(stored["grad_output"].to(device), *inputs)
    if op == "deform_conv2d":
        out = out + stored["bias"].view(-1, 1, 1).to(device)
    keys = ["output", *(f"grad_{key}" for key in INPUTS[op] if key != "spatial_shapes")]
    for key, answer in zip(keys, [out, *grads], strict=True):
        if key in stored:  # not where an input is absent, nor where all offsets lie exactly on a border
            expected = stored[key]
            torch.testing.assert_close(answer.cpu(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_agrees_with_torchvision():
    """In all but the slope exactly at -1, which no coordinate here is."""
    vision = pytest.importorskip("torchvision.ops")
    image, offset, weight, mask, window = make("deform_conv2d", 8)
    leaves = [t.requires_grad_() for t in (image, offset, weight, mask)]
    out, *grads = run("deform_conv2d", [image, offset, weight, mask, window])
    stride, padding, dilation = window[2:4], window[4:6], window[6:]
    theirs = vision.deform_conv2d(leaves[0], leaves[1], leaves[2], None, stride, padding, dilation, leaves[3])
    grad = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).float()
    assert_near([out.detach(), *grads], [theirs.detach(), *torch.autograd.grad(theirs, leaves, grad)], 1e-5)


def test_a_model_answers_the_same():
    pytest.importorskip("ddp_seg", reason="ddp-seg is not installed")
    import segcore

    torch.manual_seed(0)
    model = segcore.load_experiment("ddp_resnet18_toy").model.build().eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        compiled = model(images, seeds=[0, 1])
        ops.unload()
        try:
            plain = model(images, seeds=[0, 1])
        finally:
            ops.load()
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 16, 3, 32), (1, 17, 9, 35), (2, 1, 2, 1), (0, 4, 1, 3), (1, 5, 1, 16)])
def test_transposing(shape):
    backend = kernels.Backend(registration.call_cpu, half=False, chunk=1)
    for dtype in (torch.float32, torch.float64):
        tensor = torch.randn(shape, dtype=dtype)
        assert torch.equal(backend.swapped(tensor), tensor.permute(0, 3, 2, 1))
    last = tensor.permute(0, 3, 2, 1)
    assert backend.swapped(last).data_ptr() == tensor.data_ptr()  # nothing to do


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_in_chunks_of_places(groups):
    """More places than are computed at a time, which those above have not."""
    generator = torch.Generator().manual_seed(0)
    image, offset, weight, mask = (
        torch.randn(shape, generator=generator)
        for shape in ((2, 4, 20, 30), (2, 18, 20, 30), (6, 4 // groups, 3, 3), (2, 9, 20, 30))
    )
    inputs = [image, offset, weight, mask, [3, 3, 1, 1, 1, 1, 1, 1]]
    backend = kernels.Backend(registration.call_cpu, half=False, chunk=1)
    by_name = kernels.kernels(registry.defaults, backend)
    out = by_name["deform_conv2d"](*inputs)
    grad = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).float()
    assert_near(
        [out, *by_name["deform_conv2d_backward"](grad, *inputs)], run("deform_conv2d", inputs, plain=True), 1e-5
    )


def test_a_convolution_takes_a_whole_batch_at_once(monkeypatch):
    """One launch for the samples and one product, into the output, where there is memory as on a GPU."""
    calls, targets, bmm = [], [], torch.bmm

    def call(name: str, *args: Any) -> None:
        calls.append(name)
        registration.call_cpu(name, *args)

    def product(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        targets.append(out.data_ptr())
        return bmm(a, b, out=out)

    monkeypatch.setattr(torch, "bmm", product)
    by_name = kernels.kernels(registry.defaults, kernels.Backend(call, half=False, chunk=2**28))
    out = by_name["deform_conv2d"](*make("deform_conv2d", 8, n=3))
    assert calls.count("columns") == 1
    assert targets == [out.data_ptr()]


@pytest.mark.parametrize("op", OPS)
def test_half_precision_without_conversion(op):
    """The way of a backend that takes half precision and many samples, as on a GPU: here its function converts."""

    def call(name: str, dtype: torch.dtype, tensors: list[torch.Tensor | None], *sizes: Any) -> None:
        wide = [None if t is None else t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
        registration.call_cpu(name, torch.float32, wide, *sizes)
        for tensor, converted in zip(tensors, wide, strict=True):
            if tensor is not None and tensor.dtype == dtype:
                tensor.copy_(converted)

    by_name = kernels.kernels(registry.defaults, kernels.Backend(call, half=True, chunk=2**28))
    inputs = make(op, 8, n=3, dtype=torch.bfloat16)
    expected = run(op, inputs, plain=True)
    grad = torch.cos(torch.arange(expected[0].numel(), dtype=torch.float64)).view(expected[0].shape).bfloat16()
    assert_near([by_name[op](*inputs), *by_name[f"{op}_backward"](grad, *inputs)], expected, 2e-2)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [20, 32])
def test_parts_of_one_projection(device, dtype, d):
    """Queries, keys and values beside each other in memory, as one linear layer returns them."""
    *_, offset, bias, window, scale = make("deform_local_attn", d, dtype=dtype)
    qkv = torch.randn(2, 20, 3, 3, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    expected = run("deform_local_attn", [*qkv.unbind(2), offset, bias, window, scale], plain=True)
    if device == "cuda":
        qkv, offset, bias = on_device([qkv, offset, bias])
    answers = run("deform_local_attn", [*qkv.unbind(2), offset, bias, window, scale])
    assert_near([t.cpu() for t in answers], expected, 1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_parts_of_one_projection_are_not_copied():
    backend = kernels.Backend(registration.call_cpu, half=False, chunk=1)
    qkv = torch.randn(2, 20, 3, 3, 8)
    parts, step = backend.tokens(*qkv.unbind(2))
    assert [t.data_ptr() for t in parts] == [t.data_ptr() for t in qkv.unbind(2)]
    assert step == 3 * 3 * 8
    for q, k, v in [
        (qkv[:, :, 0], qkv[:, :, 1], torch.randn(2, 20, 3, 8)),
        qkv.transpose(3, 4).contiguous().mT.unbind(2),
    ]:
        parts, step = backend.tokens(q, k, v)
        assert step == 3 * 8
        for part, tensor in zip(parts, (q, k, v), strict=True):
            assert part.is_contiguous()
            assert torch.equal(part, tensor)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("d", [20, 64])
def test_windows_larger_than_three_by_three(device, d):
    inputs = make("deform_local_attn", d)
    generator = torch.Generator().manual_seed(1)
    inputs[3:6] = (
        torch.randn(2, 20, 3, 70, generator=generator),
        torch.randn(2, 3, 20, 35, generator=generator),
        [4, 5, 7, 5],
    )
    expected = run("deform_local_attn", inputs, plain=True)
    answers = run("deform_local_attn", on_device(inputs) if device == "cuda" else inputs)
    assert_near([t.cpu() for t in answers], expected, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("d", [20, 32, 64])
@pytest.mark.parametrize("size", [(9, 11), (1, 99), (99, 1)])
def test_every_pixel_is_a_query(device, d, size):
    """One level with as many queries as pixels, which a GPU takes in tiles."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, 99, 3, d, generator=generator)
    loc, attn = torch.rand(2, 99, 3, 1, 5, 2, generator=generator), torch.randn(2, 99, 3, 1, 5, generator=generator)
    inputs = [value, list(size), 1.2 * loc - 0.1, attn]
    expected = run("ms_deform_attn", inputs, plain=True)
    answers = run("ms_deform_attn", on_device(inputs) if device == "cuda" else inputs)
    assert_near([t.cpu() for t in answers], expected, 1e-5)


def on_device(inputs: list[Any]) -> list[Any]:
    """Return inputs on the GPU, where fresh memory holds NaN from here on: an element left unwritten shows."""
    assert not ops.kernels()["ms_deform_attn"]["cuda"].startswith("plain"), ops.kernels()["ms_deform_attn"]["cuda"]
    moved = [t.cuda() if isinstance(t, torch.Tensor) else t for t in inputs]
    [torch.full((2**17,), torch.nan, dtype=torch.float64, device="cuda") for _ in range(16)]  # the allocator keeps them
    return moved


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("d", "general"),
    [*((d, False) for d in (1, 3, 8, 16, 20, 32, 64, 100, 128, 256, 264)), (32, True), (64, True), (256, True)],
)
def test_cuda_equals_the_plain_kernels_on_the_cpu(op, d, dtype, general):
    """In the best form for a width, of which some are exact ones, and in the general one for arrays of any size."""
    inputs = make(op, d, dtype=dtype)
    registration._cuda.use_general_forms(general)
    try:
        answers = [t.cpu() for t in run(op, on_device(inputs))]
    finally:
        registration._cuda.use_general_forms(False)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 1e-2)
    if op == "deform_conv2d" and dtype == torch.bfloat16:
        tolerance = 2e-2  # columns, product and partial sums are rounded: 0.8e-2 before cuBLAS splits its sums
    assert_near(answers, run(op, inputs, plain=True), tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_cuda_batches_and_no_mask_or_bias(op):
    for n in (0, 1, 65):
        inputs = make(op, 4, n)
        if op != "ms_deform_attn":
            inputs[4 if op == "deform_local_attn" else -2] = None
        assert_near([t.cpu() for t in run(op, on_device(inputs))], run(op, inputs, plain=True), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_cuda_takes_values_that_are_not_aligned(op):
    """A view may begin anywhere; reading sixteen bytes at once there would be an error."""
    inputs = make(op, 32)
    expected = run(op, inputs, plain=True)
    for place, tensor in enumerate(inputs):
        if isinstance(tensor, torch.Tensor):
            moved = on_device(inputs)
            moved[place] = torch.cat((moved[place].new_zeros(1), moved[place].flatten()))[1:].view(tensor.shape)
            assert moved[place].data_ptr() % 16
            assert_near([t.cpu() for t in run(op, moved)], expected, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_cuda_coordinates_that_are_no_numbers(op):
    inputs = on_device(make(op))
    place = {"ms_deform_attn": 2, "deform_local_attn": 3}.get(op, 1)
    inputs[place] = torch.full_like(inputs[place], torch.nan)
    answers = run(op, inputs)
    assert all(answer.isfinite().all() for answer in answers)
    assert not answers[0].any()


@pytest.mark.gpu
def test_cuda_is_deterministic_on_request():
    inputs = on_device(make("ms_deform_attn", 32, 4))
    torch.use_deterministic_algorithms(True)
    try:
        first, second = run("ms_deform_attn", inputs), run("ms_deform_attn", inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_cuda_does_not_wait_and_records_in_a_graph():
    inputs = on_device(make("ms_deform_attn", 32))
    expected = torch.ops.segcore.ms_deform_attn(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        answer = torch.ops.segcore.ms_deform_attn(*inputs)
    answer.zero_()
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(answer, expected)
