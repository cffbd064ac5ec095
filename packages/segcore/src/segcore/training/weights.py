"""Weights files: find or download them, read them without executing anything, load them strictly.

Everything here treats a file as untrusted: safetensors have no code in them, and PyTorch files are read with
`weights_only=True` and a short allow-list. There is no other way in.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import pickle
import pickletools
import re
import sys
import time
import urllib.error
import urllib.request
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import urlsplit

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from segcore import files
from segcore.errors import UserError
from segcore.experiment import published
from segcore.models.segmentor import LoadReport, Segmentor
from segcore.training.checkpoint import MANIFEST, best, newest, read_model_state

WRAPPERS = ("state_dict", "model", "module")
"""Entries of a training checkpoint that hold the weights, in the order of preference."""
ACCEPTED = (
    "give a .safetensors or .pth file, a checkpoint folder, a work_dir, `official` or `official:CONFIG`; "
    "start weights may also be a timm tag"
)
ATTEMPTS = 4
PAUSE = 2.0
"""Seconds between two attempts to go on with a broken download."""
TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as broken."""


class NumpyValue:
    """Stands for the numpy scalars and arrays in a checkpoint: it takes what it is given and keeps nothing.

    OpenMMLab stores its best score as a numpy scalar and palettes as arrays. Nothing here reads them, and numpy's own
    functions would let a crafted file set the flags of a dtype, which are not checked.
    """

    def __init__(self, *args: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


_MULTIARRAY = [f"{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")]
_ALLOWED: list[Any] = [(NumpyValue, f"numpy.{name}") for name in ("dtype", "ndarray", *_MULTIARRAY)]
"""All that a PyTorch file may name besides torch's own. Numpy 1 has the functions in `core`, numpy 2 in `_core`."""


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the weights in a `.safetensors` file, a PyTorch file or one of our checkpoint folders, on the CPU.

    Of a file this is its `state_dict`, `model` or `module` entry or else the whole, without a leading `module.` in the
    names and without `ema_*` copies (ddp/SPEC.md section 5). Tensors may be backed by the file: do not write to them.
    Raises ValueError when the file is missing, damaged, asks for code or holds anything but dense tensors by name.
    """
    if path.is_dir():
        return read_model_state(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weights file (looked at {path.absolute()}); {ACCEPTED}")
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    if text := re.match(rb"\s*<(!doctype|html|\?xml)|version https://git-lfs", head, re.IGNORECASE):
        kind = "a web page" if text[1] else "a Git LFS pointer"
        raise UserError(f"{path}: this is {kind}, not weights; delete it and download the file itself")
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for key in WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
            break
    if not isinstance(state, Mapping) or not state:
        raise UserError(f"{path}: holds {_kind(state)} instead of tensors by name; give a file with a state dict")
    wrong = [f"{name!r} is {_kind(value)}" for name, value in state.items() if not _is_weight(name, value)]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"{path}: not only dense tensors under text names: {', '.join(wrong[:3])}{more}; "
            f"give a file that is a state dict or has one under {', '.join(WRAPPERS)}"
        )
    names = {name: str(name).removeprefix("module.") for name in state}
    return {names[name]: tensor for name, tensor in state.items() if not names[name].startswith("ema_")}


def load_weights(model: Segmentor, path: Path) -> LoadReport:
    """Load a checkpoint of the whole model and report what was used.

    Our own checkpoints and published ones are told apart by their names. Strict: raises ValueError, and changes
    nothing, unless every tensor is used and every parameter is set (see `Segmentor.load_official`).
    """
    return _load(model, read_state(path), path)


def initialize(model: Segmentor, init: str, *, offline: bool = False) -> str:
    """Load the start weights `train.init` and return a line that reports it.

    `init` is a file, checkpoint folder or work_dir, `official:CONFIG`, or a timm tag. A file that has nothing of the
    model outside its backbone (timm names, or `backbone.*` as OpenMMLab's ImageNet files have) goes to
    `model.load_start`. Raises ValueError when there is no such thing, it cannot be had offline, or it does not fit.
    """
    import timm  # takes seconds, and only start weights need it

    if ":" not in init and not Path(init).expanduser().exists() and timm.is_model(init):
        state, source = _timm_state(init, offline=offline), init
    else:
        path = resolve(init, "", offline=offline)
        state, source = read_state(path), str(path)
    if model.is_whole(state):
        return f"{source}: {_load(model, state, source)}"
    with _naming(source):
        part, report = model.load_start(state)
    return f"{source}: {part}: {report}"


def resolve(checkpoint: str, experiment_name: str, *, offline: bool = False) -> Path:
    """Return the file or checkpoint folder that `checkpoint` names, downloading it if it is a published one.

    `official` is the published file of `experiment_name`, `official:CONFIG` that of another row; an existing file or
    checkpoint folder is itself; a work_dir gives its best, else its newest checkpoint. Raises ValueError otherwise.
    """
    if checkpoint == "official" or checkpoint.startswith("official:"):
        return official_file(checkpoint.partition(":")[2] or experiment_name, offline=offline)
    path = Path(checkpoint).expanduser()
    if (path / "checkpoints").is_dir():
        found = best(path) or newest(path)
        if found is None:
            raise UserError(f"{path}: this work_dir holds no complete checkpoint; train first, or {ACCEPTED}")
        return found
    if not path.exists():
        raise UserError(f"{checkpoint}: no such file or folder (looked at {path.absolute()}); {ACCEPTED}")
    if path.is_dir() and not (path / MANIFEST).exists():
        raise UserError(f"{path}: neither a checkpoint folder (no {MANIFEST}) nor a work_dir; {ACCEPTED}")
    return path


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


@contextlib.contextmanager
def _naming(source: object) -> Iterator[None]:
    """Put the file in front of what a model says about its tensors."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _read_safetensors(path: Path) -> Any:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or not a safetensors file ({error}); get it again") from None


