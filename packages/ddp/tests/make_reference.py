"""Small reference values of every part of DDP, so that a clone without SEG_REFERENCE still notices a changed number.

`python packages/ddp/tests/make_reference.py` writes reference.npz anew; do that only while test_parity.py passes, which
compares with the official code's own numbers.
"""

import zlib
from pathlib import Path

import numpy as np
import torch

import segcore
from ddp_seg.diffusion import log_snr, time_pairs

FILE = Path(__file__).with_name("reference.npz")
CASES = {
    "convnext": "ddp_convnext_t_4x4_512x1024_160k_cityscapes",
    "aligned": "ddp_convnext_t_4x4_512x1024_5k_cityscapes_aligned",
    "swin": "ddp_swin_t_2x8_512x512_160k_ade20k",
}


def normal(name, shape):
    """Standard normal numbers that follow from a name; numpy's legacy stream is frozen."""
    return torch.from_numpy(np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype("float32"))


def build(case):
    """The configuration with weights that follow from the published tensor names, at their usual scales."""
    model = (
        segcore.load_experiment(CASES[case]).with_overrides(["model.drop_path=0", "model.bit_scale=1"]).model.build()
    )
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            official, noise = model.official_names()[name], normal(model.official_names()[name], tensor.shape)
            if tensor.ndim > 1:
                noise /= (tensor.numel() / tensor.shape[0]) ** 0.5
            elif official.endswith(("weight", "gamma", "running_var")):
                noise = 1 + 0.1 * noise.abs()
            else:
                noise *= 0.1
            tensor.copy_(model.convert_official(official, noise))
    model.auxiliary_head.dropout.p = 0.0
    return model.eval()


def compute():
    """Return every reference value by name."""
    values = {"log_snr": log_snr(torch.linspace(0, 1, 7)), "linear": log_snr(torch.linspace(0, 1, 7), "linear")}
    values["time_pairs"] = torch.tensor(time_pairs(10))
    for case in CASES:
        model = build(case)
        image, labels = normal("image", (1, 3, 45, 70)), torch.arange(45 * 70).view(1, 45, 70) // 50 % 20
        labels[labels == 19] = 255
        with torch.no_grad():
            features = model.encode(image)
            noise = normal("noise", (2, *features.shape[1:]))
            values |= {f"{case}.map{i}": x[:, ::16, ::2, ::2] for i, x in enumerate(model.backbone(image))}
            values[f"{case}.features"] = features[:, ::16, ::3, ::3]
            for sampler in ("ddim", "ddpm"):
                steps = normal("steps", (3, *noise.shape))
                for accumulate in (False, True):
                    answer = model.denoise(
                        features, noise, steps=3, sampler=sampler, accumulate=accumulate, step_noise=steps
                    )
                    values[f"{case}.{sampler}.{accumulate}"] = answer[:, ::3, ::3, ::3]
        draws = {"times": torch.tensor([0.3]), "noise": noise[:1]}
        losses = model.losses(image, labels, draws=draws)
        losses["loss"].backward()
        values |= {f"{case}.{name}": value.detach() for name, value in losses.items()}
        values[f"{case}.gradients"] = torch.stack([p.grad.double().norm() for p in model.parameters()]).float()
    return {name: value.numpy() for name, value in values.items()}


if __name__ == "__main__":
    np.savez_compressed(FILE, **compute())
