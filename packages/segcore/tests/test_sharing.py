"""Models on the Hugging Face hub and back: `push`, `hub:USER/REPO` from a server within this machine, and `verify`."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save, save_file

import ddrnet_seg.official
import segcore
from segcore.checkpoints import hugging_face, run_checkpoint
from segcore.checkpoints.load import load_init
from segcore.cli import push
from segcore.cli.main import main
from segcore.config import registry
from segcore.config.record import describe
from segcore.config.schema import Published, multi_scale
from segcore.demo.toy import generate
from segcore.evaluation.evaluate import Results
from segcore.evaluation.predictor import Predictor
from segcore.reporting.model_card import escaped, model_card
from segcore.reporting.run_record import Entry, Evaluation, read_run, write_evaluation
from segcore.testing.commands import refused
from segcore.testing.tiny import TinyStepwise

ROW = "ddrnet_23_slim_toy"
CLASSES = ("road", "<b>sky|", "a [car](http://x)")
REPO = "me/my-model"
WRONG_REPOS = ("me", "me/a/b", "../x", "me/a?b", "me/x..y", "me/x--y", f"me/{'x' * 100}")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with a checkpoint and its evaluation, full of paths of this machine and of marks in names."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    exp = segcore.load_experiment(ROW)
    private = {"root": folder, "train_list": folder / "list.txt", "val_images": f"{folder}/*", "cache": folder}
    exp = replace(
        exp,
        model=replace(exp.model, num_classes=3),
        data=replace(exp.data, dataset="folder", classes=CLASSES, **private),
        train=replace(exp.train, init_from=f"{folder}/start.pth", log=(f"{folder}/log.py:sink",)),
        evaluate=replace(exp.evaluate, img_scale=None),
    )
    torch.manual_seed(0)
    checkpoint = run_checkpoint.folder_of(folder, 7)
    run_checkpoint.save(checkpoint, exp.model.build().state_dict(), {}, describe(exp))
    shutil.copy(checkpoint / "experiment.json", folder)
    entry = Entry("final", 0.41237, 0.9, 0.5, (0.25, None, 0.75))
    write_evaluation(folder, exp, Evaluation("test", 7, CLASSES, (entry,), main="final", images=5))
    return folder


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "street.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def pushed(run, photo, tmp_path_factory):
    """The folder that `push --dry-run` writes."""
    folder = tmp_path_factory.mktemp("pushed") / "model"
    words = ["push", str(run), REPO, "--dry-run", str(folder), "--license", "cc-by-4.0", "--images", str(photo)]
    main(None, words)
    return folder


def names_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_push_writes_what_loads_back(run, pushed, photo):
    assert names_below(pushed) == ["README.md", "config.json", "images/1.jpg", "model.safetensors"]
    before, after = segcore.load_model(run, device="cpu"), segcore.load_model(pushed, device="cpu")
    assert after.class_names == CLASSES
    assert np.array_equal(before.palette, after.palette)
    assert np.array_equal(before(photo).classes, after(photo).classes)
    assert str(pushed) in after.report[0]
    assert "the run's" not in after.report[0]


def test_the_card_states_the_figures_and_escapes_the_texts_of_users(pushed):
    card = (pushed / "README.md").read_text(encoding="utf-8")
    _, header, body = card.split("---\n", 2)
    fields = dict(line.split(": ", 1) for line in header.splitlines())
    assert json.loads(fields["license"]) == "cc-by-4.0"
    [result] = json.loads(fields["model-index"])[0]["results"]
    assert result["metrics"] == [{"type": "mean_iou", "name": "mIoU", "value": 41.24}]
    assert "mIoU 41.24 %, aAcc 90.00 %, mAcc 50.00 %, measured by segcore on 5 validation images of own data" in body
    assert "| 0 | road | 25.0 |" in body
    assert "| 1 | &#60;b&#62;sky&#124; | – |" in body
    assert not re.search(r"<b>|\]\(http", body)
    assert f'segcore.load_model("hub:{REPO}")' in body
    assert "images/1.jpg" in body


def test_nothing_of_this_machine_is_shared(run, pushed):
    text = (pushed / "config.json").read_text()
    assert str(run) not in text
    settings = json.loads(text)["experiment"]
    assert settings["data"]["classes"] == list(CLASSES)
    assert settings["schedule"]["iterations"] == 420


@pytest.mark.parametrize(
    ("start", "kept"),
    [("official", True), ("official:a", True), ("hub:me/x", True), ("official/../../x.pth", False), ("tag.a", True)],
)
def test_start_weights_are_shared_by_name_only(run, start, kept):
    exp = segcore.load_experiment(run)
    seg = SimpleNamespace(experiment=replace(exp, train=replace(exp.train, init_from=start)))
    assert push.shareable(seg).train.init_from == (start if kept else None)


def test_the_header_of_the_card_is_yaml_for_any_name():
    exp = replace(segcore.load_experiment(ROW), name="a\N{DESERT}b")
    evaluation = Evaluation("test", 7, ("a",), (Entry("final", 0.4, iou=(0.1,)),), main="final")
    about = {"package": "p", "parameters": 1, "evaluation": evaluation, "images": (), "license": "mit"}
    header = model_card(exp, REPO, classes=("a",), **about).split("---\n")[1]
    assert yaml.safe_load(header)["model-index"][0]["name"] == exp.name


def test_texts_are_shown_as_they_are():
    assert escaped("ddrnet_23 slim-toy") == "ddrnet_23 slim-toy"
    assert escaped("_a_\n`é`") == "&#95;a&#95; &#96;é&#96;"


def test_figures_of_another_checkpoint_are_not_stated(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "iter_7").rename(tmp_path / "run" / "checkpoints" / "iter_8")
    for name in ("out", "again"):
        main(None, ["push", str(tmp_path / "run"), REPO, "--dry-run", str(tmp_path / name)])
        assert "note: no figures, as no evaluation of" in capsys.readouterr().out
        assert "No evaluation of these weights is stored." in (tmp_path / name / "README.md").read_text()
        other = Evaluation("test", 8, ("a", "b"), (Entry("final", 0.4, iou=(0.1, 0.2)),), main="final")
        write_evaluation(tmp_path / "run", segcore.load_experiment(ROW), other)


@pytest.mark.parametrize(
    ("part", "values", "stated"),
    [
        # as `test` stores them: the precision of the training, and a layout for speed
        ("evaluate", {"precision": "auto", "batch_size": 3, "channels_last": True}, True),
        ("data", {"workers": 3}, True),
        ("evaluate", {"flip": True}, False),
        ("evaluate", {"img_ratios": (0.5, 1.0)}, False),
        ("evaluate", {"precision": "fp32"}, False),
        ("data", {"root": Path("other")}, False),
        ("model", {"align_corners": True}, False),
    ],
)
def test_figures_of_other_settings_are_not_stated(run, tmp_path, part, values, stated):
    shutil.copytree(run, tmp_path / "run")
    exp = segcore.load_experiment(run)
    seg = SimpleNamespace(experiment=exp, class_names=CLASSES)
    found = read_run(run).evaluation
    write_evaluation(tmp_path / "run", replace(exp, **{part: replace(getattr(exp, part), **values)}), found)
    checkpoint = run_checkpoint.folder_of(tmp_path / "run", 7)
    assert push.stored_evaluation(checkpoint, seg) == (found if stated else None)


def test_a_relative_checkpoint_or_folder_is_pushed(run, pushed, tmp_path, monkeypatch):
    monkeypatch.chdir(run / "checkpoints")
    main(None, ["push", "iter_7", REPO, "--dry-run", str(tmp_path / "out")])
    assert "mIoU 41.24 %" in (tmp_path / "out" / "README.md").read_text()
    monkeypatch.chdir(pushed.parent)
    main(None, ["push", pushed.name, REPO, "--dry-run", str(tmp_path / "again")])
    assert "No evaluation of these weights is stored." in (tmp_path / "again" / "README.md").read_text()


def test_push_uploads_one_commit(run, monkeypatch, capsys):
    calls, existing = [], SimpleNamespace(private=True)

    class Api:
        def __init__(self, endpoint):
            self.endpoint = endpoint

        def create_repo(self, repo, **how):
            calls.append((repo, how))

        def model_info(self, repo):
            return existing

        def upload_folder(self, *, repo_id, folder_path, commit_message, delete_patterns):
            calls.append((repo_id, names_below(folder_path), delete_patterns))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    main(None, ["push", str(run), REPO, "--private"])
    assert calls == [
        (REPO, {"private": True, "exist_ok": True}),
        (REPO, ["README.md", "config.json", "model.safetensors"], ["images/*"]),
    ]
    assert f"http://127.0.0.1:9/{REPO}" in capsys.readouterr().out
    existing.private = False
    assert "as it is public" in refused(None, "push", run, REPO, "--private")
    assert len(calls) == 3  # no further upload


def test_push_refuses_in_one_line(run, tmp_path, monkeypatch):
    for name in WRONG_REPOS:
        assert "write USER/REPO" in refused(None, "push", run, name)
    assert "such as apache-2.0" in refused(None, "push", run, REPO, "--license", "a: b")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "name a new folder" in refused(None, "push", run, REPO, "--dry-run", tmp_path / "full")
    (tmp_path / "text.jpg").write_text("no image")
    refused(None, "push", run, REPO, "--dry-run", tmp_path / "new", "--images", tmp_path / "text.jpg")
    assert names_below(tmp_path) == ["full/file", "text.jpg"]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits"))
    assert "not uploaded (Connection refused)" in refused(None, "push", run, REPO)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(None, "push", run, REPO)


@pytest.mark.parametrize(
    ("part", "key", "value", "what"),
    [("model", "class", "segcore_config_own:Net", "model"), ("data", "dataset", "own.py:open_split", "data set")],
)
def test_a_run_with_code_of_its_own_is_not_pushed(run, tmp_path, part, key, value, what):
    record = json.loads((run / "experiment.json").read_text())
    record["experiment"][part][key] = value
    (tmp_path / "experiment.json").write_text(json.dumps(record))
    line = refused(None, "push", tmp_path, REPO, "--dry-run", tmp_path / "out")
    assert f"cannot be pushed, as its {what} is defined in a file of yours" in line


def test_the_commands_of_the_page_that_need_no_network(run, photo, tmp_path, monkeypatch):
    page = (Path(__file__).parents[3] / "docs" / "hub.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(<!-- not run: needs a network -->\n)?```(?:sh|python)\n(.*?)```", page, re.DOTALL)
    [code] = [code for network, code in blocks if not network]
    shutil.copytree(run, tmp_path / "runs" / "mine")
    Image.open(photo).save(tmp_path / "street.jpg")
    monkeypatch.chdir(tmp_path)
    for line in code.splitlines():
        main(None, shlex.split(line)[1:])
    assert (tmp_path / "results" / "street.png").is_file()


# hub:USER/REPO

COMMIT = "1" * 40


@pytest.fixture
def hub(server, pushed, tmp_path, monkeypatch):
    """A server with the pushed model, also at the commit, and an empty cache; returns the server."""
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    serve(server, (pushed / "model.safetensors").read_bytes(), (pushed / "config.json").read_bytes())
    return server


def serve(server, weights, settings=None):
    """Serve a repository at main and at its commit; the weights are stored as large files are, by their SHA-256."""
    server.files |= {f"/{REPO}/resolve/{revision}/model.safetensors": weights for revision in ("main", COMMIT)}
    if settings:
        server.files |= {f"/{REPO}/resolve/{revision}/config.json": settings for revision in ("main", COMMIT)}
    digest = hashlib.sha256(weights).hexdigest()
    by_file = {"model.safetensors": digest, "config.json": "2" * 40}
    for path in server.files:
        etag = by_file.get(path.rpartition("/")[2])
        server.stated[path] = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}


@pytest.mark.parametrize("revision", ["", f"@{COMMIT}"])
def test_a_model_of_the_hub_is_loaded(hub, run, photo, revision, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    name = f"hub:{REPO}{revision}"
    seg = segcore.load_model(name, device="cpu")
    assert seg.class_names == CLASSES
    assert np.array_equal(seg(photo).classes, segcore.load_model(run, device="cpu")(photo).classes)
    asked = {path.rpartition("/")[2] for path, _ in hub.seen if path.startswith(f"/{REPO}/")}
    assert asked == {"model.safetensors", "config.json"}  # beside what the library asks once a day
    assert {*hub.tokens} == {"Bearer hf_secret"}
    hub.files.clear()  # the copy is used offline, and where the server is gone
    segcore.load_model(name, device="cpu", offline=True)
    hub.server_close()
    segcore.load_model(name, device="cpu")


def test_commands_take_models_of_the_hub(hub, photo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(None, ["predict", f"hub:{REPO}", str(photo), "results", "--device=cpu"])
    main(None, ["predict", ROW, f"hub:{REPO}", str(photo), "again", "--device=cpu", "--model.num-classes=3",
                "--data.dataset=folder", "--data.classes", *CLASSES, "--evaluate.img-scale=None"])  # fmt: skip
    assert (tmp_path / "results/street.png").read_bytes() == (tmp_path / "again/street.png").read_bytes()
    assert not (tmp_path / "runs").exists()


def test_a_push_in_between_does_not_mix_two_commits(hub, photo, tmp_path, monkeypatch):
    settings = hugging_face.hub_settings

    def before_a_push(name, **how):
        found = settings(name, **how)
        for path in [path for path in hub.files if "/main/" in path]:
            del hub.files[path]  # main is another commit now
        return found

    monkeypatch.setattr("segcore.inference.hub_settings", before_a_push)
    monkeypatch.setattr(hugging_face, "hub_settings", before_a_push)
    main_files = dict(hub.files)
    assert segcore.load_model(f"hub:{REPO}", device="cpu").class_names == CLASSES
    hub.files |= main_files
    main(None, ["predict", f"hub:{REPO}", str(photo), str(tmp_path / "results"), "--device=cpu"])
    assert (tmp_path / "results/street.png").is_file()


def test_the_help_of_a_model_of_the_hub_downloads_its_settings_alone(hub):
    code = (
        "import sys, huggingface_hub.constants as known\n"
        "from segcore.cli.main import parse\n"
        f"known.HF_HUB_CACHE = {huggingface_hub.constants.HF_HUB_CACHE!r}\n"
        f"try: parse(['predict', 'hub:{REPO}', '--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    how = {"capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "COLUMNS": "200"}, **how)
    assert done.stdout.splitlines()[-1] == "False"
    assert f"predict hub:{REPO}" in done.stdout
    assert {path.rpartition("/")[2] for path, _ in hub.seen if REPO in path} == {"config.json"}


def test_commands_say_that_a_repository_has_no_settings(server, hub, tmp_path):
    assert "not downloaded yet" in refused(None, "predict", f"hub:{REPO}", "a.jpg", tmp_path, "--offline")
    for path in [path for path in server.files if path.endswith("config.json")]:
        del server.files[path]
    with pytest.raises(segcore.UserError, match=r"one without config\.json"):
        segcore.load_model(f"hub:{REPO}")
    assert not any(path.endswith("safetensors") for path, _ in server.seen)
    assert "for the last, name a configuration" in refused(None, "predict", f"hub:{REPO}", "a.jpg", "b")


def test_start_weights_from_the_hub_bring_their_classes(hub):
    exp = segcore.load_experiment(ROW)
    model = replace(exp.model, num_classes=2).build()
    report = load_init(model, f"hub:{REPO}", exp=replace(exp, model=replace(exp.model, num_classes=2)),
                       classes=("tree", "road"))  # fmt: skip
    assert report.endswith("classifier: road kept, 1 of 2 classes new")


def test_weights_of_others_need_no_settings_of_ours(server, hub, run, monkeypatch):
    for settings in (b'{"model_type": "other"}', None):
        server.files = {"/w.pth": b""}
        serve(server, (run / "checkpoints/iter_7/model.safetensors").read_bytes(), settings)
        folder = hugging_face.hub_folder(f"hub:{REPO}")
        assert (folder / "config.json").exists() == bool(settings)
        exp = segcore.load_experiment(ROW)
        load_init(replace(exp.model, num_classes=3).build(), f"hub:{REPO}")
        with monkeypatch.context() as patch:  # no network
            patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
            assert hugging_face.hub_folder(f"hub:{REPO}") == folder
        words = "of another program; name a configuration, and give hub:USER/REPO" if settings else "one without config"
        with pytest.raises(segcore.UserError, match=words):
            segcore.load_model(f"hub:{REPO}")
        shutil.rmtree(folder.parents[2])


@pytest.mark.parametrize("answer", [None, SimpleNamespace(status_code=502), SimpleNamespace(status_code=403)])
def test_settings_that_cannot_be_fetched_are_not_taken_for_absent(hub, monkeypatch, answer):
    known = huggingface_hub.get_hf_file_metadata

    def metadata(url):
        if url.endswith("config.json"):
            error = OSError("broken")
            error.response = answer
            raise error
        return known(url)

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
        with pytest.raises(segcore.UserError, match=r"config\.json: cannot be downloaded"):
            hugging_face.hub_folder(f"hub:{REPO}")
    with pytest.raises(segcore.UserError, match="not downloaded yet"):
        hugging_face.hub_folder(f"hub:{REPO}", offline=True)
    assert (hugging_face.hub_folder(f"hub:{REPO}") / "config.json").is_file()


def test_damage_and_absence_are_one_line(hub, tmp_path, monkeypatch):
    def fails(words, name=f"hub:{REPO}", **how):
        with pytest.raises(segcore.UserError, match=words) as error:
            segcore.load_model(name, **how)
        assert "\n" not in str(error.value)

    for name in (*WRONG_REPOS, f"{REPO}@../x"):
        fails("write hub:USER/REPO", f"hub:{name}")
    fails("no such repository.*HF_TOKEN", "hub:me/none")
    fails("not downloaded yet, and downloads are disabled", offline=True)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fails("not downloaded yet, and downloads are disabled")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    [*_, path] = [path for path in hub.files if path.endswith("model.safetensors")]
    whole = hub.files[path]
    hub.files |= {path: whole[:-1] + b"!" for path in hub.files if path.endswith("model.safetensors")}
    fails(r"its SHA-256 is \w+, not \w+ as stated; delete ")
    fails(r"its SHA-256 is \w+, not \w+ as stated; delete ", offline=True)
    shutil.rmtree(tmp_path / "hf")
    hub.server_close()
    fails(r"cannot be downloaded \(Connection re(fused|set by peer)\)")


@pytest.mark.slow
def test_the_variables_of_the_library_are_read(hub, tmp_path):
    """HF_HOME, HF_TOKEN and HF_ENDPOINT, which the library reads when it is imported; none of a user's own."""
    code = f"from segcore.checkpoints.hugging_face import hub_folder; print(hub_folder('hub:{REPO}'))"
    own = {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_secret", "HF_ENDPOINT": hub.url}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | own
    how = {"env": environment, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([sys.executable, "-c", code], check=True, **how)
    assert done.stdout.startswith(str(tmp_path / "home" / "hub"))
    assert {*hub.tokens} == {"Bearer hf_secret"}


# verify


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    generate(root, train=1, val=2, height=64, width=128)
    return root


@pytest.fixture(scope="module")
def row_weights():
    """Random weights of the toy row, as a file's bytes."""
    torch.manual_seed(0)
    return save(segcore.load_experiment(ROW).model.build().official_state())


@pytest.fixture
def row(server, weights_folder, row_weights, monkeypatch, tmp_path):
    """The toy row as a published one, with random weights on a server; a function that sets its figures."""
    (tmp_path / "w.safetensors").write_bytes(row_weights)
    server.files["/w.safetensors"] = row_weights
    monkeypatch.chdir(tmp_path)

    def publish(**figures):
        named = {name.replace("_", " "): value for name, value in figures.items()}
        monkeypatch.setitem(ddrnet_seg.official.PUBLISHED, ROW, Published(named, f"{server.url}/w.safetensors"))

    return publish


def test_a_row_is_verified_from_the_download_to_the_line_of_the_model_zoo(row, toy, server, tmp_path, capsys):
    row(single_scale=50.0, multi_scale=60.0)
    line = refused(None, "verify", ROW, f"--data.root={toy}", "--device=cpu")
    found = json.loads((tmp_path / "runs" / f"{ROW}.verify.json").read_text())[ROW]
    figure, weights = found["miou"]["single scale"], server.files["/w.safetensors"]
    assert f"single scale {figure:.2f} instead of 50.00; check --data.root (2 images)" in line
    assert (found["reproduced"], found["images"], found["bytes"]) == (False, 2, len(weights))
    assert found["sha256"] == hashlib.sha256(weights).hexdigest()
    row(single_scale=round(figure, 2), multi_scale=0.0)
    main(None, ["verify", ROW, f"--data.root={toy}", "--device=cpu", "--offline"])
    out = capsys.readouterr().out
    assert f"single scale: {figure:.2f}, published {figure:.2f} (2 images): reproduced" in out
    assert f"| {figure:.2f} single scale | `{found['sha256']}` |" in out
    assert [path for path, _ in server.seen] == ["/w.safetensors"]
    path = tmp_path / "runs" / f"{ROW}.verify.json"
    refused(None, "verify", ROW, f"--data.root={toy}", "--device=cpu", "--multi-scale")
    both = json.loads(path.read_text())[ROW]
    assert (both["miou"].keys(), both["reproduced"]) == ({"single scale", "multi scale"}, False)
    assert both["miou"]["single scale"] == figure
    for stale in ({ROW: {"sha256": "0", "images": 2, "miou": {"multi scale": 1}}}, {ROW: 1, "another": {"images": 5}}):
        path.write_text(json.dumps(stale))
        main(None, ["verify", ROW, f"--data.root={toy}", "--device=cpu"])
        found = json.loads(path.read_text())
        assert (found[ROW]["miou"], found[ROW]["reproduced"]) == ({"single scale": figure}, True)
        assert found | {ROW: 0} == stale | {ROW: 0}
    path.write_text("[]")
    line = refused(None, "verify", ROW, f"--data.root={toy}", "--device=cpu")
    assert line.endswith("damaged (a list instead of an object); name another file with --json")
    assert path.read_text() == "[]"


def test_what_was_verified_is_expected_of_the_next_download(row, toy, monkeypatch, tmp_path):
    row(single_scale=50.0)
    found = {ROW: {"sha256": "0" * 64, "miou": {"single scale": 50.0}}}
    monkeypatch.setattr(registry, "stored_json", lambda package, name: found if name == "verified.json" else {})
    assert f"not {'0' * 64} as stated" in refused(None, "verify", ROW, f"--data.root={toy}", "--device=cpu")


def test_verify_takes_a_file_and_nothing_but_rows(row, toy, run, pushed, tmp_path):
    row(multi_scale=60.0)
    assert "publish no figure on the validation set" in refused(None, "verify", ROW)
    row(single_scale=60.0)
    assert "publish no multi-scale figure" in refused(None, "verify", ROW, "--multi-scale")
    assert "not a published row" in refused(None, "verify", run)
    assert "is a folder; give the file" in refused(None, "verify", ROW, pushed, f"--data.root={toy}")
    state = load_file(tmp_path / "w.safetensors")
    save_file(state, tmp_path / "mine.safetensors")
    words = ("verify", ROW, "mine.safetensors", f"--data.root={toy}", "--device=cpu", "--offline")
    assert "mine.safetensors is the row's file" in refused(None, *words)


ALIGNED = "ddp_convnext_t_4x4_512x1024_5k_cityscapes_aligned"
CITY = "ddp_convnext_t_4x4_512x1024_160k_cityscapes"


@pytest.mark.parametrize(
    ("name", "words", "found", "expected"),
    [
        (ALIGNED, [], {"1": 82.3, "3": 82.7, "10": 82.5}, {"1 step": 82.3, "3 steps": 82.7, "10 steps": 82.5}),
        (CITY, [], {"3": 82.5}, {"single scale": 82.5}),
        (CITY, [], {"3": 82.48}, None),
        (CITY, [], {"3": 82.72}, None),
        (CITY, ["--multi-scale"], {"3": 83.15}, {"multi scale": 83.15}),
    ],
)
def test_the_published_setting_is_evaluated_and_compared(name, words, found, expected, monkeypatch, tmp_path):
    exp = segcore.load_experiment(name)
    seen = []

    def evaluate(predictor, dataset, **how):
        seen.append(predictor.evaluate)
        return Results(("a",), {key: {"mIoU": value / 100} for key, value in found.items()}, 500, by="steps")

    (tmp_path / "w.pth").write_bytes(b"weights")
    monkeypatch.chdir(tmp_path)
    loaded = SimpleNamespace(predictor=Predictor(TinyStepwise(), exp.evaluate, exp.data))
    monkeypatch.setattr("segcore.cli.verify.load", lambda command, path: loaded)
    monkeypatch.setattr("segcore.data.layouts.open_dataset", lambda data, split: None)
    monkeypatch.setattr("segcore.evaluation.evaluate.evaluate", evaluate)
    given = ["verify", name, "w.pth", *words, "--json", "found.json"]
    if expected is None:
        assert "instead of 82.60" in refused(None, *given)
        return
    main(None, given)
    assert json.loads((tmp_path / "found.json").read_text())[name]["miou"] == pytest.approx(expected)
    steps = (1, 3, 10) if name == ALIGNED else exp.evaluate.steps
    assert seen == [replace(multi_scale(exp.evaluate) if words else exp.evaluate, steps=steps)]
