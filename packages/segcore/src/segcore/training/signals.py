"""Handling of Ctrl-C, and of SIGTERM as torchrun, SLURM and others send it."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType

from segcore.errors import Stopped


class SignalHandler:
    """Delays Ctrl-C and SIGTERM, in a `with` block, until `check`, where the state of the run is consistent.

    One that no `check` has seen raises KeyboardInterrupt with its number at the end of the block. A second Ctrl-C is
    not delayed, except under torchrun, which sends its own signal after each Ctrl-C.
    """

    signal: int | None = None

    def __enter__(self) -> SignalHandler:
        main = threading.current_thread() is threading.main_thread()  # handlers can be set only there
        signals = (signal.SIGINT, signal.SIGTERM) if main else ()
        self.previous = {number: signal.signal(number, self._note) for number in signals}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if kind is None and self.signal is not None:  # after the last `check`
            raise KeyboardInterrupt(self.signal)

    def check(self) -> None:
        """Raise Stopped if a signal has arrived."""
        if self.signal is not None:
            raise Stopped(self.signal)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt
        self.signal = self.signal or number
