"""The commands: each is a dataclass whose fields are its options, read by tyro; `run` does it.

Options of the configuration (`--model.timesteps 10`) stand beside the command's own. Nothing imports torch before a
command runs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import FlagConversionOff, FlagCreatePairsOff, Positional, arg

from segcore import files
from segcore.errors import UsageError, UserError
from segcore.experiment import Experiment, experiments, load_experiment, multi_scale, program, published, source

if TYPE_CHECKING:
    import torch

# The configuration's own options, without a prefix, and `--flag True` instead of `--flag / --no-flag` for its booleans.
Config = Annotated[FlagConversionOff[Experiment], arg(name="")]
Flag = FlagCreatePairsOff[bool]
Checkpoint = Annotated[Positional[str], arg(metavar="CHECKPOINT")]


@dataclass(frozen=True)
class Command:
    """What all commands with a configuration have."""

    experiment: Config
    device: str = "auto"
    """Where to compute: auto (CUDA if there is one), cpu, cuda, cuda:1 …"""
    offline: Flag = False
    """Never use the network; say instead which file belongs where."""

    def run(self, package: str | None) -> None:
        """Do it; `package` is the method's import package, None for `segcore`."""

    @property
    def default_dir(self) -> Path:
        return Path("runs") / self.experiment.name


@dataclass(frozen=True)
class Parallel(Command):
    """What the commands have that several processes can do together."""

    gpus: int | None = None
    """Start so many processes, one per GPU (with `--device cpu`: on the CPU). Leave it out if torchrun starts them."""

    def run(self, package: str | None) -> None:
        from segcore import distributed

        with distributed.process_group(self.experiment.train.timeout):
            self.run_in_process()

    def run_in_process(self) -> None:
        """Do it in one of the processes, or in the only one."""


@dataclass(frozen=True)
class Train(Parallel):
    """Train a configuration and evaluate it."""

    work_dir: Path | None = None
    """Folder for checkpoints, log and results; runs/<configuration> if not given."""
    resume: Flag = False
    """Go on from the newest valid checkpoint in the folder, if there is one."""

    def run_in_process(self) -> None:
        from segcore import distributed
        from segcore.training.loop import train

        work_dir = self.work_dir or self.default_dir
        # torchrun --max-restarts starts the same words again after a failure; the run then goes on in its own folder.
        record = work_dir / "experiment.json"
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and record.is_file()
        own = restarted and json.loads(record.read_text(encoding="utf-8")).get("torchrun") == distributed.run_id()
        resume = self.resume or own
        train(self.experiment, work_dir, device=_device(self.device), resume=resume, offline=self.offline)


@dataclass(frozen=True)
class Test(Parallel):
    """Evaluate a checkpoint on the validation set: tables on the terminal, JSON beside them."""

    checkpoint: Checkpoint = dataclasses.field(kw_only=True)
    """A work folder (its best checkpoint), a checkpoint folder, a weights file, or `official`: published weights."""
    multi_scale: Flag = False
    """Average over the six published scales, each also flipped."""
    limit: int | None = None
    """Evaluate the first images only."""
    until_converged: float | None = None
    """Report a further entry: end an image's denoising once a step changes fewer than this percentage of its pixels."""
    ensemble: tuple[str, str] | None = None
    """Configuration and checkpoint of a second model, whose class probabilities are averaged in."""
    json: Path | None = None
    """Where the figures go at full precision; runs/<configuration>.test.json if not given."""

    def run_in_process(self) -> None:
        from segcore import distributed
        from segcore.data.dataset import open_dataset
        from segcore.evaluation import report
        from segcore.evaluation.evaluate import evaluate
        from segcore.progress import progress

        exp = _until_converged(self.experiment, self.until_converged)
        settings = multi_scale(exp.evaluate) if self.multi_scale else exp.evaluate
        device = _device(self.device)
        others = load_others(self, self.ensemble, device)
        model = load_model(self, self.checkpoint, device)
        dataset = distributed.lead_first(lambda: open_dataset(exp.data, "val"))
        with progress("evaluating") as advance:
            results = evaluate(
                model, dataset, settings, exp.data, device=device, seed=exp.seed, workers=exp.data.workers,
                precision=exp.train.precision, channels_last=exp.train.channels_last,
                on_progress=advance, limit=self.limit, others=others,
            )  # fmt: skip
        if distributed.rank():
            return
        print(report.per_class(results, settings.metrics), report.summary(results, settings.metrics), sep="\n\n")
        row = published(exp.name)
        if row and row.miou and is_row(exp):
            print("\npublished mIoU:", ", ".join(f"{value:.2f} ({name})" for name, value in row.miou.items()))
        path = self.json or Path("runs") / f"{exp.name}.test.json"
        report.write_json(path, results, {"name": exp.name, "checkpoint": self.checkpoint, "seed": exp.seed})
        print(f"\n{path}")


