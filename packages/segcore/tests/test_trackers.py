"""Trackers of a run: Weights & Biases offline, a user's own, and what happens when one fails."""

import json
import os
import re
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from segcore.cli.main import parse
from segcore.config.schema import DataConfig, Experiment, ModelConfig, TrainConfig
from segcore.config.user_code import Stored
from segcore.errors import UserError
from segcore.training import loop, trackers
from segcore.training.logger import Logger
from segcore.training.trackers import start_trackers

ROOT = Path(__file__).parents[3]
VALUES = {"lr": 0.1, "loss": 4.0, "images_per_second": 3.5, "seconds": 0.5, "data_seconds": 0.0}
VAL = {"mIoU": 0.5, "aAcc": 0.75, "classes": ["road", "car"], "entries": {"final": {"IoU": [0.5, None]}}}
SINK = """
import json
from pathlib import Path

class Sink:
    def __init__(self, run):
        self.file = (Path(run.work_dir) / "sunk.jsonl").open("a")
        self.add("start", run.start, run.settings["train.batch_size"], sorted(run.changed))
    def add(self, *values):
        print(json.dumps(values), file=self.file, flush=True)
    def log(self, iteration, values):
        self.add("log", iteration, values)
    def image(self, iteration, image):
        self.add("image", iteration, image.shape)
    def finish(self, results):
        self.add("finish", results)

class Failing(Sink):
    def log(self, iteration, values):
        raise ConnectionError("no route to\\nhost")

def broken(run):
    raise OSError("no server")

def nothing(run):
    return print
"""


class Tiny(ModelConfig):
    def build(self):
        raise NotImplementedError


