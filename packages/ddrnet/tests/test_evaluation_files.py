"""What `test` and `predict` write for others: figures of every image, masks, and the files of benchmark servers."""

import copy
import csv
import json
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import segcore
from segcore.checkpoints import run_checkpoint
from segcore.cli.main import main
from segcore.config.record import describe
from segcore.data.layouts import cityscapes
from segcore.demo.toy import generate
from segcore.evaluation.metrics import ConfusionMatrix
from segcore.testing.commands import refused

PAGE = Path(__file__).parents[3] / "docs/results.md"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    generate(root, train=2, val=3, height=64, width=128)
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with random weights."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    exp = segcore.load_experiment("ddrnet_23_slim_toy").with_overrides(["evaluate.img_scale=128 64", "data.workers=0"])
    torch.manual_seed(0)
    checkpoint = run_checkpoint.folder_of(folder, 1)
    run_checkpoint.save(checkpoint, exp.model.build().state_dict(), {}, describe(exp))
    shutil.copy(checkpoint / "experiment.json", folder)
    return folder


@pytest.fixture(scope="module")
def tested(run, toy, tmp_path_factory):
    """The folder that `test` wrote its files into."""
    folder = tmp_path_factory.mktemp("tested")
    words = [f"--json={folder / 'test.json'}", f"--per-image={folder / 'images.csv'}", "--calibration"]
    words += [f"--save={folder / 'masks'}", "--label-ids", f"--zip={folder / 'upload.zip'}"]
    main("ddrnet_seg", ["test", str(run), f"--data.root={toy}", "--device=cpu", *words])
    return folder


def test_masks_give_the_figures(tested, toy):
    """Read back, they give the confusion matrix, the metrics and each image's row."""
    stored = json.loads((tested / "test.json").read_text())
    total, rows = ConfusionMatrix(19), list(csv.DictReader((tested / "images.csv").open()))
    assert [row["name"] for row in rows] == [f"toytown/toytown_{i:06}_000000_leftImg8bit" for i in range(3)]
    for row in rows:
        mask = Image.open(tested / "masks" / f"{row['name']}.png")
        assert (mask.mode, [*mask.size]) == ("P", [int(row["width"]), int(row["height"])])
        label = row["name"].replace("leftImg8bit", "gtFine_labelTrainIds.png")
        own = ConfusionMatrix(19).update(np.array(mask), cv2.imread(str(toy / "gtFine/val" / label), -1))
        total.merge(own)
        found = own.compute()
        assert int(row["pixels"]) == own.matrix.sum()
        assert (float(row["mIoU"]), float(row["aAcc"])) == (found["mIoU"], found["aAcc"])
        for name, value in zip(stored["classes"], found["IoU"].float().numpy(), strict=True):
            assert row[f"IoU {name}"] == ("" if np.isnan(value) else str(value))
    assert "steps" not in rows[0]
    assert stored["confusion"] == {"final": total.matrix[:19, :19].tolist()}
    assert (tested / "test.report.html").is_file()
    assert stored["entries"]["final"]["mIoU"] == total.compute()["mIoU"]
    assert sum(stored["calibration"]["counts"]) == total.matrix.sum()
    assert 0 < stored["calibration"]["ece"] < 1
    classes = json.loads((tested / "masks" / "classes.json").read_text())
    assert classes[13] == {"value": 13, "name": "car", "color": [0, 0, 142]}


