"""Train, evaluate and use semantic segmentation models. Importing it imports no torch.

`seg = segcore.load_model(config, weights)` returns a model that segments images: `seg("street.jpg")`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segcore.config.registry import experiments, load_experiment
    from segcore.config.schema import Experiment
    from segcore.errors import UserError
    from segcore.inference import LoadedModel, load_model
    from segcore.models.segmentor import Segmentor
    from segcore.result import Result

_MODULES = {
    "Experiment": "config.schema",
    "LoadedModel": "inference",
    "Result": "result",
    "Segmentor": "models.segmentor",
    "UserError": "errors",
    "experiments": "config.registry",
    "load_experiment": "config.registry",
    "load_model": "inference",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:  # imported on first use: some import torch
        return getattr(import_module(f"segcore.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'segcore' has no attribute {name!r}")


__all__ = [
    "Experiment", "LoadedModel", "Result", "Segmentor", "UserError", "experiments", "load_experiment", "load_model"
]  # fmt: skip
__version__ = "0.1.0"
