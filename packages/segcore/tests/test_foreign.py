"""Reading weights files without executing anything in them."""

import contextlib
import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from segcore import UserError
from segcore.checkpoints import foreign, pickled, tensor_files


def refused(path, *words):
    """Check that reading `path` fails with one line that contains the path and `words`."""
    with pytest.raises(UserError) as error:
        foreign.read_state(path)
    text = str(error.value)
    assert "\n" not in text
    for word in (str(path), *words):
        assert word in text


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
    """The test writes the reconstructor's name into the file, so either numpy version tests both names."""
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
def test_weights_are_unwrapped(tmp_path, wrapper):
    state = {"a": torch.ones(2)}
    path = tmp_path / "w.pth"
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, path)
    assert foreign.read_state(path).keys() == {"a"}


def test_a_compressed_file_is_read_correctly(tmp_path):
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
        pickle.loads(path.read_bytes())  # the file does execute its code
        assert marker.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a": torch.ones(2), "epoch": 5}, ["'epoch' is int"]),
        ({"other": {"a": torch.ones(2)}}, ["'other' is dict", "state_dict"]),
        ({3: torch.ones(2)}, [": 3 is a"]),
        ([torch.ones(2)], ["list"]),
        ({"a": np.ones(2)}, ["'a' is numpy"]),
        ({"state_dict": {}}, ["nothing"]),
        ({"a": torch.ones(2).to_sparse()}, ["sparse"]),
        ({"a": torch.ones(2, device="meta")}, ["meta"]),
        ({"a": torch.ones(2, dtype=torch.complex64)}, ["complex"]),
    ],
)
def test_content_other_than_a_state_dict_is_refused(tmp_path, content, words):
    path = tmp_path / "w.pth"
    torch.save(content, path)
    refused(path, *words)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"\n<!DOCTYPE html><html>Sign in</html>", "web page"),
        (b"<html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "LFS"),
        (b"", "an empty file"),
        (b'{"error": 404}', "a JSON text"),
        (b"PK\x03\x04 not really", "damaged"),
        (pickle.dumps({}, 2), "not a PyTorch weights file"),
        (bytes(range(256)), "damaged"),
    ],
)
def test_files_other_than_checkpoints_are_refused(tmp_path, content, word):
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
        refused(path, "download it again")


def test_flipped_bytes_in_a_pytorch_file_never_change_a_weight(tmp_path):
    """A checksum covers every byte of the data; changes of irrelevant bytes may pass."""
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
    for position in range(header):  # any other damaged byte yields a state or a one-line error
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x04]) + content[position + 1 :])
        with contextlib.suppress(UserError):
            foreign.read_state(path)


# Files that take hours or the whole memory to read: each is refused at once


def plain(value):
    """Pickle data without memo numbers."""
    pickler = pickle.Pickler(file := io.BytesIO(), 2)
    pickler.fast = True
    pickler.dump(value)
    return file.getvalue()[2:-1]


def put(index):
    return pickle.LONG_BINPUT + struct.pack("<I", index)


def get(index):
    return pickle.LONG_BINGET + struct.pack("<I", index)


def call(name, *arguments):
    module, _, name = name.rpartition(".")
    return f"c{module}\n{name}\n(".encode() + b"".join(arguments) + b"tR"


def storage(count, key="0"):
    return b"(" + plain("storage") + b"ctorch\nFloatStorage\n" + plain(key) + plain("cpu") + plain(count) + b"tQ"


def view(offset, size, stride):
    """Pickle a view of a storage of four elements."""
    return call(
        "torch._utils._rebuild_tensor_v2", storage(4), plain(offset), plain(size), plain(stride), plain(False), b"N"
    )


