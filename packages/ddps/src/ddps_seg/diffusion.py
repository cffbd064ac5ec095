"""Discrete diffusion of label maps with uniform transitions (arXiv 2306.01721, section 3; D3PM, arXiv 2107.03006).

Every class, background included, is a state; a step of noise keeps a label or draws a new one uniformly. A noise index
k runs from 0 (cleanest) to T - 1 (almost uniform), and -1 means no noise. The network's timestep t runs the other way:
t = 0 is the noisiest map, and k = T - 1 - t.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Schedule = Literal["linear", "cosine"]
Mode = Literal["q_pred", "q_posterior", "bayes"]
CLEAN, NOISY = 0.99999, 0.000009
"""The cumulative alpha of the first and of the last noise index."""
TINY = 1e-30
"""Replaces a probability of zero."""


class NoiseSchedule(NamedTuple):
    """Logarithms of alpha, the share of kept labels, and beta = (1 - alpha) / K, float32.

    Per step (T,), and cumulative (T + 1,), where the last entry means no noise.
    """

    log_at: Tensor
    log_bt: Tensor
    log_cumprod_at: Tensor
    log_cumprod_bt: Tensor


def alphas_and_betas(timesteps: int, num_classes: int, schedule: Schedule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return alphas and betas per step (T,), and cumulative (T + 1,), in float32 and in this order of operations."""
    i = torch.arange(timesteps, device="cpu")
    match schedule:
        case "linear":
            kept = i / (timesteps - 1) * (NOISY - CLEAN) + CLEAN
        case "cosine":
            kept = (torch.cos((i + timesteps) * math.pi * 0.5 / timesteps) + 1) ** 2 * (CLEAN - NOISY) + NOISY
        case other:
            raise ValueError(f"schedule is {other!r}; it must be linear or cosine")
    at = kept / torch.cat([torch.ones(1, device="cpu"), kept[:-1]])
    cumulative = torch.cat([kept, torch.ones(1, device="cpu")])
    return at, (1 - at) / num_classes, cumulative, (1 - cumulative) / num_classes


def make_schedule(timesteps: int, num_classes: int, schedule: Schedule) -> NoiseSchedule:
    """Return the tables of a schedule."""
    return NoiseSchedule(*(values.log() for values in alphas_and_betas(timesteps, num_classes, schedule)))


def step_list(timesteps: int, wanted: int | None = None) -> list[int]:
    """Return the network's timesteps of a run, from the noisiest to T - 1, which always comes last.

    `wanted` (None: all) gives the stride T // wanted, so the number of evaluations usually differs from it. Raises
    ValueError when it is below 1.
    """
    if wanted is not None and wanted < 1:
        raise ValueError(f"inference_timesteps is {wanted}; it must be at least 1, or None for all")
    found = list(range(0, timesteps, timesteps // min(timesteps, wanted or timesteps)))
    return found if found[-1] == timesteps - 1 else [*found, timesteps - 1]


def gumbel(uniforms: Tensor) -> Tensor:
    """Return Gumbel noise for uniform draws in [0, 1)."""
    return -torch.log(-torch.log(uniforms + TINY) + TINY)


def sample(log_p: Tensor, uniforms: Tensor) -> Tensor:
    """Return labels (N, h, w) drawn from log-probabilities (N, K, h, w), which need not be normalized."""
    return (gumbel(uniforms) + log_p).argmax(1)


def q_pred(labels: Tensor, index: int | Tensor, noise: NoiseSchedule, uniforms: Tensor) -> Tensor:
    """Return labels (N, h, w) with the noise of an index, or of one index per image (N,), in a single draw.

    The same draw as `sample(log_q_pred(…), uniforms)` without the (N, K, h, w) tensors in between: among the classes of
    equal probability the one with the greatest uniform number wins, so only that one is compared with the old label.
    """
    uniforms = uniforms.to(labels.device)
    most, other = uniforms.max(1)
    own = uniforms.gather(1, labels[:, None])[:, 0]
    kept, changed = _levels(index, noise, labels)
    return torch.where(gumbel(own) + kept >= gumbel(most) + changed, labels, other)


def log_q_pred(labels: Tensor, index: int | Tensor, noise: NoiseSchedule, num_classes: int) -> Tensor:
    """Return log q(x_k | x_0) (N, K, h, w) for labels (N, h, w) and an index or one per image (N,)."""
    kept, changed = _levels(index, noise, labels)
    return torch.where(_is(labels, num_classes), kept[:, None], changed[:, None])


def log_q_posterior(
    clean: Tensor, noisy: Tensor, index: int | Tensor, noise: NoiseSchedule, num_classes: int, *, exact: bool = False
) -> Tensor:
    """Return log-probabilities (N, K, h, w) of x_(k-1), not normalized, from labels x_0 and x_k (N, h, w).

    The published code differs from Bayes' rule: it divides by q(x_k = c | x_0) of each class c instead of the observed
    class, and so favors the noisy label. With `exact` it is Bayes' rule.
    """
    at, bt = _at(noise.log_at, index, noisy), _at(noise.log_bt, index, noisy)
    tiny = math.log(TINY)
    same, changed = torch.logaddexp(at, bt), torch.logaddexp(at + tiny, bt)
    likelihood = torch.where(_is(noisy, num_classes), same[:, None], changed[:, None])
    before = likelihood + log_q_pred(clean, index - 1, noise, num_classes)
    if exact:
        return before
    return (before - log_q_pred(clean, index, noise, num_classes)).clamp(-70, 0)


def _is(labels: Tensor, num_classes: int) -> Tensor:
    """Return (N, K, h, w) bool: whether the class is the label's."""
    return labels[:, None] == torch.arange(num_classes, device=labels.device)[:, None, None]


def _levels(index: int | Tensor, noise: NoiseSchedule, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probability of the old label and of every other one, (N or 1, 1, 1)."""
    a, b = _at(noise.log_cumprod_at, index, labels), _at(noise.log_cumprod_bt, index, labels)
    return torch.logaddexp(a, b), torch.logaddexp(a + math.log(TINY), b)


def _at(table: Tensor, index: int | Tensor, like: Tensor) -> Tensor:
    """Return a table's values at an index, or one per image, as (N or 1, 1, 1)."""
    return table[index].reshape(-1, 1, 1).to(like.device)
