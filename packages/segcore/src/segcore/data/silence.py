"""Keep what decoders' libraries print away from the terminal."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

_lock = threading.Lock()
_threads = 0
_terminal: Any = None
"""Standard error as a stream on a duplicate of its descriptor, while that is silent."""


@contextlib.contextmanager
def silent_codecs() -> Iterator[None]:
    """Discard what libpng, libjpeg and libtiff print on standard error themselves, in any number of threads at once."""
    global _threads, _terminal
    if sys.__stderr__ is None:  # closed: the number 2 may be that of any file
        yield
        return
    with _lock:
        _threads += 1
        if _threads == 1:
            descriptor, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
            how = sys.__stderr__.encoding, sys.__stderr__.errors
            _terminal = io.TextIOWrapper(io.FileIO(descriptor, "w"), *how, write_through=True)
            if sys.stderr is sys.__stderr__:  # what other threads print, such as a progress bar, is shown
                sys.stderr = _terminal
            os.dup2(nowhere, 2)
            os.close(nowhere)
    try:
        yield
    finally:
        with _lock:
            _threads -= 1
            if _threads == 0:
                os.dup2(_terminal.fileno(), 2)
                if sys.stderr is _terminal:
                    sys.stderr = sys.__stderr__
                _terminal.close()
