"""Decoded images and labels on the disk (`data.cache`): reading an array takes a fraction of decoding a file.

The name of a cached file is a checksum of its source (path, size, time of change) and of all that decides how it is
decoded, so nothing else is ever found under it. It is an .npy, of which nothing is executed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import PIL

from segcore.errors import UserError
from segcore.files import regular_file, write

DECODERS = "1", np.__version__, cv2.__version__, PIL.__version__
"""What decodes the files; raise the first number when this package decodes otherwise."""


def cache_file(folder: Path, source: Path, *how: object) -> Path:
    """Return where the array is that `source` decodes to; raises OSError when there is no such file."""
    state, digest = source.stat(), hashlib.sha256()
    for part in (source.absolute(), state.st_size, state.st_mtime_ns, DECODERS, *how):
        digest.update(part if isinstance(part, bytes) else repr(part).encode() + b"\0")
    return folder / f"{digest.hexdigest()}.npy"


def cached(folder: Path | None, source: Path, read: Callable[[], np.ndarray], *how: object) -> np.ndarray:
    """Return `read()`, the array that `source` decodes to, from the cache if it is there; otherwise add it.

    A damaged file is replaced. Without a `folder`, or where it cannot be written, `read` answers. Several processes may
    share the folder: a file is there whole or not at all.
    """
    if folder is None:
        return read()
    try:
        file = cache_file(folder, source, *how)
    except OSError:
        return read()  # says what is wrong with the source
    try:
        return _load(file)
    except Exception:  # not there, or damaged: numpy raises errors of many types
        array = read()
    with contextlib.suppress(UserError):  # no space, or read-only: the array is right all the same
        write(file, _content(array))
    return array


def _content(array: np.ndarray) -> bytes:
    """Return an array as an .npy file with its checksum behind."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, allow_pickle=False)
    return stream.getvalue() + zlib.crc32(stream.getbuffer()).to_bytes(4, "little")


def _load(file: Path) -> np.ndarray:
    regular_file(file)
    data = file.read_bytes()
    if zlib.crc32(memoryview(data)[:-4]) != int.from_bytes(data[-4:], "little"):
        raise ValueError("damaged")
    return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
