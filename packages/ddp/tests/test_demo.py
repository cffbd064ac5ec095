"""The demo on a few small scenes: its page, whose images are the scored ones, and resuming it."""

import base64
import io
import json
import re
import shutil
import subprocess

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from segcore.checkpoints.run_checkpoint import newest
from segcore.cli.main import main
from segcore.config.schema import DataConfig
from segcore.data.layouts import open_dataset
from segcore.demo.toy import generate
from segcore.evaluation.metrics import ConfusionMatrix
from segcore.evaluation.uncertainty import AUROC

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


def test_the_page_shows_everything_and_needs_no_other_file(folder):
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert "mIoU at 3 steps: " in page
    assert re.search(r"linear classifier on color and position \(quadratic terms\): \d+\.\d%; ratio \d+\.\d\d", page)
    assert "Training loss" in page
    assert page.count("<figcaption>step 1</figcaption>") == 2, "one strip per image"
    for caption in ("image", "ground truth", "step 3", "prediction", "uncertainty", "wrong pixels"):
        assert f"<figcaption>{caption}</figcaption>" in page
    for entry in ("1 step", "3 steps", "10 steps", "road", "bicycle"):
        assert entry in page
    assert page.index("<td>1 step<") < page.index("<td>3 steps<") < page.index("<td>10 steps<")
    sources = re.findall(r'(?:src|href)="([^"]{0,20})', page)
    assert sources
    assert all(source.startswith("data:image/png;base64,"[:20]) for source in sources)
    assert len(list(folder.glob("panels_*.png"))) == 2
    figures = json.loads((folder / "figures.json").read_text())
    assert f"mIoU at 3 steps: {figures['mIoU']:.1%}; " in page
    assert 0 <= figures["uncertainty_AUROC"] <= 1
    assert f"AUROC of {figures['uncertainty_AUROC']:.3f}" in page
    assert "Uncertainty is the probability of" in page


@pytest.fixture(scope="module")
def shown(folder):
    """The panels on the page by caption, a list of images (H, W, 3) each."""
    page = (folder / "index.html").read_text(encoding="utf-8")
    found: dict[str, list[np.ndarray]] = {}
    for data, caption in re.findall(r'<img src="data:image/png;base64,([^"]*)" alt="([^"]*)"><figcaption>', page):
        found.setdefault(caption, []).append(np.array(Image.open(io.BytesIO(base64.b64decode(data)))))
    return found


def index_of(image, colors):
    """Return (H, W): the index of each pixel's color in `colors` (K, 3), 255 for any other color."""
    equal = (image[:, :, None] == np.asarray(colors)).all(-1)
    return np.where(equal.any(-1), equal.argmax(-1), 255)


def test_the_page_shows_the_scored_images(folder, shown):
    """The page shows all validation images, so its panels must give its figures."""
    val = open_dataset(DataConfig("toy", folder / "scenes"), "val")
    figures = json.loads((folder / "figures.json").read_text())
    run = json.loads((folder / "run" / "results.json").read_text())
    matrix, area = ConfusionMatrix(19), AUROC()
    inferno = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_INFERNO)[:, 0, ::-1]
    for i in range(len(val)):
        image, label = val.pair(i)
        np.testing.assert_array_equal(shown["image"][i], image)
        np.testing.assert_array_equal(index_of(shown["ground truth"][i], val.palette), label)
        prediction = index_of(shown["prediction"][i], val.palette)
        matrix.update(prediction, label)
        wrong = index_of(shown["wrong pixels"][i], inferno[[0, 255]])
        np.testing.assert_array_equal(wrong, (prediction != label) & (label != 255))
        uncertainty = index_of(shown["uncertainty"][i], inferno) / 255
        area.update(torch.from_numpy(uncertainty), torch.from_numpy(prediction), torch.from_numpy(label))
        final_step = index_of(shown["step 3"][i], val.palette)
        assert (final_step == prediction).mean() > 0.999, "bf16 rounds differently in batches of another size"
    assert matrix.compute()["mIoU"] == figures["mIoU"] == run["entries"]["3"]["mIoU"]
    assert matrix.compute()["aAcc"] == run["entries"]["3"]["aAcc"]
    assert area.compute() == pytest.approx(figures["uncertainty_AUROC"], abs=5e-3)  # the page has 256 levels


def test_a_browser_shows_every_image_and_a_narrow_window_needs_no_scrolling(folder, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on the path")
    found = (
        "images: [...document.images].map(image => image.complete && image.naturalWidth > 0), "
        "width: innerWidth, content: document.documentElement.scrollWidth"
    )
    script = f"<script>onload = () => document.body.replaceChildren(JSON.stringify({{{found}}}))</script>"
    page = tmp_path / "page.html"
    page.write_text((folder / "index.html").read_text(encoding="utf-8") + script, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [browser, *options, "--window-size=500,900", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    answer = json.loads(re.search(r'\{"images.*?\}', done.stdout)[0])
    assert answer["images"] == [True] * (2 * 8 + 1)
    assert answer["content"] <= answer["width"]


def test_the_demo_resumes(folder, capsys):
    weights = newest(folder / "run") / "model.safetensors"
    before = weights.stat().st_mtime_ns
    main("ddp_seg", ["demo", f"--work-dir={folder}", *SMALL])
    assert weights.stat().st_mtime_ns == before, "it trained again"
    assert "iter_3: already finished" in capsys.readouterr().out
