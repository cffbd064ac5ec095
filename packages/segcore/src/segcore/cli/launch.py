"""`--gpus N`: start the processes of a command."""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import TYPE_CHECKING

from segcore.environment import usable_cpus
from segcore.errors import UserError

if TYPE_CHECKING:
    from segcore.cli.common import Parallel


def launch(command: Parallel, words: list[str], package: str | None) -> None:
    """Start the processes of `--gpus N` as torchrun does, with the same words, and wait for them."""
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
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cpus() // count)))
    logging.disable(logging.ERROR)  # torchrun's own messages: the processes say what is wrong
    try:
        torchrun(parse_args(["--standalone", f"--nproc-per-node={count}", "-m", package or "segcore", *own]))
    except ChildFailedError as error:
        ends = {number: -failure.exitcode for number, failure in error.failures.items()}
        for number, by in ends.items():
            if by > 0 and by != signal.SIGTERM:  # it could not report it; SIGTERM is torchrun's, for the others
                print(f"process {number} was ended by signal {by} ({signal.Signals(by).name})", file=sys.stderr)
        raise SystemExit(-min(ends.values()) if min(ends.values()) < 0 else 128 + max(ends.values())) from None
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None