@pytest.fixture
def exp(tmp_path: Path) -> Experiment:
    (tmp_path / "my.py").write_text(SINK)
    return Experiment("tiny", Tiny(num_classes=2), DataConfig(root=tmp_path), train=TrainConfig(batch_size=4))


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of a run, without TensorBoard."""
    monkeypatch.setattr(trackers, "_tensorboard", lambda run: None)
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def with_log(exp: Experiment, *names: str) -> Experiment:
    return replace(exp, train=replace(exp.train, log=names))


def logged(exp: Experiment, work_dir: Path, start: int = 0) -> None:
    """Log a step, an evaluation with an image, and the end."""
    with Logger(work_dir, 9, {}, start=start, trackers=start_trackers(exp, work_dir, start)) as log:
        log.train(start + 1, VALUES)
        log.val(start + 1, VAL, "")
        log.image(start + 1, np.zeros((4, 6, 3), np.uint8))
        log.finish({"mIoU": 0.5})


def test_a_sink_of_ones_own_gets_everything(exp: Experiment, run_dir: Path) -> None:
    logged(with_log(exp, f"{run_dir.parent / 'my.py'}:Sink"), run_dir, start=3)
    start, train, val, image, finish = map(json.loads, (run_dir / "sunk.jsonl").read_text().splitlines())
    changed = ["data.root", "model.class", "model.num_classes", "name", "train.batch_size", "train.log"]
    assert start == ["start", 3, 4, changed]
    assert train == ["log", 4, {f"train/{name}": value for name, value in VALUES.items()}]
    assert val == ["log", 4, {"val/mIoU": 0.5, "val_means/aAcc": 0.75, "val_iou/road": 0.5}]
    assert image == ["image", 4, [4, 6, 3]]
    assert finish == ["finish", {"mIoU": 0.5}]


def test_a_tracker_that_fails_is_dropped_with_one_line(exp: Experiment, run_dir: Path, capsys) -> None:
    name = f"{run_dir.parent / 'my.py'}:Failing"
    logged(with_log(exp, name), run_dir)
    [line] = capsys.readouterr().err.splitlines()
    assert line == (
        f"warning: the tracker {name} failed (ConnectionError: no route to host); the run goes on without it"
    )
    assert len((run_dir / "sunk.jsonl").read_text().splitlines()) == 1
    assert [json.loads(line)["mode"] for line in (run_dir / "log.jsonl").read_text().splitlines()] == [
        "meta",
        "train",
        "val",
    ]


def test_a_run_that_ends_early_tells_its_trackers(exp: Experiment, run_dir: Path) -> None:
    exp = with_log(exp, f"{run_dir.parent / 'my.py'}:Sink")
    with pytest.raises(KeyboardInterrupt), Logger(run_dir, 9, {}, trackers=start_trackers(exp, run_dir, 0)):
        raise KeyboardInterrupt
    assert (run_dir / "sunk.jsonl").read_text().splitlines()[-1] == '["finish", null]'


@pytest.mark.parametrize("failing", ["write", "Logger"])
def test_trackers_end_when_the_run_cannot_begin(exp, run_dir: Path, monkeypatch, failing: str) -> None:
    """Between their start and the first step: no space for experiment.json, or a log that cannot be written."""

    def full(*_: object, **__: object) -> None:
        raise UserError("no space")

    exp = with_log(exp, f"{run_dir.parent / 'my.py'}:Sink")
    begun = {"iteration": 0, "best_miou": 0.0, "early_end": lambda exp: ""}
    state = types.SimpleNamespace(**begun, description={}, device=torch.device("cpu"))
    monkeypatch.setattr(loop, "setup", lambda *_, **__: (exp, state, [], None, []))
    monkeypatch.setattr(loop, failing, full)
    with pytest.raises(UserError, match="no space"):
        loop.train(exp, run_dir)
    assert (run_dir / "sunk.jsonl").read_text().splitlines()[1:] == ['["finish", null]']


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("broken", "my.py: cannot be run, line 23: OSError: no server"),
        ("nothing", "my.py:nothing: returned builtin_function_or_method without log, image, finish; return an obj"),
        ("absent", "my.py:absent: name the function as "),
    ],
)
def test_a_sink_that_cannot_start_is_one_line(exp: Experiment, run_dir: Path, name: str, text: str) -> None:
    first = f"{run_dir.parent / 'my.py'}:Sink"
    with pytest.raises(UserError) as caught:
        start_trackers(with_log(exp, first, f"{run_dir.parent / 'my.py'}:{name}"), run_dir, 0)
    assert text in str(caught.value)
    if name != "absent":  # which is found before any starts
        assert (run_dir / "sunk.jsonl").read_text().splitlines()[-1] == '["finish", null]'


def test_wrong_names_are_one_line(exp: Experiment, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"train\.log is 'wandbb'; it must be wandb or file\.py:function"):
        with_log(exp, "wandbb")
    with pytest.raises(UserError, match=r"train\.log absent\.py:sink: there is no file absent\.py"):
        start_trackers(with_log(exp, "absent.py:sink"), run_dir, 0)
    with pytest.raises(UserError, match="is stored in the run, and a file of yours is imported only if you name it"):
        start_trackers(with_log(exp, Stored(f"{run_dir.parent / 'my.py'}:Sink")), run_dir, 0)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"train\.log wandb: is not installed; pip install 'segcore\[wandb\]'"):
        start_trackers(with_log(exp, "wandb"), run_dir, 0)


def test_weights_and_biases_offline(exp: Experiment, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run has the same id; what is stored is checked by its bytes, which are no public format."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    exp = with_log(exp, "wandb")
    (run_dir / "results.json").write_text("{}")
    logged(exp, run_dir)
    identity = json.loads((run_dir / "wandb.json").read_text())["id"]
    logged(exp, run_dir, start=1)
    assert json.loads((run_dir / "wandb.json").read_text())["id"] == identity
    wandb.teardown()  # its process writes the rest
    stored = [path.read_bytes() for path in run_dir.glob(f"wandb/offline-run-*-{identity}/run-{identity}.wandb")]
    assert stored
    for word in (b"train/loss", b"val/mIoU", b"val_iou/road", b"train.batch_size"):
        assert all(word in content for content in stored)
    assert any(path.name.startswith("predictions") for path in run_dir.glob("wandb/*/files/media/images/*.png"))
    assert [*run_dir.glob("wandb/*/files/results.json")]


def test_weights_and_biases_that_cannot_start_leave_no_folder(exp, run_dir: Path, monkeypatch) -> None:
    def init(dir: str, **_: object) -> None:
        Path(dir, "wandb").mkdir()
        raise OSError("no key\nconfigured")

    wandb = types.SimpleNamespace(init=init, Settings=lambda **_: None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(UserError, match=r"wandb: cannot start \(no key configured\); `wandb login`, or set WANDB_MODE"):
        start_trackers(with_log(exp, "wandb"), run_dir, 0)
    assert not [*run_dir.iterdir()]


def test_a_foreign_id_is_not_used(run_dir: Path) -> None:
    for content in ("{}", '{"id": "../../x"}', '{"id": "abc"}'):
        (run_dir / "wandb.json").write_text(content)
        identity = trackers._wandb_id(run_dir)
        assert (identity == "abc") == ("abc" in content)
        assert identity.isalnum()


@pytest.mark.parametrize("error", [TypeError("Descriptors\nfail"), AttributeError("np.x"), OSError("full")])
def test_tensorboard_that_cannot_start_is_a_note(exp, tmp_path: Path, monkeypatch, capsys, error: Exception) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(trackers, "TensorBoard", fails)
    assert start_trackers(exp, tmp_path, 0) == {}
    [line] = capsys.readouterr().err.splitlines()
    reason = " ".join(str(error).split())
    assert f"TensorBoard cannot start in '{tmp_path}' ({type(error).__name__}: {reason}); the run goes on" in line


def test_tensorboard_that_is_not_installed_is_no_note(exp: Experiment, tmp_path: Path, monkeypatch, capsys) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert start_trackers(exp, tmp_path, 0) == {}
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_tensorboard_in_a_folder_that_it_cannot_name_is_a_note(exp: Experiment, tmp_path: Path, capsys) -> None:
    pytest.importorskip("tensorboard")
    assert start_trackers(exp, tmp_path / os.fsdecode(b"caf\xe9"), 0) == {}
    line = capsys.readouterr().err
    assert "TensorBoard cannot start in " in line
    assert "UnicodeEncodeError: " in line


class FakeMLflow(types.ModuleType):
    """Records calls, and has the run `abc`."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.calls = []

    def active_run(self):
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="abc"))

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *values, **options: self.calls.append((name, values, options))


