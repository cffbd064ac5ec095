"""The state of a training run: saving it in a checkpoint, and resuming from one."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segcore import distributed
from segcore.checkpoints import run_checkpoint as checkpoint
from segcore.config.record import ConfigDiff, differences, with_defaults
from segcore.config.schema import Experiment
from segcore.data.loader import RareClasses
from segcore.errors import UserError
from segcore.models.segmentor import Segmentor
from segcore.training.ema import Average, averaged, start_ema
from segcore.training.guard import KeptBuffers
from segcore.training.optimizer import load_optimizer_state, optimizer_state


@dataclass
class TrainState:
    """Everything that changes during training.

    A checkpoint holds it, except `buffers`, `failures`, `rare_classes` and `kept`.
    """

    model: Segmentor
    losses: nn.Module
    """`model.losses` as a module: compiled and data-parallel if the settings say so."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: Average | None
    """The averaged weights, None without `train.ema`."""
    buffers: KeptBuffers
    """The model's buffers as they were before the step."""
    failures: Tensor
    """() int32, on the device: consecutive last steps with a loss or gradient that was not finite."""
    description: dict[str, Any]
    """Settings and versions."""
    frozen: list[nn.Module]
    """Parts of the model that stay in evaluation mode, see `train.freeze`."""
    rare_classes: RareClasses | None = None
    """Draws the training samples, see `data.rare_class_sampling`; every start makes it anew from the labels."""
    iteration: int = 0
    """Finished iterations."""
    evaluated: int = 0
    """`iteration` at the last evaluation, and at the best one below."""
    best_iteration: int = 0
    best_miou: float = -math.inf
    not_better: int = 0
    """Evaluations since the best one."""
    saved: int = 0
    """`iteration` of the newest checkpoint."""
    skipped: int = 0
    """Training samples that could not be read, over all processes."""
    kept: str = ""
    """The last report about checkpoints that pruning kept."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def train_mode(self) -> None:
        """Set the model to training mode, but for its frozen parts."""
        self.model.train()
        for module in self.frozen:
            module.eval()

    def early_end(self, exp: Experiment) -> str:
        """Return why the run ends here, before its last iteration, by `train.patience`; empty if it does not."""
        patience, count = exp.train.patience, self.not_better
        if patience is None or count < patience or not self.evaluated == self.iteration < exp.schedule.iterations:
            return ""
        return f"no better mIoU in {count} evaluation{'s' * (count > 1)} (train.patience)"


def save_state(exp: Experiment, state: TrainState, work_dir: Path) -> None:
    """Write a checkpoint of the current state, record the best one and remove those no longer kept.

    With `train.ema` the checkpoint's model is the averaged one, and its state file also has the trained weights.
    """
    model, rest = content_of(state)

    def write() -> None:
        checkpoint.save(checkpoint.folder_of(work_dir, state.iteration), model, rest, state.description)
        if state.best_iteration:
            checkpoint.mark_best(work_dir, state.best_iteration, state.best_miou)
        kept = checkpoint.prune(work_dir, exp.train.keep_last, state.iteration)
        if kept not in ("", state.kept):
            print(kept, file=sys.stderr)
        state.kept = kept

    distributed.on_main_process(write)
    state.saved = state.iteration


def content_of(state: TrainState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what a checkpoint of the current state holds: the model's state dict, and the rest."""
    rest = {
        "iteration": state.iteration,
        "evaluated": state.evaluated,
        "best_iteration": state.best_iteration,
        "best_miou": state.best_miou,
        "not_better": state.not_better,
        "skipped": state.skipped,
        "optimizer": optimizer_state(state.model, state.optimizer),
        "scaler": state.scaler.state_dict(),
    }
    model = state.model.state_dict()
    if state.average:
        rest["trained"] = {name: model[name] for name in state.average}
        model |= state.average
    return model, rest


def load_state(exp: Experiment, state: TrainState, folder: Path) -> list[str]:
    """Set `state` from a checkpoint; return lines that report this and the settings that have changed since.

    Raises UserError when the checkpoint does not fit the model or is beyond the end of the schedule.
    """
    found = checkpoint.load(folder)
    own, rest = state.model.state_dict(), {"not_better": 0, **found.state}
    if wrong := sorted(n for n in {*own, *found.model} if _shape(own, n) != _shape(found.model, n)):
        remedy = ConfigDiff.of(folder, exp).remedy or "resume with the settings in its experiment.json"
        raise UserError(
            f"{folder}: {len(wrong)} tensors do not fit the model (first: {wrong[0]}); "
            f"{remedy}, or choose another --work-dir"
        )
    kinds = dict.fromkeys(_COUNTS, int) | {"best_miou": float, "optimizer": dict, "scaler": dict}
    if damaged := [name for name, kind in kinds.items() if not isinstance(rest.get(name), kind)]:
        raise UserError(f"{folder / 'state.pt'}: has no usable {', '.join(damaged)}; choose another --work-dir")
    total, epochs = exp.schedule.iterations, exp.schedule.epochs
    setting, length = ("iterations", total) if epochs is None else ("epochs", epochs)
    if rest["iteration"] > total:
        raise UserError(f"{folder}: is beyond schedule.{setting} {length}; raise that number")
    try:
        state.model.load_state_dict({**found.model, **rest.get("trained", {})})
        if state.average is not None:
            with averaged(state.model, found.model):
                state.average = start_ema(state.model)
        load_optimizer_state(state.model, state.optimizer, rest["optimizer"])
        if rest["scaler"]:
            state.scaler.load_state_dict(rest["scaler"])
    except torch.OutOfMemoryError:
        raise
    except UserError as error:
        raise UserError(f"{folder / 'state.pt'}: {error}, or choose another --work-dir") from None
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:  # not as we write it
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{folder / 'state.pt'}: does not fit the run ({reason}); choose another --work-dir") from None
    for name in (*_COUNTS, "best_miou"):
        setattr(state, name, rest[name])
    state.saved = state.iteration
    if state.best_iteration and not distributed.rank():  # its record is written after the checkpoint
        checkpoint.mark_best(folder.parent.parent, state.best_iteration, state.best_miou)
    changed = differences(with_defaults(found.experiment.get("experiment", {}), exp), state.description["experiment"])
    where = f"resuming from iteration {state.iteration}"
    if state.iteration == total:
        where = f"already finished; to train longer, raise schedule.{setting} above {length}"
    elif early := state.early_end(exp):
        where = f"already finished, {early}; to train longer, raise train.patience above {state.not_better} or to None"
    return [f"{folder}: {where}", *(f"changed since then: {line}" for line in changed)]


_COUNTS = ("iteration", "evaluated", "best_iteration", "not_better", "skipped")
"""Names of the whole numbers in a checkpoint's state."""


def _shape(state: Mapping[str, Any], name: str) -> Any:
    return state[name].shape if name in state else None
