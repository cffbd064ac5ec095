"""Downloads from misbehaving servers: a file appears complete, or one line says which file to put where."""

import base64
import errno
import hashlib
import inspect
import json
import os
import re
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save

from segcore import UserError
from segcore.checkpoints import download, hub
from segcore.config.schema import Published


@pytest.fixture(autouse=True)
def folder(weights_folder):
    return weights_folder


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def refused(url, folder, *words):
    """Check that downloading fails with one line (URL, place and `words`) and leaves nothing behind."""
    with pytest.raises(UserError) as error:
        hub.fetch(url)
    text = str(error.value)
    assert "\n" not in text
    for word in (*words, f"download {url} and put the file at {folder / url.rpartition('/')[2]}"):
        assert word in text
    assert not folder.exists() or names_in(folder) == []


def test_a_file_is_downloaded_once(server, folder, capsys):
    body = server.files["/w.pth"]
    path = hub.fetch(f"{server.url}/w.pth", sha256=hashlib.sha256(body).hexdigest())
    assert path == folder / "w.pth"
    assert path.read_bytes() == body
    assert hub.fetch(f"{server.url}/w.pth", offline=True) == path
    assert len(server.seen) == 1
    assert names_in(folder) == ["w.pth", "w.pth.sha256"]
    assert "downloading w.pth (kB): 1050/1050" in capsys.readouterr().err


def test_a_terminal_gets_a_bar(server, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    hub.fetch(f"{server.url}/w.pth")
    assert "1050/1050" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)


def test_a_redirect_is_followed_and_the_name_kept(server, folder):
    assert hub.fetch(f"{server.url}/moved.pth").read_bytes() == server.files["/w.pth"]
    assert names_in(folder) == ["moved.pth", "moved.pth.sha256"]


def test_a_broken_download_starts_again_from_the_beginning(server):
    assert hub.fetch(f"{server.url}/restart.pth").read_bytes() == server.files["/w.pth"]
    assert server.seen == [("/restart.pth", None)] * 2


def test_a_busy_server_is_asked_again_after_the_pause_that_it_wants_but_no_longer_than_a_minute(server, monkeypatch):
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)
    assert hub.fetch(f"{server.url}/busy.pth").read_bytes() == server.files["/w.pth"]
    assert pauses == [60, 7]


@pytest.mark.parametrize(
    ("name", "words"), [("broken.pth", ["broke 4 times", " of 1050153 bytes"]), ("none.pth", ["404"])]
)
def test_a_failed_download_leaves_nothing_behind(server, folder, name, words):
    refused(f"{server.url}/{name}", folder, *words)


@pytest.mark.parametrize(("name", "words"), [("broken.pth", "broke 4 times"), ("w.pth", "the server returned 503")])
def test_each_pause_between_attempts_is_twice_the_one_before(server, folder, monkeypatch, name, words):
    pauses, server.status = [], 503
    monkeypatch.setattr("time.sleep", pauses.append)
    monkeypatch.setattr(download, "PAUSE", 2.0)
    refused(f"{server.url}/{name}", folder, words)
    assert pauses == [2, 4, 8]
    assert len(server.seen) == 4


@pytest.mark.parametrize("headers", [{}, {"Content-Length": ""}])
def test_no_more_is_written_than_weights_have(server, folder, monkeypatch, headers):
    server.headers = headers
    monkeypatch.setattr(download, "MAX_BYTES", 100_000)
    refused(f"{server.url}/w.pth", folder, "the server sends more than 100000 bytes")
    assert len(server.seen) == 1
    monkeypatch.setattr(download, "MAX_BYTES", len(server.files["/w.pth"]))
    assert hub.fetch(f"{server.url}/w.pth").read_bytes() == server.files["/w.pth"]


def test_no_more_is_written_than_the_server_states(server, folder):
    body = server.files["/w.pth"]
    server.files["/w.pth"] = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    server.headers = {"Content-Length": "1000", "Transfer-Encoding": "chunked"}  # the second one counts
    refused(f"{server.url}/w.pth", folder, "the server sends more than 1000 bytes")


PAGE = b"<!DOCTYPE html><html>Sign in</html>"
PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(1000)
UNSIZED = {"Content-Length": ""}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("body", "headers", "status", "words"),
    [
        (b"", {}, 200, "an empty file"),
        (b"", UNSIZED, 200, "an empty file"),
        (PAGE, {"Content-Type": "text/html; charset=utf-8"}, 200, "a web page"),
        (PAGE, {}, 200, "a web page"),
        (b'{"error": "sign in"}', {"Content-Type": "application/json"}, 200, "a JSON text"),
        (b"version https://git-lfs.github.com/spec/v1\n", {}, 200, "a Git LFS pointer"),
        (PICTURE, {}, 200, "damaged"),
        ("short", {}, 200, "damaged"),
        ("short", UNSIZED, 200, "damaged"),
        ("whole", {}, 206, "the server returned 206 Partial Content"),
    ],
)
def test_only_whole_weights_are_kept(server, folder, body, headers, status, words, suffix):
    weights = server.files["/w.pth"] if suffix == ".pth" else save({"w": torch.zeros(1000)})
    body = {"short": weights[:-10], "whole": weights}.get(body, body)
    server.files[f"/w{suffix}"], server.headers, server.status = body, headers, status
    refused(f"{server.url}/w{suffix}", folder, words)