def test_the_example_for_mlflow(exp: Experiment, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", fake := FakeMLflow())
    exp = with_log(exp, f"{ROOT / 'examples' / 'mlflow_sink.py'}:Sink")
    logged(exp, run_dir)
    assert [name for name, *_ in fake.calls] == [
        *("set_experiment", "start_run", "log_params", "log_dict", "log_metrics", "log_metrics", "log_image"),
        *("log_dict", "end_run"),
    ]
    assert fake.calls[-1] == ("end_run", ("FINISHED",), {})
    fake.calls.clear()
    logged(exp, run_dir, start=1)
    assert fake.calls[1] == ("start_run", (), {"run_id": "abc", "run_name": "run"})


@pytest.mark.oracle
def test_mlflow_has_one_run_after_a_resume(exp: Experiment, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # its small package has no other store without a server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (run_dir.parent / "mlruns").as_uri())
    mlflow = pytest.importorskip("mlflow")
    exp = with_log(exp, f"{ROOT / 'examples' / 'mlflow_sink.py'}:Sink")
    logged(exp, run_dir)
    logged(exp, run_dir, start=1)
    found = mlflow.MlflowClient()
    [run] = found.search_runs([found.get_experiment_by_name("segcore").experiment_id])
    assert run.data.metrics["val/mIoU"] == 0.5
    assert len(found.get_metric_history(run.info.run_id, "train/loss")) == 2
    assert run.data.params["train.batch_size"] == "4"


def test_commands_and_sink_of_the_page(exp: Experiment, run_dir: Path) -> None:
    page = (ROOT / "docs/watching_a_run.md").read_text(encoding="utf-8")
    commands = re.findall(r"(?m)^segcore (.+)$", page)
    assert len(commands) == 5
    for command in commands:
        assert parse(command.split())
    [code] = re.findall(r"(?s)```python\n(.+?)```", page)
    (run_dir.parent / "page.py").write_text(code)
    logged(with_log(exp, f"{run_dir.parent / 'page.py'}:Sink"), run_dir)
    assert len((run_dir / "mine.txt").read_text().splitlines()) == 2
