"""What several commands share: their options and how a model is loaded."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import FlagConversionOff, FlagCreatePairsOff, Positional, arg

from segcore.config.registry import load_experiment
from segcore.config.schema import Experiment
from segcore.errors import UserError

if TYPE_CHECKING:
    import torch


# The configuration's own options, without a prefix, and `--flag True` instead of `--flag / --no-flag` for its booleans.
Config = Annotated[FlagConversionOff[Experiment], arg(name="")]
Flag = FlagCreatePairsOff[bool]
Checkpoint = Annotated[Positional[str], arg(metavar="CHECKPOINT")]


@dataclass(frozen=True)
class Command:
    """What all commands with a configuration have."""

    experiment: Config
    device: str = "auto"
    """Where to compute: auto (CUDA if there is one), cpu, cuda, cuda:1 …"""
    offline: Flag = False
    """Never use the network; say instead which file belongs where."""

    def run(self, package: str | None) -> None:
        """Do it; `package` is the method's import package, None for `segcore`."""

    @property
    def default_dir(self) -> Path:
        return Path("runs") / self.experiment.name


@dataclass(frozen=True)
class Parallel(Command):
    """What the commands have that several processes can do together."""

    gpus: int | None = None
    """Start so many processes, one per GPU (with `--device cpu`: on the CPU). Leave it out if torchrun starts them."""

    def run(self, package: str | None) -> None:
        from segcore import distributed

        with distributed.process_group(self.experiment.train.timeout):
            self.run_in_process()

    def run_in_process(self) -> None:
        """Do it in one of the processes, or in the only one."""


def is_row(exp: Experiment) -> bool:
    """Return whether the model and the dataset are those of the published row whose name `exp` has."""
    row = load_experiment(exp.name)
    return (exp.model, exp.data.dataset) == (row.model, row.data.dataset)


def load_model(command: Command, checkpoint: str, device: torch.device) -> Any:
    """Return the command's model with the weights of `checkpoint`, for inference on `device`; prints the report.

    A model that has `fuse()` comes fused and in the channels-last layout, which is faster and answers alike.
    """
    import torch

    from segcore import distributed
    from segcore.checkpoints.load import find_weights, load_weights
    from segcore.checkpoints.run_checkpoint import standing
    from segcore.config.record import ConfigDiff

    path = distributed.main_process_first(
        lambda: find_weights(checkpoint, command.experiment.name, offline=command.offline)
    )
    model: Any = command.experiment.model.build()
    other = ConfigDiff.of(path, command.experiment)
    try:
        report = load_weights(model, path)
    except UserError:
        if other.remedy:
            raise UserError(f"{path}: was trained with other settings; {other.remedy}") from None
        raise
    if not distributed.rank():
        of_a_run = path.is_dir() and path != Path(checkpoint).expanduser()
        print(f"{path}{f' ({standing(path)})' if of_a_run else ''}: {report}", file=sys.stderr)
        if other.options:
            print(f"note: {path} was trained with {other.options}", file=sys.stderr)
    fuses = hasattr(model, "fuse")
    channels_last = fuses or command.experiment.train.channels_last
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return (model.fuse() if fuses else model).eval().to(device).to(memory_format=layout)


def load_others(command: Command, ensemble: tuple[str, str] | None, device: torch.device) -> list[Any]:
    """Return the second model of `--ensemble CONFIG CHECKPOINT` in a list, or an empty one.

    Raises UserError when it was trained on images that are normalized otherwise.
    """
    if ensemble is None:
        return []
    name, checkpoint = ensemble
    exp = load_experiment(name)
    data, own = exp.data, command.experiment.data
    if (data.mean, data.std, data.channels) != (own.mean, own.std, own.channels):
        raise UserError(
            f"--ensemble {name}: its data.mean, data.std or data.channels differ; name a model with the same"
        )
    return [load_model(dataclasses.replace(command, experiment=exp), checkpoint, device)]


def with_early_exit(exp: Experiment, percent: float | None) -> Experiment:
    """Return `exp` with `evaluate.early_exit_threshold` set to `percent`, where one is given."""
    if percent is None:
        return exp
    return dataclasses.replace(exp, evaluate=dataclasses.replace(exp.evaluate, early_exit_threshold=percent))


def device_of(name: str) -> torch.device:
    import torch

    from segcore import distributed

    if name == "auto" or (name == "cuda" and torch.cuda.is_available()):
        return distributed.local_device()
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(
            f"--device {name} is not available here; use cpu, or cuda with an NVIDIA GPU and driver"
        ) from None
    return device


def complete_toy_set(exp: Experiment) -> None:
    """Generate what the toy set of `exp` lacks; nothing for other data sets."""
    from segcore import distributed
    from segcore.demo import toy

    if exp.data.dataset == "toy":
        distributed.main_process_first(lambda: toy.generate_missing(exp.data.root))
