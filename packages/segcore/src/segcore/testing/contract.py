"""The contract of a `Segmentor` and a `StepwiseSegmentor`, as functions that raise AssertionError.

A method's `tests/test_contract.py` calls them with small models built from its own dataclass.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from segcore.cli.main import COMMANDS
from segcore.config.registry import experiments, load_experiment
from segcore.config.schema import DataConfig, EvalConfig, Experiment, LossConfig, ModelConfig
from segcore.data.images import read_label
from segcore.data.layouts import palette_of
from segcore.deploy import export
from segcore.deploy.runtimes import load_exported
from segcore.environment import LIBRARIES
from segcore.evaluation.predictor import Predictor
from segcore.inference import LoadedModel
from segcore.models import layers
from segcore.models.losses import LOSSES
from segcore.models.segmentor import Segmentor
from segcore.models.stepwise import StepwiseSegmentor, predict_entries, require_stepwise
from segcore.testing.host_reads import HostReads
from segcore.testing.stored import filled
from segcore.training.activations import checkpoint_activations

ODD_SIZES = ((51, 70), (64, 33), (97, 64))


def images(count: int, height: int = 64, width: int = 96, channels: int = 3) -> Tensor:
    """Return reproducible normalized images (count, channels, height, width)."""
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(count))


def labels(model: Segmentor, count: int, height: int = 64, width: int = 96) -> Tensor:
    """Return reproducible labels (count, height, width) int64 with an ignored border."""
    generator = torch.Generator().manual_seed(count)
    values = torch.randint(model.num_classes, (count, height, width), generator=generator)
    values[:, :3] = model.ignore_index
    return values


def refusal(call: Callable[[], object]) -> str:
    """Return the message of the ValueError that `call` must raise."""
    try:
        call()
    except ValueError as error:
        return str(error)
    raise AssertionError("bad input was accepted")


@torch.no_grad()
def check_forward(model: Segmentor) -> None:
    """Check batches of 1 and 3, odd sizes, and finite logits at the input's size; too small images raise ValueError.

    The logits equal those at the network's own resolution, resized to the input's size. `fuse` gives the same logits.
    """
    model.eval()
    for count in (1, 3):
        assert model(images(count)).shape == (count, model.num_classes, 64, 96)
    fused = model.fuse()
    for height, width in ODD_SIZES:
        batch = images(1, height, width)
        logits, own = model(batch), model(batch, resize=False)
        assert logits.shape == (1, model.num_classes, height, width)
        assert own.shape[:2] == logits.shape[:2]
        assert torch.equal(model.resize_to_input(own, (height, width)), logits)
        assert logits.isfinite().all()
        torch.testing.assert_close(fused(batch), logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(fused.fuse()(batch), fused(batch)), "fused again"
    if model.min_size > 1:
        assert str(model.min_size) in refusal(lambda: model(images(1, model.min_size - 1, 64)))


@torch.no_grad()
def check_seeds(model: Segmentor, atol: float = 1e-4) -> None:
    """An image's logits are equal alone and in a batch; equal seeds repeat, None is seed 0, a wrong number raises."""
    model.eval()
    batch, seeds = images(3), [5, 6, 5]
    together = model(batch, seeds=seeds)
    assert torch.equal(together, model(batch, seeds=seeds)), "the same seeds gave another answer"
    assert torch.equal(model(batch), model(batch, seeds=[0, 0, 0]))
    for i, seed in enumerate(seeds):
        alone = model(batch[i : i + 1], seeds=[seed])
        torch.testing.assert_close(together[i : i + 1], alone, atol=atol, rtol=1e-4)


@torch.no_grad()
def check_products(model: Segmentor) -> None:
    """Check that oneDNN's products, where the operator is present, give the logits of MKL's within 2e-5 of the largest.

    The classes are equal, except for ties within that difference.
    """
    batch, answers = images(2), []
    for library in LIBRARIES:
        with mock.patch.dict(os.environ, SEG_LINEAR=library), mock.patch.object(layers, "FEW", 0):
            answers.append(copy.deepcopy(model).eval()(batch))
    mkl, onednn = answers
    most = 2e-5 * mkl.abs().max().item()
    torch.testing.assert_close(onednn, mkl, atol=most, rtol=0)
    first, second = mkl.topk(2, 1).values.unbind(1)
    assert (first - second)[onednn.argmax(1) != mkl.argmax(1)].le(2 * most).all()


