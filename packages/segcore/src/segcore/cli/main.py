"""The command line of every method: `<method>-seg COMMAND …`, and `segcore COMMAND …` over all installed methods.

Words become a command, and exceptions become one line and an exit status. Nothing imports torch before a command runs,
and what takes time to import is imported where a Ctrl-C is answered already.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_origin

from segcore.cli import configs
from segcore.cli.bench import Bench
from segcore.cli.check import Check
from segcore.cli.common import OUT_OF_MEMORY, Command
from segcore.cli.configs import Configs
from segcore.cli.convert import Convert
from segcore.cli.demo import Demo
from segcore.cli.env import Env
from segcore.cli.export import Export
from segcore.cli.import_coco import ImportCoco
from segcore.cli.import_config import ImportConfig
from segcore.cli.import_isprs import ImportPotsdam, ImportVaihingen
from segcore.cli.predict import Predict
from segcore.cli.push import Push
from segcore.cli.report import Report
from segcore.cli.test import Test
from segcore.cli.train import Train
from segcore.cli.verify import Verify
from segcore.cli.web import Web
from segcore.config import options
from segcore.config.fields import Section, reads
from segcore.config.label_rows import with_class_count
from segcore.config.registry import experiments, find_experiment, program
from segcore.config.schema import Experiment
from segcore.errors import UsageError, UserError

COMMANDS: dict[str, type[Any]] = {
    "train": Train,
    "test": Test,
    "predict": Predict,
    "web": Web,
    "report": Report,
    "configs": Configs,
    "check": Check,
    "bench": Bench,
    "export": Export,
    "convert": Convert,
    "verify": Verify,
    "push": Push,
    "import coco": ImportCoco,
    "import potsdam": ImportPotsdam,
    "import vaihingen": ImportVaihingen,
    "import-config": ImportConfig,
    "demo": Demo,
    "env": Env,
}
NOT_READ = {"check": ("device", "offline"), "export": ("device",), "bench": ("offline",)}
"""Options of all commands with a configuration that one of them has no use for."""
OF_EXPORTED = ("test", "predict", "web", "bench")
"""Commands that take an exported file as CONFIG."""
OUR_WARNINGS = ("segcore", "seg-cuda-ops")
"""How the messages of our own warnings begin."""
HELP = """usage: {prog} COMMAND …

{commands}

{prog} COMMAND --help lists a command's options, and COMMAND CONFIG --help those of a configuration with its values.
CONFIG is a name (`{prog} configs` lists them) or a unique part of one, the path of a published configuration, your own
file.py:function, or what has its own weights, so that CHECKPOINT is left out: the folder of a run or checkpoint,
hub:USER/REPO, or an exported file .onnx.

{prog} --version prints the version, {prog} --tyro-print-completion bash (or zsh, fish) the shell's completion."""


