"""A run's folder belongs to one run at a time, and a killed run leaves nothing that blocks the next one."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from segcore.errors import UserError
from segcore.training import lock
from segcore.training.lock import LOCK, run_lock

fcntl = pytest.importorskip("fcntl")
HOLDER = """
import os, sys, time
from pathlib import Path
from segcore.training.lock import run_lock
with run_lock(Path(sys.argv[1])):
    child = os.fork()  # as data-loading processes, which may outlive a killed run for seconds
    if child:
        print(child, flush=True)
    time.sleep(600)
"""


def test_another_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(UserError, match=rf"a run is training there \(process {holder.pid} on ") as caught:
            run_lock(tmp_path).__enter__()
        assert "\n" not in str(caught.value)
        holder.kill()
        holder.wait()
        assert (tmp_path / LOCK).exists()
        os.kill(child, 0)  # lives
        with run_lock(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)
        holder.communicate()
    assert not list(tmp_path.iterdir())


def test_the_same_process_is_refused_and_no_empty_folder_stays(tmp_path: Path) -> None:
    work_dir = tmp_path / "runs/mine"
    for _ in range(2):
        with run_lock(work_dir):
            for same in (work_dir, tmp_path / "runs/../runs/mine"):
                with pytest.raises(UserError, match="this process already trains there"):
                    run_lock(same).__enter__()
        assert not (tmp_path / "runs").exists()
    with run_lock(work_dir):
        (work_dir / "log.jsonl").touch()
    assert [path.name for path in work_dir.iterdir()] == ["log.jsonl"]


def record(**changes: Any) -> str:
    own = {"host": socket.gethostname(), "process": os.getppid(), "since": "2026-01-01 00:00:00"}
    return json.dumps({**own, "started": lock._started(os.getppid()), **changes})


STALE = [
    "",
    "[",
    "[" * 10_000,
    '{"process": "x"}',
    "\0" * 9,
    record(process=2**40),
    record(started="0"),
    record(started=1),
]


@pytest.mark.parametrize("has_locks", [True, False])
@pytest.mark.parametrize("text", STALE, ids=range(len(STALE)))
def test_a_stale_lock_is_taken_over(tmp_path: Path, monkeypatch, text: str, has_locks: bool) -> None:
    """Also where the number of the process belongs to another one by now."""
    if not has_locks:
        monkeypatch.setattr(fcntl, "lockf", without_locks)
    (tmp_path / LOCK).write_text(text)
    with run_lock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()


def without_locks(*_: Any) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_without_locks_the_record_decides(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / LOCK).write_text(record(host="elsewhere"))
    with run_lock(tmp_path):  # the file system's lock is free: the run there has ended
        pass
    monkeypatch.setattr(fcntl, "lockf", without_locks)
    for text, remedy in ((record(), r"another --work-dir$"), (record(host="elsewhere"), rf"delete .*/{LOCK}\)$")):
        (tmp_path / LOCK).write_text(text)
        with pytest.raises(UserError, match=rf"process {os.getppid()} on .*{remedy}"):
            run_lock(tmp_path).__enter__()
        assert (tmp_path / LOCK).read_text() == text


def test_a_lock_that_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a" / LOCK)
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / LOCK).symlink_to(tmp_path / "precious")
    for name, problem in (("a", r"is not a regular file \(a FIFO\)"), ("b", "is a link"), ("precious", "is a file")):
        with pytest.raises(UserError, match=problem):
            run_lock(tmp_path / name).__enter__()
    assert (tmp_path / "precious").read_text() == "kept"


def test_a_lock_that_was_deleted_and_taken_by_another_is_left_to_it(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        (tmp_path / LOCK).unlink()
        (tmp_path / LOCK).write_text("another's")
    assert (tmp_path / LOCK).read_text() == "another's"
