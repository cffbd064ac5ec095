"""DGMN2's parts against small stored values, in any clone; test_parity.py compares them with the published code.

`python packages/dgmn2/tests/test_reference.py` rewrites reference.npz; do that only while test_parity.py passes.
"""

from pathlib import Path

import torch

from dgmn2_seg.configs import DGMN2Config
from segcore.config.schema import LossConfig
from segcore.testing.stored import check, filled, normal, write

FILE = Path(__file__).with_name("reference.npz")
HEADS = ("fpn", "setr_naive", "setr_pup", "setr_mla")


def compute():
    """Return every value by name."""
    # No sample and no ReLU of this image is close enough to its kink for rounding to change the gradients.
    images, values = normal("image4", (2, 3, 57, 90)), {}
    labels = torch.arange(2 * 57 * 90).view(2, 57, 90) // 50 % 20
    labels[labels == 19] = 255
    with torch.no_grad():
        for head in HEADS:
            for img_size in (49, None):
                model = filled(DGMN2Config(backbone="nano", head=head, img_size=img_size).build())
                values[f"{head}.{img_size}.logits"] = model(images)[:, ::3, ::5, ::5]
        for k, x in enumerate(filled(DGMN2Config().build()).backbone(images)):
            values[f"tiny.map{k}"] = x[:, ::16]
    for average in ("all", "valid"):
        model = filled(DGMN2Config(backbone="nano").build())
        weight = tuple(torch.linspace(0.5, 1.5, 19).tolist())
        losses = model.losses(
            images, labels, loss=LossConfig("cross_entropy", weight, avg_non_ignore=average == "valid")
        )
        losses["loss"].backward()
        values |= {f"{average}.{name}": value.detach() for name, value in losses.items()}
        values[f"{average}.gradients"] = torch.stack([p.grad.double().norm() for p in model.parameters()]).float()
    return values


def test_stored_values():
    check(compute(), FILE)


if __name__ == "__main__":
    write(compute(), FILE)
