"""Small building blocks shared by several models."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from segcore.environment import product_library
from segcore.errors import UserError

M = TypeVar("M", bound=nn.Module)


def widened(x: Tensor) -> Tensor:
    """Return `x` in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def resize(x: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    """Return `x` (N, C, H, W) resized bilinearly, without antialiasing, to `size` (height, width)."""
    symbolic = any(isinstance(side, torch.SymInt) for side in (*x.shape[-2:], *size))  # comparing specializes them
    if not symbolic and tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=list(size), mode="bilinear", align_corners=align_corners)


FEW = 1 << 20
"""Multiplications below which PyTorch's own product is faster: a call of oneDNN's takes 15 µs."""


def cpu_inference(x: Tensor) -> bool:
    """Return whether this runs on a CPU and neither autograd nor the compiler nor an exporter records it."""
    exported = torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()
    return x.device.type == "cpu" and not (torch.is_grad_enabled() or torch.compiler.is_compiling() or exported)


def by_onednn(x: Tensor) -> bool:
    """Return whether products with `x` go to oneDNN: float32 inference on a CPU that nothing records or compiles."""
    if not cpu_inference(x) or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    return product_library() == "onednn"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `F.linear` of `x` (…, I), a weight (O, I) and a bias (O,), from the library that `by_onednn` selects."""
    if not by_onednn(x) or x.numel() * len(weight) < FEW:
        return F.linear(x, weight, bias)
    # A strided view would take 20 times as long.
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), bias, "none", [], "")


class Linear(nn.Linear):
    """A linear layer by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class Conv1x1(nn.Conv2d):
    """A 1x1 convolution by oneDNN where `by_onednn` says so; with one thread PyTorch takes MKL's products instead."""

    def forward(self, input: Tensor) -> Tensor:
        if not by_onednn(input) or input.numel() * self.out_channels < FEW:
            return super().forward(input)
        return torch.mkldnn_convolution(input, self.weight, self.bias, (0, 0), self.stride, (1, 1), 1)


def use_fast_products(module: M) -> M:
    """Make the linear layers and 1x1 convolutions in `module` ours, a library's too, and return it.

    They keep parameters, names and hooks; layers of a derived class stay as they are. Raises UserError for a wrong
    SEG_LINEAR, which a training run should not meet in its first evaluation.
    """
    product_library()
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = Linear
        elif type(part) is nn.Conv2d and part.kernel_size == (1, 1) and part.groups == 1 and part.padding == (0, 0):
            part.__class__ = Conv1x1
    return module


@contextlib.contextmanager
def pass_without_grad() -> Iterator[None]:
    """Disable gradients in a pass that is followed by a pass with gradients through the same parameters.

    Torch 2.10 would reuse autocast's low-precision copies of the parameters, made here without a gradient, in the later
    pass (pytorch#112583), so the autocast cache is cleared.
    """
    with torch.no_grad():
        yield
    torch.clear_autocast_cache()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return `tensor` on `device`; a copy from CPU to GPU does not wait for pending GPU work."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training a sample (N, ...) is zeroed at this rate, others are scaled."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        kept = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * (kept / (1 - self.rate) if self.rate < 1 else kept)


def residual_blocks(module: nn.Module) -> list[nn.Module]:
    """Return the blocks with stochastic depth, at any rate, inside a module; timm also has `drop_path1` in them."""
    return [part for part in module.modules() if hasattr(part, "drop_path") or hasattr(part, "drop_path1")]


class ConvNorm(nn.Sequential):
    """Convolution padded by half its kernel, a norm and an optional activation: `conv`, `norm`, `act`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        norm: Callable[[int], nn.Module],
        act: nn.Module | None = None,
        *,
        stride: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=bias)
        self.norm = norm(out_channels)
        if act is not None:
            self.act = act


def check_two_images(network: str, images: Tensor, norm: object) -> None:
    """Raise UserError if `norm`, behind a global pooling, would train on one value per channel: that of one image.

    SyncBatchNorm sees the images of all processes.
    """
    if len(images) == 1 and isinstance(norm, nn.BatchNorm2d) and norm.training:
        raise UserError(
            f"{network} trains on 2 images per forward pass or more; set train.device_batch_size to 2 or more, and "
            "train.batch_size to as many for each process"
        )


@torch.no_grad()
def fused(module: M) -> M:
    """Return a copy of `module` in evaluation mode, the batch norm of every `ConvNorm` folded into its convolution."""
    copied = copy.deepcopy(module).eval()
    for part in copied.modules():
        norm = getattr(part, "norm", None)  # none in a module that is fused already
        if isinstance(part, ConvNorm) and isinstance(norm, nn.BatchNorm2d):
            part.conv = fuse_conv_bn_eval(part.conv, norm)
            del part.norm
    return copied