@torch.no_grad()
def check_plain(model: Segmentor) -> None:
    """A model without steps has no stepwise attributes and exactly one entry."""
    assert not isinstance(model, StepwiseSegmentor)
    assert not hasattr(model, "predict_steps")
    batch = images(2)
    entries = predict_entries(model.eval(), batch, (1, 2), [1, 2])
    assert list(entries) == ["final"]
    assert torch.equal(entries["final"], model(batch, seeds=[1, 2]))
    assert "leave out --steps" in refusal(lambda: require_stepwise(model, "--steps"))


@torch.no_grad()
def check_onnx(model: Segmentor, config: ModelConfig, size: tuple[int, int], path: Path) -> None:
    """The ONNX file of one size, with weights at their usual scales, answers in ONNX Runtime as the model; slow."""
    names = tuple(f"c{i}" for i in range(config.num_classes - (model.ignore_index == 0)))
    exp = Experiment("onnx", config, DataConfig(classes=names, add_background_class=model.ignore_index == 0))
    export.export(filled(model), exp, path, export.Settings(*size))
    batch = images(1, *size)
    found, own = load_exported(path)(batch), model(batch)
    assert found.shape == own.shape
    assert (found.argmax(1) == own.argmax(1)).double().mean() >= export.MIN_AGREEMENT


