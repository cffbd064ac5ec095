"""Models with the reference's weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ddrnet_seg.configs import DDRNetConfig


@pytest.fixture(scope="module")
def official(manifest, fill) -> Callable[[str], dict[str, torch.Tensor]]:
    """A function that returns the reference's weights of a network, such as ddrnet_23, under the authors' names."""

    def tensors(name: str) -> dict[str, torch.Tensor]:
        shapes = manifest(name)["state_dict"]
        return fill({k: v for k, v in shapes.items() if not k.endswith("num_batches_tracked")})

    return tensors


@pytest.fixture(scope="module")
def filled(official) -> Callable[..., Any]:
    """A function that builds a variant with the reference's weights."""

    def build(variant: str, **settings: Any) -> Any:
        model = DDRNetConfig(variant=variant, **settings).build().eval()
        model.load_official(official(f"ddrnet_{variant}"))
        return model

    return build