DAG = b")" + b"".join(put(i) + get(i) + b"\x86" for i in range(60))
"""A tuple of two tuples that are one object, 60 times: 2**60 parts for whoever walks through it."""
LIST_DAG = b"]" + b"".join(put(i) + b"](" + get(i) + get(i) + b"e" for i in range(60))
STEPS, DAMAGED, LESS = "takes more steps", "damaged, truncated or not", "declares more data than it holds"
BOMBS = {
    "pushes and pops": (b"N0" * 600_000 + b"}", STEPS),
    "a key of shared tuples": (b"}" + DAG + b"Ns", "a key other than a name is NoneType"),
    "a set of shared tuples": (b"\x8f(" + DAG + b"\x90", "holds set"),
    "a call of shared lists": (LIST_DAG + b")R", DAMAGED),
    "a call of a name with shared lists": (call("builtins.set", LIST_DAG), "holds builtins.set"),
    "a deeply nested key": (b"})" + b"\x85" * 300_000 + b"Ns", "a key other than a name is NoneType"),
    "keys of one hash": (
        b"}(" + b"".join(plain(n * (2**61 - 1)) + b"N" for n in range(40_000)) + b"u",
        "a key other than a name is NoneType",
    ),
    "an attribute of a list": (call("builtins.getattr", b"]", plain("append")), "requires builtins.getattr"),
    "an attribute of nothing": (call("builtins.getattr"), DAMAGED),
    "zeros by number": (call("builtins.bytearray", plain(10**12)), "holds builtins.bytearray"),
    "copies of a text": (
        plain("0" * 100_000) + put(0) + b"0" + call("_codecs.encode", get(0), plain("latin1")) * 40_000,
        "_codecs.encode",
    ),
    "copies of a list": (
        b"](" + b"](NNe" * 1000 + b"e" + put(0) + b"0" + call("collections.OrderedDict", get(0)) * 2000,
        STEPS,
    ),
    "copies of arguments": (
        b"(" + b"N" * 1000 + b"t" + put(0) + b"0" + (b"cbuiltins\nset\n" + get(0) + b"R") * 2000,
        STEPS,
    ),
    "a long text": (b"X" + struct.pack("<I", 2**32 - 1), STEPS),
    "a long number": (b"\x8b" + struct.pack("<i", 2**31 - 1), DAMAGED),
    "a long array": (b"\x96" + struct.pack("<Q", 2**62), DAMAGED),
    "a high memo number": (b"}" + put(2**32 - 1), "holds nothing"),
    "a long name": (b"\x80\x04" + plain("os") + plain("a\nb" * 100_000) + b"\x93", "it requires 'os.a\\nb"),
    "a storage beyond the file": (storage(10**15), LESS),
    "a storage beyond its data": (storage(5), LESS),
    "a negative storage": (storage(-1), DAMAGED),
    "a key of a storage": (storage(4, ((),) * 9), DAMAGED),
    "a view of all bytes a million times": (view(0, (10**6, 4), (0, 1)), "tensors of more than 16 times its size"),
    "a view beyond its data": (view(1, (4,), (1,)), "reaches beyond its data"),
    "a view beyond its data by steps": (view(0, (2, 2), (3, 1)), "reaches beyond its data"),
    "a view backwards": (view(3, (4,), (-1,)), DAMAGED),
    "a view of overflowing size": (view(0, (2**62, 2**62, 0), (1, 1, 1)), DAMAGED),
    "a view of many dimensions": (view(0, (2**2000,) * 100_000, (1,) * 100_000), DAMAGED),
}  # fmt: skip


@pytest.fixture
def write_pickle(tmp_path):
    """A function that writes a PyTorch file of a given pickle, with one storage of four floats."""

    def write(content, form):
        path = tmp_path / f"{form}.pth"
        torch.save({"w": torch.zeros(4)}, path, _use_new_zipfile_serialization=form == "zip")
        if form == "zip":
            with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as old, zipfile.ZipFile(path, "w") as new:
                for name in old.namelist():
                    new.writestr(name, content if name.endswith("data.pkl") else old.read(name))
        else:
            parts = (tensor_files.MAGIC, tensor_files.PROTOCOL, {})
            head = b"".join(pickle.dumps(part, 2) for part in parts)
            keys = ["0"] if b"FloatStorage" in content else []
            path.write_bytes(head + content + pickle.dumps(keys, 2) + struct.pack("<q", 4) + bytes(16))
        return path

    return write


