"""Small pieces that several models are made of."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F


def resize(x: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    """Return `x` (N, C, H, W) resized bilinearly, without antialiasing, to `size` (height, width)."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=list(size), mode="bilinear", align_corners=align_corners)


class ConvNorm(nn.Sequential):
    """Convolution without bias that keeps the size, a norm and perhaps an activation: `conv`, `norm`, `act`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        norm: Callable[[int], nn.Module],
        act: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = norm(out_channels)
        if act is not None:
            self.act = act
