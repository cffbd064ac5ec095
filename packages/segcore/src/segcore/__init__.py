"""Data, training and evaluation for semantic segmentation. Importing it imports next to nothing."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segcore.errors import UserError
    from segcore.experiment import Experiment, experiments, load_experiment
    from segcore.models.segmentor import Segmentor

_ROOMS = {
    "Experiment": "experiment",
    "Segmentor": "models.segmentor",
    "UserError": "errors",
    "experiments": "experiment",
    "load_experiment": "experiment",
}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:  # only who asks for it pays for importing what it needs, torch for one
        return getattr(import_module(f"segcore.{_ROOMS[name]}"), name)
    raise AttributeError(f"module 'segcore' has no attribute {name!r}")


__all__ = ["Experiment", "Segmentor", "UserError", "experiments", "load_experiment"]
__version__ = "0.1.0"