@pytest.mark.timeout(60)  # without the bounds, most take far longer
@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_pickle_that_explodes_is_refused(write_pickle, bomb, form):
    content, words = BOMBS[bomb]
    if form == "legacy" and bomb == "a storage beyond its data":
        words = DAMAGED
    refused(write_pickle(b"\x80\x02" + content + b".", form), words)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_views_of_one_storage_are_read(write_pickle, form):
    content = b"\x80\x02}(" + plain("a") + view(1, (3,), (1,)) + plain("b") + view(0, (2, 2), (1, 2)) + b"u."
    state = foreign.read_state(write_pickle(content, form))
    assert (state["a"].shape, state["b"].shape) == ((3,), (2, 2))
    assert state["a"].untyped_storage().data_ptr() == state["b"].untyped_storage().data_ptr()


@pytest.mark.timeout(60)
def test_a_zip_file_that_unpacks_to_more_than_it_holds_is_refused(tmp_path, monkeypatch):
    path, bomb = tmp_path / "w.pth", tmp_path / "bomb.pth"
    torch.save({"w": torch.zeros(1000)}, path)
    entries = {name: zipfile.ZipFile(path).read(name) for name in zipfile.ZipFile(path).namelist()}
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, bytes(10**7) if name.endswith("data/0") else content)
    refused(bomb, "declares 10000", "bytes in a file of 1")
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_LZMA) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    refused(bomb, "compressed in an unusual way")
    with zipfile.ZipFile(bomb, "w") as archive:  # a hundred entries in one place
        for name, content in entries.items():
            archive.writestr(name, content)
        archive.filelist += [entry for entry in archive.filelist if entry.file_size == 4000] * 100
    refused(bomb, "declares")
    monkeypatch.setattr(tensor_files, "DIRECTORY", 50)
    refused(path, "more entries than weights have")


def test_the_header_of_a_safetensors_file_is_bounded(tmp_path):
    path = tmp_path / "w.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 10**8))
        file.truncate(10**9)
    refused(path, "its header is too long")


def test_many_tensors_are_not_too_many(tmp_path):
    """Each storage adds to what a pickle may cost; a large optimizer has several for each weight."""
    path = tmp_path / "w.pth"
    weights = {f"backbone.stages.2.blocks.{i}.attention.weight": torch.zeros(1) for i in range(400)}
    optimizer = {i: {"step": torch.zeros(()), "exp_avg": torch.zeros(1)} for i in range(400)}
    for new_format in (True, False):
        torch.save({"state_dict": weights, "optimizer": optimizer}, path, _use_new_zipfile_serialization=new_format)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pickled, "UNITS", 1000)
            assert len(foreign.read_state(path)) == 400


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_tensors_of_all_kinds_are_those_that_were_saved(tmp_path, form, protocol):
    dtypes = [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool),
    ]
    state = {str(dtype): torch.arange(12).reshape(3, 4).to(dtype) for dtype in dtypes}
    state |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "strided": torch.randn(6, 4)[::2, 1:].T}
    state |= {"parameter": torch.nn.Parameter(torch.randn(3)), "tied": state["torch.int8"]}
    state["attributed"] = torch.nn.Parameter(torch.randn(3))
    state["attributed"].decay = False
    path = tmp_path / "w.pth"
    torch.save(state, path, pickle_protocol=protocol, _use_new_zipfile_serialization=form == "zip")
    read = foreign.read_state(path)
    assert list(read) == list(state)
    for name, tensor in state.items():
        assert (read[name].dtype, read[name].stride()) == (tensor.dtype, tensor.stride()), name
        assert torch.equal(read[name].double(), tensor.double()), name
    assert read["tied"].data_ptr() == read["torch.int8"].data_ptr()
