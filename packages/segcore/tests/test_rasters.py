"""Large and georeferenced images: windows of TIFFs, classes as with the whole image in memory, tiles for training."""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from segcore.cli import predict_raster
from segcore.cli.predict import Predict
from segcore.config.schema import DataConfig, EvalConfig, Experiment, ModelConfig
from segcore.data import rasters
from segcore.data.check import check
from segcore.data.images import read_image, read_label
from segcore.data.layouts import find_files, open_dataset
from segcore.data.rasters import open_raster, tile_boxes
from segcore.errors import UserError
from segcore.evaluation.blocks import predict_blocks
from segcore.evaluation.predictor import Predictor
from segcore.evaluation.scores import most_probable
from segcore.inference import LoadedModel
from segcore.testing.tiny import Tiny, TinyStepwise

rasterio = pytest.importorskip("rasterio")
GroundControlPoint = pytest.importorskip("rasterio.control").GroundControlPoint
from_origin = pytest.importorskip("rasterio.transform").from_origin

RANDOM = np.random.default_rng(0)
SIZE = (100, 130)
BOXES = ((0, 0, *SIZE), (13, 27, 55, 99), (90, 120, *SIZE), (99, 0, 100, 1))
WINDOWS = EvalConfig(mode="slide", crop=(32, 48), stride=(21, 40))


def scene(channels: int = 3, dtype: str = "uint8", size: tuple[int, int] = SIZE) -> np.ndarray:
    return RANDOM.integers(1, 200, (*size, channels)).astype(dtype)


