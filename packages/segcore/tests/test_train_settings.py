"""How long a run is, what it leaves out and what it recomputes: epochs, patience, frozen parts, saved activations."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from segcore.checkpoints import run_checkpoint as checkpoint
from segcore.config.registry import load_experiment
from segcore.config.schema import (
    DataConfig,
    EvalConfig,
    Experiment,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from segcore.errors import UserError
from segcore.evaluation.evaluate import evaluate
from segcore.models.segmentor import Segmentor
from segcore.testing.tiny import Tiny
from segcore.training import loop
from segcore.training.loop import train


class Net(Tiny):
    """Two convolutions, a batch norm, dropout."""

    def recomputed_blocks(self) -> list[nn.Module]:
        return [self.norm]


@dataclass(frozen=True)
class TinyModel(ModelConfig):
    num_classes: int = 2
    dropout: float = 0.3

    def build(self) -> Segmentor:
        return Net(self.num_classes, dropout=self.dropout)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven training images, a bright stripe on noise, and two for validation."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.RandomState(0)
    for i in range(9):
        label = np.zeros((32, 32), np.uint8)
        label[:, 2 * i : 2 * i + 8] = 1
        image = (rng.randint(0, 100, (32, 32, 3)) + 120 * label[..., None]).astype(np.uint8)
        for folder, pixels in (("images", image), ("masks", label)):
            path = root / folder / ("train" if i < 7 else "val") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), pixels)
    return root


@pytest.fixture
def exp(root: Path) -> Experiment:
    return Experiment(
        "tiny",
        TinyModel(),
        DataConfig("folder", root, classes=("dark", "bright"), crop=(32, 32), workers=0),
        OptimizerConfig(lr=0.01),
        ScheduleConfig(iterations=10, power=0.0),
        train=TrainConfig(batch_size=2, device_batch_size=2, log_every=1, evaluate_every=1, save_every=4, keep_last=9),
        evaluate=EvalConfig(),
    )


def results(work_dir: Path) -> dict[str, Any]:
    return json.loads((work_dir / "results.json").read_text())


def settings(work_dir: Path) -> dict[str, Any]:
    return json.loads((work_dir / "experiment.json").read_text())["experiment"]


def validated(work_dir: Path) -> list[int]:
    lines = [json.loads(line) for line in (work_dir / "log.jsonl").read_text().splitlines()]
    return [line["iteration"] for line in lines if line["mode"] == "val"]


def changed(exp: Experiment, *overrides: str) -> Experiment:
    return exp.with_overrides(overrides)


# Epochs


@pytest.mark.parametrize(("epochs", "batch", "iterations"), [(1, 2, 4), (2, 2, 7), (3, 7, 3), (1, 8, 1)])
def test_epochs_are_resolved_printed_and_stored(
    exp: Experiment, tmp_path: Path, capsys, epochs: int, batch: int, iterations: int
) -> None:
    """Seven images; the last batch of the run may reach into the next epoch."""
    batches = (f"train.batch_size={batch}", f"train.device_batch_size={batch}", "train.evaluate_every=0")
    train(changed(exp, f"schedule.epochs={epochs}", *batches), tmp_path)
    expected = f"schedule.epochs {epochs}: {iterations} iterations (7 images, train.batch_size {batch})"
    assert f"{expected} in place of schedule.iterations 10\n" in capsys.readouterr().out
    assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, iterations)
    assert (settings(tmp_path)["schedule"]["iterations"], settings(tmp_path)["schedule"]["epochs"]) == (
        iterations,
        epochs,
    )


def test_a_run_of_epochs_is_resumed_with_another_number_of_images(exp: Experiment, tmp_path: Path, capsys) -> None:
    exp = changed(exp, "schedule.epochs=2", "train.evaluate_every=0", "schedule.warmup_iterations=4")
    train(changed(exp, "data.train_images=images/train/[0-3].png", "data.train_masks=masks/train/[0-3].png"), tmp_path)
    shown = capsys.readouterr().out
    assert "2: 4 iterations (4 images, train.batch_size 2) in place of schedule.iterations 10, all of them within " in (
        shown
    )
    stored = replace(exp, schedule=replace(exp.schedule, iterations=4))  # as `train RUN --resume` reads it
    train(stored, tmp_path, resume=True)
    shown = capsys.readouterr().out
    assert "2: 7 iterations (7 images, train.batch_size 2) in place of schedule.iterations 4\n" in shown
    assert "iter_4: resuming from iteration 4\n" in shown
    assert "changed since then: schedule.iterations: 4 -> 7\n" in shown
    train(exp, tmp_path, resume=True)
    assert "iter_7: already finished; to train longer, raise schedule.epochs above 2\n" in capsys.readouterr().out
    before = (tmp_path / "experiment.json").read_bytes()
    train(changed(exp, "optimizer.lr=0.5"), tmp_path, resume=True)
    assert "optimizer.lr: " in capsys.readouterr().out
    assert (tmp_path / "experiment.json").read_bytes() == before  # nothing was trained with 0.5
    with pytest.raises(UserError, match=r"iter_7: is beyond schedule.epochs 1; raise that number$"):
        train(changed(exp, "schedule.epochs=1"), tmp_path, resume=True)


# Patience


@pytest.fixture
def mious(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """The mIoU to report at each evaluation by its iteration, 0.5 by default."""
    figures: dict[int, float] = {}
    iteration = 0

    def fixed(predictor: Any, *args: Any, **kwargs: Any) -> Any:
        found = evaluate(predictor, *args, **kwargs)
        found.final["mIoU"] = figures.get(iteration, 0.5)
        return found

    def validate(exp: Experiment, state: Any, *args: Any, original: Any = loop.validate) -> Any:
        nonlocal iteration
        iteration = state.iteration
        return original(exp, state, *args)

    monkeypatch.setattr(loop, "evaluate", fixed)
    monkeypatch.setattr(loop, "validate", validate)
    return figures


def test_patience_ends_a_run_as_its_last_iteration_would(exp: Experiment, tmp_path: Path, capsys, mious) -> None:
    mious.update({1: 0.4, 2: 0.5, 3: 0.45, 4: 0.6, 5: 0.6, 6: 0.1, 7: 0.6})
    found = train(changed(exp, "train.patience=3"), tmp_path)
    assert found is not None
    assert validated(tmp_path) == [1, 2, 3, 4, 5, 6, 7]
    reason = "no better mIoU in 3 evaluations (train.patience)"
    end = f"{tmp_path}: finished at iteration 7 of 10, {reason}; best: iteration 4, mIoU 60.00\n"
    assert capsys.readouterr().out.endswith(end)
    assert (results(tmp_path)["iteration"], results(tmp_path)["stopped_early"]) == (7, reason)
    assert results(tmp_path)["entries"] == found.to_json()["entries"]
    assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, 7)
    assert checkpoint.best(tmp_path) == checkpoint.folder_of(tmp_path, 4)

    train(changed(exp, "train.patience=3"), tmp_path, resume=True)
    shown = capsys.readouterr().out
    assert f"iter_7: already finished, {reason}; to train longer, raise train.patience above 3 or to None\n" in shown
    assert shown.endswith(end)
    assert results(tmp_path)["stopped_early"] == reason

    mious.clear()
    train(exp, tmp_path, resume=True)
    shown = capsys.readouterr().out
    assert "iter_7: resuming from iteration 7\n" in shown
    assert f"{tmp_path}: finished; best: iteration 4, mIoU 60.00\n" in shown
    assert (results(tmp_path)["iteration"], results(tmp_path)["stopped_early"]) == (10, "")


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_patience_counts_over_a_resume(exp: Experiment, tmp_path: Path, mious, stop: int, monkeypatch) -> None:
    """Wherever the run is interrupted, between a checkpoint and the next one or right after an evaluation."""
    mious.update({2: 0.6})
    exp = changed(exp, "train.patience=4", "train.save_every=2")

    def killed(*args: Any, original: Any = loop.train_step) -> None:
        if args[1].iteration == stop:
            raise RuntimeError("killed")
        original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            train(exp, tmp_path)
    train(exp, tmp_path, resume=True)
    assert validated(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert (results(tmp_path)["iteration"], checkpoint.load(checkpoint.folder_of(tmp_path, 6)).state["not_better"]) == (
        6,
        4,
    )


def test_without_a_single_better_evaluation(exp: Experiment, tmp_path: Path, capsys, mious) -> None:
    mious.update(dict.fromkeys(range(11), float("nan")))
    train(changed(exp, "train.patience=1"), tmp_path)
    assert capsys.readouterr().out.endswith("iteration 1 of 10, no better mIoU in 1 evaluation (train.patience)\n")


def test_patience_does_not_shorten_a_run_that_ends_anyway(exp: Experiment, tmp_path: Path, capsys, mious) -> None:
    train(changed(exp, "train.patience=9"), tmp_path)
    assert "finished; best" in capsys.readouterr().out
    assert (results(tmp_path)["iteration"], results(tmp_path)["stopped_early"]) == (10, "")


# Frozen parts


def test_a_frozen_part_keeps_its_weights_and_statistics(exp: Experiment, tmp_path: Path, capsys) -> None:
    """Also over evaluations, which change the mode, and in the averaged weights."""
    exp = changed(exp, "train.freeze=conv norm", "train.ema=0.9", "schedule.iterations=4")
    train(exp, tmp_path / "a")
    assert (
        "frozen: conv, norm (0.00024 M of 0.000258 M parameters) with random weights, as train.init_from is None\n"
        in (capsys.readouterr().out)
    )
    torch.manual_seed(exp.seed)
    before, after = TinyModel().build().state_dict(), checkpoint.load(checkpoint.folder_of(tmp_path / "a", 4))
    for name, tensor in before.items():
        moved = not torch.equal(tensor, after.model[name])
        assert moved == name.startswith("head"), name
    assert set(after.state["optimizer"]) == {"head.weight", "head.bias"}

    train(changed(exp, "schedule.iterations=2"), tmp_path / "b")
    train(exp, tmp_path / "b", resume=True)
    resumed = checkpoint.load(checkpoint.folder_of(tmp_path / "b", 4)).model
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in after.model.items())


def test_changed_parts_are_reported_on_resume(exp: Experiment, tmp_path: Path, capsys) -> None:
    exp = changed(exp, "schedule.iterations=2", "train.freeze=conv norm", "optimizer.lr_mult=head 2")
    train(exp, tmp_path)
    longer = ("schedule.iterations=4", "train.freeze=norm", "optimizer.lr_mult=head 2 conv 0.1")
    capsys.readouterr()
    train(changed(exp, *longer), tmp_path, resume=True)
    shown = capsys.readouterr().out
    assert "frozen: norm (1.6e-05 M of 0.000258 M parameters)\n" in shown
    assert "changed since then: train.freeze: ['conv', 'norm'] -> ['norm']\n" in shown
    assert "changed since then: optimizer.lr_mult: [['head', 2.0]] -> [['head', 2.0], ['conv', 0.1]]\n" in shown
    assert shown.count("changed since then") == 3
    assert set(checkpoint.load(checkpoint.folder_of(tmp_path, 4)).state["optimizer"]) == {
        *("conv.weight", "conv.bias", "head.weight", "head.bias"),
    }


def test_a_run_of_an_earlier_version_is_resumed(exp: Experiment, tmp_path: Path, capsys) -> None:
    """One without the settings and the state that came later: their defaults are no change."""
    train(exp.with_overrides(["schedule.iterations=4"]), tmp_path)
    folder = checkpoint.folder_of(tmp_path, 4)
    found = checkpoint.load(folder)
    for section, name in [("train", "freeze"), ("train", "patience"), ("optimizer", "lr_mult"), ("schedule", "epochs")]:
        del found.experiment["experiment"][section][name]
    del found.state["not_better"]
    checkpoint.save(folder, found.model, found.state, found.experiment)
    (tmp_path / "experiment.json").write_text(json.dumps(found.experiment))
    capsys.readouterr()
    train(changed(exp, "train.patience=9"), tmp_path, resume=True)
    shown = capsys.readouterr().out
    assert re.findall("changed since then: (.*)", shown) == [
        "schedule.iterations: 4 -> 10",
        "train.patience: None -> 9",
    ]


# Activations


def test_recomputed_activations_train_alike_and_evaluate(exp: Experiment, tmp_path: Path) -> None:
    """With dropout, gradient accumulation and an average; evaluations in between see the same model."""
    exp = changed(exp, "schedule.iterations=4", "train.device_batch_size=1", "train.ema=0.9")
    for recompute in (False, True):
        train(changed(exp, f"train.checkpoint_activations={recompute}"), tmp_path / str(recompute))
    plain, recomputed = (checkpoint.load(checkpoint.folder_of(tmp_path / run, 4)) for run in ("False", "True"))
    assert all(torch.equal(tensor, recomputed.model[name]) for name, tensor in plain.model.items())
    assert results(tmp_path / "False")["entries"] == results(tmp_path / "True")["entries"]


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["train.patience=2", "train.evaluate_every=0"], "train.patience counts evaluations, but train.evaluate_every"),
        (["train.checkpoint_activations=True", "train.compile=True"], "does not work with train.compile"),
        (["train.patience=0"], "train.patience is 0; it must be at least 1"),
        (["schedule.epochs=0"], "schedule.epochs is 0; it must be at least 1"),
        (["optimizer.lr_mult=head 0"], "optimizer.lr_mult is 0.0; it must be above 0"),
        (["optimizer.lr_mult=head=3"], "optimizer.lr-mult head=3: expected"),
    ],
)
def test_wrong_settings_are_one_line(exp: Experiment, overrides: Iterable[str], text: str) -> None:
    with pytest.raises(UserError) as caught:
        changed(exp, *overrides)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refused_class_weights_leave_nothing_behind(exp: Experiment, tmp_path: Path) -> None:
    exp = changed(exp, "data.rare_class_sampling=0.1", "loss.class_weight=1 2 3")
    with pytest.raises(UserError, match="has 3 values for 2 classes"):
        train(exp, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_without_blocks_is_refused(exp: Experiment, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(TinyModel, "build", lambda self: Tiny(2))
    with pytest.raises(UserError, match=r"^train.checkpoint_activations: Tiny names no blocks; set it to False, or"):
        train(changed(exp, "train.checkpoint_activations=True"), tmp_path / "run")
    with pytest.raises(UserError, match=r"^train.freeze convolution: .* \(did you mean conv\?\)"):
        train(changed(exp, "train.freeze=convolution"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_published_rows_are_as_before() -> None:
    for name in ("ddrnet_23_slim_cityscapes", "ddp_convnext_t_4x4_512x1024_160k_cityscapes"):
        exp = load_experiment(name)
        assert exp.schedule.epochs is exp.train.patience is None
        assert exp.train.freeze == exp.optimizer.lr_mult == ()
