"""DDPS: a denoising diffusion prior for segmentation (arXiv 2306.01721) and its base models. Imports no torch."""

__version__ = "0.1.0"
