"""Weights files: reading them without executing anything, downloads from a server that misbehaves, strict loading."""

import contextlib
import hashlib
import os
import pickle
import re
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from segcore import UserError
from segcore.checkpoints import foreign, hub, load
from segcore.checkpoints import run_checkpoint as checkpoint
from segcore.config.schema import Published
from segcore.models.segmentor import LoadReport, Segmentor


class Tiny(Segmentor):
    """A whole segmentor in three layers; the published layout of `head.weight` is transposed."""

    def __init__(self, num_classes: int = 4, auxiliary: bool = False):
        super().__init__()
        self.num_classes = num_classes
        self.stem = nn.Conv2d(3, 8, 1)
        self.bn = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, num_classes)
        if auxiliary:
            self.auxiliary_head = nn.Conv2d(8, num_classes, 1)

    def logits(self, images, seeds=None):
        return self.head(self.bn(self.stem(images)).movedim(1, 3)).movedim(3, 1)

    def losses(self, images, labels, **options):
        return {"loss": nn.functional.cross_entropy(self(images), labels)}

    def key_map(self):
        new = {"stem": "backbone.conv1", "bn": "backbone.bn1", "head": "decode_head.conv_seg"}
        return {name: ".".join([new.get((p := name.split("."))[0], p[0]), *p[1:]]) for name in self.state_dict()}

    def convert(self, name, tensor):
        return tensor.T if name == "decode_head.conv_seg.weight" else tensor


class WithBackbone(Tiny):
    def load_backbone(self, state):
        self.received = dict(state)
        return LoadReport(len(state))


def official(model):
    names = model.key_map()
    return {names[name]: model.convert(names[name], tensor) for name, tensor in model.state_dict().items()}


@pytest.fixture
def model():
    torch.manual_seed(1)
    return Tiny()


@pytest.fixture
def same(model):
    """Return whether another model has exactly the weights of `model`."""
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return lambda other: all(torch.equal(tensor, wanted[name]) for name, tensor in other.state_dict().items())


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The folder of downloaded weights."""
    monkeypatch.setenv("SEGCORE_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights"


def refused(path, *words):
    """Check that reading `path` fails with one line that names it and says `words`."""
    with pytest.raises(UserError) as error:
        foreign.read_state(path)
    text = str(error.value)
    assert "\n" not in text
    for word in (str(path), *words):
        assert word in text


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# Reading


def test_reads_training_checkpoints_of_openmmlab(tmp_path):
    state = {"module.a.weight": torch.randn(3, 2), "b": torch.arange(4), "ema_a_weight": torch.zeros(3, 2)}
    meta = {"best_score": np.float64(0.8271), "best32": np.float32(0.5), "iter": 9, "CLASSES": ("road", "car")}
    meta |= {"PALETTE": np.arange(12, dtype=np.uint8).reshape(4, 3), "hook_msgs": {"mIoU": [np.int64(7)]}}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3, 2)}}, "param_groups": [{"lr": 1e-4, "initial_lr": 1e-4}]}
    path = tmp_path / "iter_10.pth"
    for new_format in (True, False):
        checkpoint = {"meta": meta, "state_dict": state, "optimizer": optimizer}
        torch.save(checkpoint, path, _use_new_zipfile_serialization=new_format)
        read = foreign.read_state(path)
        assert list(read) == ["a.weight", "b"]
        assert torch.equal(read["a.weight"], state["module.a.weight"])
        assert torch.equal(read["b"], state["b"])


@pytest.mark.parametrize("core", ["core", "_core"])
def test_numpy_scalars_of_numpy_1_and_2(tmp_path, core):
    """The reconstructor's name is written into the file by hand, so both are tested under either numpy."""
    path, new = tmp_path / "any.pth", tmp_path / "renamed.pth"
    torch.save(
        {"state_dict": {"a": torch.ones(2)}, "meta": {"s": np.float64(0.5), "p": np.zeros((2, 3), np.uint8)}}, path
    )
    here = np.float64(0).__reduce__()[0].__module__.encode()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(new, "w", zipfile.ZIP_STORED) as renamed:
        for name in old.namelist():
            renamed.writestr(name, old.read(name).replace(here, b"numpy." + core.encode() + b".multiarray"))
    with zipfile.ZipFile(new) as archive:
        assert f"numpy.{core}.multiarray\nscalar".encode() in archive.read("any/data.pkl")
    assert torch.equal(foreign.read_state(new)["a"], torch.ones(2))


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module", None])
def test_takes_the_weights_out_of_their_wrapper(tmp_path, wrapper):
    state = {"a": torch.ones(2)}
    path = tmp_path / "w.pth"
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, path)
    assert foreign.read_state(path).keys() == {"a"}


