"""Files: special ones are refused, stored JSON is untrusted, permissions are the umask's, names of any encoding."""

import contextlib
import errno
import json
import os
import socket
import stat
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import zeros

from segcore.checkpoints import hub
from segcore.errors import UnreadError, UserError
from segcore.files import (
    MAX_DEPTH,
    expanded,
    parse_json,
    read_json,
    regular_file,
    replacing,
    umask_permissions,
    utf8_path,
    write,
    write_zip,
    writing_folder,
)


def special(path: Path, kind: str) -> Path:
    """Make something at the path that is not a regular file; a device can only be linked to."""
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a socket":
        with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)  # the system allows few characters in a socket's path
    elif kind == "a folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    return path


@pytest.mark.parametrize("kind", ["a FIFO", "a socket", "a device", "a folder"])
def test_only_regular_files_are_opened(tmp_path: Path, kind: str) -> None:
    path = special(tmp_path / "a.pth", kind)
    with pytest.raises(UserError, match=rf"a\.pth: is not a regular file \({kind}\)$"):
        regular_file(path)


def test_a_file_and_a_link_to_one_pass_and_nothing_there_is_an_oserror(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    regular_file(tmp_path / "link")
    with pytest.raises(FileNotFoundError):
        regular_file(tmp_path / "none")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="loop"):
        regular_file(tmp_path / "loop")


def nested(depth: int) -> str:
    """Return an object with `depth` levels."""
    return (depth - 1) * '{"a":' + "{}" + (depth - 1) * "}"


DAMAGED = {
    "": "Expecting value",
    "{": "Expecting property name",
    "[1]": "a list instead of an object",
    "null": "a NoneType instead of an object",
    '{"a": NaN}': "NaN is not a finite number",
    '{"a": [-Infinity]}': "-Infinity is not a finite number",
    '{"a": 1e999}': "1e999 is not a finite number",
    f'{{"a": {10**400}}}': "is too large",
    '{"a": "\\ud800"}': "not UTF-8",
    '{"a": 1} b': "Extra data",
    100_000 * "[": "nested too deeply",
    100_000 * '{"a":': "nested too deeply",
    nested(MAX_DEPTH + 1): "nested too deeply",
}


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_json_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=rf"a\.json: damaged \(.*{DAMAGED[text]}.*\)$") as caught:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


def test_json_that_is_no_text_or_huge_or_cannot_be_read(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a.json"
    for content, problem in ((b'{"a": "\xff"}', "not UTF-8"), ("{}".encode("utf-16"), "not UTF-8"), (b"", "Expecting")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=problem):
            read_json(path)
    os.truncate(path, 1 << 40)  # without a block on the disk
    with pytest.raises(UserError, match=r"damaged \(larger than 16 MiB\)"):
        read_json(path)
    for missing in (tmp_path / "none.json", path / "a.json"):
        with pytest.raises((FileNotFoundError, NotADirectoryError)):
            read_json(missing)

    def fails(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))  # without the name of a file, as Python's reads

    monkeypatch.setattr(Path, "open", fails)
    with pytest.raises(UnreadError, match=r"a\.json: cannot be read \(Input/output error\)"):
        read_json(path)


TEXT = st.text(st.characters(codec="utf-8"))
NUMBER = st.integers(-(10**18), 10**18) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
)


@settings(max_examples=40)
@given(st.dictionaries(TEXT, JSON))
def test_whole_json_is_read_unchanged(value: dict[str, object]) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