@dataclass(frozen=True)
class Predict(Command):
    """Segment an image, every image of a folder, a video or a camera: class-index PNGs and colour overlays."""

    checkpoint: Checkpoint = dataclasses.field(kw_only=True)
    """A work folder (its best checkpoint), a checkpoint folder, a weights file, or `official`: published weights."""
    input: Annotated[Positional[Path], arg(metavar="INPUT")] = dataclasses.field(kw_only=True)
    """An image file, a folder of images (subfolders too, which the output repeats), a video, or a camera's number."""
    output: Annotated[Positional[Path], arg(metavar="OUTPUT")] = dataclasses.field(kw_only=True)
    """A folder; for one image also the mask's file (.png) or the overlay's (.jpg), for a video a video file (.mp4)."""
    palette: str = "auto"
    """Colours: of the configuration's dataset (auto), cityscapes, ade20k, or a text file with `r g b` per line."""
    opacity: float = 0.5
    """Share of the colours in the overlay, 0 to 1."""
    uncertainty: Flag = False
    """Diffusion only: also write NAME_uncertainty.png, grey; value / 255 is the probability of another class."""
    steps: Flag = False
    """Diffusion only: also write NAME_steps.png, a strip of the map after every denoising step."""
    animate: Flag = False
    """Diffusion only: also write NAME_animation.gif, the same maps one after the other."""
    start_mask: Path | None = None
    """DDPS only: start the denoising from this mask of class indices instead of a random one; 255 stands for no class.
    For a folder of images a folder of masks under the results' names."""
    until_converged: float | None = None
    """Diffusion only: end an image's denoising once a step changes fewer than this percentage of its pixels."""
    ensemble: tuple[str, str] | None = None
    """Configuration and checkpoint of a second model, whose class probabilities are averaged in; for images."""
    frames: int | None = None
    """Videos and cameras only: stop after so many frames. Ctrl-C also ends a camera's recording."""

    def run(self, package: str | None) -> None:
        from segcore import predict, video

        exp = _until_converged(self.experiment, self.until_converged)
        moving = video.is_video(self.input)
        if moving and (self.uncertainty or self.steps or self.animate or self.start_mask or self.ensemble):
            raise UserError(
                f"{self.input}: --uncertainty, --steps, --animate, --start-mask and --ensemble are for images, "
                "not for videos"
            )
        if moving:
            path = video.plan(self.input, self.output)
        else:
            jobs = predict.plan(
                self.input, self.output, uncertainty=self.uncertainty, steps=self.steps, animation=self.animate,
                start=self.start_mask,
            )  # fmt: skip
        classes, palette = predict.classes_and_palette(exp.data, self.palette)
        others = load_others(self, self.ensemble, _device(self.device))
        model = load_model(self, self.checkpoint, _device(self.device))
        predict.check_classes(model, classes)
        if moving:
            video.run(model, exp, self.input, path, palette, opacity=self.opacity, frames=self.frames)
        else:
            predict.run(model, exp, jobs, palette, opacity=self.opacity, others=others)


@dataclass(frozen=True)
class Export(Command):
    """Write a checkpoint as ONNX (.onnx) or as a torch.export program (.pt2), checked against the model."""

    checkpoint: Checkpoint = dataclasses.field(kw_only=True)
    """A work folder (its best checkpoint), a checkpoint folder, a weights file, or `official`: published weights."""
    output: Annotated[Positional[Path], arg(metavar="OUTPUT")] = dataclasses.field(kw_only=True)
    """The file to write; its ending says which kind."""
    size: str | None = None
    """Size of the images, HEIGHTxWIDTH; evaluate.scale if not given."""
    batch: int = 1
    """Images per call."""
    dynamic: Flag = False
    """Accept any number of images of any size whose sides are multiples of what the network needs."""

    def run(self, package: str | None) -> None:
        import torch

        from segcore import export
        from segcore.bench import parse_size

        exp = self.experiment
        size = (exp.evaluate.scale or exp.data.crop[::-1])[::-1]
        height, width = parse_size(self.size, "--size") if self.size else size
        settings = export.Settings(height, width, self.batch, self.dynamic)
        model = load_model(self, self.checkpoint, torch.device("cpu"))
        for check in export.export(model, exp, self.output, settings):
            print(check)
        print(f"{self.output}: {self.output.stat().st_size / 2**20:.1f} MiB")


