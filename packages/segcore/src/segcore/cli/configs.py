"""`configs`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from segcore import files
from segcore.config import model_zoo
from segcore.config.options import Flag, nearest
from segcore.config.record import settings_of
from segcore.config.registry import experiments, find_experiment, is_config, program
from segcore.config.schema import Experiment
from segcore.config.source import source
from segcore.config.user_code import FROM_FILE, is_reference
from segcore.errors import UsageError, UserError


@dataclass(frozen=True)
class Configs:
    """List the configurations with their published figures (those with WORD in their names), or show one."""

    word: str | None = dataclasses.field(default=None, kw_only=True)
    """A part of the names to list; a whole name, file.py:function or run folder shows that configuration."""
    json: Flag = False
    """Print JSON."""
    write: Path | None = None
    """Write the configuration as a Python file to edit; run it as `train FILE.py`."""

    def run(self, package: str | None) -> None:
        if self.write:
            usage = f"{program(package)} configs CONFIG --write {self.write}"
            raise UsageError(f"--write {self.write}: which configuration? write `{usage}`")
        key = (self.word or "").replace("-", "_").lower()
        table = [row for row in model_zoo.rows(package) if key in row.name.replace("-", "_").lower()]
        if not table:
            near = nearest(key, experiments(package), cutoff=0.3)  # the published names are long
            raise UserError(f"no configuration has {self.word!r} in its name{near}")
        print(model_zoo.as_json(table) if self.json else model_zoo.as_text(table))


@dataclass(frozen=True)
class ShowConfig(Configs):
    """Show the settings of a configuration that differ from the neutral defaults, with the changes of your options."""

    experiment: Experiment = dataclasses.field(kw_only=True)

    def run(self, package: str | None) -> None:
        if self.json and self.write:
            raise UserError(f"--json prints, and --write {self.write} writes a Python file; leave one of them out")
        if self.json:
            print(json.dumps(settings_of(self.experiment), indent=1))
        elif self.write is None:
            print(source(self.experiment), end="")
        elif self.write.suffix != ".py":
            raise UserError(f"{self.write}: a configuration is written as .py; choose such a name")
        elif type(self.experiment.model).__module__.startswith(FROM_FILE):
            raise UserError(f"{self.write}: the model is defined in a file of yours; copy that, and edit the copy")
        elif self.write.exists():
            raise UserError(f"{self.write}: exists already; choose another name or remove it")
        else:
            files.write(self.write, source(self.experiment, comments=True))
            print(f"{self.write}: edit it, then `train {self.write}`")


def prepare(words: list[str], package: str | None) -> tuple[Configs, list[str]]:
    """Return the command that the words after `configs` begin, and its options: whole names are shown, parts filter."""
    word = words[0] if words and not words[0].startswith("-") else None
    if not word or not (is_reference(word) or is_config(word, package)):
        return Configs(), words
    return ShowConfig(experiment=find_experiment(word, package)[0]), words[1:]
