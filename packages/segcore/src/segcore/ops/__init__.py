"""Operators that PyTorch lacks, registered with torch.library: they run on any device, trace, compile and export."""

from segcore.ops.deform_conv import DeformConv2d, ModulatedDeformConv2d, deform_conv2d
from segcore.ops.deform_unfold import deform_unfold
from segcore.ops.local_attention import deform_local_attn
from segcore.ops.ms_deform_attn import ms_deform_attn
from segcore.ops.registry import kernels, load, unload
from segcore.ops.resize_argmax import resize_argmax

__all__ = [
    "DeformConv2d",
    "ModulatedDeformConv2d",
    "deform_conv2d",
    "deform_local_attn",
    "deform_unfold",
    "kernels",
    "load",
    "ms_deform_attn",
    "resize_argmax",
    "unload",
]

load()
