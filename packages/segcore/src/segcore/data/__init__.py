"""Semantic segmentation datasets: readers, transforms and the training loader."""
