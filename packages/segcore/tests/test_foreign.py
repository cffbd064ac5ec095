"""Reading weights files without executing anything in them."""

import contextlib
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from segcore import UserError
from segcore.checkpoints import foreign


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
        ({"net": {"a": torch.ones(2)}}, ["'net' is dict", "state_dict"]),
        ({3: torch.ones(2)}, [": 3 is a"]),
        ([torch.ones(2)], ["list"]),
        ({"a": np.ones(2)}, ["'a' is NumpyValue"]),
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
        (b"", "damaged"),
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