def test_a_compressed_file_is_read_right(tmp_path):
    path, packed = tmp_path / "w.pth", tmp_path / "packed.pth"
    torch.save({"a": torch.ones(1000), "b": torch.arange(5)}, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    state = foreign.read_state(packed)
    assert torch.equal(state["a"], torch.ones(1000))
    assert torch.equal(state["b"], torch.arange(5))


def test_files_written_without_checksums_are_read(tmp_path):
    path = tmp_path / "w.pth"
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, path)
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(foreign.read_state(path)["a"], torch.ones(3))


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_pickle_is_named_and_never_run(tmp_path, form, protocol):
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"
    content = {"state_dict": {"a": torch.ones(2)} if form != "pickle" else {}, "meta": Malicious(marker)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content, protocol))
    else:
        content = {"meta": content["meta"], **content}  # before the tensors, whose protocol 4 names torch cannot read
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=form == "zip")
    refused(path, f"{os.mkdir.__module__}.mkdir", "nothing was executed")
    assert not marker.exists()
    if form == "pickle":
        pickle.loads(path.read_bytes())  # the file does what it says
        assert marker.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a": torch.ones(2), "epoch": 5}, ["'epoch' is int"]),
        ({"net": {"a": torch.ones(2)}}, ["'net' is dict", "state_dict"]),
        ({3: torch.ones(2)}, ["text names: 3 is"]),
        ([torch.ones(2)], ["list"]),
        ({"a": np.ones(2)}, ["'a' is NumpyValue"]),
        ({"state_dict": {}}, ["nothing"]),
        ({"a": torch.ones(2).to_sparse()}, ["sparse"]),
        ({"a": torch.ones(2, device="meta")}, ["meta"]),
        ({"a": torch.ones(2, dtype=torch.complex64)}, ["complex"]),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path, content, words):
    path = tmp_path / "w.pth"
    torch.save(content, path)
    refused(path, *words)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"\n<!DOCTYPE html><html>Sign in</html>", "web page"),
        (b"<html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "LFS"),
        (b"", "damaged"),
        (b"PK\x03\x04 not really", "damaged"),
        (pickle.dumps({}, 2), "not a PyTorch weights file"),
        (bytes(range(256)), "damaged"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, content, word):
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    refused(path, word)


def test_a_missing_file_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such weights file") as error:
        foreign.read_state(tmp_path.relative_to(tmp_path) / "gone.pth")
    assert str(tmp_path / "gone.pth") in str(error.value)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_truncated_file_is_refused(tmp_path, form):
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    state = {"a": torch.randn(30, 30), "b": torch.randn(5)}
    save_file(state, path) if form == "safetensors" else torch.save(
        state, path, _use_new_zipfile_serialization=form == "zip"
    )
    content = path.read_bytes()
    for length in [*np.linspace(1, len(content) - 1, 40).astype(int)]:
        path.write_bytes(content[:length])
        refused(path, "get it again")


def test_flipped_bytes_in_a_pytorch_file_never_change_a_weight(tmp_path):
    """Every byte of the data stands under a checksum; one that does not matter may pass."""
    path = tmp_path / "w.pth"
    state = {"a": torch.randn(20, 10), "b": torch.randn(5)}
    torch.save(state, path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        data = archive.getinfo("w/data/0").header_offset + 100
    passed = set()
    for position in {data, *range(0, len(content), 23)}:
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :])
        with contextlib.suppress(UserError):
            read = foreign.read_state(path)
            passed.add(position)
            assert all(torch.equal(read[name], state[name]) for name in state), position
    assert data not in passed


