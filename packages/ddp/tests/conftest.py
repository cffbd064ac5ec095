"""Models with the reference's weights."""

from collections.abc import Callable

import pytest

import segcore
from ddp_seg.model import DDP


@pytest.fixture(scope="module")
def filled(manifest, fill) -> Callable[..., DDP]:
    """A function that builds a configuration with the reference's weights, loaded under their published names."""

    def build(name: str, *overrides: str) -> DDP:
        shapes = {k: v for k, v in manifest(name)["state_dict"].items() if not k.endswith(SKIPPED)}
        model = segcore.load_experiment(name).with_overrides(overrides).model.build().eval()
        report = model.load_official(fill(shapes))
        assert report.loaded == len(shapes)
        return model

    return build


SKIPPED = ("num_batches_tracked", "relative_position_index")
