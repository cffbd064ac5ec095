"""Data, training and evaluation for semantic segmentation. Importing it imports next to nothing."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segcore.config.registry import experiments, load_experiment
    from segcore.config.schema import Experiment
    from segcore.errors import UserError
    from segcore.models.segmentor import Segmentor

_MODULES = {
    "Experiment": "config.schema",
    "Segmentor": "models.segmentor",
    "UserError": "errors",
    "experiments": "config.registry",
    "load_experiment": "config.registry",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:  # only who asks for it pays for importing what it needs, torch for one
        return getattr(import_module(f"segcore.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'segcore' has no attribute {name!r}")


__all__ = ["Experiment", "Segmentor", "UserError", "experiments", "load_experiment"]
__version__ = "0.1.0"
