"""One run per folder: a second one is refused while the first lives.

The lock is the operating system's, on the file `<work_dir>/.lock`. The system releases it when the process ends in any
way, so what a killed run leaves blocks nothing, and data-loading processes do not inherit it. Network file systems with
a lock service hold it across hosts. Where the file system has no locks, the record in the file decides: a run of this
host lives if its process does, and one of another host until the file is deleted. Windows has no such lock.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from segcore import distributed
from segcore.errors import UserError
from segcore.files import MAX_JSON, parse_json, regular_file, writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_held = set[Path]()
"""Folders where this process trains: the system's lock excludes only other processes."""


@contextlib.contextmanager
def run_lock(work_dir: Path) -> Iterator[None]:
    """Hold a run's folder, which is created, for a `with` block; rank 0 takes the lock for all ranks.

    Folders that were created and stay empty are removed at the end. Raises UserError on all ranks, naming the process
    that trains there, when the folder is taken.
    """
    with contextlib.ExitStack() as stack:
        distributed.on_main_process(lambda: stack.enter_context(_locked(work_dir)))
        yield


@contextlib.contextmanager
def _locked(work_dir: Path) -> Iterator[None]:
    if work_dir.exists() and not work_dir.is_dir():
        raise UserError(f"{work_dir}: is a file; choose another --work-dir")
    folder = work_dir.resolve()
    if folder in _held:
        raise UserError(f"{work_dir}: this process already trains there; choose another --work-dir")
    created = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    path = folder / LOCK
    with writing(work_dir):
        folder.mkdir(parents=True, exist_ok=True)
        file = _take(path)
    _held.add(folder)
    try:
        yield
    finally:
        _held.remove(folder)
        with contextlib.suppress(OSError), file:
            if _is_at(path, file):
                path.unlink()
        for parent in created:
            with contextlib.suppress(OSError):  # not empty
                parent.rmdir()


def _take(path: Path) -> IO[str]:
    """Return the lock file, open and locked, with a record of this process in it; raises UserError when it is taken."""
    if path.is_symlink():
        raise UserError(f"{path}: is a link; delete it")
    if path.exists():
        regular_file(path)
    file = path.open("a+", encoding="utf-8", errors="replace")
    record = _record(file)
    if _is_taken(file, record):
        elsewhere = record.get("host") != socket.gethostname()
        raise UserError(
            f"{path.parent}: a run is training there (process {record.get('process')} on {record.get('host')}, since "
            f"{record.get('since')}); wait until it ends, or choose another --work-dir"
            + f" (if it no longer runs, delete {path})"
            * elsewhere
        )
    if not _is_at(path, file):  # the run that held it has removed it just now
        return _take(path)
    file.truncate(0)
    own = {"host": socket.gethostname(), "process": os.getpid(), "started": _started(os.getpid())}
    json.dump({**own, "since": time.strftime("%Y-%m-%d %H:%M:%S")}, file)
    file.flush()
    return file


def _record(file: IO[str]) -> dict[str, Any]:
    """Return the record of the run that holds or held the lock, without what is not of its type."""
    file.seek(0)
    with contextlib.suppress(ValueError):
        found = parse_json(file.read(MAX_JSON))
        kinds = {"host": str, "process": int, "started": str, "since": str}
        return {key: found[key] for key, kind in kinds.items() if isinstance(found.get(key), kind)}
    return {}


def _is_taken(file: IO[str], record: dict[str, Any]) -> bool:
    """Lock the file and return False, or return True when another process holds it."""
    if fcntl is None:
        return False
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return True
    # This file system has no locks.
    if not record or record.get("host") != socket.gethostname():
        return bool(record)
    return "started" in record and _started(record.get("process", 0)) == record["started"]


def _started(process: int) -> str:
    """Return when a process started, in the kernel's clock, so that a later one of the same number differs."""
    try:
        return (
            Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
        )
    except (OSError, IndexError):
        return ""


def _is_at(path: Path, file: IO[str]) -> bool:
    """Return whether the path still leads to the open file."""
    return path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))