def encoded(digest):
    return base64.b64encode(digest).decode()


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize(
    ("name", "headers"),
    [
        ("w-{sha256:.8}.pth", {}),
        ("w_20210811_100655-{sha256:.8}.pth", {}),
        ("w.pth", {"Content-MD5": "{base64}"}),
        ("w.pth", {"x-goog-hash": "crc32c=n03x6A==, md5={base64}"}),
        ("w.pth", {"x-amz-request-id": "1", "ETag": '"{md5}"'}),
        ("w.pth", {"X-Linked-ETag": '"{sha256}"'}),
    ],
)
def test_the_hash_that_the_host_states_is_checked(server, folder, name, headers, right):
    body = server.files["/w.pth"]
    hashed = body if right else body + b"changed"
    values = {kind: hashlib.new(kind, hashed).hexdigest() for kind in ("sha256", "md5")}
    values["base64"] = encoded(hashlib.md5(hashed).digest())
    name = name.format(**values)
    server.files[f"/{name}"] = body
    server.headers = {key: text.format(**values) for key, text in headers.items()}
    if right:
        assert hub.fetch(f"{server.url}/{name}").read_bytes() == body
    else:
        refused(f"{server.url}/{name}", folder, " as stated; try again")


def test_texts_in_the_place_of_hashes_are_no_hashes(server):
    server.headers = {"Content-MD5": "none", "x-goog-hash": "crc32c=n03x6A==", "ETag": f'"{"0" * 32}"'}
    assert hub.fetch(f"{server.url}/w.pth").read_bytes() == server.files["/w.pth"]


def test_a_file_that_no_longer_has_the_hash_in_its_name_is_noticed(server, folder):
    folder.mkdir()
    (folder / "w-01234567.pth").write_bytes(b"other")
    with pytest.raises(UserError, match=r"w-01234567\.pth: its SHA-256 is not 01234567; delete it"):
        hub.fetch(f"{server.url}/w-01234567.pth")


def test_the_hash_of_a_download_is_recorded_and_verified_at_each_use(server, folder):
    path = hub.fetch(f"{server.url}/w.pth")
    record = folder / "w.pth.sha256"
    assert record.read_text() == f"{hashlib.sha256(path.read_bytes()).hexdigest()}  w.pth\n"
    path.write_bytes(b"other")
    with pytest.raises(
        UserError, match=r"w\.pth: its SHA-256 is not \w+ as in w\.pth\.sha256; delete it and its record"
    ):
        hub.fetch(f"{server.url}/w.pth")
    record.write_text("no hash")  # as a file that somebody put there, without a record
    assert hub.fetch(f"{server.url}/w.pth") == path


def test_leftovers_of_killed_downloads_are_removed(server, folder):
    for name in (".w.pth.old.part", ".v.pth.old.part", ".w.pth.new.part"):
        (folder / name / ".cache").mkdir(parents=True)
        (folder / name / ".cache" / "w.pth").write_bytes(b"part")
        for path in (folder / name, *(folder / name).rglob("*")):
            os.utime(path, times=(1e9, 1e9) if "old" in name else None)
    hub.fetch(f"{server.url}/w.pth")
    assert names_in(folder) == [".w.pth.new.part", "w.pth", "w.pth.sha256"]


def test_two_downloads_of_one_file_at_once(server, folder):
    server.both = threading.Barrier(2, timeout=30)
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(hub.fetch, [f"{server.url}/both.pth"] * 2))
    assert paths == [folder / "both.pth"] * 2
    assert paths[0].read_bytes() == server.files["/w.pth"]
    assert names_in(folder) == ["both.pth", "both.pth.sha256"]


def test_content_with_another_hash_is_refused(server, folder):
    with pytest.raises(UserError, match="its sha256 is"):
        hub.fetch(f"{server.url}/w.pth", sha256="0" * 64)
    assert names_in(folder) == []
    (folder / "w.pth").write_bytes(b"other")
    with pytest.raises(UserError, match="delete it"):
        hub.fetch(f"{server.url}/w.pth", sha256=hashlib.sha256(server.files["/w.pth"]).hexdigest())


