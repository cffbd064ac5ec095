"""Folders of golden numbers and real images. Tests that need them skip without them and report it.

Also a server of weights within this machine.
"""

import io
import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch

from segcore import ops


class Arrays(dict[str, np.ndarray]):
    """Arrays by name; those that the package of reference numbers leaves out skip the test that asks for them."""

    left_out: tuple[str, ...] = ()

    def __missing__(self, name: str) -> np.ndarray:
        if name in self.left_out:
            pytest.skip(f"{name} shows a photograph, which segcore-reference leaves out")
        raise KeyError(name)


@pytest.fixture(scope="session")
def golden(reference: Path) -> Callable[[str], dict[str, np.ndarray]]:
    """Return `load(path)`, which reads an .npz below the reference folder, such as `eval/golden/resize.npz`."""
    listed = reference / "left_out.json"
    left_out = json.loads(listed.read_text()) if listed.is_file() else {}

    def load(path: str) -> dict[str, np.ndarray]:
        with np.load(reference / path, allow_pickle=False) as arrays:
            found = Arrays(arrays)
        found.left_out = left_out.get(path, ())
        return found

    return load


@pytest.fixture(scope="session")
def real_data(reference: Path) -> Path:
    """Folder with a few real image and label pairs, one sub-folder per dataset in its own layout."""
    folder = reference.parent / "data"
    if not os.environ.get("SEG_REFERENCE") or not folder.is_dir():  # others' packages may have a `data` beside ours
        pytest.skip("no folder `data` beside SEG_REFERENCE: real images keep their data sets' terms")
    return folder


@pytest.fixture(params=["plain", "compiled"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test with the plain kernels of the operators, and again with those of an installed package."""
    ops.load() if request.param == "compiled" else ops.unload()
    if request.param == "compiled" and ops.kernels()["ms_deform_attn"]["cpu"].startswith("plain"):
        pytest.skip(f"no compiled kernels: {ops.kernels()['ms_deform_attn']['cpu']}")
    yield request.param
    ops.load()


class Weights(BaseHTTPRequestHandler):
    """Serves `server.files` like a plain host and like the Hugging Face hub; other paths misbehave."""

    def do_GET(self) -> None:
        server, path = self.server, unquote(self.path.partition("?")[0])
        server.seen.append((path, self.headers.get("Range")))
        body = server.files["/w.pth"]
        if path in server.files:
            self.answer(server.files[path], server.headers, server.status)
        elif path == "/moved.pth":
            self.answer(b"", {"Location": "/w.pth"}, status=302)
        elif path == "/unsafe.pth":
            self.answer(b"", {"Location": "http://example.invalid/w.pth"}, status=302)
        elif path == "/restart.pth":  # complete from the second request on
            self.answer(body, send=None if len(server.seen) > 1 else 1000)
        elif path == "/busy.pth":
            status, pause = {1: (429, "1000000"), 2: (503, "7")}.get(len(server.seen), (200, ""))
            self.answer(body, {"Retry-After": pause}, status)
        elif path == "/both.pth":  # for two requests at once
            server.both.wait()
            self.answer(body)
        elif path == "/broken.pth":
            self.answer(body, send=len(body) // 2)
        else:
            self.send_error(404)

    def do_HEAD(self) -> None:
        self.server.tokens.append(self.headers.get("Authorization"))
        known = self.path in self.server.files
        self.answer(self.server.files[self.path], self.server.headers, send=0) if known else self.send_error(404)

    def answer(self, body: bytes, headers: dict[str, str] | None = None, status: int = 200, send: int | None = None):
        """Send the head and the first `send` bytes of the body; the hub's responses also name a commit and an ETag."""
        self.send_response(status)
        hub = {"ETag": '"v1"', "X-Repo-Commit": "0" * 40}
        hub |= self.server.stated.get(self.path, {})
        for name, value in {"Content-Length": str(len(body)), **hub, **(headers or {})}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:send])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """A server at `server.url` with the files `server.files` (path -> content).

    They are sent with `server.headers`, those of `server.stated` (path -> headers) and `server.status`; `server.seen`
    lists (path, Range), and `server.tokens` what HEAD requests are authorized by.
    """
    from segcore.checkpoints import download

    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:  # the user's own
        monkeypatch.delenv(name)
    monkeypatch.setattr(download, "PAUSE", 0.0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Weights)
    server.url, server.seen = f"http://127.0.0.1:{server.server_port}", []
    server.stated, server.tokens = {}, []
    torch.save({"w": torch.arange(1 << 18, dtype=torch.float32)}, weights := io.BytesIO())
    server.files, server.headers, server.status = (
        {"/w.pth": weights.getvalue()},
        {},
        200,
    )  # 1 MiB and some hundred bytes
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def weights_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of downloaded weights."""
    monkeypatch.setenv("SEGCORE_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights"
