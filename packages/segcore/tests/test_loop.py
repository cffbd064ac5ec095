"""The training loop on a tiny model and a folder of eight images."""

import json
import math
import os
import signal
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import segcore
from segcore import distributed, environment
from segcore.checkpoints import run_checkpoint as checkpoint
from segcore.config.schema import (
    DataConfig,
    EvalConfig,
    Experiment,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from segcore.data.batch import Batch
from segcore.data.layouts import open_dataset
from segcore.errors import UserError
from segcore.evaluation.evaluate import evaluate
from segcore.evaluation.predictor import Predictor
from segcore.models.segmentor import Segmentor
from segcore.testing.host_reads import HostReads
from segcore.testing.tiny import Tiny
from segcore.training import loop
from segcore.training.guard import HostCopy
from segcore.training.logger import Logger, MetricLogger
from segcore.training.loop import train, train_step
from segcore.training.setup import init_state
from segcore.training.signals import SignalHandler

FAULT: dict[str, Callable[[], float]] = {}
"""Faults that a test injects: `losses` returns a factor of the loss, `predict` runs before a prediction."""


class Net(Tiny):
    """A convolution, a norm, dropout and seeded noise: all kinds of state and randomness."""

    def logits(self, images, seeds=None):
        FAULT.get("predict", lambda: 1.0)()
        return super().logits(images, seeds)

    def losses(self, images, labels, **options):
        factor = FAULT.get("losses", lambda: 1.0)()
        images = images if math.isfinite(factor) else images * factor  # it also affects the running statistics
        losses = super().losses(images, labels, **options)
        return {**losses, "loss": factor * losses["loss"]}


@dataclass(frozen=True)
class TinyModel(ModelConfig):
    num_classes: int = 3
    dropout: float = 0.3

    def build(self) -> Segmentor:
        return Net(self.num_classes, dropout=self.dropout, noise=0.1)


@dataclass(frozen=True)
class Plain(TinyModel):
    """Without dropout, norm and noise; every image's loss is a mean over the same number of pixels."""

    def build(self) -> Segmentor:
        net = Net(self.num_classes, norm=nn.Identity)
        net.losses = lambda images, labels, **_: {"loss": net(images).square().mean()}
        return net


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Noisy images whose brighter stripe is class 1, with the darkest pixels ignored; class 2 does not occur."""
    root, rng = tmp_path_factory.mktemp("tiny"), np.random.RandomState(0)
    for i in range(8):
        label = np.zeros((32, 64), np.uint8)
        label[:, 8 * i : 8 * i + 16] = 1
        image = (rng.randint(0, 100, (32, 64, 3)) + 120 * label[..., None]).astype(np.uint8)
        label[image.max(2) < 20] = 255
        for folder, pixels in (("images", image), ("masks", label)):
            (root / folder / "train").mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(root / folder / "train" / f"{i}.png"), pixels)
    val = {"val_images": "images/train/[01].png", "val_masks": "masks/train/[01].png"}
    classes = ("dark", "bright", "absent")
    return DataConfig(
        "folder",
        root,
        classes=classes,
        img_scale=(64, 32),
        crop=(32, 32),
        ratio_range=(0.5, 2.0),
        cat_max_ratio=0.75,
        flip=0.5,
        photometric=True,
        workers=0,
        **val,
    )


@pytest.fixture
def exp(data: DataConfig) -> Experiment:
    """Six iterations of batch 3: the run crosses an epoch of 8 images at iteration 2, inside a batch."""
    return Experiment(
        "tiny",
        TinyModel(),
        data,
        OptimizerConfig(lr=0.01, weight_decay=0.01, clip_norm=1.0),
        ScheduleConfig(iterations=6, warmup_iterations=2, warmup_ratio=1e-6, warmup="scheduled"),
        train=TrainConfig(batch_size=3, device_batch_size=1, log_every=1, evaluate_every=2, save_every=2, keep_last=2),
        evaluate=EvalConfig(img_scale=(64, 32)),
    )


@pytest.fixture(autouse=True)
def _no_fault():
    FAULT.clear()
    yield
    FAULT.clear()


def at_call(number: int, happens: Callable[[], Any]) -> Callable[[], float]:
    """Return a fault that calls `happens` at its `number`-th call."""
    calls = 0

    def fault() -> float:
        nonlocal calls
        calls += 1
        return (happens() if calls == number else None) or 1.0

    return fault


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def spoil() -> None:
    raise UserError("3.png: cannot be read")


def exhaust() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB")


def fail() -> None:
    raise RuntimeError("the power is gone")


def state(work_dir: Path, iteration: int = 6) -> dict[str, Any]:
    """Return the complete saved state of an iteration in one flat dict."""
    found = checkpoint.load(checkpoint.folder_of(work_dir, iteration))
    moments = {f"{n}/{k}": v for n, values in found.state["optimizer"].items() for k, v in values.items()}
    parts = {f"{part}/{k}": v for part in ("scaler", "trained") for k, v in found.state.get(part, {}).items()}
    rest = {k: v for k, v in found.state.items() if k not in ("optimizer", "scaler", "trained")}
    return {**found.model, **moments, **parts, **rest}


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]) if isinstance(value, torch.Tensor) else value == theirs[name], name


def log(work_dir: Path, mode: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (work_dir / "log.jsonl").read_text().splitlines()]
    return [record for record in records if record["mode"] == mode]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("cut", ["interrupted", "killed", "in evaluation"])
def test_resumed_equals_uninterrupted_run(exp: Experiment, tmp_path: Path, capsys, precision: str, cut: str) -> None:
    half = precision != "fp32"
    exp = replace(exp, train=replace(exp.train, precision=precision, channels_last=half, ema=0.7 if half else None))
    exp = replace(exp, data=replace(exp.data, rare_class_sampling=0.1 if cut == "killed" else None))
    unbroken = train(exp, tmp_path / "a")
    assert unbroken is not None
    happens, expected = (fail, RuntimeError) if cut == "killed" else (interrupt, KeyboardInterrupt)
    if cut == "in evaluation":
        FAULT["predict"] = at_call(3, happens)  # the first of two images, after iteration 4
    else:
        FAULT["losses"] = at_call(8, happens)  # the second of three micro-batches of iteration 3
    with pytest.raises(expected):
        train(exp, tmp_path / "b")
    finished = {"interrupted": 3, "killed": 2, "in evaluation": 4}[cut]
    assert checkpoint.newest(tmp_path / "b") == checkpoint.folder_of(tmp_path / "b", finished)
    if cut != "killed":
        assert f"stopped after iteration {finished}; continue with `train --resume`" in capsys.readouterr().out
    FAULT.clear()
    resumed = train(exp, tmp_path / "b", resume=True)
    assert resumed is not None
    assert_equal(state(tmp_path / "a"), state(tmp_path / "b"))
    assert resumed.to_json() == unbroken.to_json()
    assert json.loads((tmp_path / "b/best.json").read_text()) == json.loads((tmp_path / "a/best.json").read_text())
    keys = {"train": ("iteration", "lr", "loss", "decode.loss_ce", "grad_norm"), "val": ("iteration", "mIoU")}
    for mode, names in keys.items():
        a, b = ([[record.get(key) for key in names] for record in log(tmp_path / run, mode)] for run in "ab")
        assert a == b


@pytest.mark.parametrize(
    ("where", "call", "happens", "text", "finished"),
    [
        ("losses", 12, spoil, r"3.png: cannot be read", 3),  # the last of three micro-batches of iteration 4
        ("losses", 12, exhaust, r"memory: lower train.device_batch_size \(1\) or data.crop \(32 32\)", 3),
        ("predict", 4, spoil, r"3.png: cannot be read", 4),
        (
            "predict",
            4,
            exhaust,
            r"memory in the evaluation: lower evaluate.batch_size \(1\), .*mode \(whole\) to slide",
            4,
        ),
    ],
)
def test_training_state_is_saved_before_an_error(
    exp: Experiment, tmp_path: Path, where: str, call: int, happens: Callable[[], None], text: str, finished: int
) -> None:
    exp = replace(exp, train=replace(exp.train, save_every=100))
    unbroken = train(exp, tmp_path / "a")
    FAULT[where] = at_call(call, happens)
    with pytest.raises(UserError, match=text) as caught:
        train(exp, tmp_path / "b")
    assert "\n" not in str(caught.value)
    assert checkpoint.newest(tmp_path / "b") == checkpoint.folder_of(tmp_path / "b", finished)
    FAULT.clear()
    resumed = train(exp, tmp_path / "b", resume=True)
    assert resumed is not None
    assert unbroken is not None
    assert resumed.to_json() == unbroken.to_json()
    assert_equal(state(tmp_path / "a"), state(tmp_path / "b"))


def test_a_crash_in_an_evaluation_does_not_lose_the_checkpoint_due(exp: Experiment, tmp_path: Path) -> None:
    FAULT["predict"] = at_call(4, fail)
    with pytest.raises(RuntimeError, match="the power is gone"):
        train(exp, tmp_path)
    assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, 4)


def test_a_resumed_run_does_not_repeat_an_evaluation(exp: Experiment, tmp_path: Path, monkeypatch) -> None:
    def always_the_same(*args: Any, **kwargs: Any) -> Any:
        results = evaluate(*args, **kwargs)
        results.final["mIoU"] = 0.5
        return results

    monkeypatch.setattr(loop, "evaluate", always_the_same)
    FAULT["losses"] = at_call(14, fail)  # in iteration 5
    with pytest.raises(RuntimeError):
        train(exp, tmp_path)
    train(exp, tmp_path, resume=True)
    assert [record["iteration"] for record in log(tmp_path, "val")] == [2, 4, 6]
    assert state(tmp_path)["evaluated"] == 6
    assert checkpoint.best(tmp_path) == checkpoint.folder_of(tmp_path, 2)


def test_out_of_memory_advises_what_can_be_set(exp: Experiment) -> None:
    for setting, offered in (("compile", False), ("checkpoint_activations", False), ("channels_last", True)):
        message = loop.out_of_memory(replace(exp, train=replace(exp.train, **{setting: True})))
        assert ("set train.checkpoint_activations" in message) == offered


def test_out_of_memory_in_the_optimizer_saves_nothing(exp: Experiment, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: exhaust())
    with pytest.raises(UserError, match=r"lower train\.device_batch_size"):
        train(exp, tmp_path)
    assert checkpoint.newest(tmp_path) is None


def test_a_second_interrupt_takes_effect_at_once(exp: Experiment, tmp_path: Path) -> None:
    FAULT["losses"] = at_call(8, lambda: (interrupt(), interrupt()))
    with pytest.raises(KeyboardInterrupt):
        train(exp, tmp_path)
    assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, 2)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_files_of_a_finished_run(exp: Experiment, tmp_path: Path) -> None:
    exp = replace(exp, train=replace(exp.train, keep_last=1, log_every=4))
    results = train(exp, tmp_path / "run")
    assert results is not None
    written = json.loads((tmp_path / "run/results.json").read_text())
    assert written["entries"] == results.to_json()["entries"]
    assert (written["name"], written["iteration"], written["images"]) == ("tiny", 6, 2)
    assert json.loads((tmp_path / "run/experiment.json").read_text())["experiment"]["train"]["keep_last"] == 1
    figures = {record["iteration"]: record["mIoU"] for record in log(tmp_path / "run", "val")}
    assert list(figures) == [2, 4, 6]
    best = max(figures, key=lambda i: (figures[i], -i))
    assert checkpoint.best(tmp_path / "run") == checkpoint.folder_of(tmp_path / "run", best)
    assert {p.name for p in (tmp_path / "run/checkpoints").iterdir()} == {f"iter_{best}", "iter_6"}
    first, last = log(tmp_path / "run", "train")
    assert (first["iteration"], last["iteration"]) == (4, 6)
    assert first["lr"] == pytest.approx(0.01 * (1 - 3 / 6))
    assert last["images_per_second"] * last["seconds"] == pytest.approx(3)
    assert last["data_seconds"] <= last["seconds"]


def test_files_of_a_run_have_the_permissions_of_the_umask(exp: Experiment, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        train(replace(exp, loss=replace(exp.loss, class_weight="auto")), tmp_path / "run")
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run").rglob("*")}
    assert len(modes) > 18
    assert {path: mode for path, mode in modes.items() if mode != (0o750 if path.is_dir() else 0o640)} == {}


def test_what_pruning_keeps_is_reported_once(exp: Experiment, tmp_path: Path, capsys) -> None:
    """A checkpoint of a newer version at iteration 1 and, at iteration 3, none of this program's."""
    short = replace(exp, schedule=replace(exp.schedule, iterations=2), train=replace(exp.train, save_every=1))
    train(short, tmp_path)
    path = tmp_path / "checkpoints/iter_1/manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 99'))
    (tmp_path / "checkpoints/iter_3").mkdir()
    (tmp_path / "checkpoints/iter_3/notes.txt").touch()
    capsys.readouterr()
    train(replace(exp, train=replace(exp.train, save_every=1, keep_last=1)), tmp_path, resume=True)
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if "iter_1/manifest.json: format 99 instead of 1" in line]) == 1
    assert len([line for line in said if "iter_3/manifest.json: missing; kept as" in line]) == 1
    assert path.exists()
    assert (tmp_path / "checkpoints/iter_3.kept/notes.txt").exists()
    assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, 6)


