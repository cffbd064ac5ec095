"""`data.cache`: decoded images and labels on the disk answer as the files do, and never for other files or settings."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest

from segcore.config.schema import DataConfig
from segcore.data import cache, check, dataset
from segcore.data.layouts import open_dataset
from segcore.data.layouts.also import join
from segcore.data.loader import train_batches
from segcore.data.transforms import TrainTransform
from segcore.errors import UserError


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    for kind, most in (("images", 256), ("masks", 3)):
        (tmp_path / kind / "train").mkdir(parents=True)
        for i in range(3):
            shape = (20, 30 + i, 3)[: 3 if most == 256 else 2]
            array = np.random.RandomState(i).randint(0, most, shape)
            cv2.imwrite(f"{tmp_path}/{kind}/train/{i}.png", array.astype(np.uint8))
    return DataConfig("folder", tmp_path, classes=("a", "b", "c"), crop=(24, 24))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are decoded."""
    names: list[str] = []
    for name in ("read_image", "read_label"):
        own = getattr(dataset, name)
        monkeypatch.setattr(dataset, name, lambda path, *how, own=own: (names.append(path.name), own(path, *how))[1])
    return names


def arrays(data: DataConfig, folder: Path | None) -> list[bytes]:
    opened = open_dataset(data, "train", folder)
    return [part.tobytes() for i in range(len(opened)) for part in opened.pair(i)]


def test_the_second_reading_decodes_nothing(data: DataConfig, tmp_path: Path, decoded: list[str]) -> None:
    plain = arrays(data, None)
    assert arrays(data, tmp_path / "cache") == plain
    assert len(decoded) == 12
    assert arrays(data, tmp_path / "cache") == plain
    assert len(decoded) == 12
    assert len(list((tmp_path / "cache").iterdir())) == 6


def test_other_files_and_settings_are_not_answered_from_it(data: DataConfig, tmp_path: Path) -> None:
    folder, file = tmp_path / "cache", tmp_path / "images/train/1.png"
    before = arrays(data, folder)
    time, size = file.stat().st_mtime_ns, file.stat().st_size
    for array in (np.full((20, 31, 3), 7, np.uint8), np.full((20, 31, 3), 8, np.uint8)):
        cv2.imwrite(str(file), array)
        os.utime(file, ns=(time, time))
        assert file.stat().st_size != size, "only the size tells"
        assert arrays(data, folder)[2] == array.tobytes() != before[2]
        time += 10**9
    labels = replace(data, classes=(), labels=("0=a", "1=ignore", "2=b"))
    for other in (replace(data, add_background_class=True), labels):
        assert arrays(other, folder) == arrays(other, None) != arrays(data, folder)
    gray = replace(data, channels=1, mean=(1.0,), std=(1.0,))
    with pytest.raises(UserError, match=r"0\.png: holds uint8 of shape \(20, 30, 3\)"):
        arrays(gray, folder)
    with pytest.raises(UserError, match=r"0\.png: .*data\.max_pixels is 9"):
        arrays(replace(data, max_pixels=9), folder)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "pickled", "fifo"])
def test_a_damaged_file_is_rebuilt_and_executes_nothing(data: DataConfig, tmp_path: Path, damage: str) -> None:
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    folder = tmp_path / "cache"
    plain = arrays(data, folder)
    for file in folder.iterdir():
        content = file.read_bytes()
        if damage == "fifo":
            file.unlink()
            os.mkfifo(file)
        elif damage == "pickled":
            np.save(file, np.array([Evil()], object))
            with file.open("ab") as stream:
                stream.write(cache.zlib.crc32(file.read_bytes()).to_bytes(4, "little"))
        else:
            flipped = content[:200] + bytes([content[200] ^ 1]) + content[201:]
            file.write_bytes({"cut": content[:-9], "flipped": flipped, "empty": b""}[damage])
    assert arrays(data, folder) == plain
    assert not (tmp_path / "executed").exists()
    assert all(cache._load(file).size for file in folder.iterdir()), "whole again"


def test_a_cache_that_cannot_be_written_costs_only_time(data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert arrays(data, tmp_path / "file" / "cache") == arrays(data, None)


SCRIPT = """
import pickle, sys
opened = pickle.load(sys.stdin.buffer)
for _ in range(8):
    for i in range(len(opened)):
        sys.stdout.buffer.write(b"".join(part.tobytes() for part in opened.pair(i)))
    for file in opened.cache.iterdir():
        file.unlink(missing_ok=True)
"""


def test_several_processes_share_it(data: DataConfig, tmp_path: Path) -> None:
    """While each also removes what the others write, none reads a part of a file."""
    opened = open_dataset(data, "train", tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    pipe = subprocess.PIPE
    processes = [subprocess.Popen([sys.executable, "-c", SCRIPT], stdin=pipe, stdout=pipe) for _ in range(2)]
    for process in processes:
        process.stdin.write(pickle.dumps(opened))
        process.stdin.close()
        process.stdin = None
    expected = b"".join(arrays(data, None)) * 8
    assert [process.communicate(timeout=120)[0] for process in processes] == [expected] * 2


def test_training_reads_all_its_sets_through_it(data: DataConfig, tmp_path: Path) -> None:
    folder, how = tmp_path / "cache", {"batch": 6, "micro": 3, "seed": 0, "start": 0, "stop": 1}
    opened = open_dataset(data, "train", folder)
    opened = join(opened, [replace(opened, max_pixels=1 << 20)])
    assert [opened.not_cached(i) for i in range(6)] == [(3, 1)] * 6
    assert len(list(train_batches(opened, TrainTransform(data), workers=0, **how))) == 2
    assert len(list(folder.iterdir())) == 12
    assert [opened.not_cached(i) for i in range(6)] == [()] * 6


def test_a_data_set_of_a_function_keeps_it(data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from dataclasses import replace\nfrom segcore.data.layouts import open_dataset\n"
        "def open_split(data, split):\n"
        "    return open_dataset(replace(data, dataset='folder', augment=None), split)\n"
    )
    opened = open_dataset(replace(data, dataset=f"{tmp_path / 'own.py'}:open_split"), "train", tmp_path / "cache")
    assert pickle.loads(pickle.dumps(opened)).cache == tmp_path / "cache"


def test_its_size_is_said_first(data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check.shutil, "disk_usage", lambda path: Mock(free=free))
    folder, free = tmp_path / "cache", 5_000_000_000
    cv2.imwrite(f"{tmp_path}/images/train/2.png", np.zeros((5000, 5000, 3), np.uint8))  # a file of 73 kB
    opened = open_dataset(data, "train", folder)
    opened.pair(0)
    assert check.cache_note(folder, [opened]) == f"data.cache {folder}: 3 images, 0.1 GB needed, 5.0 GB free"
    assert len(list(folder.iterdir())) == 2, "nothing is decoded for it"
    free = 99_000_000
    with pytest.raises(UserError, match=r"0\.1 GB needed, 0\.1 GB free; name a folder on a larger disk"):
        check.cache_note(folder, [opened])
    with pytest.raises(UserError, match=r"0\.png: cannot be written"):
        check.cache_note(tmp_path / "images/train/0.png", [opened])
    (tmp_path / "images/train/2.png").unlink()
    assert check.cache_note(folder, [opened]).startswith(f"data.cache {folder}: 3 images, 0.0 GB needed")
