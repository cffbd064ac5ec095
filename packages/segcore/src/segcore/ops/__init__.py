"""Operators that PyTorch lacks, registered with torch.library: they run on any device, trace, compile and export."""

from segcore.ops.ms_deform_attn import ms_deform_attn
from segcore.ops.registry import kernels, load

__all__ = ["kernels", "ms_deform_attn"]

load()
