"""`push`."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segcore import files
from segcore.config.options import Flag
from segcore.config.record import SETTINGS, flat_settings, record_of, settings_of, with_defaults
from segcore.config.user_code import FROM_FILE, is_reference
from segcore.errors import UserError
from segcore.files import read_json

if TYPE_CHECKING:
    from segcore.config.schema import Experiment
    from segcore.inference import LoadedModel
    from segcore.reporting.run_record import Evaluation


OF_THE_MACHINE = (
    *("data.workers", "data.cache", "data.max_pixels"),
    *("evaluate.batch_size", "evaluate.channels_last", "evaluate.metrics"),
)
"""Settings of data and evaluation that do not change the figures, except for rounding."""


@dataclass(frozen=True)
class Push:
    """Share a trained model on the Hugging Face hub: weights, settings and a model card, for `hub:USER/REPO`."""

    checkpoint: Path = field(kw_only=True)
    """Folder of a run (its best checkpoint) or of a checkpoint."""
    repo: str = field(kw_only=True)
    """USER/REPO: where to put it; the repository is created if it is not there."""
    dry_run: Path | None = None
    """Write this new folder and upload nothing; `load_model` loads it, too."""
    license: str = "unknown"
    """The license of the weights, as the hub abbreviates it: apache-2.0, cc-by-nc-4.0, other … The data's terms may
    restrict it."""
    images: tuple[Path, ...] = ()
    """Photos to show on the card with the predicted classes; they are published, so take those that you may publish."""
    private: Flag = False
    """Create the repository as a private one."""

    def run(self, package: str | None) -> None:
        from segcore.checkpoints.hugging_face import is_repo, upload

        if not is_repo(self.repo):
            raise UserError(f"{self.repo:.200}: is no name of a repository; write USER/REPO")
        if not re.fullmatch(r"\w[\w.+-]*", self.license):
            raise UserError(f"--license {self.license:.200}: write the abbreviation of a license, such as apache-2.0")
        if self.dry_run:
            with files.writing_folder(self.dry_run) as folder:
                self._write(folder)
            print(f"{self.dry_run}: what would be uploaded to {self.repo}")
            return
        with tempfile.TemporaryDirectory() as temporary:
            self._write(Path(temporary))
            print(upload(Path(temporary), self.repo, private=self.private))

    def _write(self, folder: Path) -> None:
        """Write the files of the repository into an empty folder."""
        import torch

        from segcore.checkpoints.load import find_weights
        from segcore.checkpoints.manifest import WEIGHTS
        from segcore.config.registry import program
        from segcore.environment import versions
        from segcore.inference import load_model
        from segcore.reporting.model_card import model_card

        check_no_code(self.checkpoint)
        seg = load_model(self.checkpoint, device="cpu", offline=True)  # raises if anything is damaged or does not fit
        path = find_weights(str(self.checkpoint), seg.experiment.name, offline=True)
        if not path.is_dir():
            raise UserError(f"{path}: is no run or checkpoint; give the folder that `train` wrote")
        exp, evaluation = shareable(seg), stored_evaluation(path, seg)
        if evaluation is None:
            print(
                f"note: no figures, as no evaluation of {path} at these settings is stored; "
                f"`segcore test {self.checkpoint}` stores one"
            )
        shutil.copyfile(path / WEIGHTS, folder / WEIGHTS)
        settings = {"experiment": settings_of(exp), "versions": versions()}
        files.write(folder / SETTINGS, json.dumps(settings, indent=1) + "\n")
        names = [f"images/{number}.jpg" for number, _ in enumerate(self.images, 1)]
        for name, photo in zip(names, self.images, strict=True):
            picture = seg(photo).overlay(legend=True)
            picture.thumbnail((1280, 1280))
            (folder / name).parent.mkdir(exist_ok=True)
            picture.save(folder / name, quality=90)
        with torch.device("meta"):
            parameters = sum(tensor.numel() for tensor in exp.model.build().parameters())
        card = model_card(
            exp,
            self.repo,
            package=program(type(exp.model).__module__.partition(".")[0]),
            parameters=parameters,
            classes=seg.class_names,
            evaluation=evaluation,
            images=names,
            license=self.license,
        )
        files.write(folder / "README.md", card)


def check_no_code(folder: Path) -> None:
    """Raise UserError for a run or checkpoint that needs a file of the user's: what is shared has no code."""
    record = record_of(folder)
    try:
        settings = read_json(record)["experiment"]
        model, dataset = str(settings["model"]["class"]), str(settings["data"]["dataset"])
    except (OSError, ValueError, KeyError, TypeError):  # `load_model` says what is wrong
        return
    for what, own in (("its model", model.startswith(FROM_FILE)), ("its data set", is_reference(dataset))):
        if own:
            raise UserError(
                f"{record}: cannot be pushed, as {what} is defined in a file of yours; share the file and the run's "
                "folder in another way"
            )


def shareable(seg: LoadedModel) -> Experiment:
    """Return the settings of a model without paths of this machine and functions in files; classes are written out."""
    from segcore.config.data_sets import FOLDER, class_count
    from segcore.config.schema import DataConfig
    from segcore.data.layouts import state_classes

    exp, neutral = seg.experiment, DataConfig()
    data = dataclasses.replace(
        exp.data,
        augment=None,
        **{name: getattr(neutral, name) for name in (*FOLDER, "root", "cache", "also")},
    )
    if not class_count(data.dataset) or data.classes or data.labels:
        data = dataclasses.replace(state_classes(data), dataset="folder")
    start = exp.train.init_from or ""
    named = start == "official" or start.startswith(("official:", "hub:"))
    local = not named and re.search(r"[/\\]", start)
    train = dataclasses.replace(exp.train, log=(), init_from=None if local else exp.train.init_from)
    return dataclasses.replace(exp, data=data, train=train)


def stored_evaluation(checkpoint: Path, seg: LoadedModel) -> Evaluation | None:
    """Return the evaluation of a checkpoint at the settings of its model that its run stores, None without one."""
    from segcore.reporting.run_record import read_run

    checkpoint = checkpoint.absolute()
    if checkpoint.parent.name != "checkpoints":
        return None
    try:
        run = read_run(checkpoint.parents[1])
    except UserError:
        return None
    found, exp = run.evaluation, seg.experiment
    fits = found and found.classes == seg.class_names and checkpoint.name == f"iter_{found.iteration}"
    same = isinstance(run.evaluated, dict) and of_figures(with_defaults(run.evaluated, exp)) == of_figures(
        settings_of(exp)
    )
    return found if fits and same else None


def of_figures(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those settings of `settings_of` by dotted name that the figures of an evaluation depend on."""
    flat = flat_settings(settings)
    flat["evaluate.precision"] = flat.get("evaluate.precision") or flat.get("train.precision")
    parts = ("model.", "data.", "evaluate.", "seed")
    return {name: value for name, value in flat.items() if name.startswith(parts) and name not in OF_THE_MACHINE}
