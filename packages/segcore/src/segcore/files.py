"""Writing files so that a reader never sees a partial one, and reading only what is a file."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from segcore.errors import UserError


def write(path: Path | str, content: str | bytes) -> None:
    """Write a file completely or not at all: under a temporary name, synced, then renamed. Creates the folder.

    Text becomes UTF-8; what UTF-8 lacks, in file names of other encodings, is escaped.
    Raises UserError naming the path when the disk is full, the folder is not writable, or similar.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
            sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path, remedy: str = "free space or choose another folder") -> Iterator[None]:
    """Turn an OSError into a UserError naming `path`: on a full disk, Python does not name the file."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be written ({reason}); {remedy}") from None


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def regular_file(path: Path | str) -> None:
    """Raise UserError unless the path, or what it links to, is a regular file; call it before opening a user's file.

    Opening a FIFO waits for ever, and a device such as /dev/zero has no end. Raises OSError when there is nothing at
    the path or it cannot be reached, as opening it would.
    """
    kind = stat.S_IFMT(Path(path).stat().st_mode)
    if kind != stat.S_IFREG:
        raise UserError(f"{path}: is not a regular file ({_KINDS.get(kind, 'of an unknown kind')}); give a file")


@contextlib.contextmanager
def utf8_path(path: Path) -> Iterator[Path]:
    """Yield a path of an existing file for a library that takes UTF-8 only: `path`, or on Linux an open file's."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with path.open("rb") as file:
            yield Path(f"/dev/fd/{file.fileno()}")
    else:
        yield path


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file is on the disk, or a folder's list of names if the system supports that."""
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
