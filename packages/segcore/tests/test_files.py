"""Reading and writing files: what is no regular file is refused before anything opens it; names are of any encoding."""

import contextlib
import os
import socket
import sys
from pathlib import Path

import pytest

from segcore.errors import UserError
from segcore.files import regular_file, utf8_path, write


def special(path: Path, kind: str) -> Path:
    """Make something at the path that is not a regular file; a device can only be linked to."""
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a socket":
        with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)  # the system allows few characters in a socket's path
    elif kind == "a folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    return path


@pytest.mark.parametrize("kind", ["a FIFO", "a socket", "a device", "a folder"])
def test_only_regular_files_are_opened(tmp_path: Path, kind: str) -> None:
    path = special(tmp_path / "a.pth", kind)
    with pytest.raises(UserError, match=rf"a\.pth: is not a regular file \({kind}\); give a file"):
        regular_file(path)


def test_a_file_and_a_link_to_one_pass_and_nothing_there_is_an_oserror(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    regular_file(tmp_path / "link")
    with pytest.raises(FileNotFoundError):
        regular_file(tmp_path / "none")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="loop"):
        regular_file(tmp_path / "loop")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9")
    write(path, f"of {path.name}")
    assert path.read_bytes() == rb"of caf\udce9"
    with utf8_path(path) as other:
        assert str(other).encode()
        assert other.read_bytes() == path.read_bytes()
    with utf8_path(tmp_path) as same:
        assert same == tmp_path
