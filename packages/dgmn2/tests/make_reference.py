"""Small reference values of every part of DGMN2, so that a clone without SEG_REFERENCE still notices a changed number.

`python packages/dgmn2/tests/make_reference.py` writes reference.npz anew; do that only while test_parity.py passes,
which compares with the published code's own numbers.
"""

import zlib
from pathlib import Path

import numpy as np
import torch

from dgmn2_seg.configs import DGMN2

FILE = Path(__file__).with_name("reference.npz")
HEADS = ("fpn", "setr_naive", "setr_pup", "setr_mla")


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
    # No sample and no ReLU of this image is so near its kink that rounding could change the gradients.
    images, values = normal("image4", (2, 3, 57, 90)), {}
    labels = torch.arange(2 * 57 * 90).view(2, 57, 90) // 50 % 20
    labels[labels == 19] = 255
    with torch.no_grad():
        for head in HEADS:
            for img_size in (49, None):
                model = filled(DGMN2(backbone="nano", head=head, img_size=img_size).build())
                values[f"{head}.{img_size}.logits"] = model(images)[:, ::3, ::5, ::5]
        for k, x in enumerate(filled(DGMN2().build()).backbone(images)):
            values[f"tiny.map{k}"] = x[:, ::16]
    for average in ("all", "valid"):
        model = filled(DGMN2(backbone="nano", average=average).build())
        model.class_weight = torch.linspace(0.5, 1.5, 19)
        losses = model.losses(images, labels)
        losses["loss"].backward()
        values |= {f"{average}.{name}": value.detach() for name, value in losses.items()}
        values[f"{average}.gradients"] = torch.stack([p.grad.double().norm() for p in model.parameters()]).float()
    return {name: value.numpy() for name, value in values.items()}


if __name__ == "__main__":
    np.savez_compressed(FILE, **compute())