@pytest.mark.parametrize(
    "change", [{"iteration": None}, {"best_miou": "a"}, {"optimizer": 3}, {"skipped": [1]}], ids=str
)
def test_a_state_with_other_content_is_one_line(exp: Experiment, tmp_path: Path, change: dict[str, Any]) -> None:
    train(replace(exp, schedule=replace(exp.schedule, iterations=2)), tmp_path)
    found = checkpoint.load(checkpoint.folder_of(tmp_path, 2))
    checkpoint.save(checkpoint.folder_of(tmp_path, 2), found.model, found.state | change, found.experiment)
    with pytest.raises(UserError, match=rf"state\.pt: has no usable {next(iter(change))}; choose"):
        train(exp, tmp_path, resume=True)


@pytest.mark.parametrize(
    "change",
    [
        {"trained": ["a"]},
        {"trained": {"conv.bias": torch.zeros(7)}},
        {"optimizer": {"conv.bias": 3}},
        {"optimizer": {"state": 3}},
        {"optimizer": {"conv.bias": {"momentum_buffer": torch.zeros(3)}}},
    ],
    ids=str,
)
def test_a_state_that_does_not_fit_is_one_line(exp: Experiment, tmp_path: Path, change: dict[str, Any]) -> None:
    train(replace(exp, schedule=replace(exp.schedule, iterations=2)), tmp_path)
    found = checkpoint.load(checkpoint.folder_of(tmp_path, 2))
    checkpoint.save(checkpoint.folder_of(tmp_path, 2), found.model, found.state | change, found.experiment)
    words = "does not fit the run \\(.*\\);|the optimizer state is for 1 .*|the optimizer state is that of sgd; .* sgd"
    with pytest.raises(UserError, match=rf"state\.pt: ({words}),?( or)? choose another --work-dir"):
        train(replace(exp, optimizer=replace(exp.optimizer, kind="adamw")), tmp_path, resume=True)


