"""Order and draws are pure functions of (seed, iteration, position); workers only read ahead."""

from __future__ import annotations

import functools
import io
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from segcore.config.schema import DataConfig
from segcore.data import workers
from segcore.data.batch import Batch
from segcore.data.layouts import open_dataset
from segcore.data.loader import (
    RareClasses,
    eval_samples,
    rare_class_probabilities,
    sample_index,
    train_batches,
)
from segcore.data.transforms import TrainTransform
from segcore.errors import Stopped, UserError
from segcore.seeds import augmentation_seed, noise_seed
from segcore.training.signals import SignalHandler

LENGTH = 7


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("folder")
    rng = np.random.RandomState(0)
    for kind in ("images", "masks"):
        (root / kind / "train").mkdir(parents=True)
    for i in range(LENGTH):
        cv2.imwrite(f"{root}/images/train/{i}.png", rng.randint(0, 256, (30, 40, 3)))
        cv2.imwrite(f"{root}/masks/train/{i}.png", rng.randint(0, 3, (30, 40)))
    return DataConfig(
        "folder",
        root,
        classes=("a", "b", "c"),
        img_scale=None,
        crop=(24, 32),
        ratio_range=(0.5, 2.0),
        cat_max_ratio=0.75,
        flip=0.5,
        photometric=True,
    )


def batches(data, **changes):
    options = {"batch": 4, "micro": 2, "seed": 5, "start": 0, "stop": 4, "workers": 0} | changes
    return train_batches(open_dataset(data, "train"), TrainTransform(data), **options)


def assert_equal(first, second):
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert (a.iteration, a.seeds, a.sizes) == (b.iteration, b.seeds, b.sizes)
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


@given(st.integers(0, 2**40), st.integers(1, 12), st.integers(1, 50), st.integers(0, 5))
def test_every_epoch_is_a_permutation(seed, batch, length, epoch):
    stream = range(epoch * length, (epoch + 1) * length)
    indices = [sample_index(seed, *divmod(position, batch), batch, length) for position in stream]
    assert sorted(indices) == list(range(length))


@given(st.integers(0, 9), st.integers(0, 300))
def test_the_order_does_not_depend_on_the_batch_size(seed, position):
    expected = sample_index(seed, position, 0, 1, 100)
    for batch in (2, 3, 16):
        assert sample_index(seed, *divmod(position, batch), batch, 100) == expected


def test_epochs_and_seeds_differ():
    def epoch(seed, n):
        return [sample_index(seed, n * 50 + i, 0, 1, 50) for i in range(50)]

    assert epoch(0, 0) != epoch(0, 1)
    assert epoch(0, 0) != epoch(1, 0)


def test_rare_classes_are_drawn_by_the_published_formula():
    share = np.array([0.7, 0.25, 0.05])
    expected = np.exp((1 - share) / 0.5)
    found = rare_class_probabilities(np.array([700, 250, 0, 50]), 0.5)
    np.testing.assert_allclose(found[[0, 1, 3]], expected / expected.sum())
    assert found[2] == 0, "no image has this class"
    np.testing.assert_allclose(rare_class_probabilities(np.array([999, 1]), 1e-6), [0, 1], atol=1e-300)


def test_rare_class_sampling_draws_a_class_then_an_image_with_it(data):
    rare = RareClasses(np.array([0.25, 0.75]), (np.array([0, 1, 2, 3]), np.array([6])))
    drawn = [rare.index(5, iteration, position) for iteration in range(500) for position in range(4)]
    counts = np.bincount(drawn, minlength=LENGTH) / len(drawn)
    np.testing.assert_allclose(counts, [0.0625, 0.0625, 0.0625, 0.0625, 0, 0, 0.75], atol=0.04)
    assert drawn != [rare.index(6, iteration, position) for iteration in range(500) for position in range(4)]
    whole = list(batches(data, rare_classes=rare))
    assert_equal(whole[6:], list(batches(data, rare_classes=rare, start=3, workers=1)))
    transform = TrainTransform(data)
    image, _ = transform(
        *open_dataset(data, "train").pair(rare.index(5, 3, 1)), np.random.RandomState(augmentation_seed(5, 3, 1))
    )
    assert torch.equal(whole[6].on("cpu", data.mean, data.std)[0][1], image)


def test_batches_have_the_stated_parts_and_seeds(data):
    found = list(batches(data, start=2, stop=4))
    assert [b.iteration for b in found] == [2, 2, 3, 3]
    assert found[1].seeds == [noise_seed(5, 2, 2), noise_seed(5, 2, 3)]
    assert found[0].images.shape == (2, 3, 24, 32)
    assert (found[0].images.dtype, found[0].labels.dtype) == (torch.uint8, torch.uint8), "few bytes to hand over"
    assert found[0].labels.shape == (2, 24, 32)


