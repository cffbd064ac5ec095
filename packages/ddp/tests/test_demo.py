"""The demo on a few small scenes: its page, whose images are the scored ones, and resuming it."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from segcore.checkpoints.run_checkpoint import newest
from segcore.cli.main import main
from segcore.config.schema import DataConfig
from segcore.data.layouts import open_dataset
from segcore.demo.toy import generate
from segcore.evaluation.metrics import ConfusionMatrix

SMALL = [
    "--device=cpu", "--model.width=32", "--model.decoder-layers=1", "--schedule.iterations=3", "--train.save-every=1",
    "--data.crop", "64", "128", "--data.img-scale", "128", "64", "--evaluate.img-scale", "128", "64",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    generate(folder / "scenes", train=3, val=2, height=64, width=128)
    main("ddp_seg", ["demo", f"--work-dir={folder}", *SMALL])
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "run" / "report.html").read_text(encoding="utf-8")


def test_the_page_shows_everything_and_needs_no_other_file(folder, page):
    assert "mIoU at 3 steps: " in page
    assert re.search(r"linear classifier on color and position \(quadratic terms\): \d+\.\d%; ratio \d+\.\d\d", page)
    assert "Training loss" in page
    for caption in ("photo", "overlay", "errors", "ground truth", "prediction", "confidence", "step 1", "step 2"):
        assert page.count(f"<figcaption>{caption}</figcaption>") == 2, "once per image"
    assert "step 3" not in page, "it is the prediction"
    for entry in ("1 step", "3 steps", "10 steps", "road", "bicycle"):
        assert entry in page
    assert page.index(">1 step<") < page.index(">3 steps<") < page.index(">10 steps<")
    sources = re.findall(r'(?:src|href)="([^"]{0,12})', page)
    assert {source for source in sources if not source.startswith("#")} == {"data:image/p", "data:image/j"}
    assert len(list(folder.glob("panels_*.png"))) == 2
    figures = json.loads((folder / "figures.json").read_text())
    assert f"mIoU at 3 steps: {figures['mIoU']:.1%}; " in page
    assert 0 <= figures["uncertainty_AUROC"] <= 1
    assert f"AUROC of {figures['uncertainty_AUROC']:.3f}" in page


def index_of(image, colors):
    """Return (H, W): the index of each pixel's color in `colors` (K, 3), 255 for any other color."""
    equal = (image[:, :, None] == np.asarray(colors)).all(-1)
    return np.where(equal.any(-1), equal.argmax(-1), 255)


def test_the_page_shows_the_scored_images(folder, page):
    """The page shows all validation images, so its maps must give its figures."""
    val = open_dataset(DataConfig("toy", folder / "scenes"), "val")
    names = [val.name(i) for i in range(len(val))]
    figures = json.loads((folder / "figures.json").read_text())
    run = json.loads((folder / "run" / "results.json").read_text())
    found = re.findall(r'<img src="data:image/png;base64,([^"]*)"[^>]* alt="([^:]*): ([^"]*)">', page)
    maps = {(caption, name): np.array(Image.open(io.BytesIO(base64.b64decode(data)))) for data, caption, name in found}
    matrix = ConfusionMatrix(19)
    for i, name in enumerate(names):
        label = index_of(maps["Ground truth", name], val.palette)
        np.testing.assert_array_equal(label, val.label(i))
        matrix.update(index_of(maps["Prediction", name], val.palette), label)
    # bf16 rounds differently in batches of another size
    assert matrix.compute()["mIoU"] == pytest.approx(figures["mIoU"], abs=1e-3)
    assert figures["mIoU"] == run["entries"]["3"]["mIoU"]


def test_the_demo_resumes(folder, capsys):
    weights = newest(folder / "run") / "model.safetensors"
    before = weights.stat().st_mtime_ns
    main("ddp_seg", ["demo", f"--work-dir={folder}", *SMALL])
    assert weights.stat().st_mtime_ns == before, "it trained again"
    assert "iter_3: already finished" in capsys.readouterr().out