def test_a_record_of_the_best_that_was_not_written_is_written_on_resume(exp: Experiment, tmp_path: Path) -> None:
    train(exp, tmp_path)
    record = (tmp_path / "best.json").read_text()
    (tmp_path / "best.json").write_text('{"iteration": 2, "mIoU": 0.1}\n')  # as before the last evaluation
    train(exp, tmp_path, resume=True)
    assert (tmp_path / "best.json").read_text() == record


def test_a_signal_after_the_last_check_is_not_lost() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, SignalHandler():
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.args == (signal.SIGTERM,)


def test_training_learns_the_task(exp: Experiment, tmp_path: Path) -> None:
    exp = replace(
        exp,
        optimizer=replace(exp.optimizer, clip_norm=None),
        schedule=replace(exp.schedule, iterations=40),
        train=replace(exp.train, evaluate_every=40, save_every=40),
    )
    results = train(exp, tmp_path)
    assert results is not None
    losses = [record["loss"] for record in log(tmp_path, "train")]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert results.final["mIoU"] > 0.8


def test_training_without_evaluation(exp: Experiment, tmp_path: Path) -> None:
    data = replace(exp.data, val_images="nothing/*.png")
    assert train(replace(exp, data=data, train=replace(exp.train, evaluate_every=0)), tmp_path) is None
    assert not (tmp_path / "results.json").exists()
    assert checkpoint.best(tmp_path) is None
    assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, 6)


