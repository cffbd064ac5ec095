"""`predict` on folders: batches, threads that write, results.csv, and going on after a run that was ended."""

from __future__ import annotations

import csv
import json
import os
import resource
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from segcore.cli import predict_images
from segcore.cli.main import main
from segcore.cli.predict_files import plan
from segcore.cli.predict_record import Record
from segcore.config.schema import DataConfig, EvalConfig, Experiment, ModelConfig, TrainConfig
from segcore.data.images import read_label
from segcore.errors import UserError
from segcore.evaluation.predictor import Predictor
from segcore.inference import LoadedModel
from segcore.testing.tiny import Tiny

SIZES = ((6, 8), (6, 8), (6, 8), (5, 8), (6, 8))


@dataclass(frozen=True)
class TinyModel(ModelConfig):
    def build(self) -> Tiny:
        return Tiny()


DATA = DataConfig("folder", classes=("a", "b", "c"), mean=(0.0,) * 3, std=(99.0,) * 3, photometric=False, workers=0)
EXPERIMENT = Experiment("tiny", TinyModel(3), DATA, train=TrainConfig(precision="fp32"), evaluate=EvalConfig(None))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of five images; the fourth has another size."""
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    for n, size in enumerate(SIZES):
        pixels = np.random.RandomState(n).randint(0, 256, (*size, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "below" / f"{n}.png")
    return folder


def loaded(model: Tiny | None = None, **evaluate: Any) -> LoadedModel:
    """Return a model of random weights, the same each time, with noise."""
    torch.manual_seed(0)
    exp = replace(EXPERIMENT, evaluate=replace(EXPERIMENT.evaluate, **evaluate))
    return LoadedModel(exp, Predictor.of((model or Tiny(noise=1.0)).eval(), exp))


def predict(photos: Path, seg: LoadedModel | None = None, resume: bool = False, **options: Any) -> LoadedModel:
    """Predict the folder into `out` beside it, and return the model."""
    seg, out = seg or loaded(), photos.with_name("out")
    predict_images.run(seg, plan(photos, out), record=Record(photos, out, seg, options, resume))
    return seg


def rows(photos: Path) -> list[dict[str, str]]:
    with photos.with_name("out").joinpath("results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def masks(photos: Path) -> list[np.ndarray]:
    return [read_label(path) for path in sorted(photos.with_name("out").glob("below/?.png"))]


def calls(seg: LoadedModel) -> list[int]:
    """Return the number of images of every pass."""
    assert isinstance(seg.model, Tiny)
    return [len(images) for images, _ in seg.model.calls]


@pytest.fixture
def alone(photos: Path) -> list[np.ndarray]:
    """The masks of images that are predicted one after the other."""
    assert calls(predict(photos)) == [1] * 5
    return masks(photos)


def test_images_of_one_size_are_computed_together(photos: Path, alone: list[np.ndarray]) -> None:
    seg = predict(photos, loaded(batch_size=2))
    assert calls(seg) == [2, 1, 1, 1]
    for one, other in zip(alone, masks(photos), strict=True):
        assert (one == other).mean() > 0.9, "sums in another order"
    assert [(row["height"], row["width"]) for row in rows(photos)] == [(str(h), str(w)) for h, w in SIZES]


class Limited(Tiny):
    """Has memory for one image of a certain size at most."""

    def logits(self, images: torch.Tensor, seeds: Any = None) -> torch.Tensor:
        if len(images) > 1 or images.shape[2] == 5:
            raise torch.OutOfMemoryError
        return super().logits(images, seeds)


def test_what_is_too_large_costs_a_line_and_not_its_batch(photos: Path) -> None:
    with pytest.raises(UserError, match=r"3\.png: out of GPU memory; lower evaluate\.batch_size") as caught:
        predict(photos, loaded(Limited(), batch_size=4))
    assert "more" not in str(caught.value)
    assert [bool(row["error"]) for row in rows(photos)] == [False, False, False, True, False]
    assert len(masks(photos)) == 4


def test_every_file_has_a_line(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the order of the files, bad ones and names of any encoding too."""
    photos.joinpath("bad,\n.png").write_bytes(b"")
    Path(os.fsdecode(os.fsencode(photos) + b"/z\xff.png")).write_bytes(photos.joinpath("below/0.png").read_bytes())
    with pytest.raises(UserError, match="cannot be read as an image"):
        predict(photos)
    found = rows(photos)
    assert [row["file"] for row in found] == ["bad,\n.png", *(f"below/{n}.png" for n in range(5)), "z\\udcff.png"]
    assert [bool(row["error"]) for row in found] == [True] + [False] * 6
    assert all(float(row["seconds"]) > 0 for row in found[1:])
    assert "6 of 7 images written below" in capsys.readouterr().out
    assert not list(photos.with_name("out").glob("results.csv.*"))
    seg = loaded()
    with pytest.raises(UserError, match="cannot be read as an image"):
        predict(photos, seg, resume=True)
    assert calls(seg) == []
    assert rows(photos) == found


def threaded(threads: int) -> LoadedModel:
    seg = loaded()
    return replace(seg, experiment=replace(seg.experiment, data=replace(DATA, workers=threads)))


