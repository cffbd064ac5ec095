"""Reference numbers of DDP: found through SEG_REFERENCE, which `.ci/run` sets."""

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
from ddp_seg.model import DDPSegmentor


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of reference numbers, or a skip."""
    if "SEG_REFERENCE" not in os.environ:
        pytest.skip("SEG_REFERENCE is not set: no reference numbers to compare with")
    return Path(os.environ["SEG_REFERENCE"])


@pytest.fixture(scope="session")
def fill(reference: Path) -> Any:
    """The reference's module of deterministic weights."""
    spec = importlib.util.spec_from_file_location("fill", reference / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def golden(reference: Path) -> Callable[[str], dict[str, torch.Tensor]]:
    """A function that loads one file of golden numbers as tensors (texts stay arrays)."""

    def load(name: str) -> dict[str, Any]:
        with np.load(reference / "ddp" / "golden" / name) as data:
            return {k: torch.from_numpy(v.copy()) if v.dtype.kind in "fiub" else v for k, v in data.items()}

    return load


@pytest.fixture(scope="session")
def filled(reference: Path, fill: Any) -> Callable[..., DDPSegmentor]:
    """A function that builds a configuration with the reference's weights, loaded under their published names."""

    def build(name: str, *overrides: str) -> DDPSegmentor:
        manifest = json.loads((reference / "ddp" / "manifests" / f"{name}.json").read_text())
        shapes = {k: v for k, v in manifest["state_dict"].items() if not k.endswith(SKIPPED)}
        model = segcore.load_experiment(name).with_overrides(overrides).model.build().eval()
        report = model.load_official(fill.filled(shapes))
        assert report.loaded == len(shapes)
        return model

    return build


SKIPPED = ("num_batches_tracked", "relative_position_index")
