"""What the tests of all packages share: reference numbers, and a browser."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported: small tensors lose time on more threads

os.environ["SEG_LINEAR"] = "mkl"  # equal numbers on every processor; tests of oneDNN's products set it themselves

import contextlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

with contextlib.suppress(ImportError):  # the tests for GPUs run without hypothesis, too
    from hypothesis import settings

    settings.register_profile("any machine", deadline=None)  # an example takes as long as the machine is busy
    settings.load_profile("any machine")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let slow tests run for twenty minutes; `timeout` in pyproject.toml holds for the others."""
    if not config.pluginmanager.hasplugin("timeout"):  # the tests for GPUs run without it, too
        return
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(1200))


def find_reference() -> Path:
    """Return the folder that SEG_REFERENCE names, that reference.txt fetched, or that is installed; or skip."""
    if os.environ.get("SEG_REFERENCE"):
        folder = Path(os.environ["SEG_REFERENCE"]).absolute()
        if not folder.is_dir():
            pytest.fail(f"SEG_REFERENCE names {folder}, which is no folder", pytrace=False)
        return folder
    fetched = Path(__file__).parents[1] / ".reference" / "segcore_reference"
    if fetched.is_dir():
        return fetched
    if spec := importlib.util.find_spec("segcore_reference"):
        return Path(str(spec.origin)).parent
    pytest.skip(
        "no reference numbers; to fetch them: pip install --no-deps --upgrade --target .reference -r reference.txt"
    )


@pytest.fixture(scope="session")
def reference() -> Path:
    """Folder of the reference specifications and golden numbers, or a skip."""
    return find_reference()


@pytest.fixture(scope="session")
def fill(reference: Path) -> Callable[..., dict[str, torch.Tensor]]:
    """A function that gives deterministic tensors for names and shapes."""
    spec = importlib.util.spec_from_file_location("fill", reference / "fill.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.filled


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """The system's Chromium, driven by Playwright, or a skip where there is none."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no chromium on the path")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def golden(reference: Path, request: pytest.FixtureRequest) -> Callable[[str], dict[str, Any]]:
    """A function that loads one file of the method's golden numbers as tensors (texts stay arrays)."""

    def load(name: str) -> dict[str, Any]:
        with np.load(reference / _package(request) / "golden" / f"{name}.npz", allow_pickle=False) as data:
            return {k: torch.from_numpy(v.copy()) if v.dtype.kind in "fiub" else v for k, v in data.items()}

    return load


@pytest.fixture(scope="module")
def manifest(reference: Path, request: pytest.FixtureRequest) -> Callable[[str], dict[str, Any]]:
    """A function that loads the parameter list of one of the method's rows or networks."""
    return lambda name: json.loads((reference / _package(request) / "manifests" / f"{name}.json").read_text())


def _package(request: pytest.FixtureRequest) -> str:
    """Return the folder of the package whose tests ask."""
    return request.path.relative_to(Path(__file__).parent).parts[0]
