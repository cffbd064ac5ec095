"""Image segmentation with a trained model: `load_model` returns the object that the command line also uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from segcore import distributed
from segcore.checkpoints.foreign import read_state
from segcore.checkpoints.load import find_weights, load_weights
from segcore.checkpoints.run_checkpoint import standing
from segcore.config.data_sets import class_count
from segcore.config.record import ConfigDiff
from segcore.config.registry import find_experiment
from segcore.config.schema import DataConfig, Experiment
from segcore.config.user_code import FROM_FILE
from segcore.data import pairs
from segcore.data.images import read_image
from segcore.data.labels import ignored_label
from segcore.data.layouts import palette_of
from segcore.data.rasters import Box
from segcore.errors import UserError
from segcore.evaluation.blocks import predict_blocks
from segcore.evaluation.predictor import Predictor, early_exit_entry
from segcore.evaluation.uncertainty import predict_uncertainty
from segcore.files import regular_file
from segcore.models.segmentor import Segmentor
from segcore.models.stepwise import StepwiseSegmentor, require_stepwise
from segcore.reporting import figures

ImageLike = str | Path | Image.Image | np.ndarray | Tensor
"""A file; a PIL image; an array (H, W, C), or (H, W) with one channel; a tensor (C, H, W). Arrays and tensors are uint8
uint16 or float32 depending on `data.bit_depth`; three channels are RGB."""


def load_model(
    config: str | Path | Experiment,
    weights: str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    offline: bool = False,
    ensemble: Sequence[LoadedModel] = (),
) -> LoadedModel:
    """Return a model with its weights, ready to segment images.

    Args:
        config: a run's or checkpoint's folder, which needs no `weights`; or anything that `load_experiment` takes,
            or an Experiment.
        weights: `official` (downloaded once), `official:CONFIG`, a weights file, or a run's or checkpoint's folder.
        device: auto (CUDA if there is one, else the CPU), cpu, cuda, cuda:1, mps …
        offline: never use the network; the error names the missing file and its location.
        ensemble: further models, whose class probabilities are included in the average.

    Raises ValueError when the configuration, the weights or the device cannot be used; one line, with the remedy.
    """
    exp, folder = (config, None) if isinstance(config, Experiment) else find_experiment(config)
    weights = weights or folder
    if weights is None:
        raise UserError(
            f"{config}: which weights? give `official` for the published ones, a weights file or a run folder as "
            "`weights`, or the folder of a run or checkpoint instead of the name"
        )
    target = find_device(device)
    path = distributed.main_process_first(lambda: find_weights(str(weights), exp.name, offline=offline))
    for other in ensemble:
        data = other.experiment.data
        if (data.mean, data.std, data.channels) != (exp.data.mean, exp.data.std, exp.data.channels):
            raise UserError(f"the ensemble's {other.experiment.name} has another data.mean, data.std or data.channels")
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
    of_a_run = f" ({standing(path)})" if path.is_dir() and path != Path(weights).expanduser() else ""
    note = [f"note: {path} was trained with {differs.options}"] if differs.options else []
    fused = model.fuse().eval().to(target)
    predictor = Predictor.of(fused, exp, [other.model for other in ensemble])
    if fused is not model and exp.evaluate.channels_last is None:  # then this layout is faster
        predictor = predictor.using(channels_last=True)
    if predictor.evaluate.channels_last:
        fused.to(memory_format=torch.channels_last)
    return LoadedModel(exp, predictor, report=(f"{path}{of_a_run}: {loaded}", *note))


def find_device(name: str | torch.device) -> torch.device:
    """Return the device for a name; auto and cuda are this process's own GPU, auto without a GPU is the CPU.

    Raises UserError when the device is not available.
    """
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
    def __call__(self, images: ImageLike) -> Result: ...
    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...]) -> list[Result]: ...
    def __call__(self, images: Any) -> Result | list[Result]:
        """Return the result for an image of any size, or a list of results for a list of images.

        Listed images of one size go through the network together, `evaluate.batch_size` at a time. Raises ValueError
        for an image that cannot be read, has another number of channels, or is smaller than `model.min_size`.
        """
        if isinstance(images, (str, Path, Image.Image, np.ndarray, Tensor)):
            return self([images])[0]
        if not isinstance(images, Sequence):
            raise UserError(
                f"{type(images).__name__} is no image; give a path, a PIL image, an array, a tensor or a list"
            )
        results: list[Result] = []
        step = self.experiment.evaluate.batch_size
        for start in range(0, len(images), step):
            chunk = images[start : start + step]
            arrays = [as_array(image, self.experiment.data) for image in chunk]
            used: list[int] = []
            answers = self._answer.classes(arrays, [self.experiment.seed] * len(arrays), network=self._network(used))
            for image, array, entries in zip(chunk, arrays, answers, strict=True):
                name = Path(image).stem if isinstance(image, (str, Path)) else f"image_{len(results)}"
                classes = list(entries.values())[-1].cpu().numpy().astype(self._dtype)
                results.append(Result(self, array, classes, name, sum(used) / len(used) if used else None))
        return results

    def blocks(
        self, size: tuple[int, int], read: Callable[[Box], np.ndarray], steps_used: list[int]
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield (y, x, `mask` (h, w)) of blocks that cover a large image, see `predict_blocks`.

        The numbers of steps with `evaluate.early_exit_threshold` are appended to `steps_used`.
        """
        network = self._network(steps_used)
        for y, x, entries in predict_blocks(self._answer, size, read, self.experiment.seed, network=network):
            yield y, x, self.mask(list(entries.values())[-1].cpu().numpy())

    def mask(self, classes: np.ndarray) -> np.ndarray:
        """Return classes as files hold them: a leading class `background` is left out and becomes the ignored label."""
        if not self.experiment.data.add_background_class:
            return classes
        return np.where(classes == 0, ignored_label(len(self.class_names) - 1), classes - 1).astype(classes.dtype)

    def probabilities(self, image: np.ndarray) -> np.ndarray:
        """Return the class probabilities (K, H, W) float32 of an image (H, W, C)."""
        [entries] = self._answer.probabilities([image], [self.experiment.seed], network=self._network([]))
        return list(entries.values())[-1].cpu().numpy()

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
        entries = self._run(image, model.denoising_trajectory)
        return {figures.step_title(step, model.step_unit): classes for step, classes in entries.items()}

    def refine(self, image: np.ndarray, start: np.ndarray) -> dict[str, np.ndarray]:
        """Return `start` and the classes (H, W) after every denoising step from it, on the whole image in one view.

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
        masks = torch.from_numpy(start)[None]
        return {"start": start, **self._run(image, lambda images, seeds: model.refine_mask(images, masks, seeds))}

    def result(self, image: np.ndarray, classes: np.ndarray) -> Result:
        """Return a result for classes (H, W) from another source, for example `refine`."""
        return Result(self, image, classes.astype(self._dtype))

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

    def _run(self, image: np.ndarray, network: Any) -> dict[str, np.ndarray]:
        [entries] = self._configured.classes([image], [self.experiment.seed], network=network)
        return {step: classes.cpu().numpy() for step, classes in entries.items()}

    def _stepwise(self) -> StepwiseSegmentor:
        return require_stepwise(self.model, "uncertainty, steps, a start mask and evaluate.early_exit_threshold")


@dataclass(frozen=True, eq=False)
class Result:
    """The model's output for one image."""

    loaded: LoadedModel = field(repr=False)
    image: np.ndarray = field(repr=False)
    """The image (H, W, C) in the units of its file."""
    classes: np.ndarray = field(repr=False)
    """Class indices (H, W) uint8, or uint16 above 256 classes: `class_names[index]` is the name."""
    name: str = "image"
    """Stem of the files that `save` writes: that of the image file, if there is one."""
    steps_used: float | None = None
    """Mean number of denoising steps with `evaluate.early_exit_threshold`, else None."""

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Class probabilities (K, H, W) float32 in 0..1. Computed on first use, by another run with the same draws."""
        return self.loaded.probabilities(self.image)

    @cached_property
    def confidence(self) -> np.ndarray:
        """Probability (H, W) float32 in 0..1 of the class in `classes`; computed from `probabilities`."""
        if len(self.probabilities) == 1:
            p = self.probabilities[0]
            found: np.ndarray = np.where(self.classes == 1, p, 1 - p)
        else:
            found = np.take_along_axis(self.probabilities, self.classes[None].astype(np.int64), 0)[0]
        return found

    @property
    def mask(self) -> np.ndarray:
        """The mask that `save` writes, see `LoadedModel.mask`."""
        return self.loaded.mask(self.classes)

    def overlay(self, legend: bool = False, opacity: float = 0.5) -> Image.Image:
        """Return the image overlaid with the classes' colors; `legend` adds the names of its classes below."""
        first = int(self.loaded.experiment.data.add_background_class)
        names, colors = self.loaded.class_names[first:], self.loaded.palette[first:]
        painted = figures.overlay(figures.to_uint8_rgb(self.image), self.mask, colors, opacity)
        if legend:
            painted = _with_legend(painted, names, colors, [int(k) for k in np.unique(self.mask) if k < len(names)])
        return Image.fromarray(painted)

    def save(self, output: str | Path, *, opacity: float = 0.5) -> tuple[Path, Path]:
        """Write NAME.png, the mask of class indices, and NAME_overlay.png into the folder `output`; return both."""
        paths = Path(output, f"{self.name}.png"), Path(output, f"{self.name}_overlay.png")
        self.write(*paths, opacity=opacity)
        return paths

    def write(self, mask: Path, overlay: Path, *, opacity: float = 0.5) -> None:
        """Write the mask (.png) and the overlay (.png or .jpg), each atomically; missing folders are created."""
        first = int(self.loaded.experiment.data.add_background_class)
        if self.classes.dtype == np.uint8:
            figures.write_class_png(mask, self.mask, self.loaded.palette[first:])
        else:
            figures.write_image(mask, self.mask)
        figures.write_image(overlay, np.array(self.overlay(opacity=opacity)))


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


def _with_legend(image: np.ndarray, names: Sequence[str], colors: np.ndarray, shown: Sequence[int]) -> np.ndarray:
    """Return an image (H, W, 3) with the colors and names of some classes below it."""
    if not shown:
        return image
    columns = min(len(shown), max(image.shape[1] // 130, 1))
    table = figures.legend([names[k] for k in shown], colors[list(shown)], columns)
    width = max(image.shape[1], table.shape[1])
    parts = [np.pad(x, ((0, 0), (0, width - x.shape[1]), (0, 0)), constant_values=255) for x in (image, table)]
    return np.concatenate(parts)
