"""The demo on a handful of small scenes: what it writes, and that it goes on where it was."""

import json
import re

import pytest

from segcore.checkpoints.run_checkpoint import newest
from segcore.cli.main import main
from segcore.demo.toy import generate

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
    for caption in ("input", "truth", "step 3", "prediction", "uncertainty", "wrong pixels"):
        assert f"<figcaption>{caption}</figcaption>" in page
    for entry in ("1 step", "3 steps", "10 steps", "road", "bicycle"):
        assert entry in page
    assert page.index("<td>1 step<") < page.index("<td>3 steps<") < page.index("<td>10 steps<")
    sources = re.findall(r'(?:src|href)="([^"]{0,20})', page)
    assert sources
    assert all(source.startswith("data:image/png;base64,"[:20]) for source in sources)
    assert len(list(folder.glob("picture_*.png"))) == 2
    figures = json.loads((folder / "figures.json").read_text())
    assert f"mIoU at 3 steps: {figures['mIoU']:.1%}; " in page
    assert 0 <= figures["uncertainty_AUROC"] <= 1
    assert f"AUROC of {figures['uncertainty_AUROC']:.3f}" in page
    assert "from 0 (black) to 1 (yellow)" in page


def test_started_again_it_goes_on(folder, capsys):
    weights = newest(folder / "run") / "model.safetensors"
    before = weights.stat().st_mtime_ns
    main("ddp_seg", ["demo", f"--work-dir={folder}", *SMALL])
    assert weights.stat().st_mtime_ns == before, "it trained again"
    assert "iter_3: already finished" in capsys.readouterr().out