def _read_torch(path: Path) -> Any:
    """Return what a PyTorch file holds, through the allow-list; executes nothing in it."""
    damaged = f"{path}: damaged, cut off or not a PyTorch weights file; get it again"
    try:
        with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; the error says enough
            mmap = zipfile.is_zipfile(path) and _check_zip(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        if name := _refused(path, str(error)):
            raise UserError(
                f"{path}: refused, nothing was executed: it asks for {name}, which weights do not need; "
                "get it again, or ask its authors for a plain state dict, best as safetensors"
            ) from None
        raise UserError(damaged) from None
    except Exception:  # a damaged pickle can fail in any way
        raise UserError(damaged) from None


def _check_zip(path: Path) -> bool:
    """Check the checksums of a PyTorch zip file, which torch does not; return whether it can be mapped into memory."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        # torch.serialization.set_crc32_options(False) leaves them all 0
        if any(entry.CRC for entry in entries) and (bad := archive.testzip()):
            raise UserError(f"{path}: damaged ({bad!r} fails its checksum); get it again")
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)


def _refused(path: Path, message: str) -> str | None:
    """Return the function or class that the unpickler stopped at, None if it stopped for another reason."""
    if found := re.search(r"GLOBAL ([\w.]+)", message):
        return found[1]
    # Since protocol 4, functions are named by two strings on the stack; torch stops at the first one without telling.
    strings = [""]
    with contextlib.suppress(Exception), contextlib.ExitStack() as stack:
        file: IO[bytes] = stack.enter_context(path.open("rb"))
        if zipfile.is_zipfile(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            file = stack.enter_context(archive.open(next(n for n in archive.namelist() if n.endswith("/data.pkl"))))
        while True:  # one pickle after the other, until what follows is none
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "STACK_GLOBAL":
                    return ".".join(strings[-2:])
                if isinstance(argument, str):
                    strings.append(argument)
    return None


def _is_weight(name: object, value: object) -> bool:
    """Whether this is an ordinary tensor under a name: dense, real, with data."""
    if not isinstance(name, str) or not isinstance(value, Tensor):
        return False
    return (
        value.layout == torch.strided and value.device.type == "cpu" and not (value.is_quantized or value.is_complex())
    )


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {'quantized' if value.is_quantized else value.layout} {value.dtype} tensor on {value.device}"
    return f"nothing ({type(value).__name__})" if isinstance(value, Mapping) and not value else type(value).__name__


def _load(model: Segmentor, state: Mapping[str, Tensor], source: object) -> LoadReport:
    own = sum(name in state for name in model.state_dict())
    official = sum(name in state for name in model.official_names().values())
    with _naming(source):
        return model.load_own(state) if own and own >= official else model.load_official(state)


def _timm_state(tag: str, *, offline: bool) -> dict[str, Tensor]:
    """Return the state dict of a timm model with its pretrained weights, under the names of the installed timm.

    The file is `<tag>.safetensors` in `weights_dir()`, downloaded where absent from timm's collection on the
    Hugging Face hub (or the mirror `$HF_ENDPOINT`).
    """
    import timm

    try:
        cfg = timm.get_pretrained_cfg(tag)
    except RuntimeError as error:
        raise UserError(f"train.init {tag}: {error} timm.list_pretrained() in Python lists all tags") from None
    if cfg is None or not cfg.hf_hub_id:
        raise UserError(f"train.init {tag}: timm offers no weights for it; give another tag or a file")
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
