"""`import potsdam` and `import vaihingen`: tiles, names and labels of MMSegmentation's converters."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from segcore.cli.main import main
from segcore.config.data_sets import CLASS_FILES, DATA_SETS
from segcore.config.schema import DataConfig
from segcore.data.check import check
from segcore.data.isprs import SOURCES, tile_boxes
from segcore.data.labels import read_classes
from segcore.data.layouts import open_dataset

RANDOM = np.random.default_rng(0)
COLORS = np.concatenate([np.zeros((1, 3), np.uint8), read_classes(CLASS_FILES / "isprs.txt")[1]])
POTSDAM = "2_Ortho_RGB/top_potsdam_{}_RGB.tif", "5_Labels_all_noBoundary/top_potsdam_{}_label_noBoundary.tif"
VAIHINGEN = "a/top/top_mosaic_09cm_{}.tif", "b/top_mosaic_09cm_{}_noBoundary.tif"
FILES = {"potsdam": (POTSDAM, "2_10", "7_13"), "vaihingen": (VAIHINGEN, "area1", "area38")}
SIZE = 700, 1024


def write(folder: Path, files: tuple[str, str], area: str, size: tuple[int, int] = SIZE) -> list[np.ndarray]:
    """Write an area's image and colors of classes; return the image and the labels, 0 to 6."""
    columns, rows = (RANDOM.integers(0, 256, (1, side, 3), np.uint8) for side in size[::-1])
    image = columns + rows.transpose(1, 0, 2)  # of little entropy, so that it is written soon
    label = image[..., 0] % 7
    for pattern, array in zip(files, (image, COLORS[label]), strict=True):
        path = folder / pattern.format(area)
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, array, photometric="rgb", rowsperstrip=64)
    return [image, label]


def test_as_many_tiles_as_published() -> None:
    areas = SOURCES["potsdam"].splits
    count = len(tile_boxes(6000, 6000))
    assert tuple(count * len(areas[split]) for split in ("train", "val")) == DATA_SETS["potsdam"].images
    assert tile_boxes(2569, 1919)[-1] == (2569 - 512, 1919 - 512, 2569, 1919), "Vaihingen's area 1"
    assert len(tile_boxes(2569, 1919)) == 24
    for source in SOURCES.values():
        assert not {*source.splits["train"]} & {*source.splits["val"]}


@pytest.mark.parametrize("name", FILES)
def test_tiles_names_and_labels(tmp_path: Path, name: str, capsys) -> None:
    files, *areas = FILES[name]
    arrays = {split: write(tmp_path / "in", files, area) for split, area in zip(("train", "val"), areas, strict=True)}
    (tmp_path / "in/gts_for_participants").mkdir()
    (tmp_path / "in/gts_for_participants/top_mosaic_09cm_area1.tif").touch()  # of the name of an image
    main(None, ["import", name, str(tmp_path / "in"), str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert f"{tmp_path / 'out'}: 4 tiles in train, 4 tiles in val" in said
    assert "note: no files of " in said
    assert said.splitlines()[-1] == f"to check and train: --data.dataset {name} --data.root {tmp_path / 'out'}"
    corners = [(0, 0), (0, 512), (188, 0), (188, 512)]
    for (split, (image, label)), area in zip(arrays.items(), areas, strict=True):
        for kind, array in (("img_dir", image), ("ann_dir", label)):
            found = {path.name: np.array(Image.open(path)) for path in (tmp_path / "out" / kind / split).iterdir()}
            assert found.keys() == {f"{area}_{x}_{y}_{x + 512}_{y + 512}.png" for y, x in corners}
            for y, x in corners:
                tile = found[f"{area}_{x}_{y}_{x + 512}_{y + 512}.png"]
                np.testing.assert_array_equal(tile, array[y : y + 512, x : x + 512])
        data = DataConfig(name, tmp_path / "out")
        report = check(data, split, 6)  # type: ignore[arg-type]
        assert (report.samples, report.problems, report.notes) == (4, [], [])
        np.testing.assert_array_equal(
            open_dataset(data, split).label(0), np.where(label[:512, :512], label[:512, :512] - 1, 255).astype(np.uint8)
        )


def test_other_colors_are_ignored_and_named(tmp_path: Path, capsys) -> None:
    write(tmp_path / "in", POTSDAM, "2_10", (512, 512))
    colors = np.zeros((512, 512, 3), np.uint8)
    colors[:10], colors[10:20] = COLORS[5], (252, 255, 0)
    path = tmp_path / "in" / POTSDAM[1].format("2_10")
    tifffile.imwrite(path, colors, photometric="rgb")
    main(None, ["import", "potsdam", str(tmp_path / "in"), str(tmp_path / "out")])
    assert "note: 2_10: pixels of the colors #fcff00 belong to no class and are ignored" in capsys.readouterr().out
    mask = np.array(Image.open(tmp_path / "out/ann_dir/train/2_10_0_0_512_512.png"))
    assert [np.unique(part).tolist() for part in (mask[:10], mask[10:])] == [[5], [0]]


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300_000])


FAULTS = {
    "no files": (lambda a, b: [a.unlink(), b.unlink()], r"in: has no top_potsdam_\*_RGB.tif; unpack 2_Ortho_RGB.zip"),
    "no image": (lambda a, b: a.unlink(), r"label_noBoundary.tif: there is no top_potsdam_2_10_RGB.tif; unpack"),
    "no label": (lambda a, b: b.unlink(), r"10_RGB.tif: there is no top_potsdam_2_10_label_noBoundary.tif; unpack"),
    "twice": (lambda a, b: (a.parent.parent / a.name).write_bytes(b""), r"RGB.tif: two files of 2_10; remove one"),
    "sizes": (lambda a, b: write(b.parents[1], (POTSDAM[1],) * 2, "2_10", (700, 600)), r"label of 700x600 pixels"),
    "small": (
        lambda a, b: write(a.parents[1], POTSDAM, "2_10", (300, 600)),
        r"RGB.tif: has 300x600 pixels; a tile has 512x512",
    ),
    "damaged": (lambda a, b: damage(b), r"label_noBoundary.tif: cannot be read as an image"),
    "no image file": (lambda a, b: a.write_bytes(b"no TIFF"), r"RGB.tif: cannot be read as an image"),
    "four bands": (
        lambda a, b: tifffile.imwrite(a, np.zeros((*SIZE, 4), np.uint8), photometric="minisblack", planarconfig=1),
        r"RGB.tif: holds uint8 of shape \(512, 512, 4\), but data.channels is 3",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line(tmp_path: Path, capsys, name: str) -> None:
    write(tmp_path / "in", POTSDAM, "2_10")
    FAULTS[name][0](*(tmp_path / "in" / pattern.format("2_10") for pattern in POTSDAM))
    with pytest.raises(SystemExit) as end:
        main(None, ["import", "potsdam", str(tmp_path / "in"), str(tmp_path / "out")])
    out, err = capsys.readouterr()
    [line] = err.splitlines()
    assert (end.value.code, out, [path.name for path in tmp_path.iterdir()]) == (1, "", ["in"])
    assert re.search(FAULTS[name][1], line), line