@pytest.mark.parametrize("path", ["w.pth", "authors/model/resolve/main/w.pth"])
def test_without_network_it_says_which_file_goes_where(server, folder, monkeypatch, path):
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits"))  # huggingface_hub would, for 23 s
    with socket.socket() as unused:  # bound, so that nobody else takes the port, but nothing listens there
        unused.bind(("127.0.0.1", 0))
        server.url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        refused(f"{server.url}/{path}", folder, "cannot be downloaded (Connection refused)")
    with pytest.raises(UserError, match=r"w\.pth: missing") as error:
        hub.fetch(f"{server.url}/{path}", offline=True)
    assert f"download {server.url}/{path} and put the file at {folder / 'w.pth'}" in str(error.value)


def test_a_proxy_that_does_not_answer_is_named(folder, monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://user:secret@127.0.0.1:9")  # nothing listens there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    refused("https://example.org/w.pth", folder, "(Connection refused; the proxy for https is 127.0.0.1:9)")


PROXIES = (
    "http://user:sec/ret@host:80",
    "http://user:secret",
    "http://user:secret@:80",
    "http://u:[secret@h:1",
    "sec ret",
)


@pytest.mark.parametrize("proxy", PROXIES)
def test_no_part_of_a_malformed_proxy_is_shown(server, folder, monkeypatch, proxy):
    monkeypatch.setenv("https_proxy", proxy)
    refused("https://example.org/w.pth", folder, "(the address of the proxy for https is malformed; check https_proxy)")


def test_the_proxy_is_named_only_where_it_is_used(server, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://user:secret@proxy.example:80")
    monkeypatch.setenv("no_proxy", "inside.example")
    urls = ["https://a.example/w", "https://inside.example/w", "http://a.example/w"]
    words = [download._reason(OSError("refused"), url) for url in urls]
    assert words == ["refused; the proxy for https is proxy.example:80", "refused", "refused"]


@pytest.mark.parametrize("url", ["http://example.org/w.pth", "file://localhost/etc/passwd", "ftp://example.org/w.pth"])
def test_other_hosts_require_https(folder, url):
    refused(url, folder, "not an https address")


def test_a_redirect_to_plain_http_is_not_followed(server, folder):
    refused(f"{server.url}/unsafe.pth", folder, "cannot be downloaded", "'http://example.invalid/w.pth'")


def test_a_folder_that_cannot_be_written_is_named(server, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SEGCORE_WEIGHTS", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"file.*SEGCORE_WEIGHTS"):
        hub.fetch(f"{server.url}/w.pth")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_cache_that_cannot_be_written_is_one_line(server, folder, monkeypatch, code):
    def mkdir(path, *rest):
        raise OSError(code, os.strerror(code), path)

    monkeypatch.setattr("os.mkdir", mkdir)
    with pytest.raises(UserError, match=rf"w\.pth: cannot be written \({os.strerror(code)}\).*SEGCORE_WEIGHTS"):
        hub.fetch(f"{server.url}/w.pth")


def test_without_a_home_folder_it_says_what_to_set(monkeypatch):
    for name in ("SEGCORE_WEIGHTS", "XDG_CACHE_HOME", "LOCALAPPDATA", "HOME", "USERPROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as for a user without an entry in /etc/passwd
    with pytest.raises(UserError, match=r"no home folder.*set HOME, or SEGCORE_WEIGHTS"):
        hub.weights_dir()


@pytest.mark.parametrize("path", ["w.pth", "authors/model/resolve/main/w.pth"])
def test_a_full_disk_names_the_file(server, folder, monkeypatch, path):
    resource = pytest.importorskip("resource")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.files[f"/{path}"] = server.files["/w.pth"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))  # writing fails as on a full disk
    try:
        with pytest.raises(UserError, match=r"w\.pth: cannot be written .*SEGCORE_WEIGHTS"):
            hub.fetch(f"{server.url}/{path}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names_in(folder) == []


def test_the_default_folder_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("SEGCORE_WEIGHTS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert hub.weights_dir() == tmp_path / "segcore" / "weights"


# The Hugging Face hub


def test_files_of_the_hub_come_from_its_mirror(server, folder, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.files["/authors/model/resolve/v2/a/w.pth"] = server.files["/w.pth"]
    path = hub.fetch("https://huggingface.co/authors/model/resolve/v2/a/w.pth")
    assert path == folder / "w.pth"
    assert path.read_bytes() == server.files["/w.pth"]
    assert names_in(folder) == ["w.pth", "w.pth.sha256"]
    with pytest.raises(UserError, match=r"resolve/v2/gone\.pth: cannot be downloaded .*404"):
        hub.fetch("https://huggingface.co/authors/model/resolve/v2/gone.pth")
    assert names_in(folder) == ["w.pth", "w.pth.sha256"]


def test_the_hash_that_the_hub_states_is_checked(server, folder, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.files["/authors/model/resolve/v2/w.pth"] = server.files["/w.pth"]
    server.headers = {"X-Linked-ETag": f'"{"0" * 64}"'}
    with pytest.raises(UserError, match=r"its sha256 is \w+, not 0+ as stated"):
        hub.fetch("https://huggingface.co/authors/model/resolve/v2/w.pth")
    assert names_in(folder) == []


def test_offline_the_hub_is_not_asked(server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"w\.pth: missing, and downloads are disabled"):
        hub.fetch("https://huggingface.co/authors/model/resolve/v2/w.pth")
    hub.fetch(f"{server.url}/w.pth")  # another host
    assert len(server.seen) == 1


PAGE_OF_ROW = "https://huggingface.co/authors/all/tree/main/a/row"


@pytest.fixture
def row(server, monkeypatch):
    """A row whose weights are somewhere in a folder of the hub: a function that lists the files there."""
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(hub, "published", lambda name: Published({}, page=PAGE_OF_ROW))

    def listing(*names):
        paths = [{"rfilename": path} for path in (*(f"a/row/{name}" for name in names), "a/row2/c.pth", "best.pth")]
        about = {"id": "authors/all", "private": False, "downloads": 0, "likes": 0, "tags": [], "siblings": paths}
        server.files["/api/models/authors/all/revision/main"] = json.dumps(about).encode()

    return listing


@pytest.mark.parametrize("others", [("log.json",), ("iter_9.pth", "log.json")])
def test_the_weights_in_a_folder_of_the_hub_are_found(server, folder, row, others):
    row("best_mIoU.pth", *others)
    server.files["/authors/all/resolve/main/a/row/best_mIoU.pth"] = server.files["/w.pth"]
    path = hub.official_file("the-row")
    assert path == folder / "the_row.pth"
    assert path.read_bytes() == server.files["/w.pth"]
    server.files.clear()  # nothing is listed again
    assert hub.official_file("the_row") == path


def test_the_weights_in_a_folder_of_the_hub_must_have_the_verified_hash(server, folder, row, monkeypatch):
    row("best.pth")
    server.files["/authors/all/resolve/main/a/row/best.pth"] = server.files["/w.pth"]
    monkeypatch.setattr(hub, "published", lambda name: Published({}, page=PAGE_OF_ROW, sha256="0" * 64))
    with pytest.raises(UserError, match=r"its sha256 is \w+, not 0+ as stated"):
        hub.official_file("the_row")
    assert names_in(folder) == []
    (folder / "the_row.pth").write_bytes(server.files["/w.pth"])
    with pytest.raises(UserError, match=r"its SHA-256 is not 0{64}; delete it"):
        hub.official_file("the_row")


@pytest.mark.parametrize(
    ("names", "words"), [(("a.pth", "b.pth"), "holds a.pth, b.pth, of which"), (("log.json",), "holds no weights file")]
)
def test_a_folder_without_certain_weights_is_left_to_the_user(folder, row, names, words):
    row(*names)
    with pytest.raises(UserError, match=words) as error:
        hub.official_file("the_row")
    assert f"download the weights at {PAGE_OF_ROW} and put them at {folder / 'the_row.pth'}" in str(error.value)
    with pytest.raises(UserError, match="missing, and downloads are disabled"):
        hub.official_file("the_row", offline=True)


# Google Drive

DRIVE = "https://drive.google.com/uc?export=download&id=KEY"


def test_google_drive_without_gdown_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(UserError) as error:
        hub.fetch(DRIVE, name="w.pth")
    for word in ("segcore[drive]", f"download {DRIVE} and put the file at {folder / 'w.pth'}"):
        assert word in str(error.value)
    assert names_in(folder) == []


WEIGHTS = save({"w": torch.ones(2)})


@pytest.mark.parametrize("given", [WEIGHTS, b"<html>sign in", None, RuntimeError("too many accesses\nto the file")])
def test_google_drive_through_gdown(folder, monkeypatch, given):
    def download(*, id, output):
        assert id == "KEY"
        if isinstance(given, Exception):
            raise given
        if given is not None:
            with open(output, "wb") as file:  # noqa: PTH123
                file.write(given)
        return given and output

    monkeypatch.setitem(sys.modules, "gdown", SimpleNamespace(download=download))
    if given == WEIGHTS:
        assert hub.fetch(DRIVE, name="w.safetensors").read_bytes() == given
        assert names_in(folder) == ["w.safetensors", "w.safetensors.sha256"]
        return
    with pytest.raises(UserError) as error:
        hub.fetch(DRIVE, name="w.pth")
    assert f"download {DRIVE} and put the file at {folder / 'w.pth'}" in str(error.value)
    assert "\n" not in str(error.value)
    assert names_in(folder) == []


def test_gdown_accepts_the_arguments():
    gdown = pytest.importorskip("gdown", reason="the extra `drive` is not installed")
    assert {"id", "output"} <= inspect.signature(gdown.download).parameters.keys()