def test_a_sample_is_its_file_transformed_with_its_own_draws(data):
    dataset, transform = open_dataset(data, "train"), TrainTransform(data)
    part = next(iter(batches(data, start=3, stop=4)))
    index = sample_index(5, 3, 1, 4, LENGTH)
    image, label = transform(*dataset.pair(index), np.random.RandomState(augmentation_seed(5, 3, 1)))
    images, labels = part.on("cpu", data.mean, data.std)
    assert torch.equal(images[1], image)
    assert torch.equal(labels[1], label)


def test_a_run_resumes_at_any_iteration_and_micro_batches_only_divide_the_batch(data):
    whole = list(batches(data))
    assert_equal(whole[6:], list(batches(data, start=3)))  # in the second epoch of seven images
    joined = list(batches(data, micro=4))
    assert torch.equal(torch.cat([whole[0].images, whole[1].images]), joined[0].images)
    assert joined[0].seeds == whole[0].seeds + whole[1].seeds
    with pytest.raises(ValueError, match="does not divide"):
        batches(data, micro=3)


def test_workers_change_nothing_and_end(data):
    state = torch.get_rng_state()
    assert_equal(list(batches(data)), list(batches(data, workers=3)))
    assert torch.equal(torch.get_rng_state(), state)
    assert not multiprocessing.active_children()


def test_closing_early_ends_the_workers(data):
    loader = batches(data, stop=1000, workers=1)
    assert isinstance(next(loader), Batch)
    assert multiprocessing.active_children()
    loader.close()
    assert not multiprocessing.active_children()


@pytest.mark.skipif(os.name != "posix", reason="other systems have no SIGKILL")
def test_a_worker_that_dies_is_one_line(data):
    found = batches(data, stop=1000, workers=1)
    next(found)
    if Path("/proc/self/maps").exists():
        assert "/torch_" not in Path("/proc/self/maps").read_text(), "/dev/shm, of 64 MB in containers, is used"
    samples = eval_samples(open_dataset(data, "train"), 1)
    next(samples)
    for process in multiprocessing.active_children():
        process.kill()
    for left in (found, samples):
        with pytest.raises(UserError, match=r"was ended by SIGKILL; if memory ran out, lower data.workers \(1\)"):
            list(left)
    assert not multiprocessing.active_children()


@pytest.mark.skipif(os.name != "posix", reason="stops a process")
def test_waiting_for_a_worker_can_be_ended(data):
    signals = SignalHandler()
    found = batches(data, stop=1000, workers=1, on_wait=signals.check)
    next(found)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGSTOP)
    signals.signal = signal.SIGTERM
    with pytest.raises(Stopped):
        list(found)
    assert not multiprocessing.active_children()


def test_a_message_that_ends_early_is_no_item():
    sent = io.BytesIO()
    images = torch.randint(0, 1 << 16, (2, 3, 4, 5)).to(torch.uint16)
    batch = Batch(images, torch.zeros(2, 4, 5, dtype=torch.uint8), [1, 2], 3, sizes=((4, 5), (2, 3)))
    workers._send(sent, (None, batch))
    _, found = workers._receive(io.BytesIO(sent.getvalue()))
    assert_equal([found], [batch])
    for end in range(len(sent.getvalue())):
        with pytest.raises((EOFError, pickle.UnpicklingError)):
            workers._receive(io.BytesIO(sent.getvalue()[:end]))


class Dying:
    """What ends a process that unpickles it."""

    def __reduce__(self):
        return os._exit, (3,)


@pytest.mark.parametrize("size", [0, 1 << 20])
def test_a_worker_that_dies_at_its_start_is_one_line(size):
    load = functools.partial(max, Dying(), bytes(size))
    with pytest.raises(UserError, match=r"^a data-loading process ended, see its output \(3\); "):
        next(workers.read_ahead(load, [0], 1))


def test_no_memory_is_one_line():
    def fail(_):
        raise MemoryError

    with pytest.raises(UserError, match=r"^no memory left to load data; "):
        next(workers.read_ahead(fail, [0], 0))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_file_is_one_line_from_any_process(data, workers, tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    (tmp_path / "images/x.png").write_bytes(b"")
    cv2.imwrite(f"{tmp_path}/masks/x.png", np.zeros((30, 40), np.uint8))
    broken = DataConfig("folder", tmp_path, "images/*", "masks/*", classes=("a",), crop=(24, 32))
    with pytest.raises(UserError) as caught:
        list(batches(broken, workers=workers))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "images/x.png") in str(caught.value)
    assert not multiprocessing.active_children()


