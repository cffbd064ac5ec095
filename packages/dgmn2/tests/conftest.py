"""Reference numbers of DGMN2: found through SEG_REFERENCE, which `.ci/run` sets."""

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dgmn2_seg.configs import DGMN2


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
        with np.load(reference / "dgmn2" / "golden" / f"{name}.npz") as data:
            return {k: torch.from_numpy(v.copy()) if v.dtype.kind in "fiub" else v for k, v in data.items()}

    return load


@pytest.fixture(scope="session")
def manifest(reference: Path) -> Callable[[str], dict[str, Any]]:
    """A function that loads the parameter list of a published row."""
    return lambda name: json.loads((reference / "dgmn2" / "manifests" / f"{name}.json").read_text())


@pytest.fixture(scope="session")
def official(manifest, fill) -> Callable[[str], dict[str, torch.Tensor]]:
    """A function that gives the reference's weights of a head on the tiny backbone, under their published names."""

    def tensors(head: str) -> dict[str, torch.Tensor]:
        shapes = manifest(f"{head}_dgmn2_tiny_4x2_769x769_40k_cityscapes")["state_dict"]
        return fill({k: v for k, v in shapes.items() if not k.endswith("num_batches_tracked")})

    return tensors


@pytest.fixture(scope="session")
def filled(official) -> Callable[..., Any]:
    """A function that builds a head on the tiny backbone with the reference's weights."""

    def build(head: str, **settings: Any) -> Any:
        model = DGMN2(backbone="tiny", head=head, **settings).build().eval()
        model.load_official(official(head))
        return model

    return build