@pytest.fixture(params=["rasterio", "tifffile"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Read with rasterio, and again as where it is not installed."""
    if request.param == "tifffile":
        monkeypatch.setitem(sys.modules, "rasterio", None)
    return request.param


class NoCodecs(dict[int, object]):
    """What tifffile looks decoders up in, without imagecodecs."""

    def __missing__(self, key: int) -> object:
        raise KeyError(f"{key} requires the 'imagecodecs' package")


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"byteorder": ">"},
        {"tile": (32, 48)},
        {"compression": "lzw", "rowsperstrip": 7},
        {"compression": "zlib", "predictor": True, "tile": (16, 16), "bigtiff": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_windows_are_those_of_the_whole_image(tmp_path: Path, backend: str, planar: str, how: dict) -> None:
    for (dtype, depth), channels in product({"uint8": 8, "uint16": 16, "float32": 32}.items(), (1, 3, 5)):
        image, path = scene(channels, dtype), tmp_path / "a.tif"
        stored = image.transpose(2, 0, 1) if planar == "separate" and channels > 1 else image.squeeze()
        more = {"planarconfig": planar} if channels > 1 else {}
        tifffile.imwrite(path, stored, photometric="minisblack", **more, **how)
        with open_raster(path, channels, depth) as raster:
            assert (raster.height, raster.width) == SIZE
            for box in BOXES:
                window, valid = raster.read(box)
                assert valid.all()
                np.testing.assert_array_equal(window, image[box[0] : box[2], box[1] : box[3]], strict=True)


def test_three_channels_are_decoded_as_in_the_whole_image(tmp_path: Path, backend: str) -> None:
    gray, rgba = Image.fromarray(scene(1)[..., 0]), scene(4)
    gray.save(tmp_path / "gray.tif")
    gray.quantize(16).save(tmp_path / "palette.tif", compression="tiff_adobe_deflate")
    tifffile.imwrite(tmp_path / "rgba.tif", rgba, photometric="rgb", extrasamples=["unassalpha"], tile=(16, 16))
    Image.fromarray(rgba[..., :3]).save(tmp_path / "a.png")
    for name in ("gray.tif", "palette.tif", "rgba.tif", "a.png"):
        whole = read_image(tmp_path / name)
        with open_raster(tmp_path / name) as raster:
            for box in BOXES:
                np.testing.assert_array_equal(raster.read(box)[0], whole[box[0] : box[2], box[1] : box[3]])


def test_pixels_without_data_are_zeros(tmp_path: Path, backend: str) -> None:
    image, path = scene(3, "float32"), tmp_path / "a.tif"
    image[:10, :20], image[50, 60, 0] = np.nan, -9999  # one band of a pixel is data
    for nodata in ("nan", "-9999 "):
        stored = np.nan_to_num(image, nan=float(nodata))
        tifffile.imwrite(path, stored, photometric="rgb", tile=(16, 16), extratags=[(42113, "s", 0, nodata, True)])
        with open_raster(path, 3, 32) as raster:
            window, valid = raster.read((5, 10, 60, 70))
        np.testing.assert_array_equal(valid, ~np.isnan(image[5:60, 10:70]).all(-1))
        np.testing.assert_array_equal(window, np.nan_to_num(image[5:60, 10:70]))
    rgba = scene(4)
    rgba[:10, :20, 3] = 0
    tifffile.imwrite(path, rgba, photometric="rgb", extrasamples=["unassalpha"])
    with open_raster(path) as raster:
        assert (raster.read((0, 0, *SIZE))[1] == (rgba[..., 3] > 0)).all()


def test_a_tiff_that_cannot_be_read_in_windows_is_refused(tmp_path: Path, backend: str) -> None:
    def refused(match: str, channels: int = 3, max_pixels: int = 1 << 28) -> None:
        with (
            pytest.raises(UserError, match=rf"a\.tif: .*{match}") as caught,
            open_raster(path, channels, 8, max_pixels) as raster,
        ):
            raster.read(BOXES[0])
        assert "\n" not in str(caught.value)

    path = tmp_path / "a.tif"
    refused("No such file")
    path.write_bytes(b"II*\0" + bytes(100))
    refused("cannot be read")
    Image.fromarray(scene()).convert("CMYK").save(path)
    refused("SEPARATED: convert it to RGB", 4)
    Image.fromarray(scene()).convert("1").save(path)
    refused("1 bits per band")
    Image.fromarray(scene()).save(path, tiffinfo={274: 6})
    refused("turned or mirrored")
    tifffile.imwrite(path, scene().transpose(2, 0, 1).copy(), photometric="minisblack")
    refused("bands are pages")
    tifffile.imwrite(path, scene(), photometric="rgb", compression="zlib", rowsperstrip=50)
    refused("a tile or strip has 6500 pixels, data.max_pixels is 6499: write it in tiles", max_pixels=6499)
    refused(r"holds uint8 of shape \(100, 130, 3\), but data.channels is 5", 5)
    tifffile.imwrite(path, scene(3, "uint16"), photometric="rgb")
    refused(r"holds uint16 .*data.bit_depth 8")
    for how in ({}, {"compression": "zlib", "tile": (16, 16)}):
        tifffile.imwrite(path, scene(), photometric="rgb", **how)
        path.write_bytes(path.read_bytes()[:-700])
        refused("cannot be read as an image")


def test_without_rasterio_an_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, scene(), photometric="rgb", tile=(16, 16), compression="lzw")
    monkeypatch.setitem(sys.modules, "rasterio", None)
    monkeypatch.setattr(tifffile.TIFF, "DECOMPRESSORS", NoCodecs())
    with pytest.raises(UserError, match=r"LZW needs `pip install segcore\[geo\]`"), open_raster(path) as raster:
        raster.read(BOXES[0])
    path.with_suffix(".tfw").write_text("1\n0\n0\n-1\n0\n0\n")
    with pytest.raises(UserError, match=r"a\.tfw beside it needs `pip install segcore\[geo\]`"):
        predict_raster.run(loaded(), path, tmp_path / "out.tif")


# Prediction


def blocks(predictor: Predictor, image: np.ndarray, **how: int) -> dict[str, np.ndarray]:
    """Return the most probable classes by entry that the blocks make up; every pixel lies in one."""
    found: dict[str, np.ndarray] = {}
    size = image.shape[:2]
    for y, x, entries in predict_blocks(predictor, size, lambda box: rasters.cut(image, box), 7, **how):
        for entry, classes in ((entry, most_probable(p)) for entry, p in entries.items()):
            whole = found.setdefault(entry, np.full(size, -1))
            part = whole[y : y + classes.shape[0], x : x + classes.shape[1]]
            assert part.shape == classes.shape
            assert (part == -1).all()
            part[:] = classes
    assert all((classes >= 0).all() for classes in found.values())
    return found


MODELS = {
    "plain": lambda: Tiny(5, noise=1.0),
    "one class": lambda: Tiny(1, noise=1.0),
    "stepwise": lambda: TinyStepwise(5, noise=1.0),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size", [(100, 230), (32, 48), (20, 300), (90, 30)], ids=str)
def test_classes_are_those_of_the_whole_image_in_memory(model: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    image, data = scene(size=size), DataConfig(classes=tuple("abcde"))
    predictor = Predictor(MODELS[model]().eval(), WINDOWS, data)
    [wanted] = predictor.classes([image], [7])
    for sums in (1 << 30, 1):  # one strip, and as narrow ones as can be
        found = blocks(predictor, image, sums=sums)
        assert found.keys() == wanted.keys()
        for entry, classes in wanted.items():
            np.testing.assert_array_equal(found[entry], classes)


def test_windows_draw_their_noise_where_it_is_configured() -> None:
    model = TinyStepwise(5, noise=1.0).eval()
    assert model.noise_device != "cpu"
    blocks(
        Predictor(model, replace(WINDOWS, noise_device="cpu"), DataConfig(classes=tuple("abcde"))), scene(size=(32, 48))
    )
    assert model.noise_device == "cpu"


def test_classes_of_an_ensemble_and_of_the_mean_over_steps() -> None:
    torch.manual_seed(0)
    image, data = scene(size=(100, 230)), DataConfig(classes=tuple("abcde"))
    settings = replace(WINDOWS, steps=(1, 3), ensemble_steps=True)
    background = TinyStepwise(6, noise=1.0)
    background.ignore_index = 0
    predictor = Predictor(background.eval(), settings, data, (Tiny(5, noise=1.0).eval(), Tiny(6).eval()))
    [wanted] = predictor.classes([image], [7])
    for entry, classes in blocks(predictor, image, sums=1).items():
        np.testing.assert_array_equal(classes, wanted[entry])


def test_memory_holds_only_the_rows_of_open_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    largest, zeros = 0, torch.Tensor.new_zeros

    def noted(tensor: torch.Tensor, *size: object, **how: object) -> torch.Tensor:
        nonlocal largest
        found = zeros(tensor, *size, **how)
        largest = max(largest, found.nbytes)
        return found

    monkeypatch.setattr(torch.Tensor, "new_zeros", noted)
    predictor = Predictor(Tiny(5).eval(), WINDOWS, DataConfig(classes=tuple("abcde")))
    blocks(predictor, scene(size=(400, 400)))
    assert largest == 4 * 5 * 32 * 400
    largest = 0
    blocks(predictor, scene(size=(400, 400)), sums=100_000)
    assert 0 < largest <= 100_000


@dataclass(frozen=True)
class TinyConfig(ModelConfig):
    """Classes by brightness."""

    def build(self) -> Tiny:
        return Tiny(
            self.num_classes, lambda x: -(x.mean(1, keepdim=True) - torch.arange(self.num_classes)[:, None, None]).abs()
        )


def loaded(classes: int = 4, evaluate: EvalConfig = WINDOWS, **data: object) -> LoadedModel:
    """Return a model that answers with the mean of the channels."""
    names = tuple(f"c{i}" for i in range(classes))
    settings = DataConfig(classes=names, mean=(0.0,) * 3, std=(1.0,) * 3, **data)
    exp = Experiment("tiny", TinyConfig(classes + settings.add_background_class), settings, evaluate=evaluate)
    return LoadedModel(exp, Predictor.of(exp.model.build().eval(), exp))


def write_geotiff(path: Path, image: np.ndarray, **how: object) -> None:
    height, width, count = image.shape
    profile = {"crs": "EPSG:32633", "transform": from_origin(500_000, 5_000_000, 0.5, 0.25), "tiled": True}
    sizes = {"height": height, "width": width, "count": count, "blockxsize": 64, "blockysize": 64}
    with rasterio.open(path, "w", driver="GTiff", dtype=image.dtype, **sizes, **profile | how) as file:
        file.write(np.moveaxis(image, -1, 0))


def test_a_georeferenced_image_becomes_a_georeferenced_map(tmp_path: Path, backend: str, capsys) -> None:
    seg = loaded(evaluate=replace(WINDOWS, img_scale=(100, 100)))
    image = np.repeat(RANDOM.integers(0, 4, (300, 400, 1)), 3, 2).astype(np.uint8)
    image[100:200, :50] = 200
    write_geotiff(tmp_path / "a.tif", image, nodata=200, compress="lzw")
    predict_raster.run(seg, tmp_path / "a.tif", tmp_path / "new" / "out.tif")
    shown = capsys.readouterr()
    assert str(tmp_path / "new" / "out.tif") in shown.out
    assert "note: a .tif keeps the image's own size; evaluate.img_scale (100, 100) is not applied" in shown.err
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.tif"]
    with rasterio.open(tmp_path / "a.tif") as source, rasterio.open(tmp_path / "new" / "out.tif") as found:
        assert (found.crs, found.transform) == (source.crs, source.transform)
        assert (found.nodata, found.dtypes, found.count, found.block_shapes) == (255, ("uint8",), 1, [(256, 256)])
        colors = [found.colormap(1)[k][:3] for k in range(4)]
        classes = found.read(1)
    np.testing.assert_array_equal(colors, seg.palette)
    np.testing.assert_array_equal(classes, np.where(image[..., 0] == 200, 255, image[..., 0]))
    np.testing.assert_array_equal(read_label(tmp_path / "new" / "out.tif"), classes)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_an_ordinary_image_becomes_an_ordinary_map(tmp_path: Path, name: str) -> None:
    seg, image = loaded(), np.repeat(RANDOM.integers(0, 4, (300, 400, 1)), 3, 2).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / name)
    predict_raster.run(seg, tmp_path / name, tmp_path / "out.tiff")
    with rasterio.open(tmp_path / "out.tiff") as found:
        assert found.crs is None
        assert found.transform.is_identity
        np.testing.assert_array_equal(found.read(1), image[..., 0])
    np.testing.assert_array_equal(read_label(tmp_path / "out.tiff"), seg(image).mask)


def test_control_points_and_a_world_file_are_kept(tmp_path: Path) -> None:
    corners = [(0, 0, 10, 50), (0, 100, 20, 50), (80, 0, 10, 40)]
    points = [GroundControlPoint(*corner) for corner in corners]
    write_geotiff(tmp_path / "a.tif", scene(), gcps=points, transform=None, crs="EPSG:4326")
    Image.fromarray(scene()).save(tmp_path / "b.tif")
    (tmp_path / "b.tfw").write_text("2\n0\n0\n-2\n1001\n1999\n")
    for name in ("a", "b"):
        predict_raster.run(loaded(), tmp_path / f"{name}.tif", tmp_path / f"{name}_out.tif")
    with rasterio.open(tmp_path / "a_out.tif") as found:
        kept, crs = found.gcps
    assert [(p.row, p.col, p.x, p.y) for p in kept] == corners
    assert crs == "EPSG:4326"
    with rasterio.open(tmp_path / "b_out.tif") as found:
        assert found.transform == from_origin(1000, 2000, 2, 2)


def test_background_and_more_classes_than_8_bits_hold(tmp_path: Path) -> None:
    Image.fromarray(scene()).save(tmp_path / "a.tif")
    mean = read_image(tmp_path / "a.tif").mean(2)
    predict_raster.run(loaded(3, add_background_class=True), tmp_path / "a.tif", tmp_path / "out.tif")
    np.testing.assert_array_equal(read_label(tmp_path / "out.tif"), np.where(mean.round() == 0, 255, 2))
    seg = loaded(300)
    predict_raster.run(seg, tmp_path / "a.tif", tmp_path / "out.tif")
    with rasterio.open(tmp_path / "out.tif") as found:
        assert (found.dtypes, found.nodata) == (("uint16",), 65535)
        assert found.colormap(1)[299][:3] == tuple(seg.palette[299])
        np.testing.assert_array_equal(found.read(1), seg(tmp_path / "a.tif").mask)
    bright = seg(np.full((4, 5, 3), 255, np.uint8))  # class 255, which is not the ignored label
    assert (np.asarray(bright.overlay(opacity=1)) == seg.palette[255]).all()


def test_confidence_and_probabilities_of_a_raster(tmp_path: Path, backend: str) -> None:
    image = np.repeat(RANDOM.integers(0, 4, (300, 400, 1)), 3, 2).astype(np.uint8)
    image[100:200, :50] = 200
    write_geotiff(tmp_path / "a.tif", image, nodata=200, compress="lzw")
    image[100:200, :50] = 0  # as the network sees it
    seg = loaded()
    found = seg(image, probabilities=True)
    targets = predict_raster.plan(tmp_path / "a.tif", tmp_path / "out.tif", confidence=True, probabilities=True)
    predict_raster.run(seg, tmp_path / "a.tif", **targets)
    assert len(list(tmp_path.iterdir())) == 4
    with rasterio.open(tmp_path / "out.tif") as file:
        valid = file.read(1) != 255
        place = file.crs, file.transform
    with rasterio.open(tmp_path / "out_confidence.tif") as file:
        assert (file.nodata, file.dtypes, file.crs, file.transform) == (0, ("uint8",), *place)
        gray = file.read(1)
    np.testing.assert_array_equal(gray, np.where(valid, (found.confidence * 255).round(), 0))
    with rasterio.open(tmp_path / "out_probabilities.tif") as file:
        assert (file.dtypes, file.crs, file.transform) == (("float32",) * 4, *place)
        assert np.isnan(file.nodata)
        assert file.descriptions == ("c0", "c1", "c2", "c3")
        bands = file.read()
    assert (np.isnan(bands) == ~valid).all()
    expected = found.probabilities.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(bands[:, valid], expected[:, valid])


def test_names_of_bands_have_any_letters(tmp_path: Path) -> None:
    names = ("Straße", "<a & b>", 'the "third"')
    with rasters.probability_writer(tmp_path / "p.tif", (40, 30), names) as put:
        put(0, 0, np.full((3, 40, 30), 0.25))
    with rasterio.open(tmp_path / "p.tif") as file:
        assert file.descriptions == names
        assert (file.read() == 0.25).all()


def test_probabilities_of_one_class_are_one_band(tmp_path: Path) -> None:
    with rasters.probability_writer(tmp_path / "p.tif", (40, 30), ["water"]) as put:
        put(0, 0, np.full((1, 40, 30), 0.25))
    with rasterio.open(tmp_path / "p.tif") as file:
        assert file.descriptions == ("water",)
        assert (file.read() == np.full((1, 40, 30), 0.25)).all()


def test_a_result_of_a_raster_does_not_overwrite_it(tmp_path: Path) -> None:
    source = tmp_path / "a_confidence.tif"
    source.touch()
    with pytest.raises(UserError, match=r"a_confidence\.tif: would overwrite the image"):
        predict_raster.plan(source, tmp_path / "a.tif", confidence=True)


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", scene(size=(300, 400)), photometric="rgb", tile=(64, 64))
    whole = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(whole[:-100_000])
    with pytest.raises(UserError, match=r"a\.tif: cannot be read"):
        predict_raster.run(loaded(), tmp_path / "a.tif", tmp_path / "out.tif")
    (tmp_path / "a.tif").write_bytes(whole)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (50_000, 120_001):  # no room for the classes, nor for the file with its color table
        noise = loaded(256)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(UserError, match=r"out\.tif: cannot be written \(File too large\); free space"):
                predict_raster.run(noise, tmp_path / "a.tif", tmp_path / "out.tif")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    seg = loaded(evaluate=replace(WINDOWS, flip=True))
    with pytest.raises(UserError, match=r"a\.tif: .*one view; set --evaluate.img-ratios 1"):
        predict_raster.run(seg, tmp_path / "a.tif", tmp_path / "out.tif")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tif"]


def test_predict_writes_a_tif_if_the_output_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seg = loaded()
    monkeypatch.setattr("segcore.cli.predict.load", lambda *given: seg)
    Image.fromarray(scene()).save(tmp_path / "a.tif")
    Predict(seg.experiment, checkpoint="none", input=tmp_path / "a.tif", output=tmp_path / "out.TIF").run(None)
    assert json.loads((tmp_path / "out_classes.json").read_text())[-1]["value"] == 255
    np.testing.assert_array_equal(read_label(tmp_path / "out.TIF"), seg(tmp_path / "a.tif").mask)
    with pytest.raises(
        UserError, match=r"it has 13000 pixels, .* raise that, or take windows: data.tile, predict to a"
    ):
        read_image(tmp_path / "a.tif", max_pixels=100)


def test_what_predict_refuses(tmp_path: Path) -> None:
    exp, path = loaded().experiment, tmp_path / "a.tif"
    Image.fromarray(scene()).save(path)
    for source, target, more, match in (
        (tmp_path, tmp_path / "out.tif", {}, "one file for all images of the folder"),
        (path, path, {}, "would overwrite the image"),
        (path, tmp_path / "out.tif", {"uncertainty": True}, "with --uncertainty, .* give a folder"),
    ):
        with pytest.raises(UserError, match=match):
            Predict(exp, checkpoint="none", input=source, output=target, **more).run(None)


# Training


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40))
def test_tiles_cover_an_image_once_and_none_is_a_sliver(height: int, width: int, side: int) -> None:
    count = np.zeros((height, width), int)
    for y1, x1, y2, x2 in tile_boxes(height, width, side):
        assert max(y2 - y1, x2 - x1) <= side
        assert y2 - y1 >= min(height, side // 2)
        assert x2 - x1 >= min(width, side // 2)
        count[y1:y2, x1:x2] += 1
    assert (count == 1).all()


def folder(tmp_path: Path, colors: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Write a large image and mask and a small pair; return the large ones."""
    for name in ("images", "masks"):
        (tmp_path / name / "train").mkdir(parents=True)
    image, mask = scene(size=(150, 230)), RANDOM.integers(0, 3, (150, 230)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "images/train/a.tif", image, photometric="rgb", tile=(64, 64), compression="zlib")
    stored = mask if colors is None else colors[mask]
    kind = "minisblack" if colors is None else "rgb"
    tifffile.imwrite(tmp_path / "masks/train/a.tif", stored, photometric=kind, tile=(64, 64), compression="zlib")
    cv2.imwrite(str(tmp_path / "images/train/b.png"), scene(size=(300, 40)))
    cv2.imwrite(str(tmp_path / "masks/train/b.png"), np.zeros((300, 40), np.uint8))
    return image, mask


@pytest.mark.parametrize("kind", ["indices", "colors", "png"])
def test_rasters_are_trained_on_in_tiles(tmp_path: Path, backend: str, kind: str) -> None:
    colors = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8) if kind == "colors" else None
    image, mask = folder(tmp_path, colors)
    data = DataConfig(root=tmp_path, classes=("r", "g", "b"), tile=100, max_pixels=15_000)
    if colors is not None:
        data = replace(data, labels=("#ff0000=r", "#00ff00=g", "#0000ff=b"), classes=())
        cv2.imwrite(str(tmp_path / "masks/train/b.png"), np.full((300, 40, 3), (0, 0, 255), np.uint8))
    if kind == "png":  # decoded whole for each tile
        (tmp_path / "masks/train/a.tif").unlink()
        cv2.imwrite(str(tmp_path / "masks/train/a.png"), mask)
        data = replace(data, max_pixels=mask.size)
    dataset = open_dataset(data, "train")
    assert len(dataset) == 7
    assert [dataset.name(i) for i in (0, 1, 5, 6)] == ["a_0_0", "a_0_76", "a_75_153", "b"]
    rebuilt, labels = np.zeros_like(image), np.zeros_like(mask)
    for index, sample in enumerate(dataset.samples[:6]):
        y1, x1, y2, x2 = sample.box
        rebuilt[y1:y2, x1:x2], labels[y1:y2, x1:x2] = dataset.pair(index)
    np.testing.assert_array_equal(rebuilt, image)
    np.testing.assert_array_equal(labels, mask)
    assert dataset.pair(6)[0].shape == (300, 40, 3)


def test_tiles_report_their_files(tmp_path: Path) -> None:
    _, mask = folder(tmp_path)
    data, path = DataConfig(root=tmp_path, classes=("r", "g"), tile=100), tmp_path / "masks/train/a.tif"
    with pytest.raises(UserError, match=r"a\.tif: label values 2 are not classes; allowed are 0-1, 255"):
        find_files(data, "train").label(0)
    tifffile.imwrite(path, scene(size=mask.shape), photometric="rgb")
    with pytest.raises(UserError, match=r"a\.tif: label of shape \(75, 76, 3\); save one channel"):
        find_files(data, "train").label(0)
    tifffile.imwrite(path, mask[1:], photometric="minisblack")
    with pytest.raises(UserError, match=r"a\.tif: label of 149x230 pixels .* for an image of 150x230"):
        find_files(data, "train")


def test_check_names_the_damage_of_a_tiled_image(tmp_path: Path) -> None:
    for kind in ("images", "masks"):
        (tmp_path / kind / "train").mkdir(parents=True)
        data = np.random.RandomState(0).randint(0, 2, (64, 64), np.uint8)
        tifffile.imwrite(tmp_path / kind / "train/a.tif", data, tile=(32, 32), compression="zlib")
    image = tmp_path / "images/train/a.tif"
    image.write_bytes(image.read_bytes()[:400])
    data = DataConfig("folder", tmp_path, classes=("a", "b"), channels=1, mean=(0,), std=(1,), tile=32)
    problems = check(data, "train").problems
    assert problems
    assert all("a.tif" in line and "previous exception" not in line for line in problems)
