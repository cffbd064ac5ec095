"""Find published weights and download them."""

from __future__ import annotations

import contextlib
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor

from segcore import files
from segcore.checkpoints.foreign import read_state
from segcore.config.registry import published
from segcore.errors import UserError

ATTEMPTS = 4
PAUSE = 2.0
"""Seconds between two attempts to go on with a broken download."""
TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as broken."""


def official_file(name: str, *, offline: bool = False) -> Path:
    """Return the local file of a published row's weights, downloading it where it is absent.

    Raises ValueError when the row is not a published one, its authors offer no weights, or they cannot be fetched.
    """
    row = published(name)
    if row is None:
        raise UserError(f"{name!r} is not a published configuration; `configs` lists them, write official:CONFIG")
    if row.url is None and row.page is not None:
        raise UserError(f"the weights of {name} are at {row.page}; download the file there and give its path")
    if row.url is None:
        raise UserError(f"the authors of {name} offer no weights for it; train it, or give a checkpoint of your own")
    return fetch(row.url, offline=offline, name=row.file)


def weights_dir() -> Path:
    """Return the folder of downloaded weights: `$SEGCORE_WEIGHTS`, else `segcore/weights` in the user's cache."""
    if own := os.environ.get("SEGCORE_WEIGHTS"):
        return Path(own).expanduser()
    cache = os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "segcore" / "weights"


def fetch(url: str, *, offline: bool = False, sha256: str | None = None, name: str | None = None) -> Path:
    """Return the file of `url` in `weights_dir()`, downloading it if it is not there.

    `name` is the local file name, by default the URL's last part; `sha256` (hexadecimal) is what the content must hash
    to. The file appears whole or not at all; a broken download goes on where it stopped, if the server can do that.
    Raises ValueError naming the URL and where to put the file when it is absent and cannot be fetched.
    """
    target = weights_dir() / (name or PurePosixPath(urlsplit(url).path).name)
    if target.is_file():
        if sha256 and files.sha256(target) != sha256:
            raise UserError(f"{target}: its SHA-256 is not {sha256}; delete it to download {url} again")
        return target
    by_hand = f"download {url} and put the file at {target}"
    if offline:
        raise UserError(f"no network: {by_hand}")
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")  # processes may fetch the same file at once
    with _writable(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("xb") as file, _progress(target.name) as show:
                _download(url, file, by_hand, show)
                file.flush()
                os.fsync(file.fileno())
            if sha256 and files.sha256(part) != sha256:
                raise UserError(f"{url}: the SHA-256 of what came is not {sha256}; try again, or {by_hand}")
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    return target


def _download(url: str, file: IO[bytes], by_hand: str, show: Callable[[int, int | None], None]) -> None:
    """Write the body of `url` into `file`, going on after breaks; raises UserError that ends with `by_hand`."""
    etag = None
    for attempt in range(1, ATTEMPTS + 1):
        _check_safe(url, by_hand)
        start = file.tell() if etag else 0
        headers = {"User-Agent": "segcore"} | ({"Range": f"bytes={start}-", "If-Range": etag} if etag and start else {})
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
                _check_safe(response.url, by_hand)  # after redirects
                if response.headers.get_content_type() == "text/html":
                    raise UserError(f"{url}: the answer is a web page, not weights (a login or a proxy?); {by_hand}")
                etag = response.headers.get("ETag", "W/")
                etag = None if etag.startswith("W/") else etag  # a weak one does not promise the same bytes
                goes_on = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
                start = start if response.status == 206 and goes_on else 0
                file.seek(start)
                file.truncate()
                length = response.headers.get("Content-Length")
                total = None if length is None else start + int(length)
                while chunk := response.read(1 << 20):
                    with _writable(Path(file.name)):  # a full disk is no broken connection
                        file.write(chunk)
                    show(file.tell(), total)
                if total in (None, file.tell()):
                    return
                raise ConnectionError(f"{file.tell()} of {total} bytes came")
        except urllib.error.HTTPError as error:
            raise UserError(f"{url}: the server answers {error.code} {error.reason}; {by_hand}") from None
        except urllib.error.URLError as error:
            raise UserError(f"no network ({error.reason}): {by_hand}") from None
        except (http.client.HTTPException, OSError) as error:
            if attempt == ATTEMPTS:
                raise UserError(
                    f"{url}: the connection broke {attempt} times ({error}); try again, or {by_hand}"
                ) from None
            time.sleep(PAUSE)


def _check_safe(url: str, by_hand: str) -> None:
    """Refuse anything but https, except plain http within this machine."""
    parts = urlsplit(url)
    if parts.scheme != "https" and (parts.scheme, parts.hostname) not in {("http", "127.0.0.1"), ("http", "localhost")}:
        raise UserError(f"{url}: not an https address; {by_hand}")


@contextlib.contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int | None], None]]:
    """Yield `show(done, total)` in bytes: a bar on a terminal, elsewhere a line per tenth (or 100 MB); on stderr."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(name, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    shown = -1

    def show(done: int, total: int | None) -> None:
        nonlocal shown
        now = 10 * done // total if total else done // 100_000_000
        if now != shown:
            shown = now
            of = f" of {total / 1e6:.1f}" if total else ""
            print(f"downloading {name}: {done / 1e6:.1f}{of} MB", file=sys.stderr, flush=True)

    yield show


@contextlib.contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); set SEGCORE_WEIGHTS to another folder"
        ) from None


def timm_state(tag: str, *, offline: bool) -> dict[str, Tensor]:
    """Return the state dict of a timm model with its pretrained weights, under the names of the installed timm.

    The file is `<tag>.safetensors` in `weights_dir()`, downloaded where absent from timm's collection on the
    Hugging Face hub (or the mirror `$HF_ENDPOINT`).
    """
    import timm

    try:
        cfg = timm.get_pretrained_cfg(tag)
    except RuntimeError as error:
        raise UserError(f"train.init_from {tag}: {error} timm.list_pretrained() in Python lists all tags") from None
    if cfg is None or not cfg.hf_hub_id:
        raise UserError(f"train.init_from {tag}: timm offers no weights for it; give another tag or a file")
    tag = f"{cfg.architecture}.{cfg.tag}"
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    path = fetch(f"{hub}/{cfg.hf_hub_id}/resolve/main/model.safetensors", offline=offline, name=f"{tag}.safetensors")
    state = read_state(path)
    try:
        # timm renames the tensors of older files and checks them against the architecture
        return timm.create_model(tag, pretrained=True, pretrained_cfg_overlay={"state_dict": state}).state_dict()
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: does not fit timm's {tag} ({reason}); delete it to download it again") from None
