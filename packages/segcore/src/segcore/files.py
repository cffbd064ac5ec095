"""Writing files so that a reader never sees a partial one, and reading only what is a file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from segcore.errors import UnreadError, UserError


def write(path: Path | str, content: str | bytes) -> None:
    """Write a file completely or not at all: under a temporary name, synced, then renamed. Creates the folder.

    Text becomes UTF-8; what UTF-8 lacks, in file names of other encodings, is escaped.
    Raises UserError naming the path when the disk is full, the folder is not writable, or similar.
    """
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


def write_zip(path: Path, folder: Path, names: Iterable[str]) -> None:
    """Write an archive of files by their names below `folder`, as `write` does; they are not compressed.

    What UTF-8 lacks in a name is escaped. Raises UserError for a name that leads out of the folder.
    """
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", strict_timestamps=False) as archive:
        for name in names:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise UserError(f"{path}: not written, as {name} leads out of a folder; give the file another name")
            archive.write(folder / name, name.encode(errors="backslashreplace").decode())


def temporary_path(path: Path, suffix: str = ".tmp") -> Path:
    """Return a hidden name beside `path` that no other thread, process or machine takes, and that is never too long."""
    return path.with_name(f".{path.name[:30]}.{secrets.token_hex(4)}{suffix}")


@contextlib.contextmanager
def replacing(path: Path, suffix: str = ".tmp") -> Iterator[Path]:
    """Yield a temporary name beside `path`; what was written under it is synced and renamed, unless there was an error.

    Raises UserError as `write` does.
    """
    temporary = temporary_path(path, suffix)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
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


def check_writable(path: Path) -> None:
    """Raise UserError, naming `path`, when `write` could not write the file; nothing is left behind."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file")
    with writing(path, "choose another folder"):
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        tempfile.TemporaryFile(dir=folder).close()


@contextlib.contextmanager
def writing_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`, which is synced and becomes `path`, or disappears if the block raises.

    Raises UserError when something other than an empty folder is at `path`, or it cannot be written.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path}: is there already and not empty; name a new folder")
    temporary = temporary_path(path)
    with writing(path):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            if hasattr(os, "sync"):  # not on Windows; one call for all files, of which there may be very many
                os.sync()
            if path.exists():
                path.rmdir()  # Windows renames to no folder that is there
            temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError into an UnreadError naming `path`, which Python does not name when the disk fails.

    What says that there is no such file, FileNotFoundError and NotADirectoryError, stays.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise UnreadError(f"{path}: cannot be read ({error.strerror or error})") from None


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
MAX_JSON, MAX_DEPTH = 1 << 24, 64
"""Bytes and levels of nesting beyond which a stored JSON file counts as damaged."""
MAX_RECORD = 16 * MAX_JSON
"""Bytes of what a run stores by iteration, class or image: its log and its evaluation."""


def regular_file(path: Path | str) -> None:
    """Raise UserError unless the path, or what it links to, is a regular file; call it before opening a user's file.

    Opening a FIFO waits for ever, and a device such as /dev/zero has no end. Raises OSError when there is nothing at
    the path or it cannot be reached, as opening it would.
    """
    kind = stat.S_IFMT(Path(path).stat().st_mode)
    if kind != stat.S_IFREG:
        raise UserError(f"{path}: is not a regular file ({_KINDS.get(kind, 'of an unknown kind')})")


def read_json(path: Path, most: int = MAX_JSON) -> dict[str, Any]:
    """Return the object that a stored JSON file of at most `most` bytes holds.

    Raises FileNotFoundError or NotADirectoryError when there is none, UnreadError when it cannot be read, and UserError
    when it is no regular file or is damaged (see `parse_json`): one line, to which the caller adds the remedy.
    """
    with reading(path):
        regular_file(path)
        with path.open("rb") as file:
            data = file.read(most + 1)
    try:
        return parse_json(data, most)
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error})") from None


def parse_json(data: str | bytes, most: int = MAX_JSON) -> dict[str, Any]:
    """Return the object in a JSON text, which is untrusted.

    Raises ValueError with the reason for what is no JSON, not UTF-8, larger than `most` bytes or nested deeper than
    MAX_DEPTH, has a number that is not finite or beyond 20 digits, or a text that cannot be printed, or is not an
    object.
    """
    if len(data) > most:
        raise ValueError(f"larger than {most >> 20} MiB")
    try:
        text = data if isinstance(data, str) else data.decode()
        value = json.loads(text, parse_constant=_finite, parse_float=_finite, parse_int=_integer)
        json.dumps(value, ensure_ascii=False).encode(errors="surrogateescape")  # names of files have any encoding
    except UnicodeError:
        raise ValueError("not UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for item in level for child in _children(item)]
    if level:
        raise ValueError("nested too deeply")
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__} instead of an object")  # NoneType, str …
    return value


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def _integer(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"{text[:20]}… is too large")
    return int(text)


def _children(item: Any) -> Iterable[Any]:
    return item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()


def umask_permissions(path: Path) -> None:
    """Give a file that a library made private (0600) the permissions of any new file in its folder."""
    probe = temporary_path(path, ".mode")
    probe.touch()  # the umask can only be read by changing it, for all threads
    try:
        path.chmod(stat.S_IMODE(probe.stat().st_mode))
    finally:
        probe.unlink()


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


def expanded(path: str | Path) -> Path:
    """Return a path with the home folder in place of `~`; one of a user who is not known stays as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def sync(path: Path) -> None:
    """Wait until a file is on the disk, or a folder's list of names if the system supports that."""
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
