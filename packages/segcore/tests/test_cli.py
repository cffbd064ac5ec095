"""What the command line answers to words that it cannot read: one line each, which names option, value and remedy."""

from __future__ import annotations

import ast
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest

import segcore
from segcore.cli.common import Command
from segcore.cli.main import COMMANDS, main, offers, parse
from segcore.config import options, registry
from segcore.config.record import settings_of
from segcore.errors import UserError

CONFIG = f"{Path(__file__).parent / 'runs' / 'tiny.py'}:tiny"


def answer(capsys: pytest.CaptureFixture[str], *words: str, status: int = 2) -> str:
    """Run a command that must end with this status and one line on standard error; return the line."""
    with pytest.raises(SystemExit) as end:
        main(None, list(words))
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (status, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    return err.removeprefix("error: ").strip()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--gpus two", "--gpus two: expected a whole number or None"),
        (
            "--loss.class-weight atuo --seed 1",
            "--loss.class-weight atuo: expected a tuple of a number, … or auto or auto_sqrt or None",
        ),
        (
            "--loss.class-weight 1 2 x",
            "--loss.class-weight 1 2 x: expected a tuple of a number, … or auto or auto_sqrt or None",
        ),
        ("--data.img-scale 3 None", "--data.img-scale 3 None: expected (a whole number, a whole number) or None"),
        ("--train.batch-size=3.5", "--train.batch-size 3.5: expected a whole number"),
        ("--train.channels-last maybe", "--train.channels-last maybe: expected True or False"),
        ("--schedule.kind poli", "--schedule.kind poli: expected poly, cosine or step"),
        ("--data.crop 64", "--data.crop 64: expected (a whole number, a whole number)"),
        ("--work-dir", "--work-dir: expected a Path or None"),
        ("--train.bach 4", "there is no option --train.bach (did you mean --train.batch-size?); `--help` lists all"),
        ("--lr 1", "there is no option --lr: write --optimizer.lr; `--help` lists all"),
        ("--train.batch-size 4 5", "'5' is not expected there; `--help` shows what can be given"),
        ("--resume=yes", "--resume yes: expected no value"),
        ("--resume yes", "'yes' is not expected there; `--help` shows what can be given"),
        ("--model.num-classes 3 --train.batch-size 0", "train.batch_size is 0; it must be at least 1"),
    ],
)
@pytest.mark.parametrize("columns", ["40", "200"])
def test_wrong_words(capsys, monkeypatch, words, expected, columns):
    monkeypatch.setenv("COLUMNS", columns)
    status = 1 if expected.startswith("train.batch_size") else 2
    assert answer(capsys, "train", CONFIG, *words.split(), status=status) == expected


@pytest.mark.parametrize(
    ("option", "ours"),
    [
        ("--eval", "--evaluate.metrics"),
        ("--cfg-options", "--optimizer.lr 1e-4"),
        ("--epochs", "--schedule.epochs"),
        ("--model", "the configuration comes first"),
        ("--batch-size", "--train.batch-size"),
        ("--amp", "--train.precision auto"),
        ("--tta", "--multi-scale"),
        ("--show-dir", "--save DIR"),
    ],
)
def test_options_of_other_tools_are_answered_with_ours(capsys, option, ours):
    assert ours in answer(capsys, "train", CONFIG, option, "x")
    assert ours in answer(capsys, "train", option, "x", CONFIG)
    assert parse(["train", CONFIG, "--work_dir", "x"]).work_dir == Path("x")


def test_a_list_in_front_of_a_place_takes_its_word(capsys):
    """Lists take all words up to the next option, so the places come first; help says so, too."""
    line = answer(capsys, "test", CONFIG, "--evaluate.img-ratios", "1", "2", "--limit", "2")
    order = "put CHECKPOINT right after CONFIG: `segcore test CONFIG CHECKPOINT [OPTIONS]`"
    assert line == f"missing: CHECKPOINT; {order}"
    line = answer(capsys, "predict", CONFIG, "run", "photos", "--opacity", "1")
    assert line.startswith("missing: OUTPUT; put CHECKPOINT INPUT OUTPUT right after CONFIG")
    with pytest.raises(SystemExit) as end:
        main(None, ["test", CONFIG, "--help"])
    assert not end.value.code
    assert order[1:] in " ".join(capsys.readouterr().out.split())


def test_commands_and_configurations(capsys, monkeypatch):
    assert "did you mean train?" in answer(capsys, "trian", CONFIG)
    assert "which configuration?" in answer(capsys, "configs", "--write", "my.py")
    known = dict.fromkeys(("net_small_512x1024_160k_cityscapes", "net_small_toy", "other_toy"))
    monkeypatch.setattr(registry, "experiments", lambda package=None: known)
    line = answer(capsys, "train", "net_smal_cityscapes", status=1)
    assert line.endswith("(did you mean net_small_512x1024_160k_cityscapes?); `segcore configs` lists all")
    line = answer(capsys, "train", "net_small", status=1)
    assert "net_small_toy, net_small_512x1024_160k_cityscapes" in line
    assert "--batches" in answer(capsys, "bench", CONFIG, "--batches")