@torch.no_grad()
def check_steps(model: StepwiseSegmentor, steps: tuple[int, ...]) -> None:
    """Entries are outputs at the input's size; the configured one is the last; trajectories have one per step."""
    model.eval()
    batch, seeds = images(2), [1, 2]
    answer = model(batch, seeds=seeds)
    entries = model.predict_steps(batch, seeds=seeds)
    assert list(entries) == [model.default_step]
    assert torch.equal(list(entries.values())[-1], answer)
    asked = model.predict_steps(batch, steps=steps, seeds=seeds)
    assert list(asked) == [str(step) for step in steps]
    assert predict_entries(model, batch, steps, seeds).keys() == asked.keys()
    shown = model.denoising_trajectory(batch, seeds=seeds)
    assert len(shown) == min(len(model.step_keys), 20)
    torch.testing.assert_close(list(shown.values())[-1], answer, atol=1e-4, rtol=1e-4)
    for logits in (*asked.values(), *shown.values()):
        assert logits.shape == (2, model.num_classes, 64, 96)
    assert "leave out --dynamic" in refusal(lambda: model.exportable(batch, dynamic=True))
    fixed = model.exportable(batch, dynamic=False)
    torch.testing.assert_close(fixed(batch), model(batch), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def check_denoising(model: StepwiseSegmentor) -> None:
    """Mean probabilities are log-probabilities that depend on the noise; a run may stop early or not."""
    model.eval()
    batch, seeds = images(2), [1, 2]
    steps = list(model.denoising_trajectory(batch, seeds=seeds).values())
    assert len(steps) > 1
    mean = model.log_mean_probs(batch, seeds, starts=2)
    assert mean.shape == steps[-1].shape
    assert mean.isfinite().all()
    assert mean.max() < 1e-5, "no log-probabilities"
    assert not torch.equal(mean, model.log_mean_probs(batch, [7, 8], starts=2)), "the noise plays no part"
    for percent in (1e-9, 50.0, 100.0):
        found, steps_used = model.early_exit(batch, percent, seeds)
        for row, count in enumerate(steps_used):
            assert 1 < count <= len(steps)
            torch.testing.assert_close(found[row], steps[count - 1][row], atol=1e-4, rtol=1e-4)


def check_probabilities(model: Segmentor, config: ModelConfig, folder: Path) -> None:
    """The written probabilities add up to 1 and are highest at the mask's class: whole, windows, several views.

    Confidence is that probability; the mask is the same whatever is written beside it.
    """
    background = model.ignore_index == 0
    names = tuple(f"class {k}" for k in range(model.num_classes - background))
    data = DataConfig("folder", classes=names, add_background_class=background)
    image = torch.randint(256, (64, 96, 3), generator=torch.Generator().manual_seed(0)).byte().numpy()
    for evaluate in (
        EvalConfig(None),
        EvalConfig(None, "slide", crop=(64, 64), stride=(64, 32)),
        EvalConfig((96, 64), img_ratios=(0.75, 1.25), flip=True),
    ):
        exp = Experiment("mine", config, data, evaluate=evaluate)
        seg = LoadedModel(exp, Predictor.of(model.eval(), exp))
        plain, result = seg(image), seg(image, probabilities=True)
        mask_file, _ = plain.save(folder / "mask")
        found, _, confidence_file, file = result.save(folder, confidence=True, probabilities=True)
        assert found.read_bytes() == mask_file.read_bytes()
        mask, gray = read_label(found), read_label(confidence_file)
        with np.load(file, allow_pickle=False) as stored:
            probabilities, values = stored["probabilities"], stored["values"]
            assert tuple(stored["names"]) == seg.class_names
        assert (probabilities.dtype, probabilities.shape) == (np.float16, (model.num_classes, 64, 96))
        np.testing.assert_allclose(probabilities.sum(0, dtype=np.float64), 1, atol=1e-3)
        chosen = np.where(values[:, None, None] == mask, probabilities, -1).max(0)
        assert (chosen == probabilities.max(0)).all()  # rounding keeps the order; only ties may go to another class
        np.testing.assert_allclose(gray / 255, chosen, atol=0.5 / 255 + 1e-3)
        np.testing.assert_allclose(plain.probabilities, result.probabilities, atol=1e-5)  # by another run


def check_backward(model: Segmentor) -> None:
    """Batches of 2 and 3, float32 and bfloat16: the loss is the sum of its parts, and each gradient is finite.

    No operation makes the host wait for the device.
    """
    model.train()
    for count, half in ((2, False), (3, True)):
        model.zero_grad()
        with HostReads() as reads, torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses = model.losses(images(count), labels(model, count), seeds=list(range(count)))
        parts = [value for name, value in losses.items() if "loss" in name and name != "loss"]
        torch.testing.assert_close(losses["loss"], torch.stack(parts).sum())
        with reads:
            losses["loss"].backward()
        assert reads.found == [], "these wait for the device"
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, f"{name} got no gradient"
            assert parameter.grad.isfinite().all(), f"{name} has a gradient that is not finite"


def check_training_draws(model: Segmentor) -> None:
    """Training draws follow from the seeds, image by image."""
    model.eval()  # no stochastic layers: only the seeds are random
    batch, target = images(2), labels(model, 2)
    first, again = (model.losses(batch, target, seeds=[3, 4])["loss"] for _ in range(2))
    assert torch.equal(first, again)


def check_all_ignored(model: Segmentor) -> None:
    """A batch without a single labeled pixel has a finite loss and finite gradients."""
    model.train()
    model.zero_grad()
    target = torch.full((2, 64, 96), model.ignore_index)
    loss = model.losses(images(2), target, seeds=[0, 1])["loss"]
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def check_losses(model: Segmentor, kinds: Sequence[str] = tuple(LOSSES)) -> None:
    """The losses use `loss.kind` and `loss.class_weight` without storing it in the model; unsupported ones raise."""
    model.eval()
    names, batch, target = set(model.state_dict()), images(2), labels(model, 2)

    def loss(**settings: Any) -> Tensor:
        return model.losses(batch, target, seeds=[3, 4], loss=LossConfig(**settings))["loss"]

    weight = tuple(torch.linspace(0.5, 2, model.num_classes).tolist())
    for kind in LOSSES:
        if kind in kinds:
            plain, weighted = (loss(kind=kind, ohem_min_kept=1, class_weight=w) for w in (None, weight))
            assert not torch.equal(plain, weighted)
        else:
            assert f"loss.kind is {kind}" in refusal(partial(loss, kind=kind))
    mixed = partial(loss, kind=("cross_entropy", "dice"), weights=(1.0, 0.5))
    if "dice" in kinds:
        torch.testing.assert_close(mixed(), loss() + 0.5 * loss(kind="dice"))
        assert loss(label_smoothing=0.5) != loss()
    else:
        assert "loss.kind is cross_entropy dice" in refusal(mixed)
        assert "loss.label_smoothing" in refusal(partial(loss, label_smoothing=0.5))
    assert torch.equal(loss(), model.losses(batch, target, seeds=[3, 4])["loss"])
    assert loss(avg_non_ignore=True) > loss(), "ignored pixels count"
    assert set(model.state_dict()) == names


def check_arguments(config: type[ModelConfig], model: type[Segmentor]) -> None:
    """The model takes the fields of its dataclass as keyword arguments, with the same defaults."""
    expected = {item.name: item.default for item in dataclasses.fields(config)}
    found = {name: item.default for name, item in inspect.signature(model).parameters.items()}
    assert found == expected


def check_state_dict(build: Callable[[], Segmentor]) -> None:
    """Weights round-trip under our names and under the published ones, which are unique; missing tensors raise."""
    first, second, third = build().eval(), build().eval(), build().eval()
    state, names = first.state_dict(), first.key_map()
    assert set(names) == set(state)
    assert len(set(names.values())) == len(names)
    auxiliary = first.auxiliary_names
    assert all(names[n].startswith(auxiliary) for n in names if n.startswith(auxiliary))
    second.load_checkpoint(state)
    assert torch.equal(first(images(1)), second(images(1)))
    third.load_official(first.official_state())
    assert all(torch.equal(tensor, state[name]) for name, tensor in third.state_dict().items())
    missing = {names[n]: t for n, t in state.items()}
    missing.pop(next(names[n] for n, _ in first.named_parameters()))
    assert "1 tensors missing" in refusal(lambda: third.load_official(missing))


def check_configs(package: str) -> None:
    """Every configuration builds (on the meta device) under its own name and matches its data set."""
    for name in experiments(package):
        exp = load_experiment(name)
        assert exp.name.replace("-", "_") == name
        with torch.device("meta"):
            model = exp.model.build()
        assert model.num_classes == exp.model.num_classes
        if exp.data.dataset != "folder":  # whose classes the user names
            assert exp.model.num_classes == len(palette_of(exp.data)[0])
        assert set(model.key_map()) == set(model.state_dict())


def check_help(package: str) -> None:
    """`--help` of every command works and imports no torch."""
    code = (
        "import sys\nfrom segcore.cli.main import main\n"
        f"for command in {[*COMMANDS]!r}:\n"
        f"    try:\n        main({package!r}, [command, '--help'])\n"
        "    except SystemExit as end:\n        assert end.code == 0, command\n"
        "    assert 'torch' not in sys.modules, f'torch was imported for {command}'"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("usage: ")]
    assert len(lines) == len(COMMANDS)
    assert all(command in line for command, line in zip(COMMANDS, lines, strict=True))


def check_recomputation(build: Callable[[], Segmentor]) -> None:
    """Checkpointed activations: the same losses, gradients and running statistics, bit for bit, from less memory."""
    found, sizes = [], []
    for recompute in (False, True):
        model = build().train()
        if recompute:
            assert checkpoint_activations(model) > 1
        torch.manual_seed(0)
        saved: dict[int, int] = {}

        def pack(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            losses = model.losses(images(2), labels(model, 2), seeds=[1, 2])
        losses["loss"].backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        found.append((losses, gradients, model.state_dict(), {"draw": torch.rand(1)}))
        sizes.append(sum(saved.values()))
    for plain, recomputed in zip(*found, strict=True):
        assert plain.keys() == recomputed.keys()
        for name, value in plain.items():
            other = recomputed[name]
            assert other is None if value is None else torch.equal(value, other), name
    assert sizes[1] < 0.6 * sizes[0], sizes
