"""Download weights from the Hugging Face hub, Google Drive, and other hosts, and keep nothing that is not weights."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit
from urllib.request import getproxies, proxy_bypass

from segcore.errors import UserError
from segcore.progress import progress

if TYPE_CHECKING:
    import requests

ATTEMPTS = 4
PAUSE = 2.0
"""Seconds before the second attempt; each further pause doubles."""
TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as broken."""
LONGEST_PAUSE = 60.0
"""Seconds that a server may ask to wait for before the next attempt."""
MAX_BYTES = 20_000_000_000
"""Far more than published weights have: without a limit, a server could send until the disk is full."""
HUB = "https://huggingface.co"
"""The mirror `$HF_ENDPOINT`, if set, replaces it."""
_PROXY = re.compile(r"(?:\w+://)?(?:[^/?#\[\]\s]*@)?((?:[\w.-]+|\[[\da-fA-F:.]+\])(?::\d+)?)/?")


def download(url: str, part: Path, by_hand: str, sha256: str | None = None) -> None:
    """Write the weights at `url` to the path `part`, whose suffix says how to read them, and check them.

    They must be whole, and agree with the hashes that the host states and with `sha256`, the hexadecimal hash or its
    start. Raises UserError, which ends in the remedy `by_hand`, or OSError from the disk.
    """
    from segcore.checkpoints.foreign import read_state  # imports torch

    hashes = _fetch(url, part, by_hand) + ([("sha256", sha256)] if sha256 else [])
    try:
        read_state(part)
    except UserError as error:
        reason = str(error).removeprefix(f"{part}: ").partition(";")[0]
        raise UserError(f"{url}: the server sent no weights ({reason}; a login or a proxy?); {by_hand}") from None
    for algorithm, stated in hashes:
        with part.open("rb") as file:
            found = hashlib.file_digest(file, algorithm).hexdigest()
        if not found.startswith(stated):
            raise UserError(f"{url}: its {algorithm} is {found}, not {stated} as stated; try again, or {by_hand}")


def _fetch(url: str, part: Path, by_hand: str) -> list[tuple[str, str]]:
    """Download without a check and return (algorithm, hexadecimal hash) of the content as the host states it."""
    hub_file = re.fullmatch(r"(https?://[^/]+)/([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)", url)
    with network_errors(f"{url}: cannot be downloaded", by_hand, url):
        if hub_file and hub_file[1] == endpoint():
            return _from_hugging_face(part, *hub_file.groups())
        if urlsplit(url).hostname == "drive.google.com":
            return _from_google_drive(url, part, by_hand)
        return _from_host(url, part, by_hand)


def endpoint() -> str:
    """Return the address of the Hugging Face hub, or of the mirror that HF_ENDPOINT names."""
    return os.environ.get("HF_ENDPOINT", HUB).rstrip("/")


@contextlib.contextmanager
def network_errors(what: str, remedy: str, url: str | None = None) -> Iterator[None]:
    """Turn an error of the network or the server into a UserError `WHAT (reason); REMEDY`; a disk's is raised as is.

    `url` is what was asked for, None: the Hugging Face hub. The proxy on the way there is named without its password.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # exceptions differ between libraries and their versions
        if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
            raise
        raise UserError(f"{what} ({_reason(error, url or endpoint())}); {remedy}") from None


def _reason(error: BaseException, url: str) -> str:
    """Return the server's answer or the first cause: libraries nest the exceptions of a connection four deep."""
    if (answer := getattr(error, "response", None)) is not None:
        return f"the server returned {answer.status_code}"
    while cause := error.__cause__ or error.__context__:
        error = cause
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
    parts, proxies = urlsplit(url), getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(parts.hostname or ""):
        return reason
    if named := _PROXY.fullmatch(proxy):  # without its password
        return f"{reason}; the proxy for {parts.scheme} is {named[1]}"
    return f"the address of the proxy for {parts.scheme} is malformed; check {parts.scheme}_proxy"  # no part of it


