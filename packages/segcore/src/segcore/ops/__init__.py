"""Operators that PyTorch lacks, registered with torch.library: they run on any device, trace, compile and export."""

from segcore.ops.ms_deform_attn import ms_deform_attn

__all__ = ["ms_deform_attn"]
