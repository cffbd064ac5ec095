"""The state of a run while it trains: how it begins, what a checkpoint holds of it, how it goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm  # unlike torch's own it knows timm's norms with an activation
from torch import Tensor, nn

from segcore import distributed
from segcore.errors import UserError
from segcore.experiment import Experiment
from segcore.models.segmentor import Segmentor
from segcore.training import checkpoint
from segcore.training.average import Average, averaged, start_average
from segcore.training.log import OtherSettings, describe, differences
from segcore.training.optimizer import build_optimizer, load_optimizer_state, optimizer_state


@dataclass
class Run:
    """What changes while a run trains: everything that a checkpoint holds."""

    model: Segmentor
    losses: nn.Module
    """`model.losses` as a module: compiled, and in parallel with the other processes, where that is asked for."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: Average | None
    """The averaged weights, None without `train.ema`."""
    description: dict[str, Any]
    """Settings and versions."""
    iteration: int = 0
    """Finished iterations."""
    evaluated: int = 0
    """`iteration` at the last evaluation, and at the best one below."""
    best_iteration: int = 0
    best_miou: float = -math.inf
    saved: int = 0
    """`iteration` of the newest checkpoint."""
    skipped: int = 0
    """Training samples that could not be read, over all processes."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


class Losses(nn.Module):
    """`Segmentor.losses` as the forward pass of a module: what is compiled and put in parallel."""

    def __init__(self, model: Segmentor) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, labels: Tensor, seeds: list[int]) -> dict[str, Tensor]:
        return self.model.losses(images, labels, seeds=seeds)


def build(exp: Experiment, device: torch.device) -> Run:
    """Return a run at its beginning: random weights that follow from the seed, on `device`."""
    torch.manual_seed(exp.seed)
    model = exp.model.build()  # on the CPU, so that the weights do not depend on the device
    model = model.to(device)
    if exp.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if distributed.size() > 1 and device.type == "cuda":
        model = convert_sync_batchnorm(model)
    scaler = torch.amp.GradScaler(device.type, enabled=exp.train.precision == "fp16")
    average = start_average(model) if exp.train.ema is not None else None
    return Run(model, Losses(model), build_optimizer(model, exp.optimizer), scaler, average, describe(exp))


def prepare(exp: Experiment, run: Run) -> None:
    """Compile the losses and join the other processes: last, when the weights are those to go on with."""
    run.losses = distributed.in_parallel(run.losses, run.device)
    if exp.train.compile:
        run.losses = torch.compile(run.losses)  # type: ignore[assignment]


def save(exp: Experiment, run: Run, work_dir: Path) -> None:
    """Write a checkpoint of the run as it is, record the best one and remove those that are no longer kept.

    With `train.ema` its model is the averaged one, and the weights that are trained are a part of the rest.
    """
    state = {
        "iteration": run.iteration,
        "evaluated": run.evaluated,
        "best_iteration": run.best_iteration,
        "best_miou": run.best_miou,
        "skipped": run.skipped,
        "optimizer": optimizer_state(run.model, run.optimizer),
        "scaler": run.scaler.state_dict(),
    }
    model = run.model.state_dict()
    if run.average:
        state["trained"] = {name: model[name] for name in run.average}
        model |= run.average

    def write() -> None:
        checkpoint.save(checkpoint.folder_of(work_dir, run.iteration), model, state, run.description)
        if run.best_iteration:
            checkpoint.mark_best(work_dir, run.best_iteration, run.best_miou)
        checkpoint.prune(work_dir, exp.train.keep, run.iteration)

    distributed.lead(write)
    run.saved = run.iteration


def restore(exp: Experiment, run: Run, folder: Path) -> list[str]:
    """Put a run back to where a checkpoint was written; return lines that say so and which settings are others now.

    Raises UserError when the checkpoint does not fit the model or lies beyond the schedule.
    """
    found = checkpoint.load(folder)
    own, state = run.model.state_dict(), found.state
    if wrong := sorted(n for n in {*own, *found.model} if _shape(own, n) != _shape(found.model, n)):
        remedy = OtherSettings.of(folder, exp).remedy or "resume with the settings in its experiment.json"
        raise UserError(
            f"{folder}: {len(wrong)} tensors do not fit the model (first: {wrong[0]}); "
            f"{remedy}, or choose another --work-dir"
        )
    if state["iteration"] > exp.schedule.iterations:
        raise UserError(f"{folder}: lies beyond schedule.iterations {exp.schedule.iterations}; set more there")
    run.model.load_state_dict({**found.model, **state.get("trained", {})})
    if run.average is not None:
        with averaged(run.model, found.model):
            run.average = start_average(run.model)
    load_optimizer_state(run.model, run.optimizer, state["optimizer"])
    if state["scaler"]:
        run.scaler.load_state_dict(state["scaler"])
    for name in ("iteration", "evaluated", "best_iteration", "best_miou", "skipped"):
        setattr(run, name, state[name])
    run.saved = run.iteration
    changed = differences(found.experiment["experiment"], run.description["experiment"])
    where = f"going on from iteration {run.iteration}"
    if run.iteration == exp.schedule.iterations:
        where = f"already finished; to train for longer set schedule.iterations to more than {run.iteration}"
    return [f"{folder}: {where}", *(f"changed since then: {line}" for line in changed)]


def _shape(state: Mapping[str, Any], name: str) -> Any:
    return state[name].shape if name in state else None