def test_training_needs_labels(data):
    unlabeled = DataConfig(
        "folder", data.root, val_images="images/train/*", val_masks="", classes=("a",), crop=(24, 32)
    )
    dataset = open_dataset(unlabeled, "val")
    with pytest.raises(UserError, match=r"\d\.png: has no label file"):
        list(train_batches(dataset, TrainTransform(data), batch=7, micro=7, seed=0, start=0, stop=1, workers=0))
    assert [(i, label) for i, _, label in eval_samples(dataset, 0)] == [(i, None) for i in range(LENGTH)]


@pytest.mark.parametrize("workers", [0, 1])
def test_eval_samples_come_in_order(data, workers):
    dataset = open_dataset(data, "train")
    samples = list(eval_samples(dataset, workers))
    assert [index for index, _, _ in samples] == list(range(LENGTH))
    for index, image, label in samples:
        np.testing.assert_array_equal(image, dataset.image(index))
        np.testing.assert_array_equal(label, dataset.label(index))


SCRIPT = """
import sys
import threading
from pathlib import Path
from segcore.data import layouts, loader, transforms
from segcore.config.schema import DataConfig

if __name__ == "__main__":
    augment = {"ratio_range": (0.5, 2.0), "cat_max_ratio": 0.75, "flip": 0.5, "photometric": True}
    data = DataConfig("folder", Path(sys.argv[1]), classes=("a", "b", "c"), crop=(24, 32), **augment)
    opened, transform = layouts.open_dataset(data, "train"), transforms.TrainTransform(data)
    batches = loader.train_batches(opened, transform, batch=2, micro=2, seed=0, start=0, stop=10**9, workers=1)
    try:
        for _ in batches:
            print("batch", flush=True)
            if sys.argv[2] == "exit":
                sys.exit()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


def test_a_signal_while_workers_start_is_not_lost(data, monkeypatch):
    def start(*_):
        signal.raise_signal(signal.SIGINT)
        return Mock()

    monkeypatch.setattr(workers, "_Worker", start)
    with pytest.raises(KeyboardInterrupt):
        next(eval_samples(open_dataset(data, "train"), 2), None)


@pytest.mark.skipif(os.name != "posix", reason="sends signals to a process group")
@pytest.mark.parametrize("how", ["interrupt", "kill", "exit"])
def test_workers_end_quietly_with_the_main_process(data, tmp_path, how):
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, "script.py", str(data.root), how],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "batch\n"
    if how == "interrupt":
        os.killpg(process.pid, signal.SIGINT)  # like Ctrl-C, to every process of the group
    elif how == "kill":
        process.kill()
    out, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (-signal.SIGKILL if how == "kill" else 0, "")
    assert out.endswith("interrupted\n") == (how == "interrupt")
    for _ in range(100):  # helper processes may need a moment to exit
        if not group_alive(process.pid):
            return
        time.sleep(0.1)
    pytest.fail("a process is left over")


def group_alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_threads_keep_the_order_and_work_a_little_ahead(threads):
    made, last = [], [0.02, 0.0, 0.01, 0.0, 0.0, 0.0, 0.0]

    def items():
        for item in enumerate(last):
            made.append(item)
            yield item

    def function(item):
        time.sleep(item[1])
        if item[0] == 5:
            raise UserError("the sixth")
        return item[0], threading.current_thread() is threading.main_thread()

    found = workers.in_threads(function, items(), threads)
    assert next(found) == (0, threads == 0)
    assert len(made) == 1 + threads
    assert [next(found)[0] for _ in range(4)] == [1, 2, 3, 4]
    with pytest.raises(UserError, match="the sixth"):
        next(found)


def test_samples_of_different_types_keep_their_values():
    photo, raster = np.full((2, 3, 3), 200, np.uint8), np.full((2, 3, 3), 300.5, np.float32)
    small, large = np.full((2, 3), 1, np.uint8), np.full((2, 3), 300, np.uint16)
    batch = Batch.of([(photo, small), (raster, large)], (2, 4), 65535, [1, 2], 0)
    assert batch.images[:, 0, 0, 0].tolist() == [200, 300.5]
    assert batch.on("cpu", [0], [1])[1][:, 0].tolist() == [[1, 1, 1, 65535], [300, 300, 300, 65535]]
    alone = Batch.of([(photo, small)], (2, 4), 255, [1], 0)
    assert (alone.images.dtype, alone.labels.dtype) == (torch.uint8, torch.uint8)
