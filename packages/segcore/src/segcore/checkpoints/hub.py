"""Find published weights and download them from the Hugging Face hub, Google Drive, and other hosts."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from segcore import files
from segcore.checkpoints.foreign import not_weights, read_state
from segcore.config.registry import published
from segcore.errors import UserError
from segcore.progress import progress

if TYPE_CHECKING:
    from torch import Tensor

ATTEMPTS = 4
PAUSE = 2.0
"""Seconds before the second attempt; each further pause doubles."""
TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as broken."""
HUB = "https://huggingface.co"
"""The mirror `$HF_ENDPOINT`, if set, replaces it."""


def official_file(name: str, *, offline: bool = False) -> Path:
    """Return the local file of a published row's weights, downloading it if absent.

    Raises ValueError when the row is not published, its authors offer no weights, or the download fails.
    """
    row = published(name)
    if row is None:
        raise UserError(f"{name!r} is not a published configuration; `configs` lists them, use official:CONFIG")
    if row.url is None and row.page is not None:
        raise UserError(f"the weights of {name} are at {row.page}; download the file there and pass its path")
    if row.url is None:
        raise UserError(f"the authors of {name} offer no weights for it; train it, or pass your own checkpoint")
    return fetch(row.url, offline=offline, name=row.file)


def weights_dir() -> Path:
    """Return the folder of downloaded weights: `$SEGCORE_WEIGHTS`, else `segcore/weights` in the user's cache."""
    if own := os.environ.get("SEGCORE_WEIGHTS"):
        return Path(own).expanduser()
    cache = os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "segcore" / "weights"


def fetch(url: str, *, offline: bool = False, sha256: str | None = None, name: str | None = None) -> Path:
    """Return the file of `url` in `weights_dir()`, downloading it if it is not there.

    `name` is the local file name, by default the URL's last part; `sha256` (hexadecimal) is the expected hash. The file
    is downloaded into a temporary folder, checked and then renamed, so it appears complete or not at all. URLs must
    be https, or plain http to this machine.
    Raises ValueError naming the URL and the file's place when it is absent and cannot be downloaded.
    """
    if url.startswith(f"{HUB}/"):
        url = os.environ.get("HF_ENDPOINT", HUB).rstrip("/") + url.removeprefix(HUB)
    target = weights_dir() / (name or PurePosixPath(urlsplit(url).path).name)
    if target.is_file():
        if sha256 and files.sha256(target) != sha256:
            raise UserError(f"{target}: its SHA-256 is not {sha256}; delete it to download {url} again")
        return target
    by_hand = f"download {url} and put the file at {target}"
    if offline:
        raise UserError(f"{target}: missing, and downloads are disabled; {by_hand}")
    parts = urlsplit(url)
    if parts.scheme != "https" and (parts.scheme, parts.hostname) not in {("http", "127.0.0.1"), ("http", "localhost")}:
        raise UserError(f"{url}: not an https address; {by_hand}")
    with files.writing(target, "free space or set SEGCORE_WEIGHTS to another folder"):
        target.parent.mkdir(parents=True, exist_ok=True)
        # A separate folder: several processes may download the same file at once.
        with tempfile.TemporaryDirectory(".part", f".{target.name}.", target.parent, ignore_cleanup_errors=True) as own:
            part = _download(url, Path(own), by_hand)
            if kind := not_weights(part):
                raise UserError(f"{url}: the server sent {kind}, not weights (a login or a proxy?); {by_hand}")
            if sha256 and files.sha256(part) != sha256:
                raise UserError(f"{url}: the SHA-256 of the download is not {sha256}; try again, or {by_hand}")
            files.umask_permissions(part)  # gdown makes its files private
            files.sync(part)
            part.replace(target)
    return target


