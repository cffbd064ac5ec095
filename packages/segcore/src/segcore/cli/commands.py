"""The table of commands."""

from __future__ import annotations

from typing import Any

from segcore.cli.bench import Bench
from segcore.cli.check import Check
from segcore.cli.configs import Configs
from segcore.cli.demo import Demo
from segcore.cli.env import Env
from segcore.cli.export import Export
from segcore.cli.predict import Predict
from segcore.cli.test import Test
from segcore.cli.train import Train

COMMANDS: dict[str, type[Any]] = {
    "train": Train,
    "test": Test,
    "predict": Predict,
    "configs": Configs,
    "check": Check,
    "bench": Bench,
    "export": Export,
    "demo": Demo,
    "env": Env,
}
