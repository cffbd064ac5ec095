"""The command line of every method: `<method>-seg COMMAND …`, and `segcore COMMAND …` over all installed methods.

Here words become a command of `segcore.cli`, and whatever ends one becomes a line and an exit status. Nothing
imports torch before a command runs; what takes time to import is imported where a Ctrl-C is answered already.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from segcore.errors import UsageError, UserError

if TYPE_CHECKING:
    from segcore.cli.common import Parallel
    from segcore.config.schema import Experiment

OUT_OF_MEMORY = "out of GPU memory; lower evaluate.batch_size, set --evaluate.mode slide, or use --device cpu"


def main(package: str | None = None, argv: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 0, 1 for what the user must mend, 2 for wrong usage, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    # torch's CPU threads otherwise spin while they wait, and take the cores from each other beside any busy program.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # tensors of 2 MB and more on huge pages: fewer page faults
    try:
        command = parse(words, package)
        if getattr(command, "gpus", None) is not None:
            _start(command, words, package)
        else:
            command.run(package)
            _leave(0)
    except UserError as error:
        _exit(_news(f"error: {error}" if str(error) else ""), 2 if isinstance(error, UsageError) else 1)
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough; nothing may be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        if error.filename is None:
            raise
        _exit(f"error: {error.filename}: {error.strerror}", 1)
    except KeyboardInterrupt as error:  # holds the number of the signal, if it was not a Ctrl-C
        number = error.args[0] if error.args else signal.SIGINT
        _exit(_news("terminated" if number == signal.SIGTERM else "interrupted"), 128 + number)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; naming it would import torch
            raise
        _exit(f"error: {OUT_OF_MEMORY}", 1)


def parse(words: list[str], package: str | None = None) -> Any:
    """Return the command that `words` describe. Raises UserError, or SystemExit after `--help`."""
    from segcore.cli.commands import COMMANDS
    from segcore.cli.common import Command
    from segcore.cli.demo import Demo
    from segcore.config import options
    from segcore.config.registry import program

    prog = program(package)
    name, *rest = words or ["--help"]
    if name in ("-h", "--help"):
        lines = "\n".join(f"  {key:10}{command.__doc__}" for key, command in COMMANDS.items())
        print(f"usage: {prog} COMMAND …\n\n{lines}\n\n{prog} COMMAND --help tells more.")
        raise SystemExit(0)
    if name not in COMMANDS:
        near = options.nearest(name, COMMANDS)
        raise UsageError(f"{prog}: there is no command {name!r}{near}; the commands are {', '.join(COMMANDS)}")
    command: type[Any] = COMMANDS[name]
    places = [field.name for field in dataclasses.fields(command) if field.kw_only]
    known = {field.name for field in dataclasses.fields(command)} - {"experiment", *places}
    prog, how = f"{prog} {name}", dict[str, Any]()
    if issubclass(command, Command):
        if command is Demo:
            experiment = demo_experiment(package)
        else:
            experiment, rest = _configuration(prog, rest, package)
            prog += " CONFIG"
        known |= set(options.settings(experiment))
        how["default"] = command(experiment=experiment, **dict.fromkeys(places, options.MISSING))
    options.check_names(rest, known)
    what, order = command.__doc__, ""
    if places:
        order = f"put {' '.join(places).upper()} right after CONFIG: `{prog} {' '.join(places).upper()} [OPTIONS]`"
        what = f"{what} {order[0].upper()}{order[1:]}."
    return options.read(command, rest, order, prog=prog, description=what, **how)


def _configuration(prog: str, words: list[str], package: str | None) -> tuple[Experiment, list[str]]:
    """Return the configuration that the words after a command begin with, and the words after its name."""
    from segcore.config.registry import experiments, load_experiment

    if words and not words[0].startswith("-"):
        return load_experiment(words[0], package), words[1:]
    if {"-h", "--help"} & set(words):
        return next(iter(experiments(package).values()))(), words  # any: the help then shows this one's values
    raise UserError(f"{prog} needs a configuration first: `{prog} CONFIG …`; `{prog.split()[0]} configs` lists them")


def demo_experiment(package: str | None) -> Experiment:
    """Return the configuration that `demo` runs: the first of the method that trains on the toy set."""
    from segcore.config.registry import experiments

    for build in experiments(package).values():
        experiment = build()
        if experiment.data.dataset == "toy":
            return experiment
    raise UserError("no installed method has a configuration for the toy set")


def _start(command: Parallel, words: list[str], package: str | None) -> None:
    """Start the processes of `--gpus N` as torchrun does, with the same words, and wait for them."""
    import logging

    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args
    from torch.distributed.run import run as torchrun

    count = command.gpus or 0
    if "RANK" in os.environ:
        raise UserError(f"--gpus {count}: torchrun has started this process already; leave --gpus out")
    if count < 1:
        raise UserError(f"--gpus {count}: give at least 1")
    if command.device != "cpu" and count > torch.cuda.device_count():
        raise UserError(
            f"--gpus {count}: torch sees {torch.cuda.device_count()} here; give fewer, or --device cpu for processes "
            "on the CPU"
        )
    at = next(i for i, word in enumerate(words) if word.split("=")[0] == "--gpus")
    own = words[:at] + words[at + (1 if "=" in words[at] else 2) :]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    logging.disable(logging.ERROR)  # torchrun's own words: the processes say what is wrong
    try:
        torchrun(parse_args(["--standalone", f"--nproc-per-node={count}", "-m", package or "segcore", *own]))
    except ChildFailedError as error:
        ends = {number: -failure.exitcode for number, failure in error.failures.items()}
        for number, by in ends.items():
            if by > 0 and by != signal.SIGTERM:  # it could not say it itself; SIGTERM is torchrun's, for the others
                print(f"process {number} was ended by signal {by} ({signal.Signals(by).name})", file=sys.stderr)
        raise SystemExit(-min(ends.values()) if min(ends.values()) < 0 else 128 + max(ends.values())) from None
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None


def _news(text: str) -> str:
    """Return the text, or nothing where another of several processes says it."""
    from_torchrun = "segcore.distributed" in sys.modules and "RANK" in os.environ
    return text if not from_torchrun or sys.modules["segcore.distributed"].first_to_print(text) else ""


def _exit(message: str, status: int) -> None:
    if message:
        print(message, file=sys.stderr)
    _leave(status)
    raise SystemExit(status)


def _leave(status: int) -> None:
    if "segcore.distributed" in sys.modules:  # importing it would import torch
        sys.modules["segcore.distributed"].hard_exit(status)
