"""Predicting videos: every frame, complete files or none, and errors for unreadable files."""

import struct
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from segcore import files
from segcore.cli import predict_video
from segcore.config.schema import DataConfig, EvalConfig, Experiment, ModelConfig
from segcore.data import video
from segcore.data.layouts import palette_of
from segcore.errors import UserError
from segcore.evaluation.predictor import Predictor
from segcore.inference import LoadedModel
from segcore.testing.tiny import Tiny

av = pytest.importorskip("av")


def brightness(images):
    """Return logits (N, 19, H, W): class 0 where a pixel is dark, 13 where it is bright."""
    bright = images.mean(1, keepdim=True)
    logits = torch.full((len(images), 19, *images.shape[-2:]), -100.0)
    logits[:, :1], logits[:, 13:14] = -bright, bright
    return logits


class Config(ModelConfig):
    def build(self):
        return Tiny(19, brightness)


EXP = Experiment("brightness", Config(), DataConfig("toy"), evaluate=EvalConfig(img_scale=None))
PALETTE = palette_of(EXP.data)[1]


def loaded():
    return LoadedModel(EXP, Predictor.of(Tiny(19, brightness).eval(), EXP))


def make(path, frames=6, height=50, width=64, codec="mpeg4"):
    """A video whose left half is dark and whose right half is bright."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:, width // 2 :] = 255
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for _ in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def read(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)], container.streams.video[0]


@pytest.mark.parametrize(("frames", "expected"), [(None, 6), (4, 4)])
def test_every_frame_is_painted(tmp_path, frames, expected):
    source = make(tmp_path / "in.mp4")
    path = video.plan(source, tmp_path / "out")
    assert path == tmp_path / "out" / "in_overlay.mp4"
    assert predict_video.run(loaded(), source, path, opacity=1.0, frames=frames) == expected
    images, stream = read(path)
    assert len(images) == expected
    assert stream.average_rate == 10
    for image in images:
        assert image.shape == (50, 64, 3)
        for half, color in ((image[:, 4:28], PALETTE[0]), (image[:, 36:60], PALETTE[13])):
            assert np.abs(half.mean((0, 1)) - color).max() < 12, "not the class's color"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_legend_lists_all_classes_below_every_frame(tmp_path):
    source = make(tmp_path / "in.mp4", frames=2)
    predict_video.run(loaded(), source, tmp_path / "out.mp4", opacity=1.0, legend=True)
    images, _ = read(tmp_path / "out.mp4")
    assert len(images) == 2
    below = images[0][50:].reshape(-1, 3).astype(int)
    for color in PALETTE:
        assert np.abs(below - color).max(-1).min() < 40, "a color of a class that does not occur is missing"


def turn(path, *matrix):
    """Write the display matrix (a, b, c, d) into the header of an MP4: x' = a x + c y, y' = b x + d y."""
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd") + 44
    assert struct.unpack_from(">i", data, at) == (1 << 16,)
    for place, value in zip((0, 4, 12, 16), matrix, strict=True):
        struct.pack_into(">i", data, at + place, value << 16)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("matrix", "size", "dark"),
    [
        ((1, 0, 0, 1), (50, 64), np.s_[:, 4:28]),
        ((0, 1, -1, 0), (64, 50), np.s_[4:28]),  # a phone held upright: a quarter turn clockwise
        ((0, -1, 1, 0), (64, 50), np.s_[36:60]),
        ((-1, 0, 0, -1), (50, 64), np.s_[:, 36:60]),
        ((-1, 0, 0, 1), (50, 64), np.s_[:, 36:60]),  # mirrored, as by a front camera
    ],
)
def test_videos_are_predicted_as_a_player_shows_them(tmp_path, matrix, size, dark):
    source, path = turn(make(tmp_path / "in.mp4"), *matrix), tmp_path / "out.mp4"
    predict_video.run(loaded(), source, path, opacity=1.0)
    images, _ = read(path)
    assert images[0].shape == (*size, 3)
    assert np.abs(images[0][dark].mean((0, 1)) - PALETTE[0]).max() < 12


def test_quarter_turns_are_those_of_opencv(tmp_path):
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    for turns, (a, b, c, d) in {0: (0, 1, -1, 0), 1: (-1, 0, 0, -1), 2: (0, -1, 1, 0)}.items():
        matrix = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 14], np.int32) << 16
        assert (video.upright(image, matrix) == cv2.rotate(image, turns)).all()


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.ts", "a.MTS", "a.webm"])
def test_a_cut_video_is_told_and_its_beginning_written(tmp_path, name):
    whole, source = tmp_path / f"whole_{name}", tmp_path / name
    codec = {".webm": "libvpx", ".avi": "mpeg4"}.get(Path(name).suffix, "libx264")
    options = {"movflags": "faststart"} if name == "a.mp4" else {}  # the others of this kind cannot be opened at all
    noise = np.random.default_rng(0).integers(0, 255, (30, 50, 64, 3), np.uint8)
    with av.open(str(whole), "w", options=options) as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = 50, 64, "yuv420p"
        for image in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    assert predict_video.run(loaded(), whole, tmp_path / "whole.mkv") == 30
    source.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * 0.6)])
    path = video.plan(source, tmp_path / "out")
    with pytest.raises(UserError, match=r"cut or damaged; .*a_overlay.mp4 has the \d+ frames that") as error:
        predict_video.run(loaded(), source, path)
    images, _ = read(path)
    assert 10 < len(images) < 25
    assert f"the {len(images)} frames" in str(error.value)
    assert predict_video.run(loaded(), source, path, frames=5) == 5, "the end was not asked for"


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "h264"), ("a.MOV", "h264"), ("a.webm", "vp9")])
def test_the_ending_decides_the_codec(tmp_path, name, codec):
    path = video.plan(make(tmp_path / "in.mp4"), tmp_path / name)
    assert predict_video.run(loaded(), tmp_path / "in.mp4", path) == 6
    images, stream = read(path)
    assert (len(images), stream.codec_context.name.removeprefix("lib")) == (6, codec)


@pytest.mark.parametrize("name", ["a.avi", "a.ts", "a.png", "a.GIF"])
def test_other_endings_are_refused(tmp_path, name):
    with pytest.raises(UserError, match=rf"{name}: videos are written as \.mp4, .*webm"):
        video.plan(make(tmp_path / "in.mp4"), tmp_path / name)
    (tmp_path / name).mkdir()
    assert video.plan(tmp_path / "in.mp4", tmp_path / name) == tmp_path / name / "in_overlay.mp4"


def test_odd_sides_grow_by_a_pixel(tmp_path, monkeypatch):
    path = tmp_path / "odd.mp4"
    with video.writer(path, 5) as write:
        write(np.zeros((51, 63, 3), np.uint8))
    assert read(path)[0][0].shape == (52, 64, 3)


def test_a_video_is_on_the_disk_before_it_appears(tmp_path, monkeypatch):
    path, synced = tmp_path / "a.mp4", []
    monkeypatch.setattr(files, "sync", lambda part: synced.append((part.stat().st_size, path.exists())))
    with video.writer(path, 5) as write:
        write(np.zeros((50, 64, 3), np.uint8))
    assert synced == [(path.stat().st_size, False)]


def test_what_is_a_video(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert video.is_video(Path("a.MP4"))
    assert video.is_video(Path("0"))
    assert not video.is_video(Path("a.png"))
    Path("0").mkdir()
    assert not video.is_video(Path("0")), "a folder of that name is there"


def refused(tmp_path, source, target="out", **options):
    with pytest.raises(UserError) as error:
        predict_video.run(loaded(), source, video.plan(source, tmp_path / target), **options)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("*")), "something was left behind"
    return str(error.value)


def test_bad_input(tmp_path):
    good, bad = make(tmp_path / "good.mp4"), tmp_path / "bad.mp4"
    bad.write_bytes(b"no video at all" * 100)
    assert str(bad) in refused(tmp_path, bad)
    assert "no such video" in refused(tmp_path, tmp_path / "none.mp4")
    assert "would overwrite" in refused(tmp_path, good, "good.mp4")
    assert "opacity is 2" in refused(tmp_path, good, opacity=2.0)
    assert "--frames 0" in refused(tmp_path, good, frames=0)


@pytest.mark.skipif(sys.platform != "linux", reason="the name of the device is Linux's")
def test_a_camera_that_is_not_there(tmp_path):
    assert "cannot be read as a camera" in refused(tmp_path, Path("987"))


def test_without_pyav(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"install segcore\[video\]"):
        video.plan(Path("a.mp4"), tmp_path)
