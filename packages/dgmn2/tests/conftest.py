"""Models with the reference's weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dgmn2_seg.configs import DGMN2Config


@pytest.fixture(scope="module")
def official(manifest, fill) -> Callable[[str], dict[str, torch.Tensor]]:
    """A function that returns the reference's weights of a head on the tiny backbone, under their published names."""

    def tensors(head: str) -> dict[str, torch.Tensor]:
        shapes = manifest(f"{head}_dgmn2_tiny_4x2_769x769_40k_cityscapes")["state_dict"]
        return fill({k: v for k, v in shapes.items() if not k.endswith("num_batches_tracked")})

    return tensors


@pytest.fixture(scope="module")
def filled(official) -> Callable[..., Any]:
    """A function that builds a head on the tiny backbone with the reference's weights."""

    def build(head: str, **settings: Any) -> Any:
        model = DGMN2Config(backbone="tiny", head=head, **settings).build().eval()
        model.load_official(official(head))
        return model

    return build