@pytest.mark.parametrize("threads", [0, 1])
def test_a_run_that_was_ended_goes_on(
    photos: Path, alone: list[np.ndarray], monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """What is whole and up to date is kept; what a kill cut off in results.csv.part0 is done again."""
    write, out = predict_images.write, photos.with_name("out")
    written = list[Path]()

    def interrupted(job: Any, *rest: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(job.mask)
        write(job, *rest)

    monkeypatch.setattr(predict_images, "write", interrupted)
    seg = threaded(threads)
    with pytest.raises(KeyboardInterrupt):
        predict(photos, seg)
    part = out / "results.csv.part0"
    lines = part.read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == [f"below/{n}.png" for n in range(3)]
    part.write_text("\n".join(lines)[:-3])
    (out / "below" / "0_overlay.png").unlink()
    monkeypatch.setattr(predict_images, "write", write)
    assert calls(predict(photos, resume=True)) == [1, 1, 1, 1], "all but the second"
    assert [row["file"] for row in rows(photos)] == [f"below/{n}.png" for n in range(5)]
    assert not part.exists()
    assert all(np.array_equal(one, other) for one, other in zip(alone, masks(photos), strict=True))
    os.utime(photos / "below/1.png", (1, 1))
    assert calls(predict(photos, resume=True)) == [1], "the image has changed"
    assert calls(predict(photos, resume=True)) == []
    assert calls(predict(photos)) == [1] * 5, "without --resume"


def test_results_of_other_settings_or_weights_are_not_taken_for_these(photos: Path) -> None:
    predict(photos, opacity=0.5)
    before = rows(photos)
    with pytest.raises(
        UserError, match=r"out: its results were made with other settings \(options\.opacity: 0\.5 -> 1"
    ):
        predict(photos, resume=True, opacity=1)
    with pytest.raises(UserError, match=r"evaluate\.flip: False -> True"):
        predict(photos, loaded(flip=True), resume=True, opacity=0.5)
    other = loaded()
    with torch.no_grad():
        other.model.head.bias[0] += 1  # type: ignore[union-attr,operator]
    with pytest.raises(UserError, match="weights: "):
        predict(photos, other, resume=True, opacity=0.5)
    assert rows(photos) == before
    assert calls(predict(photos, loaded(batch_size=2), resume=True, opacity=0.5)) == [], "which changes no result"
    photos.with_name("out").joinpath("predict.json").write_text("{")
    for resume in (True, False):
        with pytest.raises(UserError, match=r"predict\.json: damaged .*; move it away, or choose another"):
            predict(photos, resume=resume, opacity=0.5)
    photos.with_name("out").joinpath("predict.json").unlink()
    predict(photos, other)
    assert json.loads(photos.with_name("out").joinpath("predict.json").read_text())["input"] == str(photos)


def test_another_setting_of_a_second_model_is_one_of_the_results(photos: Path) -> None:
    second = replace(EXPERIMENT, name="second")
    predict(photos, replace(loaded(), ensemble=(second,)))
    other = replace(second, evaluate=replace(second.evaluate, flip=True))
    with pytest.raises(UserError, match=r"ensemble\.second\.evaluate\.flip: False -> True"):
        predict(photos, replace(loaded(), ensemble=(other,)), resume=True)


@pytest.mark.parametrize("name", ["results.csv", "predict.json"])
def test_notes_of_someone_else_are_kept_and_nothing_is_predicted(photos: Path, name: str) -> None:
    out = photos.with_name("out")
    out.mkdir()
    (out / name).write_text('{"mine": 1}\n')
    with pytest.raises(UserError, match="would be overwritten; move it away, or choose another output folder"):
        predict(photos)
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [(name, '{"mine": 1}\n')]


def test_only_parts_of_results_are_deleted(photos: Path) -> None:
    out = photos.with_name("out")
    out.mkdir()
    for name in ("results.csv.partial", "results.csv.part12"):
        (out / name).touch()
    predict(photos)
    assert [path.name for path in out.glob("results.csv.*")] == ["results.csv.partial"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of this kind")
@pytest.mark.parametrize("threads", [0, 2])
def test_a_name_that_is_too_long_costs_a_line(photos: Path, threads: int) -> None:
    name = f"{'a' * 250}.png"
    (photos / name).write_bytes(photos.joinpath("below/0.png").read_bytes())
    with pytest.raises(UserError, match=r"_overlay\.png: cannot be written \(File name too long\)") as caught:
        predict(photos, threaded(threads))
    assert "more)" not in str(caught.value)
    assert [(row["file"], bool(row["error"])) for row in rows(photos)] == [
        (name, True), *((f"below/{n}.png", False) for n in range(5))
    ]  # fmt: skip
    assert len(masks(photos)) == 5


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of this kind")
@pytest.mark.parametrize("threads", [0, 2])
def test_a_full_disk_stops_the_run(photos: Path, threads: int) -> None:
    """Also in a thread that writes. Nothing is half-written."""
    seg = threaded(threads)
    big = photos / "big.png"
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (99, 99, 3)).astype(np.uint8)).save(big)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12000, hard))
    try:
        with pytest.raises(UserError, match=r"big_overlay\.png: cannot be written \(File too large\)"):
            predict(photos, seg)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    left = [path.name for path in photos.with_name("out").rglob("*") if "big" in path.name]
    assert left == ["big.png"]


def test_a_folder_in_the_place_of_results_csv_is_named(photos: Path) -> None:
    photos.with_name("out").joinpath("results.csv").mkdir(parents=True)
    with pytest.raises(UserError, match=r"out/results\.csv: cannot be written \(Is a directory\)"):
        predict(photos)


@pytest.mark.parametrize("source", ["0.png", "clip.mp4"])
def test_one_file_is_not_resumed(photos: Path, capsys: pytest.CaptureFixture[str], source: str) -> None:
    words = ["ddp_resnet18_toy", "none", str(photos / "below" / source), str(photos / "out"), "--resume"]
    with pytest.raises(SystemExit):
        main(None, ["predict", *words])
    assert f"{source}: --resume, --gpus and torchrun are for a folder of images" in capsys.readouterr().err
