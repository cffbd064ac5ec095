"""DDPS's parts against small stored values, in any clone; test_parity.py compares them with the published code.

`python packages/ddps/tests/test_reference.py` rewrites reference.npz; do that only while test_parity.py passes.
"""

from pathlib import Path

import numpy as np
import torch

from ddps_seg.configs import BaseModelConfig, DDPSConfig
from ddps_seg.diffusion import alphas_and_betas, log_q_posterior, make_schedule, q_pred
from segcore.testing.stored import check, filled, normal, write

FILE = Path(__file__).with_name("reference.npz")
SMALL = {"num_classes": 7, "width": 16, "output_width": 24, "num_train_timesteps": 20, "drop_path": 0.0, "dropout": 0.0}


def compute():
    """Return every value by name."""
    images = normal("image", (2, 3, 48, 64))
    labels = torch.arange(2 * 48 * 64).view(2, 48, 64) // 40 % 7
    values = {}
    with torch.no_grad():
        for backbone in ("mit_b0", "mobilenet_v2", "resnet50"):
            model = filled(BaseModelConfig(num_classes=7, backbone=backbone).build())
            values[f"{backbone}.logits"] = model(images)[..., ::5, ::5]
            values[f"{backbone}.condition"] = model.encode(images)[:, ::16]
        for schedule in ("linear", "cosine"):
            values[f"{schedule}.keep"] = torch.cat(alphas_and_betas(20, 7, schedule))
        noise, index = make_schedule(20, 7, "linear"), torch.tensor([3, 0])
        clean, noisy = labels[:, ::4, ::4], labels[:, 1::4, 2::4]
        uniforms = torch.from_numpy(np.random.RandomState(0).random_sample((3, 2, 7, 12, 16)).astype("float32"))
        values["q_pred"] = q_pred(clean, index, noise, uniforms[0])
        for exact in (False, True):
            values[f"posterior.{exact}"] = log_q_posterior(clean, noisy, index, noise, 7, exact=exact)
        model = filled(DDPSConfig(backbone="mit_b0", **SMALL).build())
        condition = model.encode(images)
        for mode, guidance in (("q_pred", 1.0), ("q_pred", 0.4), ("q_posterior", 1.0), ("bayes", 1.0)):
            steps = model.denoise_steps(
                condition, noisy, uniforms=uniforms[:2], inference_timesteps=2, mode=mode, guidance_scale=guidance
            )
            values |= {f"{mode}.{guidance}.{t}": x[:, ::2, ::2, ::2] for t, x in steps.items()}
    draws = {"timesteps": torch.tensor([0, 7]), "masks": noisy, "uniforms": uniforms[1]}
    losses = model.losses(images, labels, draws=draws)
    losses["loss"].backward()
    values |= {f"losses.{name}": value.detach() for name, value in losses.items()}
    norms = [p.grad.double().norm() for p in model.parameters() if p.grad is not None]
    values["losses.gradients"] = torch.stack(norms).float()
    return values


def test_stored_values():
    check(compute(), FILE)


if __name__ == "__main__":
    write(compute(), FILE)
