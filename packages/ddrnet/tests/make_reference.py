"""Small reference values of every part of DDRNet, so that a clone without SEG_REFERENCE still notices a changed number.

`python packages/ddrnet/tests/make_reference.py` writes reference.npz anew; do that only while test_parity.py passes,
which compares with the published code's own numbers.
"""

import zlib
from pathlib import Path

import numpy as np
import torch

from ddrnet_seg.configs import DDRNet
from ddrnet_seg.model import DDRNetClassifier

FILE = Path(__file__).with_name("reference.npz")


def normal(name, shape):
    """Standard normal numbers that follow from a name; numpy's legacy stream is frozen."""
    return torch.from_numpy(np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype("float32"))


def filled(model):
    """The model with weights that follow from the published tensor names, at their usual scales."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            official = model.official_names()[name]
            noise = normal(official, tensor.shape)
            if tensor.ndim > 1:
                noise /= (tensor.numel() / tensor.shape[0]) ** 0.5
            elif official.endswith(("weight", "running_var")):
                noise = 1 + 0.1 * noise.abs()
            else:
                noise *= 0.1
            tensor.copy_(noise)
    return model.eval()


def compute():
    """Return every reference value by name."""
    images = normal("image", (2, 3, 57, 90))
    labels = torch.arange(2 * 57 * 90).view(2, 57, 90) // 50 % 20
    labels[labels == 19] = 255
    values = {}
    with torch.no_grad():
        for variant in ("23_slim", "39"):
            model = filled(DDRNet(variant=variant).build())
            values[f"{variant}.logits"] = model(images)[:, ::3, ::5, ::5]
            features = model.backbone(normal("padded", (1, 3, 64, 96)))
            values[f"{variant}.context"] = model.context(features.low)[:, ::8]
            values[f"{variant}.auxiliary"] = model.auxiliary_head(features.middle)[:, ::3]
            values[f"{variant}.classifier"] = filled(DDRNetClassifier(variant))(images[..., :56, :88])[:, ::50]
    for loss, threshold in (("ohem", 0.06), ("ohem_seed", 0.05), ("cross_entropy", 0.9)):
        model = filled(DDRNet(loss=loss, ohem_threshold=threshold, ohem_min_kept=3000).build())
        model.class_weight = torch.linspace(0.5, 1.5, 19)
        losses = model.losses(images, labels)
        losses["loss"].backward()
        values |= {f"{loss}.{name}": value.detach() for name, value in losses.items()}
        values[f"{loss}.gradients"] = torch.stack([p.grad.double().norm() for p in model.parameters()]).float()
    return {name: value.numpy() for name, value in values.items()}


if __name__ == "__main__":
    np.savez_compressed(FILE, **compute())
