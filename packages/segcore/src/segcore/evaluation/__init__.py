"""Inference on whole images, metrics and reports."""
