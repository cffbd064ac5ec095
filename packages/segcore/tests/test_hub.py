"""Downloads from misbehaving servers: a file appears complete, or one line says which file to put where."""

import hashlib
import inspect
import re
import sys
from types import SimpleNamespace

import pytest

from segcore import UserError
from segcore.checkpoints import hub


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
    assert names_in(folder) == ["w.pth"]
    assert "downloading w.pth (kB): 1048/1048" in capsys.readouterr().err


def test_a_terminal_gets_a_bar(server, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    hub.fetch(f"{server.url}/w.pth")
    assert "1048/1048" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)


def test_a_redirect_is_followed_and_the_name_kept(server, folder):
    assert hub.fetch(f"{server.url}/moved.pth").read_bytes() == server.files["/w.pth"]
    assert names_in(folder) == ["moved.pth"]


@pytest.mark.parametrize(("name", "requests"), [("restart.pth", 2), ("busy.pth", 3)])
def test_a_broken_download_starts_again_from_the_beginning(server, name, requests):
    assert hub.fetch(f"{server.url}/{name}").read_bytes() == server.files["/w.pth"]
    assert server.seen == [(f"/{name}", None)] * requests


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("broken.pth", ["broke 4 times", " of 1048576 bytes"]),
        ("none.pth", ["404"]),
        ("page.pth", ["web page"]),
        ("untyped_page.pth", ["web page"]),
    ],
)
def test_a_failed_download_leaves_nothing_behind(server, folder, name, words):
    refused(f"{server.url}/{name}", folder, *words)


def test_content_with_another_hash_is_refused(server, folder):
    with pytest.raises(UserError, match="SHA-256"):
        hub.fetch(f"{server.url}/w.pth", sha256="0" * 64)
    assert names_in(folder) == []
    (folder / "w.pth").write_bytes(b"other")
    with pytest.raises(UserError, match="delete it"):
        hub.fetch(f"{server.url}/w.pth", sha256=hashlib.sha256(server.files["/w.pth"]).hexdigest())


@pytest.mark.parametrize("path", ["w.pth", "authors/model/resolve/main/w.pth"])
def test_without_network_it_says_which_file_goes_where(server, folder, monkeypatch, path):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub tries again for 23 s
    server.server_close()  # nothing listens on the port now
    refused(f"{server.url}/{path}", folder, "cannot be downloaded")
    with pytest.raises(UserError, match=r"w\.pth: missing") as error:
        hub.fetch(f"{server.url}/{path}", offline=True)
    assert f"download {server.url}/{path} and put the file at {folder / 'w.pth'}" in str(error.value)


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
    assert names_in(folder) == ["w.pth"]
    with pytest.raises(UserError, match=r"resolve/v2/gone\.pth: cannot be downloaded .*404"):
        hub.fetch("https://huggingface.co/authors/model/resolve/v2/gone.pth")
    assert names_in(folder) == ["w.pth"]


# Google Drive

DRIVE = "https://drive.google.com/uc?export=download&id=KEY"


def test_google_drive_without_gdown_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(UserError) as error:
        hub.fetch(DRIVE, name="w.pth")
    for word in ("segcore[drive]", f"download {DRIVE} and put the file at {folder / 'w.pth'}"):
        assert word in str(error.value)
    assert names_in(folder) == []


@pytest.mark.parametrize("given", [b"weights", b"<html>sign in", None, RuntimeError("too many accesses\nto the file")])
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
    if given == b"weights":
        assert hub.fetch(DRIVE, name="w.pth").read_bytes() == given
        assert names_in(folder) == ["w.pth"]
        return
    with pytest.raises(UserError) as error:
        hub.fetch(DRIVE, name="w.pth")
    assert f"download {DRIVE} and put the file at {folder / 'w.pth'}" in str(error.value)
    assert "\n" not in str(error.value)
    assert names_in(folder) == []


def test_gdown_accepts_the_arguments():
    gdown = pytest.importorskip("gdown", reason="the extra `drive` is not installed")
    assert {"id", "output"} <= inspect.signature(gdown.download).parameters.keys()