@dataclass(frozen=True)
class Demo(Command):
    """Train a small model on generated street scenes and write a page with its results; goes on if interrupted."""

    work_dir: Path | None = None
    """Folder for the scenes, the run and the page; runs/demo/<configuration> if not given."""

    def run(self, package: str | None) -> None:
        from segcore import demo

        work_dir = self.work_dir or Path("runs/demo", self.experiment.name)
        demo.run(self.experiment, work_dir, device=_device(self.device), package=package)


@dataclass(frozen=True)
class Configs:
    """List the configurations with their published figures, or show one."""

    name: Annotated[Positional[str | None], arg(metavar="CONFIG")] = None
    """Show this configuration: a name, or file.py:function."""
    write: Path | None = None
    """Write the configuration as a Python file to edit; run it as `train FILE.py`."""

    def run(self, package: str | None) -> None:
        if self.name is None and self.write:
            usage = f"{program(package)} configs CONFIG --write {self.write}"
            raise UsageError(f"--write {self.write}: which configuration? write `{usage}`")
        if self.name is None:
            for name in experiments(package):
                row = published(name)
                figures = ", ".join(f"{value:.2f} {key}" for key, value in row.miou.items()) if row else ""
                figures = f"mIoU {figures}" if figures else ""
                weights = " (weights: official)" if row and row.url else ""
                note = f" ({row.note})" if row and row.note else ""
                print(f"{name:55}{figures}{weights}{note}".rstrip())
            return
        text = source(load_experiment(self.name, package))
        if self.write is None:
            print(text)
            return
        if self.write.exists():
            raise UserError(f"{self.write}: exists already; choose another name or remove it")
        files.write(self.write, text)
        print(f"{self.write}: edit it, then `train {self.write}`")


@dataclass(frozen=True)
class Check(Command):
    """Read every file of the data set: counts, sizes, label histogram, and a line about everything that is wrong."""

    split: Literal["train", "val", "both"] = "both"
    """What to read."""
    json: Path | None = None
    """Where the report goes as JSON besides."""

    def run(self, package: str | None) -> None:
        from segcore.data.check import check

        exp = self.experiment
        both: tuple[Literal["train", "val"], ...] = ("train", "val")
        reports = [check(exp.data, s, exp.model.num_classes) for s in both if self.split in (s, "both")]
        print(*reports, sep="\n\n")
        if self.json:
            text = json.dumps({report.split: report.to_json() for report in reports}, indent=1)
            files.write(self.json, text + "\n")
        if count := sum(len(report.problems) for report in reports):
            raise UserError(f"{exp.data.root}: {count} problem{'s' * (count > 1)}, each listed above; mend them first")


@dataclass(frozen=True)
class Bench(Command):
    """Time the model with random weights: latency, throughput, peak memory, GFLOPs; a line per combination."""

    sizes: tuple[str, ...] = ()
    """Image sizes, HEIGHTxWIDTH; the training crop if not given."""
    batches: tuple[int, ...] = (1,)
    """Images per forward pass."""
    dtypes: tuple[Literal["fp32", "bf16", "fp16"], ...] = ("fp32",)
    """Precision of the forward pass (autocast)."""
    compile: Literal["no", "yes", "both"] = "no"
    """torch.compile."""
    channels_last: Literal["no", "yes", "both"] = "no"
    """Memory layout of images and convolutions."""
    steps: tuple[int, ...] = ()
    """Sampling steps; as the model is configured if not given. Several: a run of each in one pass."""
    warmup: int = 2
    """Passes before the timed ones; compiling happens there."""
    repeats: int = 10
    """Timed passes: the median is shown, and the 10th to the 90th percentile."""
    json: Path | None = None
    """Where the figures go at full precision besides."""

    def run(self, package: str | None) -> None:
        from segcore import bench

        both = {"no": (False,), "yes": (True,), "both": (False, True)}
        if not (self.batches and self.dtypes):
            raise UsageError("--batches and --dtypes need a value at least; leave them out for the usual ones")
        exp = self.experiment
        sizes = tuple(bench.parse_size(size) for size in self.sizes) or (exp.data.crop,)
        settings = bench.Settings(
            sizes, self.batches, self.dtypes, both[self.compile], both[self.channels_last],
            self.steps, self.warmup, self.repeats,
        )  # fmt: skip
        device, model = _device(self.device), exp.model.build()
        bench.check(model, settings)
        header = {"name": exp.name, **bench.header(model, device), "steps": self.steps or None}
        print(*(f"{name}: {value}" for name, value in header.items() if value is not None), bench.COLUMNS, sep="\n")
        cells = []
        for cell in bench.measure(model, exp.model.in_channels, settings, device):
            print(bench.as_line(cell), flush=True)
            cells.append(cell)
        if self.json:
            files.write(self.json, json.dumps({**header, "cells": cells}, indent=1) + "\n")


