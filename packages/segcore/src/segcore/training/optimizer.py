"""The optimizer: each parameter's learning rate and weight decay, and the state by parameter name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from segcore.config.schema import OptimizerConfig, ParamRule
from segcore.errors import UserError
from segcore.models.segmentor import Segmentor
from segcore.training.parameters import lr_factors

OptimizerState = dict[str, dict[str, Tensor]]
"""Parameter name -> the optimizer's state for it, such as moments."""


def param_rule(name: str, optimizer: OptimizerConfig) -> ParamRule:
    """Return the rule for a parameter's published name; a neutral rule when none matches.

    The longest key contained in the name wins (ties: the first in alphabetical order); no other rule applies.
    """
    rules = sorted(optimizer.rules, key=lambda rule: (-len(rule.key), rule.key))
    return next((rule for rule in rules if rule.key in name), ParamRule(""))


def param_settings(names: Iterable[str], optimizer: OptimizerConfig) -> dict[str, tuple[float, float]]:
    """Return (base learning rate, weight decay) by published parameter name."""
    rules = {name: param_rule(name, optimizer) for name in names}
    return {n: (optimizer.lr * r.lr_mult, optimizer.weight_decay * r.decay_mult) for n, r in rules.items()}


def build_optimizer(model: Segmentor, optimizer: OptimizerConfig) -> torch.optim.Optimizer:
    """Return AdamW or SGD over the trainable parameters of `model`, which must already be on its device.

    Parameters with equal settings share a group, which makes the fused kernels faster; the result is the same as with a
    group per parameter. A group has `initial_lr`, from which the schedule computes `lr`. A tied parameter follows the
    rule for its first name. The factors of `lr_mult` multiply those of the rules. Frozen parameters are left out. The
    fused kernels skip a step, on the device, when the optimizer's attribute `found_inf` is 1.
    """
    official = model.key_map()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    settings = param_settings((official[name] for name in parameters), optimizer)
    factors = lr_factors(model, optimizer)
    groups: defaultdict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in parameters.items():
        lr, decay = settings[official[name]]
        groups[lr * factors.get(name, 1), decay].append(parameter)
    param_groups = [
        {"params": params, "lr": lr, "initial_lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()
    ]
    match optimizer.kind:
        case "adamw":
            return torch.optim.AdamW(param_groups, betas=optimizer.betas, fused=True)
        case "sgd":
            sgd = torch.optim.SGD(param_groups, lr=optimizer.lr, momentum=optimizer.momentum, fused=True)
            if optimizer.momentum:
                for parameter in parameters.values():  # torch leaves them uninitialized if step 1 is skipped
                    sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            return sgd


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> OptimizerState:
    """Return the optimizer's state by parameter name, so that it does not depend on the parameter groups."""
    return {name: dict(optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state}


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Restore the state that `optimizer_state` returned. Groups and their settings do not change.

    The state of parameters that are frozen by now is dropped, and those that were frozen then start without any. Raises
    UserError when the state belongs to another model's parameters or to another kind of optimizer.
    """
    names = {p: name for name, p in model.named_parameters()}
    trained = [names[p] for group in optimizer.param_groups for p in group["params"]]
    if unknown := sorted(set(state) - set(names.values())):
        raise UserError(
            f"the optimizer state is for {len(unknown)} parameters that are not trained here (first: {unknown[0]}); "
            "resume with the configuration of the original run"
        )
    adamw = isinstance(optimizer, torch.optim.AdamW)
    other, key = ("sgd", "momentum_buffer") if adamw else ("adamw", "exp_avg")
    if any(key in each for each in state.values()):
        raise UserError(f"the optimizer state is that of {other}; resume with --optimizer.kind {other}")
    own = optimizer.state_dict()
    own["state"] |= {index: state[name] for index, name in enumerate(trained) if state.get(name)}
    optimizer.load_state_dict(own)
    for parameter, values in optimizer.state.items():  # the fused kernels need the parameter's memory layout
        for key, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                values[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