def test_a_damaged_safetensors_header_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.randn(4, 4), "b": torch.randn(3)}, path)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for damage in (
        b"\xff" * 8 + content[8:],
        content[:8] + b"[" + content[9:],
        content.replace(b'"F32"', b'"F99"'),
        content.replace(b"data_offsets", b"data_offset_"),
        content[:header],
        b"not at all",
        b"",
    ):
        path.write_bytes(damage)
        refused(path, "damaged")
    for position in range(header):  # whatever else happens to a byte, it is an answer or one line
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x04]) + content[position + 1 :])
        with contextlib.suppress(UserError):
            foreign.read_state(path)


# Loading into a model


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("names", ["own", "official"])
def test_own_and_published_names_are_told_apart(tmp_path, model, same, names, suffix):
    state = model.state_dict() if names == "own" else official(model)
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": state}, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    other = Tiny()
    report = load.load_weights(other, path)
    assert same(other)
    assert (report.loaded, report.mapped) == (len(state), 0 if names == "own" else len(state))


@pytest.mark.parametrize("names", ["own", "official"])
def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path, model, same, names):
    def state_of(other):
        return other.state_dict() if names == "own" else official(other)

    good = state_of(Tiny())
    conv = "stem.weight" if names == "own" else "backbone.conv1.weight"
    path = tmp_path / "w.pth"
    for state, words in (
        (state_of(Tiny(num_classes=7)), ["shapes differ", "(7, 8), not (4, 8)"]),
        ({name: tensor for name, tensor in good.items() if name != conv}, ["1 tensors missing", conv]),
        (good | {"extra.weight": torch.ones(1)}, ["1 unknown", "extra.weight"]),
        ({"some.thing": torch.ones(1)}, ["missing", "some.thing"]),
    ):
        torch.save(state, path)
        with pytest.raises(UserError) as error:
            load.load_weights(model, path)
        assert all(word in str(error.value) for word in (str(path), "Tiny", *words)), str(error.value)
        assert "\n" not in str(error.value)
        assert same(model)


def test_recomputable_buffers_and_the_auxiliary_head_may_be_absent_here(tmp_path, model, same):
    torch.manual_seed(2)
    source = Tiny(auxiliary=True)
    source.load_state_dict(model.state_dict(), strict=False)
    path, other = tmp_path / "w.pth", Tiny()
    for state in (source.state_dict(), official(source)):
        state = {name: tensor for name, tensor in state.items() if "num_batches" not in name}
        torch.save(state | {"x.relative_position_index": torch.ones(1)}, path)
        report = load.load_weights(other, path)
        assert same(other)
        assert set(report.dropped) == {"auxiliary_head.weight", "auxiliary_head.bias"}
        assert report.ignored == ("x.relative_position_index",)


# Downloads


