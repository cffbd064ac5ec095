"""Setup of a run: data sets, model, optimizer, start weights or checkpoint, and the other ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from segcore import distributed
from segcore.checkpoints import run_checkpoint as checkpoint
from segcore.checkpoints.load import find_init, load_init
from segcore.config.record import describe
from segcore.config.schema import Experiment, LossConfig
from segcore.config.user_code import is_reference
from segcore.data.check import cache_note, check_headers, require_meaning, seen_in_training
from segcore.data.dataset import Dataset
from segcore.data.layouts import open_dataset, source_of
from segcore.data.transforms import TrainTransform
from segcore.data.workers import worker_count
from segcore.environment import computed_precision, slow_precision, usable_cpus
from segcore.errors import UserError
from segcore.evaluation.evaluate import check_fit
from segcore.models.segmentor import Segmentor
from segcore.models.stepwise import StepwiseSegmentor, set_noise_device
from segcore.training.activations import checkpoint_activations
from segcore.training.class_weight import rare_classes, resolve_loss, weights_are_of_row
from segcore.training.ema import start_ema
from segcore.training.guard import KeptBuffers
from segcore.training.lock import LOCK
from segcore.training.optimizer import build_optimizer
from segcore.training.parameters import freeze, frozen_note
from segcore.training.schedule import resolve_epochs
from segcore.training.state import TrainState, load_state
from segcore.training.trackers import find_trackers


class LossModule(nn.Module):
    """`Segmentor.losses` as the forward pass of a module, which can be compiled and made data-parallel."""

    def __init__(self, model: Segmentor, loss: LossConfig) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, images: Tensor, labels: Tensor, seeds: list[int]) -> dict[str, Tensor]:
        return self.model.losses(images, labels, seeds=seeds, loss=self.loss)


def setup(
    exp: Experiment, work_dir: Path, device: torch.device, *, resume: bool, offline: bool
) -> tuple[Experiment, TrainState, Dataset, Dataset | None, list[str]]:
    """Return `exp` with its epochs resolved, the state to train from, both data sets, and lines for the user.

    In the folder of a new run it writes only `label_histogram.json`, as the last action. Raises UserError for anything
    unusable.
    """
    batch_shares(exp)  # raises for a batch that does not divide
    TrainTransform(exp.data)  # raises for a function that is not there
    distributed.on_main_process(lambda: list(find_trackers(exp.train.log)))  # raises for one that is not there
    found = distributed.on_main_process(lambda: _checkpoint_to_resume(work_dir, resume))
    dataset, val = _datasets(exp)
    if exp.train.init_from and not found:  # before the images are read
        start, name = exp.train.init_from, exp.name
        distributed.main_process_first(lambda: find_init(start, name, offline=offline))
    notes = _check_files(exp, {"train": dataset} | ({"val": val} if val else {}))
    exp, length = resolve_epochs(exp, len(dataset))
    if exp.data.workers == "auto":
        notes.append(f"data.workers: auto, {worker_count('auto')} per device ({usable_cpus()} usable CPUs)")
    if exp.train.precision == "auto":
        notes.append(f"train.precision: auto, {computed_precision('auto', device)} on this {device.type}")
    notes += slow_precision(exp.train.precision, device)
    state = init_state(with_names(exp, dataset), device)
    check_fit(state.model, dataset)
    if val and isinstance(state.model, StepwiseSegmentor):
        state.model.check_steps(exp.evaluate.steps)
    notes += [*length, *_notes(state)]
    if weights_are_of_row(exp):
        given = len(exp.loss.class_weight or ())
        notes.append(f"loss.class_weight: left out, {exp.name} states it for its {given} classes; auto counts yours")
    if exp.train.freeze:
        notes.append(frozen_note(exp, state.model, resumed=found is not None))
    if found:
        notes += distributed.main_process_first(partial(load_state, exp, state, found))
    elif resume:
        notes.append(f"{work_dir}: no checkpoint yet, starting from the beginning")
    if exp.train.init_from and not found:
        load = partial(load_init, state.model, start, exp=exp, classes=dataset.classes, offline=offline)
        notes.append(distributed.main_process_first(load))
        state.average = None if state.average is None else start_ema(state.model)
    # first, because it refuses wrong weights before a file is written
    loss = distributed.main_process_first(lambda: resolve_loss(exp, dataset, work_dir))
    state.rare_classes = distributed.main_process_first(lambda: rare_classes(exp, dataset, work_dir))
    wrap_parallel(exp, state, loss)
    return exp, state, dataset, val, notes


def with_names(exp: Experiment, dataset: Dataset) -> Experiment:
    """Return the experiment, with the classes and colors if only a user's function states them: a run stores them."""
    if not is_reference(exp.data.dataset):
        return exp
    first = int(exp.data.add_background_class)
    palette = tuple(bytes(color).hex() for color in dataset.palette[first:].tolist())
    return replace(exp, data=replace(exp.data, classes=dataset.classes[first:], palette=palette))


