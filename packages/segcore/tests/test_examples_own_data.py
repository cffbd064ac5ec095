"""The page "Your own data in ten minutes": every command on it runs, on generated files of the layouts it describes."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segcore.cli.main import main
from segcore.config.registry import experiments, load_experiment, published

savemat = pytest.importorskip("scipy.io").savemat
ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/own_data.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    for line in block.splitlines() * (not language)
    if line.startswith(("ddrnet-seg", "segcore", "python"))
]
SMALL = {
    "train": [
        *("--data.img-scale", "96", "64", "--data.crop", "64", "64", "--evaluate.img-scale", "96", "64"),
        *("--schedule.epochs=1", "--train.batch-size=2", "--train.device-batch-size=2", "--data.workers=0"),
        *("--train.evaluate-every=1", "--device=cpu", "--optimizer.lr=0.001"),
    ],
    "test": ["--device=cpu", "--data.workers=0"],
    "predict": ["--device=cpu"],
    "check": [],
    "import": [],
}
RANDOM = np.random.default_rng(0)


def write(image: Path, mask: Path | None = None, values=(0, 1), size=(64, 96)) -> None:
    """Write a noisy image and a mask of one stripe per value."""
    image.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RANDOM.integers(0, 256, (*size, 3), dtype=np.uint8)).save(image)
    if mask:
        mask.parent.mkdir(parents=True, exist_ok=True)
        stripes = np.repeat(np.array(values, np.uint8), -(-size[1] // len(values)))[: size[1]]
        Image.fromarray(stripes[None].repeat(size[0], 0)).save(mask)


def make_files(folder: Path) -> None:
    """Write what the page's commands read, below `folder`, as small as possible."""
    for split, names in (("train", "abcd"), ("val", "ef")):
        for name in names:
            write(folder / f"data/mine/images/{split}/{name}.jpg", folder / f"data/mine/masks/{split}/{name}.png")
            camvid = folder / "CamVid"
            write(camvid / f"{split}/{name}.png", camvid / f"{split}annot/{name}.png", range(12))
    for name in "abcde":
        membrane = folder / "data/membrane/train"
        write(membrane / f"image/{name}.png", membrane / f"label/{name}.png", (0, 255))
    write(folder / "photos/p.jpg")
    image = {"id": 1, "file_name": "p.jpg", "height": 64, "width": 96}
    drawn = {"id": 1, "image_id": 1, "category_id": 5, "segmentation": [[9, 9, 60, 9, 60, 40]]}
    for name in ("annotations.json", "annotations_val.json"):
        content = {"images": [image], "annotations": [drawn], "categories": [{"id": 5, "name": "crack"}]}
        (folder / name).write_text(json.dumps(content))
    for i in range(6):
        write(folder / f"CrackForest-dataset/image/{i:03d}.jpg")
        truth = np.repeat(np.array([1, 2, 3], np.uint8), 32)[None].repeat(64, 0)
        (folder / "CrackForest-dataset/groundTruth").mkdir(exist_ok=True)
        savemat(folder / f"CrackForest-dataset/groundTruth/{i:03d}.mat", {"groundTruth": {"Segmentation": truth}})
    row = published("ddrnet_23_slim_cityscapes")
    assert row is not None
    assert row.file is not None
    model = load_experiment("ddrnet_23_slim_cityscapes").model.build()
    names = model.key_map()
    (folder / "weights").mkdir()
    torch.save({names[name]: tensor for name, tensor in model.state_dict().items()}, folder / "weights" / row.file)


def test_every_command_of_the_page_runs(tmp_path, monkeypatch, capfd):
    make_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEGCORE_WEIGHTS", str(tmp_path / "weights"))
    assert [words[1] for words in COMMANDS[:4]] == ["check", "train", "test", "predict"]
    for program, *words in COMMANDS:
        if program == "python":
            run = subprocess.run([sys.executable, ROOT / words[0], *words[1:]], capture_output=True, text=True)
            assert run.returncode == 0, run.stderr
            assert "6 photos" in run.stdout
            continue
        main("ddrnet_seg", [*words, *SMALL[words[0]]])
    out = capfd.readouterr().out
    assert "classifier: none kept, 2 of 2 classes new" in out
    assert "loss.class_weight" not in out, "auto is given"
    assert out.count("problems: none") == 8
    assert (tmp_path / "runs/mine/results.json").is_file()
    assert (tmp_path / "results/p.png").is_file()
    assert np.unique(np.array(Image.open(next(Path("data/mine/masks/val").glob("004.png"))))).tolist() == [0, 1]


@pytest.mark.parametrize("part", ["images/train", "masks/train"])
def test_a_wrong_folder_is_one_line(tmp_path, part, capsys):
    make_files(tmp_path)
    (tmp_path / "data/mine" / part).rename(tmp_path / "elsewhere")
    with pytest.raises(SystemExit) as end:
        main("ddrnet_seg", [*COMMANDS[1][1:], *SMALL["train"], f"--data.root={tmp_path / 'data/mine'}"])
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 1
    assert "images/train/*" in line
    assert "data.train_images" in line


OWN = [name for name in experiments() if name.endswith(("_from_scratch", "_fine_tuned"))]


@pytest.mark.parametrize("name", OWN)
def test_configurations_for_own_data(name, tmp_path, monkeypatch):
    """Each one trains on two own classes; a fine-tuned one from weights that fit it."""
    assert f"`{name}`" in PAGE
    make_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    exp = load_experiment(name)
    stage = exp.train.init_from
    assert exp.data.root == Path("data/mine")
    if name.endswith("_from_scratch"):
        assert stage is None or stage == f"runs/{name.replace('_b0_', '_b0_base_')}"
    elif stage.startswith("official:"):
        assert load_experiment(stage.removeprefix("official:")).model == exp.model, "the classes aside, all is kept"
    else:
        assert stage == f"runs/{name.replace('_b0_', '_b0_base_')}"
    words = ["train", name, "--data.classes", "ground", "crack", "--train.init-from=None", "--no-report"]
    main(None, [*words, *SMALL["train"]])
    results = json.loads((tmp_path / "runs" / name / "results.json").read_text())
    assert results["classes"][-2:] == ["ground", "crack"]
    assert results["images"] == 2