@dataclass(frozen=True)
class Env:
    """Print what a bug report needs: versions, GPU and driver, processor, variables. Paths are left out."""

    json: Flag = False
    """As JSON."""

    def run(self, package: str | None) -> None:
        from segcore.environment import as_text, environment

        found = environment()
        print(json.dumps(found, indent=1) if self.json else as_text(found))


COMMANDS: dict[str, type[Any]] = {
    "train": Train,
    "test": Test,
    "predict": Predict,
    "configs": Configs,
    "check": Check,
    "bench": Bench,
    "export": Export,
    "demo": Demo,
    "env": Env,
}


def is_row(exp: Experiment) -> bool:
    """Return whether the model and the dataset are those of the published row whose name `exp` has."""
    row = load_experiment(exp.name)
    return (exp.model, exp.data.dataset) == (row.model, row.data.dataset)


def load_model(command: Command, checkpoint: str, device: torch.device) -> Any:
    """Return the command's model with the weights of `checkpoint`, for inference on `device`; prints the report.

    A model that has `fuse()` comes fused and in the channels-last layout, which is faster and answers alike.
    """
    import torch

    from segcore import distributed
    from segcore.training.checkpoint import standing
    from segcore.training.log import OtherSettings
    from segcore.training.weights import load_weights, resolve

    path = distributed.lead_first(lambda: resolve(checkpoint, command.experiment.name, offline=command.offline))
    model: Any = command.experiment.model.build()
    other = OtherSettings.of(path, command.experiment)
    try:
        report = load_weights(model, path)
    except UserError:
        if other.remedy:
            raise UserError(f"{path}: was trained with other settings; {other.remedy}") from None
        raise
    if not distributed.rank():
        of_a_run = path.is_dir() and path != Path(checkpoint).expanduser()
        print(f"{path}{f' ({standing(path)})' if of_a_run else ''}: {report}", file=sys.stderr)
        if other.options:
            print(f"note: {path} was trained with {other.options}", file=sys.stderr)
    fuses = hasattr(model, "fuse")
    channels_last = fuses or command.experiment.train.channels_last
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return (model.fuse() if fuses else model).eval().to(device).to(memory_format=layout)


def load_others(command: Command, ensemble: tuple[str, str] | None, device: torch.device) -> list[Any]:
    """Return the second model of `--ensemble CONFIG CHECKPOINT` in a list, or an empty one.

    Raises UserError when it was trained on images that are normalised otherwise.
    """
    if ensemble is None:
        return []
    name, checkpoint = ensemble
    exp = load_experiment(name)
    data, own = exp.data, command.experiment.data
    if (data.mean, data.std, data.channels) != (own.mean, own.std, own.channels):
        raise UserError(
            f"--ensemble {name}: its data.mean, data.std or data.channels differ; name a model with the same"
        )
    return [load_model(dataclasses.replace(command, experiment=exp), checkpoint, device)]


def _until_converged(exp: Experiment, percent: float | None) -> Experiment:
    """Return `exp` with `evaluate.until_converged` set to `percent`, where one is given."""
    if percent is None:
        return exp
    return dataclasses.replace(exp, evaluate=dataclasses.replace(exp.evaluate, until_converged=percent))


def _device(name: str) -> torch.device:
    import torch

    from segcore import distributed

    if name == "auto" or (name == "cuda" and torch.cuda.is_available()):
        return distributed.local_device()
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(
            f"--device {name} is not available here; use cpu, or cuda with an NVIDIA GPU and driver"
        ) from None
    return device
