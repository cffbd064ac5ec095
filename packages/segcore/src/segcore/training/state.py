"""The state of a run while it trains: what a checkpoint holds of it, and how it goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from segcore import distributed
from segcore.checkpoints import run_checkpoint as checkpoint
from segcore.config.record import ConfigDiff, differences
from segcore.config.schema import Experiment
from segcore.errors import UserError
from segcore.models.segmentor import Segmentor
from segcore.training.ema import Average, averaged, start_ema
from segcore.training.optimizer import load_optimizer_state, optimizer_state


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
        checkpoint.prune(work_dir, exp.train.keep_last, run.iteration)

    distributed.on_main_process(write)
    run.saved = run.iteration


def restore(exp: Experiment, run: Run, folder: Path) -> list[str]:
    """Put a run back to where a checkpoint was written; return lines that say so and which settings are others now.

    Raises UserError when the checkpoint does not fit the model or lies beyond the schedule.
    """
    found = checkpoint.load(folder)
    own, state = run.model.state_dict(), found.state
    if wrong := sorted(n for n in {*own, *found.model} if _shape(own, n) != _shape(found.model, n)):
        remedy = ConfigDiff.of(folder, exp).remedy or "resume with the settings in its experiment.json"
        raise UserError(
            f"{folder}: {len(wrong)} tensors do not fit the model (first: {wrong[0]}); "
            f"{remedy}, or choose another --work-dir"
        )
    if state["iteration"] > exp.schedule.iterations:
        raise UserError(f"{folder}: lies beyond schedule.iterations {exp.schedule.iterations}; set more there")
    run.model.load_state_dict({**found.model, **state.get("trained", {})})
    if run.average is not None:
        with averaged(run.model, found.model):
            run.average = start_ema(run.model)
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
