"""Data, training and evaluation for semantic segmentation. Importing it imports no torch."""

from segcore.errors import UserError
from segcore.experiment import Experiment, experiments, load_experiment

__all__ = ["Experiment", "UserError", "experiments", "load_experiment"]
__version__ = "0.1.0"
