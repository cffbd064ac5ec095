"""What the page shows and offers for download, computed without knowing the page."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import cv2
import numpy as np

from segcore.data.labels import ignored_label
from segcore.deploy.runtimes import ClassPredictor
from segcore.inference import LoadedModel, as_array
from segcore.models.stepwise import StepwiseSegmentor
from segcore.reporting import figures
from segcore.result import Result


@dataclass(frozen=True, eq=False)
class Answer:
    """The model's answer to one photo."""

    result: Result
    """The configured output."""
    steps: dict[str, np.ndarray]
    """Classes (H, W) after every denoising step by title, the last ones those of the result, which is called "answer"
    if it is more than the last step; empty for models without steps."""
    uncertainty: np.ndarray | None
    """Probability (H, W) of any other class in 0..1, if it was asked for."""
    report: str
    """Size, time and device in one line."""
    count: int | None = None
    """The number of steps that was asked for; None: as configured."""


def answer(
    seg: LoadedModel,
    photo: np.ndarray | str | Path,
    *,
    max_side: int = 1024,
    seed: int = 0,
    steps: int | None = None,
    uncertainty: bool = False,
    start: np.ndarray | None = None,
) -> Answer:
    """Return the model's answer to a photo, a file or (H, W, 3) uint8, whose longer side is at most `max_side` pixels.

    A larger one is shrunk. `seed` is that of the noise. For stepwise models: `steps` is the number of steps (None, or
    with `evaluate.ensemble_steps`: as configured), and `start` a map of classes (H, W) in which the denoising starts
    instead of noise.

    Raises UserError for a photo that cannot be read or is too small for the model.
    """
    began = time.perf_counter()
    image = as_array(photo, seg.experiment.data)
    height, width = image.shape[:2]
    if max(height, width) > max_side:
        size = [max(round(side * max_side / max(height, width)), 1) for side in (width, height)]
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA).reshape(*size[::-1], -1)
    seg = replace(seg, experiment=replace(seg.experiment, seed=seed))
    if seg.experiment.evaluate.ensemble_steps:
        steps = None  # the mean is that of the configured ones
    with number_of_steps(seg, steps):
        if start is not None:
            result, maps = seg.refine(image, start)
        elif is_stepwise(seg):
            maps = seg.steps(image)
            evaluate = seg.experiment.evaluate
            if evaluate.early_exit_threshold is not None or evaluate.ensemble_steps:
                result = seg(image)
                maps |= {"answer": result.classes}  # which is not the last of the maps
            else:
                last = list(maps.values())[-1]
                result = Result(seg, image, last.astype(np.min_scalar_type(seg.model.num_classes - 1)))
        else:
            result, maps = seg(image), {}
        unsure = seg.uncertainty(result) if uncertainty and maps else None
    shrunk = "" if image.shape[:2] == (height, width) else f", shrunk from {width} x {height}"
    seconds = time.perf_counter() - began
    taken = f", {result.steps_used or len(maps.keys() - {'start', 'answer'})} denoising steps" if maps else ""
    report = f"{image.shape[1]} x {image.shape[0]} pixels{shrunk}{taken}: {seconds:.2f} s on {seg.predictor.device}"
    return Answer(result, maps, unsure, report, steps)


@contextmanager
def number_of_steps(seg: LoadedModel, steps: int | None) -> Iterator[None]:
    """Let a stepwise model take another number of steps meanwhile (None: as configured)."""
    configured = getattr(seg.model, "num_inference_steps", None)
    if steps is None or not is_stepwise(seg):
        yield
        return
    seg.model.num_inference_steps = steps  # type: ignore[assignment]
    try:
        yield
    finally:
        seg.model.num_inference_steps = configured  # type: ignore[assignment]


def is_stepwise(seg: LoadedModel) -> bool:
    """Return whether the model denoises in steps."""
    return isinstance(seg.model, StepwiseSegmentor)