def _download(url: str, folder: Path, by_hand: str) -> Path:
    """Return the downloaded file below `folder`; raises UserError that ends with `by_hand`."""
    hub_file = re.fullmatch(r"(https?://[^/]+)/([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)", url)
    try:
        if hub_file and hub_file[1] == os.environ.get("HF_ENDPOINT", HUB).rstrip("/"):
            return _from_hugging_face(folder, *hub_file.groups())
        if urlsplit(url).hostname == "drive.google.com":
            return _from_google_drive(url, folder, by_hand)
        return _from_host(url, folder, by_hand)
    except UserError:
        raise
    except Exception as error:  # exceptions differ between libraries and their versions
        if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
            raise  # a disk error
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:200] or type(cause).__name__
        raise UserError(f"{url}: cannot be downloaded ({reason}); {by_hand}") from None


def _from_hugging_face(folder: Path, endpoint: str, repo: str, revision: str, filename: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo, filename, revision=revision, local_dir=folder, endpoint=endpoint))


def _from_google_drive(url: str, folder: Path, by_hand: str) -> Path:
    try:
        import gdown
    except ImportError:
        raise UserError(f"{url}: Google Drive needs gdown; pip install 'segcore[drive]', or {by_hand}") from None
    part = folder / "download"
    if gdown.download(id=parse_qs(urlsplit(url).query)["id"][0], output=str(part)) is None:
        raise UserError(f"{url}: Google Drive does not provide the file; {by_hand}")
    return part


def _from_host(url: str, folder: Path, by_hand: str) -> Path:
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    part, name = folder / "download", PurePosixPath(urlsplit(url).path).name
    retry = Retry(
        ATTEMPTS - 1, connect=0, backoff_factor=PAUSE, status_forcelist=(429, 500, 502, 503, 504),
        respect_retry_after_header=False, raise_on_status=False,
    )  # fmt: skip
    with requests.Session() as session:
        session.adapters.clear()  # a redirect to plain http elsewhere finds no adapter
        for prefix in ("https://", "{0.scheme}://{0.netloc}/".format(urlsplit(url))):
            session.mount(prefix, HTTPAdapter(max_retries=retry))
        session.headers.update({"User-Agent": "segcore", "Accept-Encoding": "identity"})
        for _ in range(ATTEMPTS):  # urllib3 does not retry once the body has begun
            with session.get(url, stream=True, timeout=TIMEOUT) as answer:
                if not answer.ok:
                    raise UserError(f"{url}: the server returned {answer.status_code} {answer.reason}; {by_hand}")
                if answer.headers.get("Content-Type", "").startswith("text/html"):
                    raise UserError(f"{url}: the server sent a web page, not weights (a login or a proxy?); {by_hand}")
                total, done = int(answer.headers.get("Content-Length", 0)), 0
                with part.open("wb") as file, progress(f"downloading {name} (kB)") as advance:
                    try:
                        for chunk in answer.iter_content(1 << 16):
                            done += file.write(chunk)
                            advance(done // 1000, total // 1000)
                        if done == total or not total:
                            return part
                    except requests.RequestException:
                        continue
    raise UserError(
        f"{url}: the connection broke {ATTEMPTS} times ({done} of {total} bytes received); try again, or {by_hand}"
    )


def timm_state(tag: str, *, offline: bool) -> dict[str, Tensor]:
    """Return the state dict of a timm model with its pretrained weights, under the names of the installed timm.

    The file is `<tag>.safetensors` in `weights_dir()`, downloaded from timm's collection on the hub if absent.
    """
    import timm

    try:
        cfg = timm.get_pretrained_cfg(tag)
    except RuntimeError as error:
        raise UserError(f"train.init_from {tag}: {error} timm.list_pretrained() in Python lists all tags") from None
    if cfg is None or not cfg.hf_hub_id:
        raise UserError(f"train.init_from {tag}: timm offers no weights for it; choose another tag or a file")
    tag = f"{cfg.architecture}.{cfg.tag}"
    url = f"{HUB}/{cfg.hf_hub_id}/resolve/main/model.safetensors"
    path = fetch(url, offline=offline, name=f"{tag}.safetensors")
    state = read_state(path)
    try:
        # timm renames the tensors of older files and checks them against the architecture
        return timm.create_model(tag, pretrained=True, pretrained_cfg_overlay={"state_dict": state}).state_dict()
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: does not fit timm's {tag} ({reason}); delete it to download it again") from None
