"""The data of a report: the settings, log and last evaluation of a run, from its folder.

`evaluation.json` is written by `train` and `test`, so that a report needs no further evaluation. All files of a run are
untrusted: what does not have the expected types is refused or left out.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np

from segcore.config.data import DataConfig
from segcore.config.fields import Section, setting
from segcore.config.record import changed_settings, describe, flat_settings, from_plain, settings_of
from segcore.config.registry import method_packages, model_configs
from segcore.config.schema import Experiment, ModelConfig
from segcore.config.user_code import FROM_FILE
from segcore.data.layouts import palette_of
from segcore.errors import UnreadError, UserError
from segcore.evaluation.evaluate import Results
from segcore.files import MAX_RECORD, parse_json, read_json, reading, regular_file, write
from segcore.reporting.tables import MAX_CONFUSION

EVALUATION = "evaluation.json"
LARGEST = 1e15
"""Absolute value that no number in a log reaches."""


@dataclass(frozen=True)
class Stored(Section):
    """Base of the stored parts: making one checks the types of its values."""

    section: ClassVar[str] = "evaluation"


@dataclass(frozen=True)
class Entry(Stored):
    """Figures of one step entry, fractions 0..1; None where undefined."""

    name: str
    miou: float | None = None
    aacc: float | None = None
    macc: float | None = None
    iou: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class ImageRow(Stored):
    """Figures of one image of the data set, fractions 0..1; None where undefined."""

    index: int = setting(0, least=0)
    name: str = ""
    miou: float | None = None
    aacc: float | None = None


@dataclass(frozen=True)
class Bins(Stored):
    """Calibration: pixels, mean confidence and accuracy (0..1, None without pixels) by bin of the confidence."""

    ece: float
    counts: tuple[int, ...]
    confidence: tuple[float | None, ...]
    accuracy: tuple[float | None, ...]


@dataclass(frozen=True)
class Evaluation(Stored):
    """An evaluation as a run stores it."""

    command: Literal["train", "test"]
    """The command that evaluated."""
    iteration: int | None
    """The checkpoint's, None for weights from elsewhere."""
    classes: tuple[str, ...]
    entries: tuple[Entry, ...] = setting((), nonempty=True)
    main: str = ""
    """The entry that counts."""
    step_unit: str = ""
    images: int = setting(0, least=0)
    skipped: int = setting(0, least=0)
    confusion: tuple[tuple[int, ...], ...] = ()
    """Pixels by class (K rows) and predicted class (K + 1, the last one is for values outside), of the main entry; none
    above MAX_CONFUSION classes."""
    per_image: tuple[ImageRow, ...] = ()
    calibration: Bins | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        count = len(self.classes)
        shapes = [len(entry.iou) == count for entry in self.entries]
        shapes += [len(row) == count + 1 for row in self.confusion] + [len(self.confusion) in (0, count)]
        if self.calibration:
            bins = self.calibration
            shapes.append(len(bins.counts) == len(bins.confidence) == len(bins.accuracy))
        if not all(shapes) or self.main not in [entry.name for entry in self.entries]:
            raise UserError(f"the evaluation of {count} classes has values for another number, or lacks its main entry")

    @classmethod
    def of(cls, results: Results, command: Literal["train", "test"], iteration: int | None) -> Evaluation:
        """Return what is stored of `results`."""
        main, bins = results.final_step, results.calibration
        # With a single class, the rows of the matrix are the labels 0 and 1, not classes.
        matrix = results.confusion.get(main) if 1 < len(results.classes) <= MAX_CONFUSION else None
        return cls(
            command,
            iteration,
            results.classes,
            entries=tuple(
                Entry(name, _number(m["mIoU"]), _number(m["aAcc"]), _number(m["mAcc"]), _numbers(m["IoU"].tolist()))
                for name, m in results.entries.items()
            ),
            main=main,
            step_unit=results.by,
            images=results.images,
            skipped=len(results.skipped),
            confusion=() if matrix is None else tuple(map(tuple, matrix[:-1].tolist())),
            per_image=tuple(ImageRow(x.index, x.name, _number(x.miou), _number(x.aacc)) for x in results.per_image),
            calibration=Bins(bins.ece, bins.counts, _numbers(bins.confidence), _numbers(bins.accuracy))
            if bins
            else None,
        )

    @property
    def final(self) -> Entry:
        """The entry that counts."""
        return next(entry for entry in self.entries if entry.name == self.main)


