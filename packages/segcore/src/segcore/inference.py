"""Image segmentation with a trained model: `load_model` returns the object that the command line also uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import repeat
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from segcore import distributed
from segcore.checkpoints.foreign import read_state
from segcore.checkpoints.hugging_face import PREFIX, hub_settings
from segcore.checkpoints.load import find_weights, load_weights
from segcore.checkpoints.run_checkpoint import standing
from segcore.config.data_sets import class_count
from segcore.config.exported import ExportedConfig
from segcore.config.record import ConfigDiff
from segcore.config.registry import find_experiment
from segcore.config.schema import DataConfig, Experiment
from segcore.config.user_code import FROM_FILE
from segcore.data import pairs
from segcore.data.images import read_image
from segcore.data.labels import ignored_label
from segcore.data.layouts import palette_of
from segcore.data.rasters import Box
from segcore.deploy.runtimes import load_exported, precision_of, predictor_of
from segcore.environment import slow_precision
from segcore.errors import UserError
from segcore.evaluation.blocks import predict_blocks
from segcore.evaluation.predictor import Predictor, early_exit_entry
from segcore.evaluation.scores import Scores, most_probable
from segcore.evaluation.uncertainty import predict_uncertainty
from segcore.files import expanded, regular_file
from segcore.models.segmentor import Segmentor
from segcore.models.stepwise import StepwiseSegmentor, require_stepwise
from segcore.reporting.classes_file import write_classes
from segcore.reporting.figures import step_title
from segcore.result import Result

Answer = tuple[Tensor, Tensor | None]
"""The classes (H, W) of an image and, if asked for, its probabilities (K, H, W)."""
ImageLike = str | Path | Image.Image | np.ndarray | Tensor
"""A file; a PIL image; an array (H, W, C), or (H, W) with one channel; a tensor (C, H, W). Arrays and tensors are
uint8, uint16 or float32 depending on `data.bit_depth`; three channels are RGB."""


def load_model(
    config: str | Path | Experiment,
    weights: str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    offline: bool = False,
    ensemble: Sequence[LoadedModel] = (),
    provider: str | None = None,
) -> LoadedModel:
    """Return a model with its weights, ready to segment images.

    Args:
        config: a run's, checkpoint's or pushed folder, `hub:USER/REPO` (a model that `push` shared on the Hugging Face
            hub; `@REVISION` behind it chooses another state than the newest) or an exported model (.onnx), which need
            no `weights`; or anything that `load_experiment` takes, or an Experiment.
        weights: `official` (downloaded once), `official:CONFIG`, a weights file, a folder, or `hub:USER/REPO`.
        device: auto (CUDA if there is one, else the CPU), cpu, cuda, cuda:1, mps …
        offline: never use the network; the error names the missing file and its location.
        ensemble: further models, whose class probabilities are included in the average.
        provider: what runs an exported model: `openvino`, or one of ONNX Runtime's, `cpu` (None), `cuda`, `tensorrt` …

    Raises ValueError when the configuration, the weights or the device cannot be used; one line, with the remedy.
    """
    exp, folder = _configuration(config, offline)
    _check_exported(exp, folder, weights, provider)
    weights = weights or (folder.as_posix() if folder else None)  # as `hub:USER/REPO` is written
    if weights is None:
        raise UserError(
            f"{config}: which weights? give `official` for the published ones, a weights file or a run folder as "
            "`weights`, or the folder of a run or checkpoint instead of the name"
        )
    target = distributed.find_device(device)
    others, settings = _ensemble(exp, ensemble, target)
    if isinstance(exp.model, ExportedConfig):
        exported = load_exported(Path(weights), provider, precision_of(exp)).eval().to(target)
        predictor = predictor_of(exported, exp, others)
        return LoadedModel(exp, predictor, report=(f"{weights}: {exported.title}",), ensemble=settings)
    path = distributed.main_process_first(lambda: find_weights(str(weights), exp.name, offline=offline))
    model = exp.model.build()
    differs = ConfigDiff.of(path, exp)
    try:
        loaded = load_weights(model, path)
    except UserError:
        if differs.remedy:
            read_state(path)  # raises if the file is damaged, and no other setting would help
            then = " ".join(filter(None, (differs.name, differs.options)))
            of_a_file = type(exp.model).__module__.startswith(FROM_FILE)  # a run alone does not import it
            remedy = "state the same" if of_a_file else "give this folder as CONFIG, without other values"
            raise UserError(f"{path}: was trained with {then}; {remedy}") from None
        raise
    of_a_run = path.is_dir() and path.parent.name == "checkpoints" and path != expanded(weights)
    notes = differs.notes(path) + slow_precision(precision_of(exp), target)
    fused = model.fuse().eval().to(target)
    predictor = Predictor.of(fused, exp, others)
    if fused is not model and exp.evaluate.channels_last is None:  # then this layout is faster
        predictor = predictor.using(channels_last=True)
    if predictor.evaluate.channels_last:
        fused.to(memory_format=torch.channels_last)
    report = (f"{path}{f' ({standing(path)})' if of_a_run else ''}: {loaded}", *notes)
    return LoadedModel(exp, predictor, report=report, ensemble=settings)


def _configuration(config: str | Path | Experiment, offline: bool) -> tuple[Experiment, Path | None]:
    """Return the experiment, and the folder, exported file or `hub:` name that `config` is."""
    if isinstance(config, Experiment):
        return config, None
    name = str(config)
    if name.startswith(PREFIX):
        settings, commit = distributed.main_process_first(lambda: hub_settings(name, offline=offline))
        return find_experiment(settings)[0], Path(commit)
    return find_experiment(config)


def _check_exported(exp: Experiment, folder: Path | None, weights: str | Path | None, provider: str | None) -> None:
    """Raise UserError for an exported file with other weights or as weights, and for a provider without one."""
    if isinstance(exp.model, ExportedConfig):
        if folder and weights:
            raise UserError(f"{weights}: {folder} is an exported model, which has its weights; name no others")
    elif weights and Path(weights).suffix == ".onnx":
        raise UserError(f"{weights}: is an exported model, which has its settings; name it as the configuration, alone")
    elif provider is not None:
        raise UserError(f"--provider {provider} is for exported models; name a file .onnx as the configuration")


def _ensemble(
    exp: Experiment, members: Sequence[LoadedModel], device: torch.device
) -> tuple[list[Segmentor], tuple[Experiment, ...]]:
    """Return the further models of an ensemble, on this device, and their settings, which must normalize as `exp`."""
    for other in members:
        data = other.experiment.data
        if (data.mean, data.std, data.channels) != (exp.data.mean, exp.data.std, exp.data.channels):
            raise UserError(f"the ensemble's {other.experiment.name} has another data.mean, data.std or data.channels")
        weights = next(other.model.parameters(), None)
        if weights is not None and weights.device != torch.empty(0, device=device).device:  # with its number
            raise UserError(f"the ensemble's {other.experiment.name} is on {weights.device}, the model on {device}")
        if other.ensemble:
            raise UserError(f"the ensemble's {other.experiment.name} is an ensemble itself; give its models one by one")
    return [other.model for other in members], tuple(other.experiment for other in members)


@dataclass(frozen=True, eq=False, repr=False)
class LoadedModel:
    """A model with weights: call it with images. Every image's noise follows from `experiment.seed` alone."""

    experiment: Experiment
    """The settings of the model and of its inference."""
    predictor: Predictor
    """The model with its views, windows and precision."""
    colors: str = "auto"
    """Source of the colors: the configuration's dataset (auto), a named data set, or a file with `r g b` per line."""
    report: tuple[str, ...] = ()
    """A description of the loaded model, and of settings that differ from the training."""
    ensemble: tuple[Experiment, ...] = ()
    """The settings of the further models in the average."""

    def __repr__(self) -> str:
        return f"LoadedModel({self.experiment.name!r} on {self.predictor.device})"

    @property
    def model(self) -> Segmentor:
        """The network, an `nn.Module` in evaluation mode."""
        return self.predictor.model

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their indices."""
        return self._classes_and_palette[0]

    @property
    def palette(self) -> np.ndarray:
        """The classes' colors, (K, 3) uint8 RGB."""
        return self._classes_and_palette[1]

    @property
    def mask_classes(self) -> tuple[tuple[str, ...], np.ndarray]:
        """The names and colors (K, 3) of the values in masks, of which a leading class `background` is none."""
        first = int(self.experiment.data.add_background_class)
        return self.class_names[first:], self.palette[first:]

    @cached_property
    def _classes_and_palette(self) -> tuple[tuple[str, ...], np.ndarray]:
        names, colors = classes_and_palette(self.experiment.data, self.colors)
        if self.model.num_classes != len(names):
            raise UserError(
                f"the model has {self.model.num_classes} classes but data.dataset {len(names)}; "
                "set data.dataset and data.classes to what the model was trained on"
            )
        return names, colors

    @overload
    def __call__(self, images: ImageLike, *, probabilities: bool = ...) -> Result: ...
    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...], *, probabilities: bool = ...) -> list[Result]: ...
    def __call__(self, images: Any, *, probabilities: bool = False) -> Result | list[Result]:
        """Return the result for an image of any size, or a list of results for a list of images.

        Listed images of one size go through the network together, `evaluate.batch_size` at a time (one with early
        exit). `probabilities` keeps the class probabilities, 4 bytes per class and pixel; otherwise
        `Result.probabilities` runs the model again. Raises ValueError for an image that cannot be read, has another
        number of channels, or is smaller than `model.min_size`.
        """
        if isinstance(images, (str, Path, Image.Image, np.ndarray, Tensor)):
            return self([images], probabilities=probabilities)[0]
        if not isinstance(images, Sequence):
            raise UserError(
                f"{type(images).__name__} is no image; give a path, a PIL image, an array, a tensor or a list"
            )
        results: list[Result] = []
        step = 1 if self._network([]) else self.experiment.evaluate.batch_size  # each has its own number of steps
        for start in range(0, len(images), step):
            chunk = images[start : start + step]
            arrays = [as_array(image, self.experiment.data) for image in chunk]
            used: list[int] = []
            seeds = [self.experiment.seed] * len(arrays)
            reduce = partial(_classes_and, probabilities=probabilities)
            answers = self._answer.reduced(arrays, seeds, reduce, network=self._network(used))
            for image, array, entries in zip(chunk, arrays, answers, strict=True):
                name = Path(image).stem if isinstance(image, (str, Path)) else f"image_{len(results)}"
                steps_used = sum(used) / len(used) if used else None
                found, kept = list(entries.values())[-1]
                classes, known = found.cpu().numpy().astype(self._dtype), None if kept is None else kept.cpu().numpy()
                results.append(Result(self, array, classes, name, steps_used, known))
        return results

    def blocks(
        self, size: tuple[int, int], read: Callable[[Box], np.ndarray], steps_used: list[int]
    ) -> Iterator[tuple[int, int, np.ndarray, Tensor]]:
        """Yield (y, x, classes (h, w), probabilities (K, h, w)) of blocks that cover a large image.

        See `predict_blocks`. The numbers of steps with `evaluate.early_exit_threshold` are appended to `steps_used`.
        """
        network = self._network(steps_used)
        for y, x, entries in predict_blocks(self._answer, size, read, self.experiment.seed, network=network):
            probabilities = list(entries.values())[-1]
            yield y, x, most_probable(probabilities).cpu().numpy(), probabilities

    def mask(self, classes: np.ndarray) -> np.ndarray:
        """Return classes as files hold them: a leading class `background` is left out and becomes the ignored label."""
        if not self.experiment.data.add_background_class:
            return classes
        return np.where(classes == 0, ignored_label(len(self.class_names) - 1), classes - 1).astype(classes.dtype)

    def probabilities(self, image: np.ndarray) -> np.ndarray:
        """Return the class probabilities (K, H, W) float32 of an image (H, W, C)."""
        return self(image, probabilities=True).probabilities

    @property
    def mask_values(self) -> np.ndarray:
        """The value (K,) uint8 or uint16 that `mask` gives each class."""
        return self.mask(np.arange(len(self.class_names), dtype=self._dtype))

    def write_classes(self, path: Path, *, nodata: bool = False) -> None:
        """Write the values of masks with names and colors, see `reporting.classes_file.write_classes`.

        `nodata`: the masks also have pixels without data.
        """
        names, palette = self.mask_classes
        background = self.experiment.data.add_background_class
        ignored = ignored_label(len(names)) if background or nodata else None
        write_classes(path, names, palette, ignored)

    def uncertainty(self, result: Result) -> np.ndarray:
        """Return, per pixel, the probability (H, W) in 0..1 of any class but the result's; stepwise models only.

        See `segcore.evaluation.uncertainty`. Raises UserError for a model that draws no noise.
        """
        self._stepwise()
        classes = torch.from_numpy(result.classes.astype(np.int64))
        [found] = predict_uncertainty(self._configured, [result.image], [classes], [self.experiment.seed])
        return found.cpu().numpy()

    def steps(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Return the classes (H, W) after every denoising step; stepwise models only."""
        model = self._stepwise()
        [entries] = self._configured.classes([image], [self.experiment.seed], network=model.trajectory_answers)
        return {step_title(step, model.step_unit): classes.cpu().numpy() for step, classes in entries.items()}

    def refine(self, image: np.ndarray, start: np.ndarray) -> tuple[Result, dict[str, np.ndarray]]:
        """Return the result of a run from a start mask on the whole image in one view, and its steps: `start` and the
        classes (H, W) after every denoising step.

        `start` holds classes (H, W). Raises UserError when the model cannot start from classes, or with windows or
        several views.
        """
        settings, model = self.experiment.evaluate, self._stepwise()
        if settings.mode != "whole" or len(settings.img_ratios) > 1 or settings.flip:
            raise UserError("a start mask takes whole images in one view; set evaluate.mode whole, no ratios, no flip")
        if self.predictor.ensemble or settings.early_exit_threshold is not None or settings.ensemble_steps:
            raise UserError(
                "a run from a start mask is not averaged and goes to its end; leave out --ensemble, "
                "evaluate.early_exit_threshold and evaluate.ensemble_steps"
            )
        masks, last = torch.from_numpy(start)[None], list[Scores]()

        def classes_of(scores: Scores) -> Iterable[Tensor]:
            last[:] = [scores]
            return scores.classes()

        def probabilities() -> np.ndarray:
            found: np.ndarray = next(iter(last[0].probabilities())).cpu().numpy()
            return found

        [entries] = self._configured.reduced(
            [image], [self.experiment.seed], classes_of, network=lambda x, seeds: model.refined_answers(x, masks, seeds)
        )
        steps = {step: classes.long().cpu().numpy() for step, classes in entries.items()}
        answer = list(steps.values())[-1].astype(self._dtype)
        return Result(self, image, answer, kept=probabilities), {"start": start, **steps}

    @property
    def _dtype(self) -> type[np.unsignedinteger[Any]]:
        return np.uint8 if self.model.num_classes <= 256 else np.uint16

    @cached_property
    def _configured(self) -> Predictor:
        """The predictor of the configured output, without the steps that `test` reports."""
        return self.predictor.using(steps=(), ensemble_steps=False)

    @cached_property
    def _answer(self) -> Predictor:
        return self.predictor if self.experiment.evaluate.ensemble_steps else self._configured

    def _network(self, steps_used: list[int]) -> Any:
        percent = self.experiment.evaluate.early_exit_threshold
        return None if percent is None else partial(early_exit_entry, self._stepwise(), percent, steps_used)

    def _stepwise(self) -> StepwiseSegmentor:
        return require_stepwise(self.model, "uncertainty, steps, a start mask and evaluate.early_exit_threshold")


def _classes_and(scores: Scores, *, probabilities: bool) -> Iterator[Answer]:
    """Yield the classes (H, W) of every image, and if asked for its probabilities (K, H, W)."""
    kept = scores.probabilities() if probabilities else repeat(None)
    return zip(scores.classes(), kept, strict=False)


def as_array(image: ImageLike, data: DataConfig) -> np.ndarray:
    """Return an image as (H, W, C) uint8, uint16 or float32, according to `data.channels` and `data.bit_depth`.

    Raises UserError for a file that cannot be read and for other shapes and types.
    """
    if isinstance(image, (str, Path)):
        return read_image(image, data.channels, data.bit_depth, data.max_pixels)
    if isinstance(image, Image.Image):  # as `read_image` reads the file
        image = ImageOps.exif_transpose(image)
    return pairs.as_array(image, data.channels, data.bit_depth)


def classes_and_palette(data: DataConfig, palette: str = "auto") -> tuple[tuple[str, ...], np.ndarray]:
    """Return class names and (K, 3) uint8 RGB colors.

    `palette`: "auto" uses the dataset's own colors, a dataset's name uses that dataset's, anything else is a text file
    with one line `r g b` per class. Raises UserError when it does not have a color for every class.
    """
    classes, colors = palette_of(data)
    if class_count(palette):
        colors = palette_of(DataConfig(palette, add_background_class=data.add_background_class))[1]
    elif palette != "auto":
        try:
            regular_file(palette)
            lines = Path(palette).read_text(encoding="utf-8").splitlines()
            rows = np.array([[int(v) for v in line.replace(",", " ").split()] for line in lines if line.strip()])
            colors = rows.astype(np.uint8)
            valid = rows.ndim == 2 and rows.shape[1] == 3 and (colors == rows).all()
        except (OSError, ValueError):
            valid = False
        if not valid:
            raise UserError(
                f"--palette {palette}: give auto, the name of a data set such as cityscapes, or a text file with "
                "`r g b` (0-255) per line"
            )
    if len(colors) < len(classes):
        raise UserError(
            f"--palette {palette} has {len(colors)} colors for {len(classes)} classes; add the missing ones"
        )
    return classes, colors[: len(classes)]
