"""DDRNet: deep dual-resolution networks for real-time segmentation (arXiv 2101.06085). Imports no torch."""

__version__ = "0.1.0"
