"""Small building blocks shared by several models."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

M = TypeVar("M", bound=nn.Module)


def resize(x: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    """Return `x` (N, C, H, W) resized bilinearly, without antialiasing, to `size` (height, width)."""
    symbolic = any(isinstance(side, torch.SymInt) for side in (*x.shape[-2:], *size))  # comparing specializes them
    if not symbolic and tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=list(size), mode="bilinear", align_corners=align_corners)


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


@torch.no_grad()
def fused(module: M) -> M:
    """Return a copy of `module` in evaluation mode, the batch norm of every `ConvNorm` folded into its convolution."""
    copied = copy.deepcopy(module).eval()
    for part in copied.modules():
        if isinstance(part, ConvNorm) and isinstance(part.norm, nn.BatchNorm2d):
            part.conv = fuse_conv_bn_eval(part.conv, part.norm)
            del part.norm
    return copied
