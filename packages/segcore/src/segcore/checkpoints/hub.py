"""Find published weights: in the folder of downloaded ones, else where their authors keep them."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from segcore import files
from segcore.checkpoints.download import HUB, download, endpoint
from segcore.checkpoints.foreign import read_state
from segcore.checkpoints.hugging_face import files_below, hub_offline
from segcore.config.registry import published
from segcore.config.schema import HASH_IN_NAME
from segcore.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".pth", ".pt", ".safetensors")
"""Of weights files."""


def official_file(name: str, *, offline: bool = False) -> Path:
    """Return the local file of a published row's weights, downloading it if absent.

    Raises ValueError when the row is not published, its authors offer no weights, or the download fails.
    """
    row = published(name)
    if row is None:
        raise UserError(f"{name!r} is not a published configuration; `configs` lists them, use official:CONFIG")
    if row.url is None and row.page is not None:
        return _from_folder(name.replace("-", "_"), row.page, row.sha256, offline)
    if row.url is None:
        raise UserError(f"the authors of {name} offer no weights for it; train it, or pass your own checkpoint")
    return fetch(row.url, offline=offline, sha256=row.sha256, name=row.file)


def _from_folder(name: str, page: str, sha256: str | None, offline: bool) -> Path:
    """Return the local file, named as the row is, of the weights in a folder of the Hugging Face hub; see `fetch`.

    They are the only weights file there, or the only one whose name begins with `best`.
    """
    parts = re.fullmatch(rf"{HUB}/([^/]+/[^/]+)/tree/([^/]+)/(.+)", page)
    assert parts
    for path in sorted(weights_dir().glob(f"{name}.*")):
        if path.suffix in SUFFIXES:
            return _unchanged(path, page, sha256)
    by_hand = f"download the weights at {page} and put them at {weights_dir() / name}.pth"
    if offline or hub_offline():
        raise UserError(f"{weights_dir() / name}.pth: missing, and downloads are disabled; {by_hand}")
    found = [
        path
        for path in map(PurePosixPath, files_below(parts[1], parts[2], parts[3], by_hand))
        if path.suffix in SUFFIXES
    ]
    best = [path for path in found if path.name.startswith("best")] if len(found) > 1 else found
    if len(best) != 1:
        names = ", ".join(path.name for path in found) or "no weights file"
        raise UserError(f"{page}: holds {names:.300}, of which none is certainly the row's; {by_hand}")
    url = f"{HUB}/{parts[1]}/resolve/{parts[2]}/{best[0]}"
    return fetch(url, sha256=sha256, name=f"{name}{best[0].suffix}")


def weights_dir() -> Path:
    """Return the folder of downloaded weights: `$SEGCORE_WEIGHTS`, else `segcore/weights` in the user's cache."""
    cache = os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else os.environ.get("XDG_CACHE_HOME")
    try:
        if own := os.environ.get("SEGCORE_WEIGHTS"):
            return Path(own).expanduser()
        return (Path(cache) if cache else Path.home() / ".cache") / "segcore" / "weights"
    except RuntimeError:
        raise UserError("no home folder to keep weights in; set HOME, or SEGCORE_WEIGHTS to a folder") from None


def fetch(url: str, *, offline: bool = False, sha256: str | None = None, name: str | None = None) -> Path:
    """Return the file of `url` in `weights_dir()`, downloading it if it is not there.

    `name` is the local file name, by default the URL's last part; `sha256` (hexadecimal, or its start) is the expected
    hash, by default the one in the URL's last part. The file is downloaded into a temporary folder, read, compared with
    the size and the hashes that the host states, and then renamed, so it appears complete or not at all. Its SHA-256 is
    recorded beside it in NAME.sha256, as `sha256sum` writes it, and verified at each use. URLs must be https, or plain
    http to this machine.
    Raises ValueError naming the URL and the file's place when it is absent and cannot be downloaded.
    """
    if url.startswith(f"{HUB}/"):
        url = endpoint() + url.removeprefix(HUB)
    file = PurePosixPath(urlsplit(url).path).name
    target = weights_dir() / (name or file)
    if not sha256 and (stated := HASH_IN_NAME.search(file)):
        sha256 = stated[1]
    if target.is_file():
        return _unchanged(target, url, sha256)
    by_hand = f"download {url} and put the file at {target}"
    if offline or (url.startswith(f"{endpoint()}/") and hub_offline()):
        raise UserError(f"{target}: missing, and downloads are disabled; {by_hand}")
    parts = urlsplit(url)
    if parts.scheme != "https" and (parts.scheme, parts.hostname) not in {("http", "127.0.0.1"), ("http", "localhost")}:
        raise UserError(f"{url}: not an https address; {by_hand}")
    with files.writing(target, "free space or set SEGCORE_WEIGHTS to another folder"):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target.parent)
        # A separate folder: several processes may download the same file at once.
        with tempfile.TemporaryDirectory(".part", f".{target.name}.", target.parent, ignore_cleanup_errors=True) as own:
            part = Path(own) / target.name
            download(url, part, by_hand, sha256)
            files.umask_permissions(part)  # gdown makes its files private
            files.sync(part)
            record = part.with_name(_record(target).name)
            record.write_text(f"{files.sha256(part)}  {target.name}\n", encoding="utf-8")
            record.replace(_record(target))
            part.replace(target)
    return target


def _record(target: Path) -> Path:
    return target.with_name(f"{target.name}.sha256")


def _unchanged(target: Path, url: str, sha256: str | None = None) -> Path:
    """Return a local file; raises UserError if its SHA-256 is not the expected one, or the one recorded with it."""
    record = _record(target)
    stated = [("", sha256)] if sha256 else []
    with contextlib.suppress(OSError, ValueError):
        content = record.read_text(encoding="utf-8")
        stated += [(f" as in {record.name}", one) for one in re.findall(r"\A[0-9a-f]{64}(?= )", content)]
    found = files.sha256(target) if stated else ""
    for where, one in stated:
        if not found.startswith(one):
            raise UserError(
                f"{target}: its SHA-256 is not {one}{where}; delete it and its record to download {url} again"
            )
    return target


def _remove_leftovers(folder: Path) -> None:
    """Remove what downloads left that were killed; one that lives writes or gives up within minutes."""
    for left in folder.glob(".*.part"):
        with contextlib.suppress(OSError):
            if time.time() - max(path.stat().st_mtime for path in (left, *left.rglob("*"))) > 3600:
                shutil.rmtree(left)


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
