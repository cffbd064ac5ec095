"""DDP's parts against small stored values, in any clone; test_parity.py compares them with the published code.

`python packages/ddp/tests/test_reference.py` rewrites reference.npz; do that only while test_parity.py passes.
"""

from pathlib import Path

import torch

import segcore
from ddp_seg.diffusion import log_snr, time_pairs
from segcore.testing.stored import check, filled, normal, write

FILE = Path(__file__).with_name("reference.npz")
CASES = {
    "convnext": "ddp_convnext_t_4x4_512x1024_160k_cityscapes",
    "aligned": "ddp_convnext_t_4x4_512x1024_5k_cityscapes_aligned",
    "swin": "ddp_swin_t_2x8_512x512_160k_ade20k",
}


def build(case):
    options = ["model.drop_path=0", "model.bit_scale=1"]
    return filled(segcore.load_experiment(CASES[case]).with_overrides(options).model.build())


def compute():
    """Return every value by name."""
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
    return values


def test_stored_values():
    check(compute(), FILE)


if __name__ == "__main__":
    write(compute(), FILE)
