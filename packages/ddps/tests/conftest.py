"""Reference numbers of DDPS: found through SEG_REFERENCE, which `.ci/run` sets."""

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import segcore


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of reference numbers, or a skip."""
    if "SEG_REFERENCE" not in os.environ:
        pytest.skip("SEG_REFERENCE is not set: no reference numbers to compare with")
    return Path(os.environ["SEG_REFERENCE"])


@pytest.fixture(scope="session")
def fill(reference: Path) -> Callable[..., dict[str, torch.Tensor]]:
    """A function that gives deterministic tensors for names and shapes."""
    spec = importlib.util.spec_from_file_location("fill", reference / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.filled


@pytest.fixture(scope="session")
def golden(reference: Path) -> Callable[[str], dict[str, Any]]:
    """A function that loads one file of golden numbers as tensors (texts stay arrays)."""

    def load(name: str) -> dict[str, Any]:
        with np.load(reference / "ddps" / "golden" / f"{name}.npz") as data:
            return {k: torch.from_numpy(v.copy()) if v.dtype.kind in "fiub" else v for k, v in data.items()}

    return load


@pytest.fixture(scope="session")
def manifest(reference: Path) -> Callable[[str], dict[str, Any]]:
    """A function that loads the parameter list of a configuration."""
    return lambda name: json.loads((reference / "ddps" / "manifests" / f"{name}.json").read_text())


@pytest.fixture(scope="session")
def filled(manifest, fill) -> Callable[..., Any]:
    """A function that builds a configuration with the reference's weights, loaded under their published names.

    The tables of the noise schedule keep what the model computed, as in the reference cases.
    """

    def build(name: str, *overrides: str) -> Any:
        model = segcore.load_experiment(name).with_overrides(overrides).model.build().eval()
        shapes = {k: v for k, v in manifest(name)["state_dict"].items() if not k.endswith("num_batches_tracked")}
        own = {theirs: model.state_dict()[ours] for ours, theirs in model.official_names().items()}
        model.load_official({**fill(shapes), **{k: v for k, v in own.items() if ".log_" in k}})
        return model

    return build
