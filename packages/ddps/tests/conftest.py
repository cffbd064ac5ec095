"""Models with the reference's weights."""

from collections.abc import Callable
from typing import Any

import pytest

import segcore


@pytest.fixture(scope="module")
def filled(manifest, fill) -> Callable[..., Any]:
    """A function that builds a configuration with the reference's weights, loaded under their published names.

    The tables of the noise schedule keep the model's own values, as in the reference cases.
    """

    def build(name: str, *overrides: str) -> Any:
        model = segcore.load_experiment(name).with_overrides(overrides).model.build().eval()
        shapes = {k: v for k, v in manifest(name)["state_dict"].items() if not k.endswith("num_batches_tracked")}
        own = {theirs: model.state_dict()[ours] for ours, theirs in model.key_map().items()}
        model.load_official({**fill(shapes), **{k: v for k, v in own.items() if ".log_" in k}})
        return model

    return build