def _number(value: Any) -> float | None:
    return None if math.isnan(value) else round(float(value), 6)


def _numbers(values: Iterable[float]) -> tuple[float | None, ...]:
    return tuple(map(_number, values))


def write_evaluation(folder: Path, exp: Experiment, evaluation: Evaluation) -> None:
    """Write evaluation.json into a run's folder, with the settings it was made with."""
    record = {"experiment": settings_of(exp), "evaluation": dataclasses.asdict(evaluation)}
    write(folder / EVALUATION, json.dumps(record, allow_nan=False) + "\n")


@dataclass(frozen=True)
class Run:
    """What a report shows of a run."""

    folder: Path | None
    """As the user named it; None for weights from elsewhere."""
    record: Mapping[str, Any]
    """experiment.json: settings, versions, command, device."""
    train: tuple[Mapping[str, Any], ...] = ()
    """Records of the log with finite `iteration` and `loss`."""
    val: tuple[Mapping[str, Any], ...] = ()
    """Records of the log with finite `iteration` and `mIoU`."""
    evaluation: Evaluation | None = None
    notes: list[str] = field(default_factory=list)
    """What is missing, in sentences."""
    evaluated: Any = None
    """The settings that the evaluation was made with, as stored."""

    @classmethod
    def of(cls, exp: Experiment, evaluation: Evaluation) -> Run:
        """Return an evaluation of weights that are of no run here."""
        return cls(None, describe(exp), evaluation=evaluation)

    @property
    def name(self) -> str:
        """The name of the configuration."""
        return str(self.record["experiment"]["name"])

    @property
    def package(self) -> str | None:
        """The method's import package, None if it is not an installed one."""
        name = self.record["experiment"]["model"]["class"].partition(":")[0].partition(".")[0]
        return name if name in method_packages() else None

    @property
    def user_file(self) -> str:
        """The name of the user's own file that defines the model, if one does."""
        module = str(self.record["experiment"]["model"]["class"]).partition(":")[0]
        return f"{module.removeprefix(FROM_FILE)}.py" if module.startswith(FROM_FILE) else ""

    def colors(self) -> list[str]:
        """Return the classes' colors as `#rrggbb`, none if they are not known."""
        try:
            data = from_plain(DataConfig, dict(self.record["experiment"]["data"]), "data")
            return [f"#{bytes(color).hex()}" for color in palette_of(data)[1].tolist()]
        except (UserError, ValueError, KeyError, TypeError):
            return []


def read_run(folder: Path) -> Run:
    """Return what a run's folder tells. Raises UserError when it is none, or its experiment.json is damaged."""
    try:
        record = read_json(folder / "experiment.json")
    except (FileNotFoundError, NotADirectoryError):
        if not folder.exists():
            raise UserError(f"{folder}: no such run; give the folder that `train` wrote") from None
        raise UserError(f"{folder}: no run (it has no experiment.json); give the folder that `train` wrote") from None
    match record.get("experiment"):
        case {"name": str(), "model": {"class": str()}, "data": {}, "schedule": {}, "train": {}}:
            pass
        case _:
            raise UserError(f"{folder / 'experiment.json'}: damaged (without the settings of a run)")
    if folder.resolve().parent.name == "checkpoints":
        raise UserError(f"{folder}: is a checkpoint; give its run, {folder.parent.parent}")
    notes: list[str] = []
    train, val = read_log(folder / "log.jsonl")
    evaluation: Evaluation | None
    evaluated = record["experiment"]
    try:
        stored = read_json(folder / EVALUATION, MAX_RECORD)
        evaluation, evaluated = _evaluation(stored["evaluation"]), stored.get("experiment")
    except FileNotFoundError:
        evaluation = _of_log(val)
    except UnreadError as error:
        notes.append(str(error))
        evaluation = _of_log(val)
    except (ValueError, KeyError, TypeError):
        notes.append(f"{EVALUATION} is damaged; `test` writes it again")
        evaluation = _of_log(val)
    return Run(folder, record, train, val, evaluation, notes, evaluated)


