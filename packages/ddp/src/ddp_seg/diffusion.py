"""Continuous-time Gaussian diffusion over label embeddings: noise schedules, time pairs and one sampler step.

Paper: arXiv 2303.17559, section 3. Time t runs from 0 (clean) to 1 (noise); the log signal-to-noise ratio l(t) fixes
the signal's share alpha = sqrt(sigmoid(l)) and the noise's sigma = sqrt(sigmoid(-l)).
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Schedule = Literal["cosine", "linear"]


def log_snr(t: Tensor, schedule: Schedule = "cosine") -> Tensor:
    """Return l(t) in float32 for times in [0, 1], any shape, on the device of `t`.

    Always float32 and in exactly this order of operations: at t = 1 the cosine's argument is almost pi / 2, where
    rounding shows (l(1) = -18.907475; float64 would give -18.904310), and the time embedding sees the difference.
    """
    t = t.to("cpu", torch.float32)  # the CPU's rounding everywhere: results must not depend on the device
    match schedule:
        case "cosine":
            x = torch.cos((t + 0.0002) / 1.00025 * math.pi * 0.5)
            return -torch.log((torch.pow(x, -2) - 1).clamp(min=1e-5))
        case "linear":
            return -torch.log(torch.expm1(1e-4 + 10 * (t * t)))
    raise ValueError(f"schedule is {schedule!r}; it must be cosine or linear")


def alpha_sigma(log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """Return the shares (alpha, sigma) of signal and noise at a log-SNR; alpha^2 + sigma^2 = 1."""
    return log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()


def add_noise(clean: Tensor, noise: Tensor, log_snr: Tensor) -> Tensor:
    """Return alpha * clean + sigma * noise for maps (N, C, h, w) and log-SNRs (N,)."""
    alpha, sigma = alpha_sigma(log_snr[:, None, None, None].to(clean.dtype))
    return alpha * clean + sigma * noise


def time_pairs(steps: int, time_difference: int = 1, start: float = 0.0) -> list[tuple[float, float]]:
    """Return (now, next) of every sampling step, from 1 down to `start`.

    With `time_difference` d > 0, the map advances d steps beyond the time that the next step is conditioned on: the
    asymmetric time intervals of the paper (section 3.3).
    """
    span = 1 - start
    return [(1 - k / steps * span, max(1 - (k + 1 + time_difference) / steps * span, start)) for k in range(steps)]


class Noise(NamedTuple):
    """Log-SNR, signal share and noise share at one time; 0-d tensors."""

    log_snr: Tensor
    alpha: Tensor
    sigma: Tensor


def noise_at(times: Sequence[float], schedule: Schedule, like: Tensor) -> list[Noise]:
    """Return the noise level at each time, as tensors with the dtype (float32 or wider) and device of `like`."""
    levels = log_snr(torch.tensor(times), schedule)
    if torch.compiler.is_compiling():
        values = [*levels.to(like)]
    else:  # a copy would wait for the GPU, and cannot be recorded in a CUDA graph
        values = [like.new_full((), level) for level in levels.tolist()]
    return [Noise(level, *alpha_sigma(level)) for level in values]


def ddim_step(noisy: Tensor, clean: Tensor, now: Noise, after: Noise) -> Tensor:
    """Return the map at level `after` from the map at `now` and the predicted clean map, deterministically."""
    noise = (noisy - now.alpha * clean) / now.sigma.clamp(min=1e-8)
    return clean * after.alpha + noise * after.sigma


def ddpm_step(noisy: Tensor, clean: Tensor, now: Noise, after: Noise, noise: Tensor | None) -> Tensor:
    """Return a sample of the map at level `after`; `noise` is standard normal, None for the last step (time 0).

    `1 - c` is kept although it rounds to 0 at t = 1: the published weights were used with it.
    """
    c = -torch.expm1(now.log_snr - after.log_snr)
    mean = after.alpha * (noisy * (1 - c) / now.alpha + c * clean)
    if noise is None:
        return mean
    variance = after.sigma**2 * c
    return mean + torch.exp(0.5 * torch.log(variance.clamp(min=1e-20))) * noise
