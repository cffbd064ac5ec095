"""Parts of a model that a setting chooses by prefix: frozen ones, and those with a learning rate of their own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from segcore.config.options import nearest
from segcore.config.schema import Experiment, OptimizerConfig
from segcore.errors import UserError
from segcore.models.segmentor import Segmentor


def named(model: Segmentor, prefix: str, setting: str) -> dict[str, nn.Parameter]:
    """Return, by own name, the parameters whose own or published name begins with the whole words of `prefix`.

    Words are what dots separate: `layer1` begins `layer1.0.weight`, but not `layer10.weight`. Raises UserError, which
    names the `setting` and the nearest prefix, when there are none.
    """
    names, parameters = model.key_map(), dict(model.named_parameters())
    both = {name: (f"{name}.", f"{names[name]}.") for name in parameters}
    found = {name: parameters[name] for name in parameters if any(n.startswith(f"{prefix}.") for n in both[name])}
    if not found:
        words = [n.split(".")[:-1] for pair in both.values() for n in pair]
        known = {".".join(parts[:length]) for parts in words for length in range(1, len(parts) + 1)}
        parts = dict.fromkeys(name.partition(".")[0] for name in parameters)
        raise UserError(
            f"{setting} {prefix}: no parameter's name begins with it{nearest(prefix, known)}; "
            f"the model's parts are {', '.join(parts)}"
        )
    return found


def freeze(model: Segmentor, prefixes: Sequence[str]) -> list[nn.Module]:
    """Exclude the parameters with these prefixes from training; return the modules that have no others.

    Those modules belong in evaluation mode. Raises UserError for an unknown prefix and when nothing is left to train.
    """
    frozen = _union(model, prefixes)
    for parameter in frozen:
        parameter.requires_grad_(False)
    if frozen and not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"train.freeze {' '.join(prefixes)}: leaves no parameter to train; freeze fewer parts")
    own = {module: set(module.parameters()) for module in model.modules()}
    return [module for module, parameters in own.items() if parameters and parameters <= frozen]


def frozen_note(exp: Experiment, model: Segmentor, *, resumed: bool) -> str:
    """Return a line for the user about what `freeze` excludes, and whether it has only random weights."""
    frozen = _union(model, exp.train.freeze)
    part, whole = (sum(p.numel() for p in some) / 1e6 for some in (frozen, model.parameters()))
    random = "" if resumed or exp.train.init_from else " with random weights, as train.init_from is None"
    return f"frozen: {', '.join(exp.train.freeze)} ({part:.3g} M of {whole:.3g} M parameters){random}"


def _union(model: Segmentor, prefixes: Sequence[str]) -> set[nn.Parameter]:
    return {parameter for prefix in prefixes for parameter in named(model, prefix, "train.freeze").values()}


def lr_factors(model: Segmentor, optimizer: OptimizerConfig) -> dict[str, float]:
    """Return the factor of each parameter by own name, for those that `optimizer.lr_mult` names.

    The longest prefix counts. Raises UserError for an unknown one.
    """
    found: dict[str, float] = {}
    for prefix, factor in sorted(optimizer.lr_mult, key=lambda item: len(item[0])):
        found |= dict.fromkeys(named(model, prefix, "optimizer.lr_mult"), factor)
    return found
