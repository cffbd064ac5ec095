"""Where golden numbers of all kinds and the few real images are. Tests that need them skip without, saying so."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from segcore import ops


@pytest.fixture(scope="session")
def golden(reference: Path) -> Callable[[str], dict[str, np.ndarray]]:
    """Return `load(path)`, which reads an .npz below the reference folder, such as `eval/golden/resize.npz`."""

    def load(path: str) -> dict[str, np.ndarray]:
        with np.load(reference / path, allow_pickle=False) as arrays:
            return dict(arrays)

    return load


@pytest.fixture(scope="session")
def real_data(reference: Path) -> Path:
    """Folder with a few real image and label pairs, one sub-folder per dataset in its own layout."""
    folder = reference.parent / "data"
    if not folder.is_dir():
        pytest.skip("no folder `data` beside SEG_REFERENCE: no real images to read")
    return folder


@pytest.fixture(params=["plain", "compiled"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test with the plain kernels of the operators, and again with those of an installed package."""
    ops.load() if request.param == "compiled" else ops.unload()
    if request.param == "compiled" and ops.kernels()["ms_deform_attn"]["cpu"].startswith("plain"):
        pytest.skip(f"no compiled kernels: {ops.kernels()['ms_deform_attn']['cpu']}")
    yield request.param
    ops.load()
