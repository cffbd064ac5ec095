"""A configuration file of MMSegmentation, 0.x or 1.x, of one of our models, as the equal Experiment."""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

from segcore.config.mmseg_read import Table, read_config
from segcore.config.mmseg_rules import Found, Key, Translation
from segcore.config.mmseg_runs import HELPERS, LABELS, LINE_0, LINE_1, PREPROCESSOR
from segcore.config.registry import experiments
from segcore.config.schema import (
    DataConfig,
    EvalConfig,
    Experiment,
    LossConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from segcore.errors import UserError

SECTIONS: dict[str, type[Any]] = {
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "schedule": ScheduleConfig,
    "loss": LossConfig,
    "train": TrainConfig,
    "evaluate": EvalConfig,
}
SHOWN = 20
"""How many values that have no equal an error lists."""


class Imported(NamedTuple):
    """What a file became."""

    experiment: Experiment
    skipped: tuple[str, ...]
    """Keys that have no influence on results, which the experiment leaves out."""
    batch: str
    """Where the number of images per optimizer step comes from."""


def import_config(path: Path, batch_size: int | None = None) -> Imported:
    """Return the equal Experiment of a file, which is read as data. Its name is that of the file.

    MMSegmentation's files say how many images a device has, not how many devices there are: `batch_size` is the number
    of images per optimizer step over all of them; None: what `gpu_ids`, the file's name or a published row of that name
    says. Raises UserError naming file, line, key and value of all that has no equal here.
    """
    return translate(path, *read_config(path), batch_size)


def translate(path: Path, table: Table, used: set[str], batch_size: int | None = None) -> Imported:
    """Return what the settings of a file mean; `used` are the names that are variables of it."""
    found = Translation()
    top = Key("", f"{path}:1")
    new = "train_dataloader" in table or "optim_wrapper" in table
    rules = LINE_1 if new else LINE_0
    model = table.get("model")
    if not isinstance(model, Table):
        raise UserError(f"{path}: has no `model = dict(…)`, as a configuration of MMSegmentation has")
    method = _method(model, top.of(table, "model"))
    more = {"data_preprocessor": PREPROCESSOR} if new else {}
    found.read({**method.rules, **more}, model, Key("model", table.lines["model"]))
    variables = (used | set(HELPERS)) - rules.keys()
    rest = {name: value for name, value in table.items() if name not in variables | {"model"}}
    found.read(rules, Table(rest, table.lines), top)
    if len(faults := found.faults) > 1:
        cut = f", the first {SHOWN}" if faults[SHOWN:] else ""
        faults = [f"{path}: {len(faults)} values have no equal here{cut}:", *faults[:SHOWN]]
    if faults:
        raise UserError("\n".join(faults))
    settings = {**found.settings, **method.settings}
    try:
        _check(settings)
        settings["train.batch_size"], batch = _batch(path, settings, batch_size)
        settings["train.init_from"] = settings.get("_load_from") or settings.get("train.init_from")
        sections = {name: kind(**_part(settings, name)) for name, kind in SECTIONS.items()}
        built = Experiment(path.stem, method.kind(**_part(settings, "model")), **sections)
    except UserError as error:
        key = found.keys.get(str(error).partition(" ")[0])
        raise UserError(f"{f'{key.where}: {key.name}' if key else path}: {error}") from None
    return Imported(built, tuple(found.skipped), batch)


def _method(model: Table, key: Key) -> Found:
    """Return what the method that the type of the decode head belongs to knows about the model."""
    head = model.get("decode_head")
    kind = head.get("type") if isinstance(head, Table) else None
    known: dict[Any, Any] = {}
    for point in entry_points(group="segcore.methods"):
        if importlib.util.find_spec(f"{point.value}.configs.from_mmseg"):
            known |= importlib.import_module(f"{point.value}.configs.from_mmseg").HEADS
    if not isinstance(kind, str) or kind not in known:
        where = key.of(model, "decode_head")
        (where.of(head, "type") if isinstance(head, Table) else where).refuse(
            kind, f"no installed method has such a model; known here: {', '.join(known)}"
        )
    result: Found = known[kind](model)
    return result


def _part(settings: dict[str, Any], section: str) -> dict[str, Any]:
    prefix = f"{section}."
    return {name.removeprefix(prefix): value for name, value in settings.items() if name.startswith(prefix)}


def _check(settings: dict[str, Any]) -> None:
    """Raise UserError unless labels and the rate in the warm-up are those that these settings have here."""
    data = settings["data.dataset"], settings["data.add_background_class"]
    labels = settings.get("_labels"), settings.get("_pad")
    if LABELS[data] != labels:
        raise UserError(
            f"labels of {data[0]} {'with' if data[1] else 'without'} a background class are not read here with "
            f"reduce_zero_label {labels[0]} and padded with {labels[1]}"
        )
    floor = settings.get("schedule.min_lr", 0.0)
    if settings.get("schedule.warmup") == "linear" and floor:
        raise UserError(f"a linear warm-up before a rate that ends at eta_min {floor}: here it would begin there")
    begin, end = settings.get("_begin", 0), settings.get("schedule.warmup_iterations", 0)
    if "_begin" in settings and begin != end:
        raise UserError(f"the learning rate decays from iteration {begin}, not from the end of the warm-up, {end}")


def _batch(path: Path, settings: dict[str, Any], given: int | None) -> tuple[int, str]:
    """Return the images per optimizer step, and where that is from."""
    device = settings["train.device_batch_size"]
    if given:
        return given, "--batch-size"
    if "_devices" in settings:
        return settings["_devices"] * device, "gpu_ids"
    for match in re.finditer(r"(?<!\d)(\d+)(xb|x)(\d+)(?!\d)", path.stem):
        devices, sign, images = int(match[1]), match[2], int(match[3])
        if images == device or (sign == "x" and devices == device):
            return devices * images, f"{match[0]} in its name"
    rows = experiments()
    if (row := path.stem.replace("-", "_")) in rows:
        return rows[row]().train.batch_size, "the published configuration of that name"
    raise UserError(f"has {device} images per device but not the number of devices; add --batch-size, their product")
