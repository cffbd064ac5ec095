"""DDRNet's parts against small stored values, in any clone; test_parity.py compares them with the published code.

`python packages/ddrnet/tests/test_reference.py` rewrites reference.npz; do that only while test_parity.py passes.
"""

from pathlib import Path

import torch

from ddrnet_seg.configs import DDRNetConfig
from ddrnet_seg.model import DDRNetClassifier
from segcore.config.schema import LossConfig
from segcore.testing.stored import check, filled, normal, write

FILE = Path(__file__).with_name("reference.npz")


def compute():
    """Return every value by name."""
    images = normal("image", (2, 3, 57, 90))
    labels = torch.arange(2 * 57 * 90).view(2, 57, 90) // 50 % 20
    labels[labels == 19] = 255
    values = {}
    with torch.no_grad():
        for variant in ("23_slim", "39"):
            model = filled(DDRNetConfig(variant=variant).build())
            values[f"{variant}.logits"] = model(images)[:, ::3, ::5, ::5]
            features = model.backbone(normal("padded", (1, 3, 64, 96)))
            values[f"{variant}.context"] = model.context(features.low)[:, ::8]
            values[f"{variant}.auxiliary"] = model.auxiliary_head(features.middle)[:, ::3]
            values[f"{variant}.classifier"] = filled(DDRNetClassifier(variant))(images[..., :56, :88])[:, ::50]
    for loss, threshold in (("ohem", 0.06), ("ohem_pyradd", 0.05), ("cross_entropy", 0.9)):
        model = filled(DDRNetConfig().build())
        weight = tuple(torch.linspace(0.5, 1.5, 19).tolist())
        settings = LossConfig(loss, weight, ohem_threshold=threshold, ohem_min_kept=3000)
        losses = model.losses(images, labels, loss=settings)
        losses["loss"].backward()
        values |= {f"{loss}.{name}": value.detach() for name, value in losses.items()}
        values[f"{loss}.gradients"] = torch.stack([p.grad.double().norm() for p in model.parameters()]).float()
    return values


def test_stored_values():
    check(compute(), FILE)


if __name__ == "__main__":
    write(compute(), FILE)