def test_import_has_formats(capsys):
    line = answer(capsys, "import", "coc", "file.json")
    assert line.startswith("segcore: there is no command 'import coc' (did you mean import coco?)")
    assert "there is no command 'import'" in answer(capsys, "import")
    for words in (["import", "--help"], ["import", "coco", "--help"], ["import coco", "--help"]):
        with pytest.raises(SystemExit) as end:
            main(None, words)
        out = capsys.readouterr().out
        assert not end.value.code
        assert "import coco" in out
        assert ("import potsdam" in out) == (len(words) == 2 and words[0] == "import")
        assert "  train" not in out


def test_version_and_completion(capsys):
    for words, expected in (
        (["--version"], f"segcore {segcore.__version__}"),
        (["--tyro-print-completion", "bash"], "--optimizer.lr"),
    ):
        with pytest.raises(SystemExit) as end:
            main(None, words)
        assert not end.value.code
        assert expected in capsys.readouterr().out


def test_a_folder_that_is_no_run_hides_no_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("cityscapes", "ddrnet_23_slim_to", "runs", "a.pytorch/runs"):
        Path(name).mkdir(parents=True)
    assert parse(["train", "ddrnet_23_slim_to"]).experiment.name == "ddrnet_23_slim_toy"
    assert "configurations have 'cityscapes' in their names" in answer(capsys, "train", "cityscapes", status=1)
    main(None, ["configs", "cityscapes"])
    assert "ddrnet_23_slim_cityscapes" in capsys.readouterr().out
    for command in ("train", "configs"):
        assert answer(capsys, command, "runs", status=1).startswith("runs: no run or checkpoint")
    line = answer(capsys, "train", "a.pytorch/runs/typo", status=1)
    assert line.startswith("a.pytorch/runs/typo: no such run, checkpoint or configuration file")


def test_a_configuration_is_written_as_a_file_that_can_be_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = answer(capsys, "configs", "ddrnet_23_slim_toy", "--write", "mine", status=1)
    assert line == "mine: a configuration is written as .py; choose such a name"
    line = answer(capsys, "configs", CONFIG, "--write", "mine.py", status=1)
    assert line == "mine.py: the model is defined in a file of yours; copy that, and edit the copy"
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("words", [["check"], ["bench"], ["test"]])
def test_a_command_does_not_overwrite_what_says_what_a_run_is(tmp_path, capsys, words):
    settings = settings_of(segcore.load_experiment("ddrnet_23_slim_toy"))
    (tmp_path / "experiment.json").write_text(json.dumps({"experiment": settings}))
    before = (tmp_path / "experiment.json").read_bytes()
    line = answer(capsys, *words, str(tmp_path), "--json", str(tmp_path / "experiment.json"), status=1)
    assert line.endswith("experiment.json: would overwrite what this command reads; name another file")
    assert (tmp_path / "experiment.json").read_bytes() == before


def test_the_demo_makes_its_own_data(capsys):
    assert "leave --data.root out" in answer(capsys, "demo", "--data.root", "elsewhere", status=1)


def test_no_word_is_a_command():
    with pytest.raises(UserError, match="there is no command ''"):
        parse([""])


def options_of(command, name):
    parsed = parse([command, name, *["x"] * sum(item.kw_only for item in fields(COMMANDS[command]))])
    return set(options.settings(parsed, offers(parsed)))


@pytest.mark.parametrize("name", [*registry.experiments()][::8])
def test_a_command_offers_what_it_reads(name):
    """And what only stepwise models can do is offered for these only."""
    offered = {command: options_of(command, name) for command in ("train", "predict", "export", "bench", "test")}
    assert len(offered["predict"]) <= 60
    for command in ("predict", "export", "bench", "test"):
        assert not [o for o in offered[command] if o.startswith(("experiment.optimizer", "experiment.schedule"))]
    assert "experiment.optimizer.lr" in offered["train"]
    stepwise = {"uncertainty", "steps", "animate", "start_mask", "experiment.evaluate.early_exit_threshold"}
    assert offered["predict"] & stepwise == (stepwise if segcore.load_experiment(name).model.stepwise else set())


def test_an_option_of_another_command_is_refused(capsys):
    line = answer(capsys, "predict", CONFIG, "run", "in", "out", "--optimizer.lr", "1")
    assert line == "--optimizer.lr is not read by this command with this model; leave it out"


def test_a_published_path_and_a_part_of_a_name_are_the_row():
    name = [*registry.experiments()][-1]
    assert parse(["train", f"configs/cityscapes/{name}.py"]).experiment.name.replace("-", "_") == name