@given(JSON, st.data())
def test_any_damage_to_json_is_a_value_error(value: object, data: st.DataObject) -> None:
    whole = json.dumps({"a": value}).encode()
    start = data.draw(st.integers(0, len(whole)))
    changed = whole[:start] + data.draw(st.binary(max_size=6)) + whole[data.draw(st.integers(start, len(whole))) :]
    with contextlib.suppress(ValueError):
        assert isinstance(parse_json(changed), dict)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_files_have_the_permissions_of_the_umask(tmp_path: Path, monkeypatch, mask: int) -> None:
    """Also those that a library makes private, as safetensors and gdown do."""

    def download(url: str, part: Path, *_: object) -> None:
        Path(tempfile.mkstemp(dir=part.parent)[1]).rename(part)

    monkeypatch.setenv("SEGCORE_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setattr(hub, "download", download)
    before = os.umask(mask)
    try:
        write(tmp_path / "a/report.html", "")
        hub.fetch("https://example.org/a.pth")
        save_file({"a": zeros(1)}, tmp_path / "a.safetensors")
        umask_permissions(tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {
        **dict.fromkeys(("a", "weights"), 0o777 & ~mask),
        **dict.fromkeys(("report.html", "a.pth", "a.pth.sha256", "a.safetensors"), 0o666 & ~mask),
    }


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9")
    write(path, f"of {path.name}")
    assert path.read_bytes() == rb"of caf\udce9"
    with utf8_path(path) as other:
        assert str(other).encode()
        assert other.read_bytes() == path.read_bytes()
    with utf8_path(tmp_path) as same:
        assert same == tmp_path


def fill_and_raise(folder, error):
    with writing_folder(folder) as temporary:
        (temporary / "x").touch()
        raise error


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    with writing_folder(tmp_path / "a/b") as folder:
        (folder / "x").touch()
        assert not (tmp_path / "a/b").exists()
    assert [path.name for path in (tmp_path / "a").rglob("*")] == ["b", "x"]
    for error, kind, line in (
        (OSError(28, "No space left on device"), UserError, r"/c: cannot be written \(No space left on device\)"),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
    ):
        with pytest.raises(kind, match=line):
            fill_and_raise(tmp_path / "c", error)
    with pytest.raises(UserError, match="b: is there already and not empty"), writing_folder(tmp_path / "a/b"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_home_folder_that_is_nobodys_is_a_name(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded("~/a") == Path("/home/me/a")
    assert expanded("~no-such-user/a") == Path("~no-such-user/a")


@pytest.mark.skipif(not hasattr(os, "sync"), reason="Windows has no such call")
def test_a_folder_is_on_the_disk_before_it_appears(tmp_path: Path, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(os, "sync", lambda: seen.append((tmp_path / "out").exists()))
    with writing_folder(tmp_path / "out") as folder:
        (folder / "x").touch()
        assert seen == []
    assert seen == [False]
    assert (tmp_path / "out/x").exists()


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    """Two threads, or processes of one number in two containers."""
    path = tmp_path / "new" / f"{'a' * 251}.txt"  # the longest name that most systems know
    with replacing(path) as first, replacing(path) as second:
        first.write_text("1")
        second.write_text("2")
    assert path.read_text() in ("1", "2")
    assert [*path.parent.iterdir()] == [path]


def test_an_archive_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write(tmp_path / "in/a/1.png", b"one")
    write_zip(tmp_path / "out/all.zip", tmp_path / "in", ["a/1.png"])
    with zipfile.ZipFile(tmp_path / "out/all.zip") as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == {"a/1.png": b"one"}
    with pytest.raises(UserError, match=r"some\.zip: cannot be written"):
        write_zip(tmp_path / "out/some.zip", tmp_path / "in", ["a/1.png", "a/2.png"])
    with pytest.raises(UserError, match=r"in: cannot be written \(Is a directory"):
        write_zip(tmp_path / "in", tmp_path / "in", ["a/1.png"])
    for name in ("../2.png", "a/../../2.png", str(tmp_path / "in/a/1.png")):
        with pytest.raises(UserError, match="leads out of a folder; give the file another name"):
            write_zip(tmp_path / "out/some.zip", tmp_path / "in", [name])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["1.png", "a", "all.zip", "in", "out"]


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are UTF-8 there")
def test_an_archive_takes_names_of_any_encoding_and_files_of_any_age(tmp_path: Path) -> None:
    name = os.fsdecode(b"z\xff.png")
    write(tmp_path / name, b"one")
    os.utime(tmp_path / name, (0, 0))  # 1970: the format begins with 1980
    write_zip(tmp_path / "all.zip", tmp_path, [name])
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        assert archive.read("z\\udcff.png") == b"one"
