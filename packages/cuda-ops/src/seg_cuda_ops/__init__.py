"""Compiled kernels for the operators of segcore, which finds them by itself when this package is installed."""

from seg_cuda_ops.registration import register

__all__ = ["register"]
__version__ = "0.1.0"
