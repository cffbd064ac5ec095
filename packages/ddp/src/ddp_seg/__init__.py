"""DDP: diffusion for dense visual prediction (arXiv 2303.17559). Importing it imports no torch."""

__version__ = "0.1.0"