def test_files_for_the_server(tested, run, toy, tmp_path):
    """Raw ids under the server's names; `predict` writes the same."""
    folder = tested / "masks" / "label_ids"
    names = [f"toytown/toytown_{i:06}_000000_pred_labelIds.png" for i in range(3)]
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png")) == names
    with zipfile.ZipFile(tested / "upload.zip") as archive:
        assert sorted(archive.namelist()) == names
        assert archive.read(names[0]) == (folder / names[0]).read_bytes()
    mask = np.array(Image.open(tested / "masks" / names[0].replace("pred_labelIds", "leftImg8bit")))
    written = Image.open(folder / names[0])
    assert written.mode == "L"
    assert np.array_equal(np.array(written), np.take(cityscapes.RAW_IDS, mask))
    out, archive = tmp_path / "out", tmp_path / "out.zip"
    words = ["predict", run, toy / "leftImg8bit/val", out, "--label-ids", "--zip", archive, "--device=cpu"]
    main("ddrnet_seg", [str(word) for word in words])
    for name in names:
        assert (out / "label_ids" / name).read_bytes() == (folder / name).read_bytes()
    assert zipfile.ZipFile(archive).namelist() == names
    single = tmp_path / "single" / "a.png"
    image = toy / "leftImg8bit/val" / names[0].replace("pred_labelIds", "leftImg8bit")
    main("ddrnet_seg", ["predict", str(run), str(image), str(single), "--label-ids", "--device=cpu"])
    assert (single.parent / "label_ids" / image.name.replace("leftImg8bit", "pred_labelIds")).is_file()


@pytest.mark.oracle
def test_cityscapes_scripts_find_the_same(tested, toy):
    """The official evaluation, of the files for the server."""
    official = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    settings = official.args
    settings.evalInstLevelScore, settings.JSONOutput, settings.quiet = False, False, True
    settings.predictionPath = str(tested / "masks" / "label_ids")
    labels = sorted(map(str, (toy / "gtFine/val").rglob("*_gtFine_labelIds.png")))
    predictions = [official.getPrediction(settings, label) for label in labels]
    scores = official.evaluateImgLists(predictions, labels, settings)["classScores"]
    stored = json.loads((tested / "test.json").read_text())
    ours = [np.nan if value is None else value for value in stored["entries"]["final"]["IoU"]]
    assert max(value for value in ours if value == value) > 0
    np.testing.assert_allclose([scores[name] for name in stored["classes"]], ours, rtol=1e-12)


def test_another_evaluation_has_another_file(run, toy):
    words = ["test", str(run), f"--data.root={toy}", "--device=cpu", "--limit=1"]
    main("ddrnet_seg", words)
    main("ddrnet_seg", [*words, "--multi-scale"])
    main("ddrnet_seg", [*words[:-1], "--ensemble", str(run)])
    names = {path.name for path in run.glob("test*.json")}
    assert names == {"test.limit_1.json", "test.multi_scale.limit_1.json", "test.ensemble.json"}


def test_a_model_knows_the_settings_of_those_that_it_is_averaged_with(run):
    other = segcore.load_model(run, device="cpu")
    both = segcore.load_model(run, device="cpu", ensemble=[other])
    assert both.ensemble == (other.experiment,)
    with pytest.raises(ValueError, match="is an ensemble itself; give its models one by one"):
        segcore.load_model(run, device="cpu", ensemble=[both])
    elsewhere = replace(other, predictor=replace(other.predictor, model=copy.deepcopy(other.model).to("meta")))
    with pytest.raises(ValueError, match="is on meta, the model on cpu"):
        segcore.load_model(run, device="cpu", ensemble=[elsewhere])


def test_the_test_split(run, toy, tmp_path, capsys):
    """Masks and nothing else; a Cityscapes set has one, the toy set none."""
    words = ["test", run, "--data.dataset=cityscapes", f"--data.root={tmp_path}", "--device=cpu", "--split=test"]
    assert "--split test writes masks; add --save FOLDER" in refused("ddrnet_seg", *words)
    words.append(f"--save={tmp_path / 'out'}")
    assert "--calibration needs labels" in refused("ddrnet_seg", *words, "--calibration")
    assert "leftImg8bit/test: no such folder" in refused("ddrnet_seg", *words)
    (tmp_path / "leftImg8bit").mkdir()
    (tmp_path / "leftImg8bit/test").symlink_to(toy / "leftImg8bit/val")
    before = {path.name for path in run.iterdir()}
    main("ddrnet_seg", [str(word) for word in (*words, "--label-ids", f"--zip={tmp_path / 'upload.zip'}")])
    assert f"3 masks written below {tmp_path / 'out'}\n{tmp_path / 'upload.zip'}\n" in capsys.readouterr().out
    assert len(list((tmp_path / "out/label_ids/toytown").iterdir())) == 3
    assert {path.name for path in run.iterdir()} == before
    here = tmp_path / "leftImg8bit/test"
    assert "would overwrite this file of the data set" in refused("ddrnet_seg", *words[:-1], f"--save={here}")
    no_split = ["test", run, f"--data.root={toy}", "--split=test", f"--save={tmp_path / 'out'}", "--device=cpu"]
    assert "data.dataset toy has no test split known here; run `predict`" in refused("ddrnet_seg", *no_split)


