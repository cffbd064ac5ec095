"""A trained model from Python: the README's example, every kind of image, and the contents of a run's folder."""

import json
import re
import shlex
import shutil
import socket
from contextlib import suppress
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import segcore
from ddrnet_seg.configs import DDRNetConfig
from segcore.checkpoints import run_checkpoint
from segcore.cli.main import COMMANDS, main
from segcore.config.record import ConfigDiff, describe
from segcore.config.schema import Experiment
from segcore.data.images import read_image, read_label

README = Path(__file__).parents[3] / "README.md"


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "street.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with a checkpoint: the toy model at the images' own size, with other classes."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    changes = ["evaluate.img_scale=None", "data.dataset=folder", "data.classes=road sky 'a car'", "model.num_classes=3"]
    exp = segcore.load_experiment("ddrnet_23_slim_toy").with_overrides(changes)
    torch.manual_seed(0)
    checkpoint = run_checkpoint.folder_of(folder, 1)
    run_checkpoint.save(checkpoint, exp.model.build().state_dict(), {}, describe(exp))
    shutil.copy(checkpoint / "experiment.json", folder)
    return folder


@pytest.fixture(scope="module")
def seg(run):
    return segcore.load_model(run, device="cpu")


def test_the_readme_example(official, photo, tmp_path, monkeypatch, capsys):
    """With a filled checkpoint under the official name, so that nothing is downloaded."""
    (code,) = re.findall(r"```python\n(import segcore\n.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    torch.save(official("ddrnet_23_slim"), tmp_path / "DDRNet23s_cityscapes.pth")
    shutil.copy(photo, tmp_path)
    monkeypatch.setenv("SEGCORE_WEIGHTS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert "(70, 90)" in capsys.readouterr().out
    assert read_label("results/street.png").shape == (70, 90)
    assert read_image("results/street_overlay.png").shape == (70, 90, 3)
    assert read_image("overlay.png").shape[0] > 70, "no legend"


def test_the_commands_and_snippets_of_the_page_on_predictions(run, photo, tmp_path, monkeypatch, capsys):
    """With a small run in place of the official weights."""
    pytest.importorskip("rasterio")
    page = (README.parent / "docs" / "predictions.md").read_text(encoding="utf-8")
    page = page.replace("ddrnet_23_slim_cityscapes official", str(run))
    page = page.replace('"ddrnet_23_slim_cityscapes", "official"', repr(str(run)))
    shutil.copy(photo, tmp_path)
    Image.open(photo).save(tmp_path / "scene.tif")
    monkeypatch.chdir(tmp_path)
    for language, code in re.findall(r"```(python|)\n(.*?)```", page, re.DOTALL):
        if language:
            scope: dict[str, Any] = {}
            exec(compile(code, "predictions.md", "exec"), scope)
            if "mask" in scope:
                agreeing = scope["mask"] == read_label("results/street.png")
                assert agreeing.mean() > 0.99
        else:
            main("ddrnet_seg", shlex.split(code)[1:])
            written = {path.name: path.read_bytes() for path in Path("results").iterdir()}
    assert written == {path.name: path.read_bytes() for path in Path("results").iterdir()}, "not those of Python"
    assert "street_probabilities.npz" in written
    for image in re.findall(r"\((images/.*?)\)", page):
        assert 0 < (README.parent / "docs" / image).stat().st_size < 60_000
    assert "are unsure" in capsys.readouterr().out


def test_every_kind_of_image_gives_the_same_result(seg, photo):
    image = read_image(photo)
    kinds = [photo, str(photo), Image.fromarray(image), image, torch.from_numpy(image).permute(2, 0, 1)]
    results = seg(kinds)
    assert [result.name for result in results] == ["street", "street", "image_2", "image_3", "image_4"]
    for result in results:
        assert np.array_equal(result.classes, seg(photo).classes)
    first = results[0]
    assert (first.classes.dtype, first.classes.shape) == (np.uint8, (70, 90))
    assert (first.probabilities.dtype, first.probabilities.shape) == (np.float32, (3, 70, 90))
    assert np.array_equal(first.probabilities.argmax(0), first.classes)
    assert np.array_equal(first.confidence, first.probabilities.max(0))
    assert seg.class_names == ("road", "sky", "a car")
    assert seg.palette.shape == (3, 3)
    assert seg.experiment.evaluate.img_scale is None
    assert not seg.model.training
    assert first.overlay().size == (90, 70)


def test_a_pil_image_is_turned_by_its_exif_tag_as_its_file_is(seg, photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.open(photo).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    first, second = seg([tmp_path / "turned.jpg", Image.open(tmp_path / "turned.jpg")])
    assert np.array_equal(first.classes, second.classes)
    assert first.classes.shape == (90, 70)


def test_the_command_line_writes_the_same(seg, run, photo, tmp_path):
    main("ddrnet_seg", ["predict", str(run), str(photo), str(tmp_path / "cli"), "--device=cpu"])
    for path in seg(photo).save(tmp_path / "python"):
        assert path.read_bytes() == (tmp_path / "cli" / path.name).read_bytes()


@pytest.mark.parametrize(
    "image",
    [
        *(np.zeros((4, 4)), np.zeros((70, 90, 4), np.uint8), torch.zeros(70, 90, 3, dtype=torch.uint8), "none.png"),
        *(Image.new("I;16", (90, 70)), Image.new("F", (90, 70)), 5, None, {"a": 1}, [["a.png"]]),
    ],
)
def test_a_non_image_is_refused(seg, image):
    with pytest.raises(ValueError, match=r"give an array \(H, W, 3\)|give a path|none\.png") as caught:
        seg(image)
    assert "\n" not in str(caught.value)


def test_missing_weights_and_devices(run):
    with pytest.raises(ValueError, match=r"which weights\? give `official` .* run folder"):
        segcore.load_model("ddrnet_23_slim_cityscapes")
    with pytest.raises(ValueError, match="device nonsense is not available"):
        segcore.load_model(run, device="nonsense")
    with pytest.raises(ValueError, match=r"iter_1: was trained with .*num-classes 3.*; give this folder as CONFIG"):
        segcore.load_model("ddrnet_23_slim_toy", run)


def test_a_checkpoint_folder_is_enough_and_options_apply_on_top(run, photo, tmp_path, monkeypatch, capsys):
    checkpoint = run_checkpoint.folder_of(run, 1)
    assert segcore.load_model(checkpoint).experiment.model == DDRNetConfig(num_classes=3, **toy_settings())
    words = ["predict", str(checkpoint), str(photo), str(tmp_path / "out"), "--device=cpu"]
    main("ddrnet_seg", [*words, "--evaluate.img-scale", "180", "140"])
    assert read_label(tmp_path / "out" / "street.png").shape == (70, 90)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main("ddrnet_seg", ["test", "ddrnet_23_slim_toy"])
    assert "missing: CHECKPOINT" in capsys.readouterr().err
    shutil.copytree(run, tmp_path / "runs" / "ddrnet_23_slim_toy")
    with pytest.raises(SystemExit):
        main("ddrnet_seg", ["test", "ddrnet_23_slim_toy", "--device=cpu"])
    assert "model.num_classes" not in (said := capsys.readouterr().err)
    assert "no such folder; set data.root" in said, "the run's own data set was not asked for"


def toy_settings():
    model = segcore.load_experiment("ddrnet_23_slim_toy").model
    return {name: value for name, value in vars(model).items() if name != "num_classes"}


HOSTILE = "from pathlib import Path\nPath({marker!r}).touch()\nraise SystemExit('imported')\n"


@pytest.fixture
def taken_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


TEXTS = {"name": "my.py:mine", "dataset": "my.py:data"}
"""They are read, as texts."""


@pytest.mark.parametrize(
    "stored",
    [
        {"model": "segcore_config_my:Net"},
        {"model": "my:Net"},
        {"model": "os:system"},
        {"model": "segcore.config.registry:load_experiment"},
        {"model": "ddrnet_seg.model:DDRNet"},
        TEXTS,
        {"name": "../../my"},
        {"name": ".."},
        {"name": "two\nlines"},
        {"dataset": 3},
        {"extra": 1},
        {},
    ],
    ids=str,
)
def test_nothing_stored_executes(stored, run, photo, tmp_path, monkeypatch, capsys, taken_port):
    """A run's folder with a code file next to it: the commands and Python read the run and never import that file."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    for place in (folder, tmp_path):
        (place / "my.py").write_text(HOSTILE.format(marker=str(tmp_path / "imported")))
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    path = Path("experiment.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    settings = record["experiment"]
    settings["model"]["class"] = stored.get("model", settings["model"]["class"])
    settings["data"]["dataset"] = stored.get("dataset", settings["data"]["dataset"])
    settings["name"] = stored.get("name", settings["name"])
    settings |= {"extra": 1} if "extra" in stored else {}
    path.write_text(json.dumps(record), encoding="utf-8")
    weights = run_checkpoint.read_model_state(run_checkpoint.folder_of(run, 1))
    run_checkpoint.save(run_checkpoint.folder_of(folder, 1), weights, {}, record)
    more = {"predict": [str(photo), str(tmp_path / "out")], "export": [str(tmp_path / "model.pt2"), "--size=64x64"]}
    more |= {"bench": ["--sizes=64x64", "--repeats=1", "--warmup=1"], "train": ["--work-dir", str(tmp_path / "work")]}
    more |= {"push": ["me/model", "--dry-run", str(tmp_path / "shared")]}
    more |= {"web": ["--port", str(taken_port)]}  # else it would wait for visitors
    refused = bool(stored) and stored != TEXTS
    with suppress(SystemExit):
        main("ddrnet_seg", ["report", str(Path())])  # shows what it can
    capsys.readouterr()
    none = {
        "demo",
        "env",
        "convert",
        "import coco",
        "import potsdam",
        "import vaihingen",
        "import-config",
    }  # read no run
    for command in sorted(set(COMMANDS) - none - {"report"}):
        for source in (Path(), run_checkpoint.folder_of(folder, 1)):
            with suppress(SystemExit):
                main("ddrnet_seg", [command, str(source), *more.get(command, [])])
                assert not refused
            said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
            assert len(said) == 1 if refused else len(said) <= 1
            assert not refused or "experiment.json: " in said[0]
    if refused:
        with pytest.raises(ValueError, match=r"experiment\.json: "):
            segcore.load_model(folder, device="cpu")
    else:
        segcore.load_model(folder, device="cpu")(photo)
    assert not (tmp_path / "imported").exists()


def test_a_stored_run_does_not_choose_where_files_are_generated(run, tmp_path, capsys):
    exp = segcore.load_experiment(str(run)).with_overrides([f"data.root={tmp_path / 'scenes'}"])
    exp = replace(exp, data=replace(exp.data, dataset="toy", classes=()), model=replace(exp.model, num_classes=19))
    checkpoint = run_checkpoint.folder_of(tmp_path / "run", 1)
    run_checkpoint.save(checkpoint, exp.model.build().state_dict(), {}, describe(exp))
    for words in (["test", checkpoint], ["train", checkpoint, "--work-dir", tmp_path / "work"]):
        with pytest.raises(SystemExit):
            main("ddrnet_seg", [str(word) for word in words])
        assert "scenes: no such folder" in capsys.readouterr().err
    assert not (tmp_path / "scenes").exists()


def test_training_from_a_checkpoint_resumes_its_run(run):
    exp, checkpoint = segcore.load_experiment(str(run)), run_checkpoint.folder_of(run, 1)
    assert COMMANDS["train"](exp, folder=checkpoint).run_dir == run
    assert COMMANDS["train"](exp, folder=run).run_dir == run
    assert COMMANDS["train"](exp).run_dir == Path("runs") / exp.name


def test_incomplete_records_of_weights_compare_as_unknown(run, tmp_path):
    for text in ('{"experiment": {"name": "a"}}', '{"experiment": 3}', "[]", '{"experiment": {"model": []}}'):
        (tmp_path / "experiment.json").write_text(text)
        assert ConfigDiff.of(tmp_path, segcore.load_experiment(str(run))) == ConfigDiff()


def test_a_setting_that_weights_were_stored_without_had_its_default(run, tmp_path):
    exp = segcore.load_experiment(str(run))
    record = describe(exp)
    for section, setting in (("model", "align_corners"), ("data", "bit_depth")):
        del record["experiment"][section][setting]
    (tmp_path / "experiment.json").write_text(json.dumps(record))
    assert ConfigDiff.of(tmp_path, exp) == ConfigDiff()
    exp = replace(exp, model=replace(exp.model, align_corners=True))
    exp = replace(exp, data=replace(exp.data, bit_depth=16, mean=(9.0,) * 3, photometric=False))
    options = ConfigDiff.of(tmp_path, exp).options
    assert "--model.align-corners False" in options
    assert "--data.bit-depth 8" in options


def test_a_published_configuration_on_own_data(tmp_path, capsys):
    """The first of the README's commands for own data: its class weights are for training, and of the other classes."""
    for split in ("train", "val"):
        for folder, array in (("images", np.zeros((64, 64, 3), np.uint8)), ("masks", np.eye(64, dtype=np.uint8))):
            (tmp_path / folder / split).mkdir(parents=True)
            Image.fromarray(array).save(tmp_path / folder / split / "a.png")
    own = ["--data.dataset", "folder", "--data.root", str(tmp_path), "--data.classes", "road", "water"]
    main("ddrnet_seg", ["check", "ddrnet_23_slim_cityscapes", *own, "--model.num-classes", "2"])
    assert "water" in capsys.readouterr().out


def test_a_model_defined_in_a_user_file_names_that_file(run, tmp_path):
    (tmp_path / "my.py").write_text(
        "from dataclasses import dataclass, replace\nfrom ddrnet_seg.configs import DDRNetConfig\nimport segcore\n\n"
        "@dataclass(frozen=True)\nclass Mine(DDRNetConfig):\n    pass\n\n"
        f"def mine():\n    exp = segcore.load_experiment({str(run)!r})\n"
        "    return replace(exp, name='mine', model=Mine(**vars(exp.model)))\n"
    )
    exp = segcore.load_experiment(f"{tmp_path / 'my.py'}:mine")
    checkpoint = run_checkpoint.folder_of(tmp_path / "run", 1)
    run_checkpoint.save(checkpoint, exp.model.build().state_dict(), {}, describe(exp))
    with pytest.raises(ValueError, match=r"model Mine is defined in .* `my\.py:FUNCTION ") as caught:
        segcore.load_model(checkpoint)
    assert "\n" not in str(caught.value)
    assert segcore.load_model(f"{tmp_path / 'my.py'}:mine", checkpoint).experiment.name == "mine"


DAMAGED = ["", "{", "[]", '{"experiment": 3}', '{"experiment": {"name": "x"}}', "\udcff", 100_000 * '{"experiment":']


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_record_gives_a_one_line_error(run, tmp_path, text):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "experiment.json").write_bytes(text.encode(errors="surrogateescape"))
    copy = run_checkpoint.folder_of(tmp_path / "run", 1)
    remedy = f"give {copy}, whose copy is intact, or name the configuration instead"
    with pytest.raises(ValueError, match=rf"run/experiment\.json: damaged \(.*\); {remedy}$") as caught:
        segcore.load_model(tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert segcore.load_experiment(copy).name == segcore.load_experiment(run).name
    (copy / "experiment.json").write_bytes(text.encode(errors="surrogateescape"))
    for folder in (tmp_path / "run", copy):
        with pytest.raises(ValueError, match=r"experiment\.json: damaged \(.*\); name the configuration instead$"):
            segcore.load_experiment(folder)


def paths_of(value, path=()):
    """Yield the path of every value in plain data."""
    yield path
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths_of(item, (*path, key))


ODD = [None, True, -1, 10**19, 1e308, "", "\0", "a\nb", "\udc80", [], [[]], {}, {"a": {"class": 3}}]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_record_with_any_other_value_loads_or_is_one_line(run, tmp_path, data):
    record = json.loads((run / "experiment.json").read_text())
    *path, last = data.draw(st.sampled_from([path for path in paths_of(record) if path]))
    parent = reduce(lambda value, key: value[key], path, record)
    if data.draw(st.booleans()):
        parent[last] = data.draw(st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=3))
    else:
        del parent[last]
    (tmp_path / "experiment.json").write_text(json.dumps(record))
    said = ""
    try:
        assert isinstance(segcore.load_experiment(tmp_path), Experiment)
    except ValueError as error:
        said = str(error)
    assert not said or said.startswith(str(tmp_path / "experiment.json"))
    assert said.isprintable()
