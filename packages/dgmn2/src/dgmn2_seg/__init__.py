"""DGMN2: dynamic graph message passing networks for visual recognition (arXiv 2209.09760). Imports no torch."""

__version__ = "0.1.0"