def read_log(path: Path) -> tuple[tuple[Mapping[str, Any], ...], tuple[Mapping[str, Any], ...]]:
    """Return the usable records `train` and `val` of a log; none if there is no log.

    Other lines are left out, and numbers from LARGEST on, with which the charts could not compute.
    """
    found: dict[str, list[Mapping[str, Any]]] = {"train": [], "val": []}
    needs = {"train": "loss", "val": "mIoU"}
    for record in _records(path):
        usable = {name: value for name, value in record.items() if not _is_number(value) or abs(value) < LARGEST}
        mode = str(record.get("mode"))
        if mode in needs and isinstance(usable.get("iteration"), int) and _is_number(usable.get(needs[mode])):
            found[mode].append(usable)
    return tuple(found["train"]), tuple(found["val"])


def _records(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        with reading(path):
            regular_file(path)
            with path.open("rb") as file:
                lines = file.read(MAX_RECORD).splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return
    for line in lines:
        try:
            yield parse_json(line)
        except ValueError:
            continue


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _evaluation(stored: Any) -> Evaluation:
    """Return an evaluation from plain data; raises ValueError or TypeError for anything else."""
    if not isinstance(stored, dict):
        raise ValueError("no object")
    return cast(Evaluation, from_plain(Evaluation, stored))


def _of_log(val: tuple[Mapping[str, Any], ...]) -> Evaluation | None:
    """Return what the last evaluation in a log tells, which has no figures per image; None without one."""
    try:
        last = val[-1]
        entries = [
            {"name": name, **{key.lower(): m[key] for key in ("mIoU", "aAcc", "mAcc", "IoU")}}
            for name, m in last["entries"].items()
        ]
        main = next((entry["name"] for entry in entries if entry["miou"] == last["mIoU"]), entries[-1]["name"])
        stored = {"command": "train", "iteration": last["iteration"], "classes": last["classes"], "entries": entries}
        return _evaluation({**stored, "main": main, "images": last["images"]})
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def not_neutral(run: Run) -> dict[str, Any]:
    """Return the settings of a run by dotted name that differ from the neutral defaults, or have none."""
    settings = run.record["experiment"]
    kinds: dict[str, Any] = model_configs()
    changed = changed_settings(settings, kinds.get(settings["model"]["class"], ModelConfig))
    return {name: value for name, value in changed.items() if name not in ("name", "model.class")}  # stand elsewhere


def different_settings(runs: list[Run]) -> dict[str, list[Any]]:
    """Return the settings by dotted name that not all runs share, with each run's value; None where it has none.

    Of models of different classes, only the settings that all have.
    """
    flat = [flat_settings(run.record["experiment"]) for run in runs]
    names = dict.fromkeys(name for settings in flat for name in settings)
    if len({settings["model.class"] for settings in flat}) > 1:
        names = dict.fromkeys(name for name in names if not name.startswith("model.") or all(name in s for s in flat))
    table = {name: [settings.get(name) for settings in flat] for name in names}
    return {name: values for name, values in table.items() if any(value != values[0] for value in values)}


def confusions(evaluation: Evaluation, least: float = 0.01, most: int = 8) -> list[tuple[float, str, str]]:
    """Return the largest shares (0..1) of a class's pixels that are predicted as one other class, with both names."""
    if not evaluation.confusion:
        return []
    shares, names = normalized(evaluation), [*evaluation.classes, "no class"]
    np.fill_diagonal(shares, 0)
    order = np.argsort(-shares, axis=None, kind="stable")[:most]
    pairs = zip(*np.unravel_index(order, shares.shape), strict=True)
    return [(float(shares[g, p]), names[g], names[p]) for g, p in pairs if shares[g, p] >= least]


def normalized(evaluation: Evaluation) -> np.ndarray:
    """Return the confusion matrix (K, K + 1) as fractions of each class's pixels; 0 for a class without pixels."""
    counts = np.array(evaluation.confusion, np.float64)
    totals: np.ndarray = counts.sum(1, keepdims=True)
    return np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
