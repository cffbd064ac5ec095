"""Read `.safetensors` and PyTorch files without executing anything; refuse those that declare more than they hold."""

from __future__ import annotations

import io
import mmap
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from segcore.checkpoints.pickled import RefusedError, Unpickler
from segcore.errors import UserError
from segcore.files import utf8_path

DIRECTORY = 24 << 20
"""Largest list of names and sizes in bytes. For 100,000 tensors, zip files need 10 MB and safetensors files 15 MB."""
EXPANSION = 8
"""How much larger a compressed file's content may be: weights halve at most, optimizer states may be zeros."""
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""What PyTorch files before the zip format, of PyTorch 1.6, begin with."""


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the content of a safetensors file, on the CPU; the library checks sizes and positions against the file's.

    Raises UserError without a remedy when it is damaged.
    """
    try:
        with path.open("rb") as file:
            if int.from_bytes(file.read(8), "little") > DIRECTORY:
                raise UserError(f"{path}: damaged or harmful (its header is too long)")
        with utf8_path(path) as readable:
            return load_file(readable)
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or not a safetensors file ({error})") from None


def load_torch(path: Path, *, mapped: bool = False) -> Any:
    """Return the content of a PyTorch file on the CPU; classes other than plain data and tensors become stand-ins.

    With `mapped`, tensors are backed by the file where possible: only what is used is kept in memory.
    Raises UserError without a remedy when it is damaged, names a class or function that weights do not need, or holds
    less than it declares.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) == b"PK\x03\x04":
                return _load_zip(path, file, mapped)
            file.seek(0)
            return _load_legacy(file, path.stat().st_size)
    except RefusedError as error:
        raise UserError(f"{path}: refused, nothing was executed: it {error}") from None
    except Exception:  # a damaged file can fail in any way
        raise UserError(f"{path}: damaged, truncated or not a PyTorch weights file") from None


class _ShortDirectory(io.BufferedReader):
    """A file for `zipfile`, which reads the directory in one piece."""

    def read(self, size: int | None = -1) -> bytes:
        if size and size > DIRECTORY:
            raise RefusedError("lists more entries than weights have")
        return super().read(size)


def _load_zip(path: Path, file: io.BufferedReader, mapped: bool) -> Any:
    content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))  # open as long as a tensor needs it
    with _ShortDirectory(io.FileIO(path)) as listing, zipfile.ZipFile(listing) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        _check_sizes(archive.infolist(), len(content))
        checked = any(entry.CRC for entry in entries.values())  # torch.serialization.set_crc32_options(False): all 0

        def data_of(entry: zipfile.ZipInfo) -> memoryview:
            if entry.compress_type != zipfile.ZIP_STORED:
                return memoryview(bytearray(archive.read(entry)))
            # zipfile would copy it; the local header ends in the lengths of two texts before the data
            start = entry.header_offset + 30 + sum(struct.unpack_from("<HH", content, entry.header_offset + 26))
            if checked and _checksum(file, start, entry.file_size) != entry.CRC:
                raise zipfile.BadZipFile("checksum")
            return content[start : start + entry.file_size]

        def read_storage(key: str, size: int) -> torch.UntypedStorage:
            data = data_of(entries[f"{folder}data/{key}"])
            if size > len(data):
                raise RefusedError("declares more data than it holds")
            storage = torch.frombuffer(data, dtype=torch.uint8).untyped_storage() if data else torch.UntypedStorage(0)
            return storage if mapped else storage.clone()

        pickled = next(entry for name, entry in entries.items() if name.endswith("/data.pkl"))
        folder = pickled.filename.removesuffix("data.pkl")
        order = entries.get(f"{folder}byteorder")
        if order and data_of(order) != b"little":
            raise RefusedError("was written on a big-endian machine")
        return Unpickler(io.BytesIO(data_of(pickled)), len(content), read_storage).load()


def _checksum(file: io.BufferedReader, start: int, size: int) -> int:
    """Return the CRC-32 of a part of the file; read in pieces, since mapped pages would count as memory."""
    file.seek(start)
    checksum = 0
    while size and (piece := file.read(min(size, 1 << 20))):
        checksum, size = zlib.crc32(piece, checksum), size - len(piece)
    return checksum


def _check_sizes(entries: list[zipfile.ZipInfo], size: int) -> None:
    """Refuse a zip file of `size` bytes whose entries overlap or unpack to many times its size."""
    stored = sum(entry.file_size for entry in entries if entry.compress_type == zipfile.ZIP_STORED)
    unpacked = sum(entry.file_size for entry in entries)
    if stored > size or unpacked > EXPANSION * size:
        raise RefusedError(f"declares {unpacked} bytes in a file of {size}")
    if any(entry.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED} for entry in entries):
        raise RefusedError("is compressed in an unusual way")


def _load_legacy(file: io.BufferedReader, size: int) -> Any:
    """Read a magic number, the format's version, the system, the content, the storages' keys, and their data."""
    promised = 0

    def new_storage(key: str, count: int) -> torch.UntypedStorage:
        nonlocal promised
        promised += 8 + count
        if promised > size - file.tell():
            raise RefusedError("declares more data than it holds")
        return torch.UntypedStorage(count)

    unpickler = Unpickler(file, size, new_storage)
    if (unpickler.load(), unpickler.load()) != (MAGIC, PROTOCOL):
        raise ValueError("not a PyTorch file")
    _, content, keys = unpickler.load(), unpickler.load(), unpickler.load()
    for key in keys:
        dtype, storage = unpickler.storages.pop(key)
        (count,) = struct.unpack("<q", file.read(8))
        if count * dtype.itemsize != storage.nbytes():
            raise ValueError("declared twice, differently")
        array = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        if file.readinto(array.data) != storage.nbytes():
            raise EOFError
    if unpickler.storages:
        raise ValueError("tensors without data")
    return content