def _from_hugging_face(part: Path, endpoint: str, repo: str, revision: str, filename: str) -> list[tuple[str, str]]:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    etag = ""
    try:  # at once, while `hf_hub_download` tries for 23 seconds to reach a host without a network
        etag = get_hf_file_metadata(hf_hub_url(repo, filename, revision=revision, endpoint=endpoint)).etag or ""
    except Exception as error:
        if getattr(error, "response", None) is None:
            raise
    path = hf_hub_download(repo, filename, revision=revision, local_dir=part.parent, endpoint=endpoint)
    Path(path).replace(part)
    return [("sha256", etag)] if re.fullmatch("[0-9a-f]{64}", etag) else []  # others are Git's


def _from_google_drive(url: str, part: Path, by_hand: str) -> list[tuple[str, str]]:
    try:
        import gdown
    except ImportError:
        raise UserError(f"weights on Google Drive need gdown: pip install 'segcore[drive]', or {by_hand}") from None
    if gdown.download(id=parse_qs(urlsplit(url).query)["id"][0], output=str(part)) is None:
        raise UserError(f"{url}: Google Drive does not provide the file; {by_hand}")
    return []


def _from_host(url: str, part: Path, by_hand: str) -> list[tuple[str, str]]:
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    class Patient(Retry):
        def get_retry_after(self, response: Any) -> float | None:
            return min(super().get_retry_after(response) or 0.0, LONGEST_PAUSE) or None

        def get_backoff_time(self) -> float:
            return max(super().get_backoff_time(), PAUSE)  # its first one is 0

    name = PurePosixPath(urlsplit(url).path).name
    retry = Patient(
        ATTEMPTS - 1, connect=0, backoff_factor=PAUSE, status_forcelist=(429, 500, 502, 503, 504), raise_on_status=False
    )
    with requests.Session() as session:
        session.adapters.clear()  # a redirect to plain http elsewhere finds no adapter
        for prefix in ("https://", "{0.scheme}://{0.netloc}/".format(urlsplit(url))):
            session.mount(prefix, HTTPAdapter(max_retries=retry))
        session.headers.update({"User-Agent": "segcore", "Accept-Encoding": "identity"})
        for attempt in range(ATTEMPTS):  # urllib3 does not retry once the body has begun
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
            with session.get(url, stream=True, timeout=TIMEOUT) as answer:
                if answer.status_code != 200:  # 206 is a part of the file, which nobody asked for
                    raise UserError(f"{url}: the server returned {answer.status_code} {answer.reason}; {by_hand}")
                total, done = int(answer.headers.get("Content-Length", 0)), 0
                most = min(total or MAX_BYTES, MAX_BYTES)
                with part.open("wb") as file, progress(f"downloading {name} (kB)") as advance:
                    try:
                        for chunk in answer.iter_content(1 << 16):
                            if max(total, done + len(chunk)) > most:
                                raise UserError(f"{url}: the server sends more than {most} bytes; {by_hand}")
                            done += file.write(chunk)
                            advance(done // 1000, total // 1000)
                        if done == total or not total:
                            return _stated_hashes(answer)
                    except requests.RequestException:
                        continue
    raise UserError(
        f"{url}: the connection broke {ATTEMPTS} times ({done} of {total} bytes received); try again, or {by_hand}"
    )


def _stated_hashes(answer: requests.Response) -> list[tuple[str, str]]:
    """Return (algorithm, hexadecimal hash) of the content from the headers.

    Content-MD5 is RFC 1864's; Google's and Amazon's stores have their own, and the Hugging Face hub has one where it
    redirects. An ETag may be any text; Amazon's is the MD5 unless the file came in parts or has a customer's key.
    """
    headers = answer.headers
    md5 = re.findall(r"^([\w+/]{22}==)$", headers.get("Content-MD5", ""))
    md5 += re.findall(r"md5=([\w+/]{22}==)", headers.get("x-goog-hash", ""))
    hashes = [("md5", base64.b64decode(text).hex()) for text in md5]
    if "x-amz-request-id" in headers and headers.get("x-amz-server-side-encryption", "AES256") == "AES256":
        hashes += [("md5", tag) for tag in re.findall(r'^"([0-9a-f]{32})"$', headers.get("ETag", ""))]
    linked = [each.headers.get("X-Linked-ETag", "") for each in (*answer.history, answer)]
    return hashes + [("sha256", tag) for text in linked for tag in re.findall(r'^"([0-9a-f]{64})"$', text)]
