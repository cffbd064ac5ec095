"""What several commands share: their options, and the model they load."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segcore.config.options import Flag
from segcore.config.record import record_of
from segcore.config.schema import Experiment
from segcore.errors import UsageError, UserError

if TYPE_CHECKING:
    from segcore.inference import LoadedModel

OUT_OF_MEMORY = "out of GPU memory; lower evaluate.batch_size, set --evaluate.mode slide, or use --device cpu"
STEPWISE = {"stepwise": True}
"""Metadata of an option that only commands of stepwise models offer: DDP's and DDPS's."""
PROVIDER = {"exported": True}
"""Metadata of an option that commands offer for an exported file alone."""


@dataclass(frozen=True)
class Command:
    """What all commands with a configuration have. Keyword-only fields have a place in front of the options."""

    experiment: Experiment
    folder: Path | None = None
    """The run's or checkpoint's folder, the exported file, or the name `hub:…`, that was given as CONFIG."""
    device: str = "auto"
    """Where to compute: auto (CUDA if there is one, else the CPU), cpu, cuda, cuda:1, mps …"""
    offline: Flag = False
    """Never use the network; an error says which file belongs where."""

    def run(self, package: str | None) -> None:
        """Do it; `package` is the method's import package, None for `segcore`."""

    @property
    def exported(self) -> bool:
        """Whether CONFIG is an exported file."""
        return self.folder is not None and self.folder.suffix == ".onnx"

    @property
    def record(self) -> Path | None:
        """The file that CONFIG is read from, if it is a run's folder or an exported file."""
        return self.folder if self.exported else self.folder and record_of(self.folder)

    @property
    def of_run(self) -> bool:
        """Whether CONFIG is the folder of a run or checkpoint; one that `push` wrote is neither."""
        return self.folder is not None and (self.folder / "experiment.json").is_file()

    @property
    def run_dir(self) -> Path:
        """The run that CONFIG is or, as a checkpoint, belongs to; by default runs/<configuration>."""
        if not (self.folder and self.of_run):
            return Path("runs") / self.experiment.name
        folder = self.folder
        if folder.parent.name != "checkpoints":  # but what it leads to may be: `iter_7`, or a link
            folder = Path(os.path.realpath(folder))
        return folder.parent.parent if folder.parent.name == "checkpoints" else self.folder


@dataclass(frozen=True)
class Parallel(Command):
    """What the commands have that several processes can do together."""

    gpus: int | None = None
    """Number of processes to launch, one per GPU (with `--device cpu`: on the CPU). Omit when using torchrun."""

    def run(self, package: str | None) -> None:
        from segcore import distributed

        with distributed.process_group(self.experiment.train.timeout):
            rest = self.run_in_process()
        if rest:  # for which the others need not wait
            rest()

    def run_in_process(self) -> Callable[[], None] | None:
        """Do it in one of the processes, or in the only one; return what this one does when the others have left."""


def load(command: Command, checkpoint: str | None, ensemble: tuple[str, ...] = (), device: str = "") -> LoadedModel:
    """Return the command's model with its weights, by default those of its folder, and print the report on stderr.

    `ensemble` is what `--ensemble` was given: CONFIG and CHECKPOINT of a second model, or a run's folder alone.
    """
    from segcore import distributed
    from segcore.inference import load_model

    how: dict[str, Any] = {"device": device or command.device, "offline": command.offline}
    provider = getattr(command, "provider", None)
    if len(ensemble) > 2:
        raise UsageError(f"--ensemble {' '.join(ensemble)}: give CONFIG and CHECKPOINT, or a run's folder alone")
    others = [load_model(*ensemble, **how)] if ensemble else []
    weights = checkpoint or (command.folder.as_posix() if command.folder else None)
    seg = load_model(command.experiment, weights, ensemble=others, provider=provider, **how)
    if not distributed.rank():
        print(*(line for loaded in (*others, seg) for line in loaded.report), sep="\n", file=sys.stderr)
    return seg


def check_file(option: str, path: Path | None, suffix: str, inputs: Iterable[object] = ()) -> None:
    """Raise UserError unless the file that an option writes, if given, has this suffix and is none of the inputs.

    Of the inputs, what is neither a path nor text does not count.
    """
    if path is None:
        return
    if path.suffix.lower() != suffix:
        raise UserError(f"--{option} {path}: does not end in {suffix}; name a file that does")
    if os.path.realpath(path) in {os.path.realpath(other) for other in inputs if isinstance(other, (str, Path))}:
        raise UserError(f"--{option} {path}: would overwrite what this command reads; name another file")


def complete_toy_set(command: Command) -> None:
    """Generate what the command's toy set lacks; nothing for other data sets, nor where a stored run says to."""
    exp = command.experiment
    if exp.data.dataset == "toy" and command.folder is None:
        from segcore import distributed
        from segcore.demo import toy

        distributed.main_process_first(lambda: toy.generate_missing(exp.data.root))


def is_row(exp: Experiment) -> bool:
    """Return whether the model and the dataset are those of the published row whose name `exp` has."""
    from segcore.config import registry
    from segcore.config.record import settings_of

    return registry.is_row(exp.name, settings_of(exp))