def main(package: str | None = None, argv: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 0, 1 for what the user must fix, 2 for wrong usage, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Python looks for modules in the current folder: `python -m` for this process, and by default for those it starts.
    # Libraries would run a file there that has the name of an optional dependency, such as h2.py.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    if argv is None and not sys.flags.safe_path and sys.path[0] == str(Path.cwd()):
        del sys.path[0]
    if argv is None:
        _show_only_our_lines()
    # torch's CPU threads otherwise spin while they wait, and take the cores from each other beside any busy program.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # tensors of 2 MB and more on huge pages: fewer page faults
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show is shown escaped
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what Apple's GPUs lack runs on the CPU
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no stacks of torch's when communication fails; we say it
    try:
        command = parse(words, package)
        if getattr(command, "gpus", None) is not None:
            from segcore.cli.launch import launch

            launch(command, words, package)
        else:
            command.run(package)
            _leave(0)
    except UserError as error:
        _exit(_once(f"error: {error}" if str(error) else ""), 2 if isinstance(error, UsageError) else 1)
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough; nothing may be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        if error.filename is None:
            raise
        _exit(f"error: {error.filename}: {error.strerror}", 1)
    except KeyboardInterrupt as error:  # holds the number of the signal, if it was not a Ctrl-C
        number = error.args[0] if error.args else signal.SIGINT
        _exit(_once("terminated" if number == signal.SIGTERM else "interrupted"), 128 + number)
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's; naming it would import torch
            _exit(f"error: {OUT_OF_MEMORY}", 1)
        if "InvalidCxxCompiler" in str(error):
            _exit("error: compile: torch.compile needs a C++ compiler on the path; install g++, or do not compile", 1)
        raise


def _show_only_our_lines() -> None:
    """Hide what libraries say about their own internals, here and in the processes that this one starts.

    Errors are still shown. The usual variables PYTHONWARNINGS, TORCH_CPP_LOG_LEVEL and TORCH_LOGS show the rest again.
    """
    if not sys.warnoptions:
        os.environ["PYTHONWARNINGS"] = ",".join(["ignore", *(f"default:{name}" for name in OUR_WARNINGS)])
        warnings.simplefilter("ignore")
        for name in OUR_WARNINGS:
            warnings.filterwarnings("default", name)
    usual = warnings.formatwarning
    warnings.formatwarning = lambda message, *where: (
        f"warning: {message}\n" if str(message).startswith(OUR_WARNINGS) else usual(message, *where)
    )
    if "TORCH_LOGS" not in os.environ:
        logging.disable(logging.WARNING)
    if sys.stderr is not None:  # not the number 2, which is silent while images are decoded (segcore.data.silence)
        sys.stderr = os.fdopen(os.dup(sys.stderr.fileno()), "w", 1, sys.stderr.encoding, sys.stderr.errors)


def parse(words: list[str], package: str | None = None) -> Any:
    """Return the command that `words` describe. Raises UserError, or SystemExit after `--help` and the like."""
    prog = program(package)
    name, *rest = words or ["--help"]
    group = {key: kind for key, kind in COMMANDS.items() if key.startswith(f"{name} ")}
    if group:
        name, rest = " ".join([name, *rest[:1]]), rest[1:]
    if name.endswith(("-h", "--help")) or name == "--version":
        listed = (group or COMMANDS).items()
        commands = "\n".join(f"  {key:18}{str(kind.__doc__).splitlines()[0]}" for key, kind in listed)
        print(_version(package) if name == "--version" else HELP.format(prog=prog, commands=commands))
        raise SystemExit(0)
    if name.startswith("--tyro-"):
        _complete(prog, words, package)
    if name not in COMMANDS:
        near = options.nearest(name, COMMANDS)
        raise UsageError(f"{prog}: there is no command {name!r}{near}; the commands are {', '.join(COMMANDS)}")
    kind, prog = COMMANDS[name], f"{prog} {name}"
    if kind is Configs:
        return _read(*configs.prepare(rest, package), prog)
    if not issubclass(kind, Command):
        return _read(_blank(kind), rest, prog)
    if kind is Demo:
        return _read(Demo(demo_experiment(package)), rest, prog)
    experiment, folder, rest = _configuration(prog, rest, package)
    if folder and folder.suffix == ".onnx" and name not in OF_EXPORTED:
        raise UserError(f"{folder}: an exported model is for {', '.join(OF_EXPORTED)}; name its run for {name}")
    run = Path("runs") / experiment.name
    if kind is Test and folder is None and run.is_dir() and (not rest or rest[0].startswith("--")):
        experiment, folder = find_experiment(run)
    return _read(_blank(kind, experiment, folder), rest, f"{prog} {folder or 'CONFIG'}")


def _blank(kind: type[Any], *given: Experiment | Path | None) -> Any:
    """Return a command whose places are not filled yet."""
    return kind(*given, **dict.fromkeys(item.name for item in dataclasses.fields(kind) if item.kw_only))


def _read(command: Any, words: list[str], prog: str) -> Any:
    """Return `command` with the values that its options and places have in `words`."""
    fields = {item.name: item for item in dataclasses.fields(command)}
    offered = offers(command)
    kinds = options.settings(command, offered)
    kinds = {key.removeprefix("experiment."): kind for key, kind in kinds.items()}
    places = [key for key in fields if fields[key].kw_only and key in kinds]
    where = "right after CONFIG" if isinstance(command, Command) else "first"
    order = f"put {' '.join(places).upper()} {where}: `{prog} {' '.join(places).upper()} [OPTIONS]`"
    if {"-h", "--help"} & set(words):
        import tyro

        what = inspect.cleandoc(str(command.__doc__)) + (f" {order[0].upper()}{order[1:]}." if places else "")
        tyro.cli(options.form(command, offered), prog=prog, description=what, args=["--help"])
    known = {key: kind for key, kind in kinds.items() if key not in places}
    free, given = options.split(words, known, {key.removeprefix("experiment.") for key in options.settings(command)})
    many = bool(places) and get_origin(kinds[places[-1]]) is tuple  # the last place takes all further words
    if len(free) > len(places) and not many:
        raise UsageError(f"{free[len(places)]!r} is not expected there; `--help` shows what can be given")
    required = [key for key in places if fields[key].default is dataclasses.MISSING]
    if missing := [key for key in required if key in places[len(free) :]]:
        raise UsageError(f"missing: {', '.join(missing).upper()}; {order}")
    given |= {key: [word] for key, word in zip(places, free, strict=False)}
    if many and free[len(places) :]:
        given[places[-1]] = free[len(places) - 1 :]
    values = options.read(given, kinds)
    if experiment := getattr(command, "experiment", None):
        values = with_class_count(experiment, values)
    return options.change(command, {key if key in fields else f"experiment.{key}": v for key, v in values.items()})


def offers(command: Any) -> options.Offered:
    """Return whether a command offers a field: it reads it, and the model can do what it is for."""
    name = next(name for name, kind in COMMANDS.items() if isinstance(command, kind))
    experiment = getattr(command, "experiment", None)
    stepwise = experiment is not None and experiment.model.stepwise
    hidden, exported = {*NOT_READ.get(name, ())}, isinstance(command, Command) and command.exported
    if isinstance(command, Command):
        hidden |= {"folder", "checkpoint"} if command.folder else {"folder"}

    def offered(owner: type, item: dataclasses.Field[Any]) -> bool:
        read = not issubclass(owner, Section) or reads(name, owner, item)
        fits = (stepwise or not item.metadata.get("stepwise")) and (exported or not item.metadata.get("exported"))
        return read and fits and item.name not in hidden

    return offered


def _configuration(prog: str, words: list[str], package: str | None) -> tuple[Experiment, Path | None, list[str]]:
    """Return the configuration that the words begin with, its folder or `hub:` name, and the other words."""
    if words and not words[0].startswith("-"):
        if words[0].startswith("hub:"):
            from segcore.checkpoints.hugging_face import hub_settings

            settings, commit = hub_settings(words[0], offline="--offline" in words)
            return find_experiment(settings, package)[0], Path(commit), words[1:]
        return *find_experiment(words[0], package), words[1:]
    if {"-h", "--help"} & set(words):
        return next(iter(experiments(package).values()))(), None, words  # any: the help then shows this one's values
    option = words[0].partition("=")[0].removeprefix("--").replace("-", "_") if words else ""
    if option in options.OF_OTHER_TOOLS:
        raise options.unknown(option, ())
    raise UserError(f"{prog} needs a configuration first: `{prog} CONFIG …`; `{prog.split()[0]} configs` lists them")


def demo_experiment(package: str | None) -> Experiment:
    """Return the configuration that `demo` runs: the first of the method that trains on the toy set."""
    for build in experiments(package).values():
        experiment = build()
        if experiment.data.dataset == "toy":
            return experiment
    raise UserError("no installed method has a configuration for the toy set")


def _version(package: str | None) -> str:
    from segcore.environment import versions

    names = [program(package), "segcore", "torch"] if package else ["segcore", "torch"]
    return ", ".join(f"{name} {versions()[name]}" for name in names)


def _complete(prog: str, words: list[str], package: str | None) -> None:
    """Print the completion script of a shell for commands and options, and exit."""
    import tyro

    example = next(iter(experiments(package).values()))()
    commands = [_blank(kind, example) if issubclass(kind, Command) else _blank(kind) for kind in COMMANDS.values()]
    forms: dict[str, Any] = {
        name: options.form(command, offers(command)) for name, command in zip(COMMANDS, commands, strict=True)
    }
    tyro.extras.subcommand_cli_from_dict(forms, prog=prog, args=words)


def _once(text: str) -> str:
    """Return the text, or nothing where another of several processes prints it."""
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
