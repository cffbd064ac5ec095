"""The compiled CPU kernels against segcore's plain ones, which its own tests hold to the reference numbers."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("seg_cuda_ops", reason="the package of compiled kernels is not installed")
ops = pytest.importorskip("segcore.ops", reason="segcore is not installed")
from seg_cuda_ops import _cpu  # noqa: E402
from segcore.ops import registry  # noqa: E402

CSRC = Path(__file__).parents[1] / "csrc"
OPS = ["ms_deform_attn", "deform_unfold", "deform_conv2d", "deform_local_attn"]
SETS = ["baseline", "avx2"]


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


def test_sanitizers_find_nothing(tmp_path):
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("no g++")
    flags = ["-std=c++17", "-O1", "-g", "-Wno-psabi", "-fsanitize=address,undefined,float-cast-overflow"]
    flags += ["-fno-sanitize-recover=all", "-DKERNELS_NAME=kernels_under_test"]
    sources = [CSRC / "cpu_kernels.cpp", Path(__file__).with_name("sanitize.cpp")]
    program = tmp_path / "sanitize"
    built = subprocess.run([compiler, *flags, *sources, "-o", program], capture_output=True, text=True, timeout=300)
    if "cannot find -lasan" in built.stderr:
        pytest.skip("no sanitizers")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
