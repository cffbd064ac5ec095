"""Data, training and evaluation for semantic segmentation. Importing it imports no torch."""

from typing import TYPE_CHECKING, Any

from segcore.errors import UserError
from segcore.experiment import Experiment, experiments, load_experiment

if TYPE_CHECKING:
    from segcore.models.segmentor import Segmentor


def __getattr__(name: str) -> Any:
    if name == "Segmentor":  # only who asks for it pays for importing torch
        from segcore.models.segmentor import Segmentor

        return Segmentor
    raise AttributeError(f"module 'segcore' has no attribute {name!r}")


__all__ = ["Experiment", "Segmentor", "UserError", "experiments", "load_experiment"]
__version__ = "0.1.0"