@pytest.mark.parametrize(
    ("here", "given", "run"),
    [
        (".", "runs/a", "runs/a"),
        ("runs/a", ".", "runs/a"),
        (".", "runs/a/checkpoints/iter_7", "runs/a"),
        ("runs/a", "checkpoints/iter_7", "runs/a"),
        ("runs/a/checkpoints", "iter_7", "runs/a"),
        (".", "none", "runs/net"),
    ],
)
def test_the_run_of_a_folder(tmp_path, monkeypatch, here, given, run):
    for folder in (tmp_path / "runs/a", tmp_path / "runs/a/checkpoints/iter_7"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "experiment.json").touch()
    monkeypatch.chdir(tmp_path / here)
    command = Command(replace(segcore.load_experiment("ddrnet_23_slim_toy"), name="net"), Path(given))
    assert command.run_dir.resolve() == tmp_path / run


def test_the_run_of_a_link_to_a_checkpoint(tmp_path, monkeypatch):
    checkpoint = tmp_path / "runs/a/checkpoints/iter_7"
    checkpoint.mkdir(parents=True)
    (checkpoint / "experiment.json").touch()
    (tmp_path / "best").symlink_to(checkpoint)
    monkeypatch.chdir(checkpoint)
    for given in (tmp_path / "best", Path("../iter_7"), Path()):
        command = Command(segcore.load_experiment("ddrnet_23_slim_toy"), given)
        assert command.run_dir.resolve() == tmp_path / "runs/a"


def test_values_of_several_parts_are_read_as_they_are_written():
    exp = segcore.load_experiment("ddrnet_23_slim_toy")

    def classes(text):
        return exp.with_overrides(["data.dataset=folder", f"data.classes={text}"]).data.classes

    assert classes(r"C:\data\a.csv b") == (r"C:\data\a.csv", "b")
    assert classes("'a, b' c,d") == ("a, b", "c", "d")
    assert classes("#ff0000=road sky") == ("#ff0000=road", "sky")


def test_another_data_set_known_by_name_drops_what_described_the_old_one():
    own = segcore.load_experiment("ddrnet_23_slim_from_scratch").with_overrides(
        ["data.classes=a b", "data.val_share=0.1", "data.val_seed=3", "data.palette=ff0000 00ff00"]
    )
    data = own.with_overrides(["data.dataset=camvid"]).data
    assert (data.val_share, data.val_seed, data.palette, data.classes) == (0, 0, (), ())
    assert own.with_overrides(["data.dataset=cityscapes"]).data.val_share == 0


def test_every_option_has_a_line_of_help():
    """tyro's help takes it from the text below the field."""
    bare = []
    package = Path(str(segcore.__file__)).parent
    commands = [path for path in (package / "cli").glob("*.py") if not path.stem.startswith(("predict_", "main"))]
    for path in (package / "config" / "schema.py", *commands):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for kind in (node for node in tree.body if isinstance(node, ast.ClassDef)):
            for field, below in itertools.pairwise([*kind.body, None]):
                said = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                if isinstance(field, ast.AnnAssign) and not said and "ClassVar" not in ast.unparse(field):
                    bare.append(f"{kind.name}.{ast.unparse(field.target)}")
    nested = {f"Experiment.{name}" for name in ("model", "data", "optimizer", "schedule", "loss", "train", "evaluate")}
    assert set(bare) - nested - {"Command.experiment", "ShowConfig.experiment"} == set()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for other processes")
@pytest.mark.parametrize("module", ["tyro", "torch"])
def test_interrupt_during_the_imports(tmp_path, module):
    """A module of that name stands for the real one, whose import takes long."""
    (tmp_path / f"{module}.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "segcore", "env", *(["--help"] if module == "tyro" else [])]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "importing\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "interrupted\n")


def test_no_module_of_the_current_folder_is_imported(tmp_path):
    (tmp_path / "tyro.py").write_text("raise SystemExit('imported')")
    command = [sys.executable, "-m", "segcore", "env", "--help"]
    env = {**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", "").strip(os.pathsep)}  # an empty part is here, too
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("number", "said"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_the_signal_that_ended_a_run_is_named(monkeypatch, capsys, number, said):
    def run(self, package):
        raise KeyboardInterrupt(number)

    monkeypatch.setattr(COMMANDS["env"], "run", run)
    with pytest.raises(SystemExit) as end:
        main(None, ["env"])
    assert (end.value.code, capsys.readouterr().err) == (128 + number, f"{said}\n")


def test_a_missing_compiler_is_one_line(monkeypatch, capsys):
    """What torch.compile raises where no C++ compiler is on the path."""
    said = "InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')\n\nSet …"

    def run(self, package):
        raise RuntimeError(said)

    monkeypatch.setattr("segcore.cli.env.Env.run", run)
    with pytest.raises(SystemExit) as stopped:
        main(None, ["env"])
    assert stopped.value.code == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: compile: torch.compile needs a C++ compiler")
    assert shown.count("\n") == 1