class Server(BaseHTTPRequestHandler):
    """Serves `body` at /w.pth and misbehaves elsewhere; remembers the requests."""

    body = bytes(range(256)) * 4096  # 1 MiB

    def do_GET(self):
        self.server.seen.append((self.path, self.headers.get("Range")))
        if self.path in self.server.files:
            self.answer(self.server.files[self.path])
        elif self.path == "/page.pth":
            self.answer(b"<html>", {"Content-Type": "text/html; charset=utf-8"})
        elif self.path == "/moved.pth":
            self.send_response(302)
            self.send_header("Location", "/w.pth")
            self.end_headers()
        elif self.path == "/resume.pth":  # breaks off after half of what is asked for, until the second half
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            rest = self.body[start:]
            tag = {"ETag": '"v1"'} | ({"Content-Range": f"bytes {start}-{len(self.body) - 1}/*"} if start else {})
            self.answer(rest, tag, 206 if start else 200, send=len(rest) if start else len(rest) // 2)
        elif self.path == "/restart.pth":  # knows no ranges; whole from the second time on
            self.answer(self.body, send=None if len(self.server.seen) > 1 else 1000)
        elif self.path == "/broken.pth":
            self.answer(self.body, send=1000)
        else:
            self.send_error(404)

    def answer(self, body, headers=(), status=200, send=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:send])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(hub, "PAUSE", 0.0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.url, server.seen, server.files = f"http://127.0.0.1:{server.server_port}", [], {"/w.pth": Server.body}
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_file_is_downloaded_once(server, folder, capsys):
    path = hub.fetch(f"{server.url}/w.pth", sha256=hashlib.sha256(Server.body).hexdigest())
    assert path == folder / "w.pth"
    assert path.read_bytes() == Server.body
    assert hub.fetch(f"{server.url}/w.pth", offline=True) == path
    assert len(server.seen) == 1
    assert names_in(folder) == ["w.pth"]
    assert "downloading w.pth: 1.0 of 1.0 MB" in capsys.readouterr().err


def test_a_terminal_gets_a_bar(server, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    hub.fetch(f"{server.url}/w.pth")
    assert "1.0/1.0 MB" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)


def test_a_redirect_is_followed_and_the_name_kept(server, folder):
    assert hub.fetch(f"{server.url}/moved.pth").read_bytes() == Server.body
    assert names_in(folder) == ["moved.pth"]


def test_a_broken_download_goes_on_where_it_stopped(server, folder):
    assert hub.fetch(f"{server.url}/resume.pth").read_bytes() == Server.body
    assert server.seen == [("/resume.pth", None), ("/resume.pth", f"bytes={len(Server.body) // 2}-")]


def test_a_broken_download_starts_again_where_the_server_knows_no_ranges(server, folder):
    assert hub.fetch(f"{server.url}/restart.pth").read_bytes() == Server.body
    assert server.seen == [("/restart.pth", None)] * 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("broken.pth", ["broke 4 times", "1000 of 1048576 bytes"]),
        ("none.pth", ["404"]),
        ("page.pth", ["web page"]),
    ],
)
def test_a_failed_download_leaves_nothing_behind(server, folder, name, words):
    with pytest.raises(UserError) as error:
        hub.fetch(f"{server.url}/{name}")
    for word in (*words, f"{server.url}/{name}", str(folder / name)):
        assert word in str(error.value)
    assert names_in(folder) == []


def test_other_content_than_promised_is_refused(server, folder):
    with pytest.raises(UserError, match="SHA-256"):
        hub.fetch(f"{server.url}/w.pth", sha256="0" * 64)
    assert names_in(folder) == []
    (folder / "w.pth").write_bytes(b"other")
    with pytest.raises(UserError, match="delete it"):
        hub.fetch(f"{server.url}/w.pth", sha256=hashlib.sha256(Server.body).hexdigest())


def test_without_network_it_says_which_file_goes_where(server, folder):
    server.server_close()  # the port now answers nobody
    for offline in (True, False):
        with pytest.raises(UserError, match=r"^no network.*: download") as error:
            hub.fetch(f"{server.url}/w.pth", offline=offline)
        assert f"download {server.url}/w.pth and put the file at {folder / 'w.pth'}" in str(error.value)
    assert not folder.exists() or names_in(folder) == []


@pytest.mark.parametrize("url", ["http://example.org/w.pth", "file://localhost/etc/passwd", "ftp://example.org/w.pth"])
def test_only_https_is_fetched_from_elsewhere(folder, url):
    with pytest.raises(UserError, match="not an https address"):
        hub.fetch(url)


