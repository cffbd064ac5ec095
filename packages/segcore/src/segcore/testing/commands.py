"""Commands in the process of a test."""

from __future__ import annotations

import contextlib
import io

from segcore.cli.main import main


def refused(package: str | None, *words: object) -> str:
    """Run a command of a method's import package that must end with status 1; return its one line that says why."""
    printed, status = io.StringIO(), None
    with contextlib.redirect_stderr(printed):
        try:
            main(package, [str(word) for word in words])
        except SystemExit as end:
            status = end.code
    lines = [line for line in printed.getvalue().splitlines() if line.startswith("error: ")]
    assert (status, len(lines)) == (1, 1), printed.getvalue()
    return lines[0]
