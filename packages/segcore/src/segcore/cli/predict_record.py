"""What `predict` notes in a folder of results: results.csv, a line per image, and predict.json, what made them."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from segcore import distributed
from segcore.cli.predict_files import Job, classes_path, realpath
from segcore.config.record import differences, settings_of
from segcore.config.schema import Experiment
from segcore.errors import UserError
from segcore.files import read_json, reading, regular_file, write, writing
from segcore.inference import LoadedModel

COLUMNS = ("file", "width", "height", "seconds", "error", "bytes", "modified")
"""The image below the input folder; its pixels; seconds of computing, of a batch its share; why there is no result;
size in bytes and time of change in nanoseconds, by which `--resume` knows the image again."""


@dataclass(frozen=True)
class Record:
    """The notes about the images of the folder `source` in the folder `target`.

    Every process adds lines to a file of its own, results.csv.partN, which a killed run leaves behind; in the end they
    become results.csv.
    """

    source: Path
    target: Path
    seg: LoadedModel
    options: dict[str, Any]
    """Options of the command that results depend on."""
    resume: bool = False

    def begin(self, jobs: Sequence[Job]) -> list[Job]:
        """Return the jobs that are left to do: with `resume`, without those whose results are whole and up to date.

        Notes of earlier runs are taken over or deleted. Raises UserError when their results were made otherwise, or a
        file in the place of the notes is none of ours.
        """
        made_by, before = self._made_by(), self._earlier()
        rows = self._taken_over(before, made_by) if self.resume and before else {}
        kept = {}
        for job in jobs:
            row = rows.get(self._name(job), [])
            if row[4:] == ["", *stamp(job)] and all(path.is_file() for path in job.written):
                kept[row[0]] = row
        self._write(kept.values())
        for part in self._parts():
            part.unlink()
        write(self.target / "predict.json", json.dumps(made_by, indent=1) + "\n")
        self.seg.write_classes(classes_path(self.target))
        return [job for job in jobs if self._name(job) not in kept]

    @contextlib.contextmanager
    def part(self) -> Iterator[Callable[..., None]]:
        """Yield a function that notes what became of a job; the values are those of COLUMNS after the file."""
        path = self.target / f"results.csv.part{distributed.rank()}"
        with writing(path):
            file = path.open("w", encoding="utf-8", errors="backslashreplace", newline="")
        with file:
            rows = csv.writer(file, lineterminator="\n")

            def note(job: Job, *values: Any) -> None:
                with writing(path):
                    rows.writerow([self._name(job), *values])
                    file.flush()

            yield note

    def finish(self, jobs: Sequence[Job]) -> None:
        """Write results.csv, in the order of the jobs, after all processes have closed their parts."""
        rows = self._rows()
        self._write(rows[name] for name in map(self._name, jobs) if name in rows)
        for part in self._parts():
            part.unlink()

    def _name(self, job: Job) -> str:
        return job.image.relative_to(self.source).as_posix().encode(errors="backslashreplace").decode()

    def _parts(self) -> list[Path]:
        return sorted(self.target.glob("results.csv.part[0-9]*"))

    def _made_by(self) -> dict[str, Any]:
        """Return what the results depend on, as plain data."""
        others = {exp.name: _settings(exp) for exp in self.seg.ensemble}
        return {
            "input": str(realpath(self.source)),
            "options": json.loads(json.dumps(self.options, default=str)),
            "colors": self.seg.palette.tobytes().hex(),
            "weights": digest([self.seg.model, *self.seg.predictor.ensemble]),
            "experiment": _settings(self.seg.experiment),
            **({"ensemble": others} if others else {}),
        }

    def _earlier(self) -> dict[str, Any] | None:
        """Return what made the results that are there, if any. Raises UserError for files that are not our notes."""
        table, path = self.target / "results.csv", self.target / "predict.json"
        remedy = "move it away, or choose another output folder"
        if table.is_file():
            with reading(table), table.open("rb") as file:
                if file.readline(1 << 10).strip() != ",".join(COLUMNS).encode():
                    raise UserError(f"{table}: is no list of results and would be overwritten; {remedy}")
        try:
            before = read_json(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except UserError as error:
            raise UserError(f"{error}; {remedy}") from None
        if not before.keys() >= {"options", "weights", "experiment"}:
            raise UserError(f"{path}: does not say what made results and would be overwritten; {remedy}")
        return before

    def _taken_over(self, before: dict[str, Any], made_by: dict[str, Any]) -> dict[str, list[str]]:
        """Return the noted rows, see `_rows`; raises UserError when the results were made otherwise."""
        if changed := differences(before, made_by):
            raise UserError(
                f"{self.target}: its results were made with other settings ({changed[0][:120]}); repeat the command "
                "that made them, or leave out --resume to start anew"
            )
        return self._rows()

    def _rows(self) -> dict[str, list[str]]:
        """Return the noted rows by file; the later ones count. A line that a killed run did not finish is left out."""
        rows = dict[str, list[str]]()
        for path in (self.target / "results.csv", *self._parts()):
            with contextlib.suppress(FileNotFoundError, csv.Error):
                regular_file(path)
                with path.open(encoding="utf-8", errors="replace", newline="") as file:
                    rows |= {row[0]: row for row in csv.reader(file) if len(row) == len(COLUMNS)}
        return rows

    def _write(self, rows: Iterable[Sequence[str]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
        write(self.target / "results.csv", text.getvalue())


def _settings(exp: Experiment) -> dict[str, Any]:
    """Return the settings that results depend on."""
    settings = settings_of(exp)
    del settings["data"]["workers"], settings["evaluate"]["batch_size"]
    return settings


def stamp(job: Job) -> list[str]:
    """Return bytes and time of change of the files that a job reads, as results.csv has them."""
    with contextlib.suppress(OSError):
        found = [path.stat() for path in (job.image, job.start) if path]
        return [str(sum(x.st_size for x in found)), str(max(x.st_mtime_ns for x in found))]
    return ["", ""]


def digest(models: Sequence[nn.Module]) -> str:
    """Return the SHA-256 of the tensors of models in hexadecimal."""
    found = hashlib.sha256()
    for model in models:
        for name, tensor in sorted(model.state_dict().items()):
            found.update(name.encode())
            found.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