def test_a_folder_that_cannot_be_written_is_named(server, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SEGCORE_WEIGHTS", str(tmp_path / "file"))
    with pytest.raises(UserError, match="SEGCORE_WEIGHTS"):
        hub.fetch(f"{server.url}/w.pth")


def test_the_default_folder_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("SEGCORE_WEIGHTS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert hub.weights_dir() == tmp_path / "segcore" / "weights"


# Finding checkpoints by what the user wrote


@pytest.fixture
def rows(server, monkeypatch):
    """Two published rows, one without weights."""
    found = {"row_a": Published({}, f"{server.url}/w.pth"), "row_b": Published({})}
    monkeypatch.setattr(hub, "published", found.get)


def test_official_weights_are_fetched(rows, folder):
    for wanted, experiment in (("official", "row_a"), ("official:row_a", "row_b")):
        path = load.resolve(wanted, experiment)
        assert path == folder / "w.pth"
        assert path.read_bytes() == Server.body


def test_rows_without_weights_say_so(rows):
    with pytest.raises(UserError, match="authors of row_b offer no weights"):
        load.resolve("official:row_b", "row_a")
    with pytest.raises(UserError, match="'row_c' is not a published configuration"):
        load.resolve("official", "row_c")


def test_a_path_is_itself_and_a_wrong_one_is_explained(tmp_path):
    path = tmp_path / "w.pth"
    path.touch()
    assert load.resolve(str(path), "row_a") == path
    with pytest.raises(UserError, match=r"no such file or folder.*work_dir.*official:CONFIG"):
        load.resolve(str(tmp_path / "gone.pth"), "row_a")


def test_a_work_dir_gives_its_best_else_its_newest_checkpoint(tmp_path, model, same):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no complete checkpoint"):
        load.resolve(str(tmp_path), "row_a")
    for iteration in (1, 2, 3):
        state = (model if iteration == 2 else Tiny()).state_dict()
        checkpoint.save(checkpoint.folder_of(tmp_path, iteration), state, {}, {})
    assert load.resolve(str(tmp_path), "row_a").name == "iter_3"
    checkpoint.mark_best(tmp_path, 2, 0.5)
    best = load.resolve(str(tmp_path), "row_a")
    assert best.name == "iter_2"
    assert load.resolve(str(best), "row_a") == best
    assert load.load_weights(other := Tiny(), best).loaded == 9
    assert same(other)
    assert load.initialize(other, str(tmp_path)).startswith(f"{best}: loaded 9")
    (best / "model.safetensors").write_bytes(b"damaged")
    refused(best, "iter_3 instead")


# Start weights


def test_start_weights_from_a_whole_checkpoint(tmp_path, model, same, server, rows):
    path, other = tmp_path / "w.pth", Tiny()
    torch.save({"state_dict": official(model)}, path)
    assert load.initialize(other, str(path)) == f"{path}: loaded 9 tensors (9 under other names)"
    assert same(other)
    server.files["/w.pth"] = path.read_bytes()
    load.initialize(other := Tiny(), "official:row_a")
    assert same(other)


def test_start_weights_from_an_imagenet_checkpoint(tmp_path):
    path, model = tmp_path / "w.pth", WithBackbone()
    state = {name: t for name, t in official(model).items() if name.startswith("backbone.")}
    torch.save({"state_dict": state | {"head.fc.weight": torch.ones(2, 2)}}, path)
    assert "loaded 7 tensors (0 under other names), dropped 1 of head" in load.initialize(model, str(path))
    assert model.received.keys() == state.keys()
    with pytest.raises(UserError, match=r"w\.pth: Tiny has no backbone loader"):
        load.initialize(Tiny(), str(path))


TAG = "mobilenetv3_small_050.lamb_in1k"  # the smallest one in every supported timm


def test_start_weights_from_timm(tmp_path, folder, server, monkeypatch):
    source = timm.create_model("mobilenetv3_small_050").state_dict()
    save_file(source, tmp_path / "served")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    with pytest.raises(UserError, match="no network: ") as error:
        load.initialize(WithBackbone(), TAG, offline=True)
    address = f"/timm/{TAG}/resolve/main/model.safetensors"
    assert f"download {server.url}{address} and put the file at {folder / TAG}.safetensors" in str(error.value)
    server.files[address] = (tmp_path / "served").read_bytes()
    for offline in (False, True):
        report = load.initialize(model := WithBackbone(), TAG, offline=offline)
        assert report.startswith(f"{TAG}: backbone only: loaded {len(source)} tensors")
        assert model.received.keys() == source.keys()
        assert all(torch.equal(model.received[name], source[name]) for name in source)
    del source["classifier.bias"]
    save_file(source, folder / f"{TAG}.safetensors")
    with pytest.raises(UserError, match=r"does not fit.*classifier\.bias.*delete it"):
        load.initialize(WithBackbone(), TAG)


@pytest.mark.parametrize(
    ("init", "words"),
    [
        ("convnext_tiny.nope", "Invalid pretrained tag"),
        ("test_convnet", "no such file or folder"),
        ("official", "not a published configuration"),
    ],
)
def test_start_weights_that_do_not_exist(init, words):
    with pytest.raises(UserError, match=words):
        load.initialize(WithBackbone(), init)