def build_network(exp: Experiment, device: torch.device) -> Segmentor:
    """Return the experiment's model as it is trained on `device`, with random weights that do not depend on it.

    It is still on the CPU. With several GPUs, batch norms use the statistics of all.
    """
    model = exp.model.build()
    set_noise_device(model, exp.evaluate.noise_device)
    if distributed.world_size() > 1 and device.type == "cuda":
        from timm.layers import convert_sync_batchnorm  # unlike torch's, it supports timm's norms with an activation

        model = convert_sync_batchnorm(model)
    return model


def init_state(exp: Experiment, device: torch.device) -> TrainState:
    """Return the state before the first step, on `device`, with random weights determined by the seed."""
    torch.manual_seed(exp.seed)
    model = build_network(exp, device).to(device)
    if exp.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    frozen = freeze(model, exp.train.freeze)
    if exp.train.checkpoint_activations:
        checkpoint_activations(model)
    return TrainState(
        model,
        LossModule(model, exp.loss),
        build_optimizer(model, exp.optimizer),
        torch.amp.GradScaler(device.type, enabled=exp.train.precision == "fp16"),
        start_ema(model) if exp.train.ema is not None else None,
        KeptBuffers(model),
        torch.zeros((), dtype=torch.int32, device=device),
        describe(exp),
        frozen,
    )


def wrap_parallel(exp: Experiment, state: TrainState, loss: LossConfig) -> None:
    """Make the losses data-parallel and compile them; call it last, after loading the start weights."""
    state.losses = distributed.in_parallel(LossModule(state.model, loss), state.device)
    if exp.train.compile:
        state.losses = torch.compile(state.losses)  # type: ignore[assignment]


def batch_shares(exp: Experiment) -> tuple[int, int]:
    """Return the images per step and per micro-batch of one rank; raises UserError when they do not divide."""
    batch, most, world = exp.train.batch_size, exp.train.device_batch_size, distributed.world_size()
    share = batch // world
    micro = min(most, share)
    if batch % world or share % micro:
        raise UserError(
            f"train.batch_size {batch} on {world} devices does not divide into passes of train.device_batch_size "
            f"{most}; make train.batch_size a multiple, or change the number of devices"
        )
    return share, micro


def _checkpoint_to_resume(work_dir: Path, resume: bool) -> Path | None:
    """Return the checkpoint to resume from, None to start anew; raises UserError when the folder permits neither."""
    if not resume:
        if work_dir.exists() and any(path.name != LOCK for path in work_dir.iterdir()):
            raise UserError(f"{work_dir}: is not empty; add --resume to resume its run, or choose another --work-dir")
        return None
    found = checkpoint.newest(work_dir)
    if found is None and any((work_dir / "checkpoints").glob("iter_*")):
        raise UserError(f"{work_dir / 'checkpoints'}: no complete checkpoint; start again with another --work-dir")
    return found


def _datasets(exp: Experiment) -> tuple[Dataset, Dataset | None]:
    """Return the training set, and the validation set if the run evaluates; no image is read."""
    cache = exp.data.cache
    dataset = distributed.main_process_first(lambda: open_dataset(exp.data, "train", cache))
    return dataset, open_dataset(exp.data, "val", cache) if exp.train.evaluate_every else None


def _check_files(exp: Experiment, parts: Mapping[str, Dataset]) -> list[str]:
    """Return notes on the splits, one line per broken file; raises UserError for what cannot be trained on."""
    cache, val = exp.data.cache, parts.get("val")
    size = distributed.on_main_process(lambda: [cache_note(cache, [*parts.values()])] if cache else [])
    broken = distributed.on_main_process(lambda: [line for part in parts.values() for line in check_headers(part)])
    if broken and exp.data.on_error == "stop":
        raise UserError(f"{broken[0]} (and {len(broken) - 1} more; `check` lists all)" if broken[1:] else broken[0])
    if val and (bare := next((sample.image for sample in val.samples if sample.label is None), None)):
        raise UserError(f"{bare}: has no label to evaluate with; set data.val_masks, or train.evaluate_every to 0")
    doubts = distributed.on_main_process(
        lambda: [line for split, part in parts.items() for line in require_meaning(part, split, source_of(exp.data))]
    )
    if val:
        doubts += [f"{source_of(exp.data)}: {note}" for note in seen_in_training(parts["train"], val)]
    return [*size, *broken, *doubts]


def _notes(state: TrainState) -> Iterator[str]:
    """Yield notes for a run with several processes."""
    if (count := distributed.world_size()) > 1:
        local = any(isinstance(module, nn.BatchNorm2d) for module in state.model.modules())
        yield f"{count} processes on {state.device.type}" + (", batch norm stays local to each" if local else "")
