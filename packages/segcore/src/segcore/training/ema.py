"""The exponential moving average (EMA) of a model's weights, which evaluation and checkpoints use when it is on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Average = dict[str, Tensor]
"""Name -> averaged value of every finite floating-point entry of a state dict; other entries are not averaged."""


def start_ema(model: nn.Module) -> Average:
    """Return the average before the first step: a copy of the weights."""
    state = {name: value.detach() for name, value in model.state_dict().items() if value.is_floating_point()}
    # A table may contain an infinity, whose mean with itself is NaN.
    return {name: value.clone() for name, value in state.items() if value.isfinite().all()}


@torch.no_grad()
def update_ema(average: Average, model: nn.Module, decay: float, skip: Tensor | None = None) -> None:
    """Set average = decay * average + (1 - decay) * value, for parameters and running statistics.

    Where the bool tensor `skip` is true, the average does not change; this is decided on the device.
    """
    state, averages = model.state_dict(), list(average.values())
    values = [state[name] for name in average]
    if skip is None:
        torch._foreach_lerp_(averages, values, 1 - decay)
    else:  # not `_foreach_lerp_` with a tensor per weight, which takes a launch for each
        changes = torch._foreach_sub(values, averages)
        torch._foreach_mul_(changes, torch.where(skip, 0.0, 1 - decay))
        torch._foreach_add_(averages, changes)


@contextmanager
def averaged(model: nn.Module, average: Average | None) -> Iterator[None]:
    """Give `model` the averaged weights within a `with` block; without an average, do nothing."""
    own = {name: value.clone() for name, value in model.state_dict().items() if name in average} if average else {}
    try:
        if average:
            model.load_state_dict(average, strict=False)
        yield
    finally:
        model.load_state_dict(own, strict=False)