def test_accumulated_gradient_equals_that_of_the_whole_batch(exp: Experiment, tmp_path: Path) -> None:
    exp = replace(exp, model=Plain(), train=replace(exp.train, batch_size=4))
    for parts in (1, 4):
        train(replace(exp, train=replace(exp.train, device_batch_size=4 // parts)), tmp_path / str(parts))
    one, four = (state(tmp_path / parts) for parts in "14")
    for name in ("conv.weight", "head.weight", "head.weight/exp_avg"):
        torch.testing.assert_close(one[name], four[name], rtol=1e-4, atol=1e-6)


def test_step_that_is_not_finite_is_skipped(exp: Experiment, tmp_path: Path) -> None:
    FAULT["losses"] = at_call(8, lambda: float("nan"))
    train(exp, tmp_path)
    assert [record.get("skipped", 0) for record in log(tmp_path, "train")] == [0, 0, 1, 0, 0, 0]
    assert log(tmp_path, "train")[2]["loss"] is None
    saved = state(tmp_path)
    assert saved["conv.weight/step"] == 5
    assert all(value.isfinite().all() for value in saved.values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize(("hardware", "same"), [(False, "fp32"), (True, "bf16")])
def test_auto_precision_is_that_of_the_hardware(
    exp: Experiment, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, hardware: bool, same: str
) -> None:
    monkeypatch.setattr(environment, "has_bfloat16", lambda device: hardware)
    for precision in ("auto", same):
        train(replace(exp, train=replace(exp.train, precision=precision)), tmp_path / precision)
    assert_equal(state(tmp_path / "auto"), state(tmp_path / same))
    out = capsys.readouterr().out
    assert f"\ntrain.precision: auto, {same} on this cpu\n" in out
    assert "no instructions for bf16" not in out


def test_a_slow_precision_is_noted(exp: Experiment, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "has_bfloat16", lambda device: False)
    exp = replace(exp, train=replace(exp.train, precision="bf16"))
    train(exp, tmp_path / "run")
    note = "note: this processor has no instructions for bf16, which is slow on it; precision auto avoids that"
    assert f"\n{note}\n" in capsys.readouterr().out
    assert note in segcore.load_model(exp, tmp_path / "run", device="cpu").report


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_three_consecutive_nonfinite_steps_stop_the_run(exp: Experiment, tmp_path: Path, precision: str) -> None:
    calls = iter([1.0] * 6)
    FAULT["losses"] = lambda: next(calls, float("inf"))
    with pytest.raises(UserError, match=r"not finite 3 times in a row.*last good checkpoint: .*iter_4$"):
        train(replace(exp, train=replace(exp.train, precision=precision)), tmp_path)
    assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, 4)
    before, after = state(tmp_path, 2), state(tmp_path, 4)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items() if "." in name)


def test_fp16_overflow_is_left_to_the_scaler(exp: Experiment, tmp_path: Path) -> None:
    """A loss of some thousands overflows at the initial scale; the scaler lowers it and the run continues."""
    FAULT["losses"] = lambda: 30_000.0
    exp = replace(exp, schedule=replace(exp.schedule, iterations=20), train=replace(exp.train, precision="fp16"))
    train(exp, tmp_path)
    skipped = [record.get("skipped", 0) for record in log(tmp_path, "train")]
    assert skipped[:3] == [1, 1, 1]
    assert skipped[-1] == 0
    assert state(tmp_path, 20)["scaler/scale"] < 65536


def test_resuming_a_finished_run_only_evaluates_it(exp: Experiment, tmp_path: Path) -> None:
    first = train(exp, tmp_path)
    before = state(tmp_path)
    FAULT["losses"] = fail
    second = train(exp, tmp_path, resume=True)
    assert first is not None
    assert second is not None
    assert first.to_json() == second.to_json()
    assert_equal(before, state(tmp_path))


def test_resume_skips_a_damaged_checkpoint(exp: Experiment, tmp_path: Path, capsys) -> None:
    train(exp, tmp_path)
    before = state(tmp_path)
    path = checkpoint.folder_of(tmp_path, 6) / "state.pt"
    path.write_bytes(path.read_bytes()[:-9])
    train(exp, tmp_path, resume=True)
    shown = capsys.readouterr()
    assert f"{path}: has " in shown.err
    assert "iter_4: resuming from iteration 4" in shown.out
    assert_equal(before, state(tmp_path))
    for folder in (tmp_path / "checkpoints").iterdir():
        (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"checkpoints: .*start again with another --work-dir"):
        train(exp, tmp_path, resume=True)


def test_resume_says_which_settings_changed(exp: Experiment, tmp_path: Path, capsys) -> None:
    train(exp, tmp_path)
    with pytest.raises(UserError, match=r"iter_6: is beyond schedule.iterations 5"):
        train(replace(exp, schedule=replace(exp.schedule, iterations=5)), tmp_path, resume=True)
    other = replace(exp, model=TinyModel(4), data=replace(exp.data, classes=("a", "b", "c", "d")))
    with pytest.raises(UserError, match=r"iter_6: 2 tensors do not fit the model \(first: head.bias\)"):
        train(other, tmp_path, resume=True)
    train(replace(exp, schedule=replace(exp.schedule, iterations=7)), tmp_path, resume=True)
    assert "changed since then: schedule.iterations: 6 -> 7" in capsys.readouterr().out
    assert state(tmp_path, 7)["conv.weight/step"] == 7


def test_averaged_weights_are_evaluated_and_saved(exp: Experiment, tmp_path: Path) -> None:
    train(exp, tmp_path / "plain")
    results = train(replace(exp, train=replace(exp.train, ema=0.9)), tmp_path / "averaged")
    plain, ours = state(tmp_path / "plain"), state(tmp_path / "averaged")
    assert torch.equal(ours["trained/conv.weight"], plain["conv.weight"])
    assert not torch.allclose(ours["conv.weight"], plain["conv.weight"], atol=1e-4)
    model = exp.model.build()
    model.load_checkpoint(checkpoint.load(checkpoint.folder_of(tmp_path / "averaged", 6)).model)
    again = evaluate(Predictor.of(model, exp), open_dataset(exp.data, "val"))
    assert results is not None
    assert again.to_json() == results.to_json()


@pytest.mark.slow
def test_compiled_training_has_the_same_losses(exp: Experiment, tmp_path: Path) -> None:
    exp = replace(exp, model=Plain(), train=replace(exp.train, evaluate_every=0))
    train(exp, tmp_path / "eager")
    train(replace(exp, train=replace(exp.train, compile=True)), tmp_path / "compiled")
    eager, compiled = ([record["loss"] for record in log(tmp_path / run, "train")] for run in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, rel=1e-3)


def test_tensorboard_has_the_curves_and_an_image(exp: Experiment, tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(exp, tmp_path)
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    names = events.Tags()["scalars"]
    wanted = ("loss", "decode.loss_ce", "lr", "grad_norm", "images_per_second", "data_seconds")
    assert {f"train/{name}" for name in wanted} | {"val_iou/dark", "val_iou/bright"} <= set(names)
    assert sorted(name for name in names if name.startswith("val"))[0] == "val/mIoU"
    settings = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| train.batch_size | 3 |" in settings
    assert set(events.PluginTagToContent("hparams")) == {
        f"_hparams_/{part}" for part in ("experiment", "session_start_info", "session_end_info")
    }
    logged = [record["loss"] for record in log(tmp_path, "train")]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(logged)
    assert [event.step for event in events.Images("predictions")] == [2, 4, 6]
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        *(f"predictions_{iteration}.png" for iteration in (2, 4, 6)),
    }


def test_used_folder_is_refused_without_resume(exp: Experiment, tmp_path: Path, capsys) -> None:
    (tmp_path / "notes.txt").touch()
    for used, problem in ((tmp_path, "is not empty; add --resume"), (tmp_path / "notes.txt", "is a file; choose")):
        with pytest.raises(UserError, match=problem):
            train(exp, used)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    train(exp, tmp_path / "new", resume=True)
    assert "no checkpoint yet, starting from the beginning" in capsys.readouterr().out


def test_a_run_that_cannot_start_leaves_no_files(exp: Experiment, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="classes"):
        train(replace(exp, model=TinyModel(5)), tmp_path / "run")
    with pytest.raises(UserError):
        train(replace(exp, data=replace(exp.data, root=tmp_path / "nowhere")), tmp_path / "run")
    with pytest.raises(UserError, match="gone"):
        train(replace(exp, train=replace(exp.train, init_from=str(tmp_path / "gone.pth"))), tmp_path / "run")
    with pytest.raises(UserError, match=r"0.png: has no label to evaluate with; set data.val_masks"):
        train(replace(exp, data=replace(exp.data, val_masks="")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_logged_memory_is_that_of_the_run_device(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 2**20 * torch.device(device).index)
    metrics = MetricLogger()
    metrics.add(["loss"], torch.tensor([2.0]), torch.tensor(False))
    metrics.seconds = 1.0
    assert "memory_mb" not in metrics.read(4, torch.device("cpu"))
    assert metrics.read(4, torch.device("cuda:3"))["memory_mb"] == 3


def test_weights_follow_from_the_seed(exp: Experiment, tmp_path: Path) -> None:
    exp = replace(exp, optimizer=replace(exp.optimizer, lr=0.0), schedule=replace(exp.schedule, iterations=1))
    torch.manual_seed(5)
    train(exp, tmp_path / "a")
    train(exp, tmp_path / "b")
    train(replace(exp, seed=1), tmp_path / "c")
    a, b, c = (state(tmp_path / run, 1)["conv.weight"] for run in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_cache_and_workers_by_themselves_change_nothing(exp: Experiment, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(loop, "worker_count", lambda workers: 0)
    cached = replace(exp, data=replace(exp.data, cache=tmp_path / "cache", workers="auto"))
    for name, each in (("plain", exp), ("filled", cached), ("read", cached)):
        train(each, tmp_path / name)
    weights = [state(tmp_path / name)["conv.weight"] for name in ("plain", "filled", "read")]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])
    assert capsys.readouterr().out.count(f"data.cache {tmp_path / 'cache'}: ") == 2
    stored = json.loads((tmp_path / "read/experiment.json").read_text())["experiment"]["data"]
    assert stored["workers"] == "auto", "another machine has another number"


def test_start_weights_come_from_a_file_once(exp: Experiment, tmp_path: Path, capsys) -> None:
    start = {name: torch.full_like(tensor, 0.25) for name, tensor in TinyModel().build().state_dict().items()}
    save_file(start, tmp_path / "start.safetensors")
    exp = replace(
        exp,
        optimizer=replace(exp.optimizer, lr=0.0),
        train=replace(exp.train, init_from=str(tmp_path / "start.safetensors")),
    )
    train(exp, tmp_path / "run")
    assert torch.equal(state(tmp_path / "run")["conv.weight"], start["conv.weight"])
    assert "start.safetensors: loaded" in capsys.readouterr().out
    (tmp_path / "start.safetensors").unlink()
    train(exp, tmp_path / "run", resume=True)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_bad_step_changes_nothing(exp: Experiment, kind: str, precision: str) -> None:
    """Even a bad first step, before the optimizer has any state, does not affect the steps after it."""
    exp = replace(exp, optimizer=OptimizerConfig(kind, lr=0.01, clip_norm=1.0))
    exp = replace(exp, train=replace(exp.train, precision=precision, ema=0.9))
    labels = torch.randint(3, (2, 16, 16), generator=torch.Generator().manual_seed(1))
    good = [
        Batch(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(i)), labels, [1, 2], i) for i in (0, 1)
    ]
    bad = Batch(torch.full((2, 3, 16, 16), float("nan")), labels, [1, 2], 0)
    first, second = init_state(exp, torch.device("cpu")), init_state(exp, torch.device("cpu"))
    second.scaler = torch.amp.GradScaler(
        "cpu", enabled=precision == "fp16", init_scale=2.0**15
    )  # as a bad step leaves it
    for run, steps in ((first, [bad, good[0], bad, good[1]]), (second, good)):
        metrics = MetricLogger()
        run.model.train()
        for batch in steps:
            run.iteration = batch.iteration
            train_step(exp, run, [batch], metrics)
            if batch is bad and run.iteration == 0 and precision == "fp16":
                run.scaler.load_state_dict(run.scaler.state_dict() | {"scale": 2.0**15})
        assert HostCopy(run.failures).read() == 0
        found = metrics.read(2, torch.device("cpu"))
        assert found.get("skipped", 0) == len(steps) - 2
        assert found["loss"] < 10
    for (name, value), other in zip(first.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
        if name in first.average:
            assert torch.equal(first.average[name], second.average[name]), name
    for p, q in zip(first.model.parameters(), second.model.parameters(), strict=True):
        mine, theirs = first.optimizer.state[p], second.optimizer.state[q]
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_host_reads_nothing_between_two_log_lines(exp: Experiment, tmp_path: Path, monkeypatch, precision) -> None:
    """Not even when a step is skipped. Every counted operation would wait for a GPU."""
    settings = replace(exp.train, precision=precision, ema=0.9, log_every=5, evaluate_every=0, save_every=20)
    exp = replace(exp, train=settings, schedule=replace(exp.schedule, iterations=10))
    reads, counts = HostReads(), []
    for name in ("tolist", "cpu"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, f=original: (reads.found.append(f.__name__), f(x))[1])
    monkeypatch.setattr(loop, "next_micro_batches", silent(reads, loop.next_micro_batches))
    advance = Logger.advance
    monkeypatch.setattr(Logger, "advance", lambda *args: (counts.append(len(reads.found)), advance(*args))[1])
    FAULT["losses"] = at_call(8, lambda: float("nan"))
    with reads:
        train(exp, tmp_path)
    assert len(counts) == 10
    assert len(set(counts[:5])) == len(set(counts[5:])) == 1, reads.found
    assert counts[5] > counts[4], "a log line does read"


def silent(reads: HostReads, function):
    """Reading images and counting errors happen on the CPU: do not count their reads."""

    def wrapped(*args):
        found = list(reads.found)
        micro_batches, agree = function(*args)
        reads.found[:] = found

        def agreed():
            found = list(reads.found)
            sums = agree()
            reads.found[:] = found
            return sums

        return micro_batches, agreed

    return wrapped


@pytest.mark.gpu
def test_no_step_waits_for_the_gpu(exp: Experiment, tmp_path: Path, monkeypatch) -> None:
    """CUDA's own check: a step that synchronizes raises."""

    def strict(function):
        def wrapped(*args):
            torch.cuda.set_sync_debug_mode("error" if args[1].iteration else "default")  # the first one sets up
            try:
                return function(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return wrapped

    monkeypatch.setattr(loop, "train_step", strict(loop.train_step))
    monkeypatch.setattr(Net, "losses", quiet_losses)
    exp = replace(exp, train=replace(exp.train, log_every=6, evaluate_every=0, ema=0.9, precision="bf16"))
    train(exp, tmp_path, device="cuda")
    assert log(tmp_path, "train")[-1]["loss"] < 10
    assert state(tmp_path)["iteration"] == 6


def quiet_losses(self, images, labels, **options):
    """A loss without noise from the CPU."""
    hidden = self.norm(self.conv(images)).relu()
    return {"loss": nn.functional.cross_entropy(self.head(self.dropout(hidden)).float(), labels, ignore_index=255)}


def test_ranks_agree_on_a_step_during_the_previous_one(exp: Experiment, tmp_path: Path, monkeypatch) -> None:
    """Their messages have a whole step to arrive."""
    events, start, step = [], distributed.start_sync_status, loop.train_step

    def started(*args: Any) -> Callable[[], list[int]]:
        number, finish = sum(event.startswith("tell") for event in events), start(*args)
        events.append(f"tell {number}")
        return lambda: (events.append(f"wait {number}"), finish())[1]

    monkeypatch.setattr(distributed, "start_sync_status", started)
    monkeypatch.setattr(loop, "train_step", lambda *args: (step(*args), events.append(f"step {args[1].iteration}"))[0])
    train(replace(exp, train=replace(exp.train, evaluate_every=0)), tmp_path)
    assert events[:6] == ["tell 0", "wait 0", "tell 1", "step 0", "wait 1", "tell 2"]
    assert events[-3:] == ["step 4", "wait 5", "step 5"]
