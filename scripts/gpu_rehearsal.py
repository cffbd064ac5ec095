"""A pytest plugin for `gpu_check.sh --rehearse`: every test is imported and set up, then skipped instead of run."""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call() -> None:
    pytest.skip("rehearsed without a GPU")