def configured_steps(seg: LoadedModel) -> int:
    """Return the model's `num_inference_steps`, 1 for models without steps."""
    model = seg.model
    if not isinstance(model, StepwiseSegmentor):
        return 1
    count = getattr(model, "num_inference_steps", None)
    return len(model.step_keys) if count is None else int(count)


def starts_from_masks(seg: LoadedModel) -> bool:
    """Return whether the denoising can start from a given map of classes."""
    model = seg.model
    return isinstance(model, StepwiseSegmentor) and type(model).start_from is not StepwiseSegmentor.start_from


def gray(values: np.ndarray) -> np.ndarray:
    """Return values (H, W) in 0..1 as a gray image (H, W, 3) uint8."""
    return figures.to_gray(values)[..., None].repeat(3, 2)


def paint(found: Answer, *, step: int | None = None, opacity: float = 0.5, only: Sequence[str] = ()) -> np.ndarray:
    """Return the photo painted with the classes, (H, W, 3) uint8.

    `step` counts the maps of `found.steps` from 0 (None: the answer). With `only`, other classes than these stay
    unpainted.
    """
    result = found.result
    names, colors = result.loaded.mask_classes
    classes = result.mask if step is None else result.loaded.mask(list(found.steps.values())[step])
    photo = figures.to_uint8_rgb(result.image)
    painted = figures.overlay(photo, classes, colors, opacity, ignored_label(len(names)))
    if not only:
        return painted
    chosen = np.isin(classes, [number for number, name in enumerate(names) if name in only])
    return np.where(chosen[..., None], painted, photo)


def legend(found: Answer, step: int | None = None) -> str:
    """Return the classes that occur as an HTML list, the most frequent first, with colors and shares of the pixels.

    The name of the step, if there is one, comes first.
    """
    result = found.result
    names, colors = result.loaded.mask_classes
    classes = result.mask if step is None else result.loaded.mask(list(found.steps.values())[step])
    counts = np.bincount(classes.ravel(), minlength=len(names))[: len(names)]
    rows = [
        f'<li><span class="swatch" style="background:rgb({",".join(map(str, colors[k]))})"></span>'
        f"{escape(names[k])} <small>{counts[k] / classes.size:.1%}</small></li>"
        for k in np.argsort(-counts, kind="stable")
        if counts[k]
    ]
    title = f"<p>{escape(list(found.steps)[step])}</p>" if step is not None else ""
    return f'{title}<ul class="legend">{"".join(rows)}</ul>'


def drawn_start(layer: np.ndarray, found: Answer) -> np.ndarray:
    """Return the start map (H, W) of what was drawn over the photo: the answer's classes where nothing was.

    `layer` is (h, w, 4) uint8 RGBA of any size; a stroke is the class with the nearest color.
    """
    result = found.result
    _, colors = result.loaded.mask_classes
    first = int(result.loaded.experiment.data.add_background_class)
    height, width = result.classes.shape
    layer = cv2.resize(layer, (width, height), interpolation=cv2.INTER_NEAREST)
    drawn = layer[..., 3] > 127
    strokes, of_pixel = np.unique(layer[drawn][:, :3].astype(int), axis=0, return_inverse=True)
    nearest = ((strokes[:, None] - colors[None].astype(int)) ** 2).sum(2).argmin(1)
    start = result.classes.astype(np.int64)
    start[drawn] = nearest[of_pixel] + first
    return start


def files(found: Answer, folder: Path) -> list[Path]:
    """Write mask, overlay and probabilities of the answer into `folder`, see `Result.write`; return the files.

    There are no probabilities of a file that answers with classes.
    """
    without = isinstance(found.result.loaded.predictor, ClassPredictor)
    mask, overlay, probabilities = (folder / name for name in ("mask.png", "overlay.png", "probabilities.npz"))
    with number_of_steps(found.result.loaded, found.count):
        found.result.write(mask, overlay, None, None if without else probabilities)
    return [path for path in (mask, overlay, probabilities) if path.exists()]