def test_files_of_the_user_are_not_overwritten_by_figures(run, toy, tmp_path):
    words = ["test", run, f"--data.root={toy}", "--device=cpu", f"--save={tmp_path / 'out'}"]
    for option, suffix in (("json", ".json"), ("per-image", ".csv"), ("zip", ".zip")):
        line = refused("ddrnet_seg", *words, f"--{option}={tmp_path / 'mine.png'}")
        assert line == f"error: --{option} {tmp_path / 'mine.png'}: does not end in {suffix}; name a file that does"
    before = (run / "experiment.json").read_bytes()
    assert "would overwrite what this command reads" in refused(
        "ddrnet_seg", *words, f"--json={run / 'experiment.json'}"
    )
    assert (run / "experiment.json").read_bytes() == before
    assert not list(tmp_path.iterdir())


def test_a_list_of_someone_else_is_refused_before_the_evaluation(run, toy, tmp_path):
    (tmp_path / "classes.json").write_text('{"mine": 1}')
    line = refused("ddrnet_seg", "test", run, f"--data.root={toy}", "--device=cpu", "--limit=1", f"--save={tmp_path}")
    assert "classes.json: is no list of classes and would be overwritten" in line
    assert [path.name for path in tmp_path.iterdir()] == ["classes.json"]


def test_sets_without_a_server_are_refused(run, toy, tmp_path):
    words = [run, "--device=cpu", "--label-ids"]
    line = "these sets have one: cityscapes, toy, ade20k, loveda, voc2012, voc2012_aug"
    own = ["--data.classes", *map(str, range(19))]
    other = ["--data.dataset=bdd100k", f"--data.root={toy}"]
    assert line in refused("ddrnet_seg", "test", *words, *other, f"--save={tmp_path / 'out'}")
    assert line in refused("ddrnet_seg", "predict", run, toy, tmp_path / "out", *words[1:], "--data.dataset=bdd100k")
    named = refused("ddrnet_seg", "predict", run, toy, tmp_path / "out", *words[1:], "--data.dataset=voc2012", *own)
    assert "data.dataset voc2012 has other classes than its benchmark" in named
    assert "--label-ids writes masks; add --save FOLDER" in refused("ddrnet_seg", "test", *words, f"--data.root={toy}")
    assert not (tmp_path / "out").exists()


def test_the_commands_and_snippets_of_the_page_on_results(run, toy, tmp_path, monkeypatch, capsys):
    shutil.copytree(run, tmp_path / "runs/toy")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/toy").symlink_to(toy)
    monkeypatch.chdir(tmp_path)
    for language, code in re.findall(r"```(python|)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        if language:
            exec(compile(code, PAGE.name, "exec"), {})
            continue
        for line in code.splitlines():
            _, command, *words = line.split()
            if command != "train":
                main("ddrnet_seg", [command, *words, "--device=cpu"])
    shown = capsys.readouterr().out
    assert re.search(r"\n\d+% of [a-z ]+ is taken for [a-z ]+\ntoytown/", shown)
    assert "expected calibration error: " in shown
    assert zipfile.ZipFile("upload.zip").namelist() == [
        f"toytown/toytown_{i:06}_000000_pred_labelIds.png" for i in range(3)
    ]
