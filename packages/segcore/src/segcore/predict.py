"""`predict`: a user's own images in; class-index PNGs and overlays out, of diffusion models uncertainty and steps."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import cv2
import numpy as np
import torch

from segcore.data.dataset import IMAGE_SUFFIXES, palette_of, read_image
from segcore.errors import UserError
from segcore.evaluation.inference import predict_classes, until_converged
from segcore.evaluation.uncertainty import predict_uncertainty
from segcore.experiment import Data, Experiment
from segcore.models.segmentor import Segmentor
from segcore.progress import progress
from segcore.visualize import colorize, displayable, grey, overlay, strip, write_class_png, write_image


class Job(NamedTuple):
    """One image and the files it becomes."""

    image: Path
    mask: Path
    overlay: Path
    uncertainty: Path | None = None
    steps: Path | None = None


def plan(source: Path, target: Path, *, uncertainty: bool = False, steps: bool = False) -> list[Job]:
    """Return what to do for an image file or a folder of images (searched recursively; its structure is kept).

    A single image goes to `target` itself when that ends in .png, otherwise everything goes below the folder `target`:
    `NAME.png`, `NAME_overlay.png` and, where asked for, `NAME_uncertainty.png` and `NAME_steps.png`. Raises UserError
    when there is nothing to read or two images would share a name.
    """
    if source.is_dir():
        if target.resolve() == source.resolve():
            raise UserError(f"{target}: is the folder of the images; choose another output folder")
        found = sorted(p for p in source.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        inside = source.resolve() in target.resolve().parents  # then leave out the results of an earlier run
        images = [p for p in found if not (inside and target.resolve() in p.resolve().parents)]
        if not images:
            raise UserError(f"{source}: no images in this folder (looked for {', '.join(IMAGE_SUFFIXES)})")
        masks = [target / p.relative_to(source).with_suffix(".png") for p in images]
    elif source.is_file():
        images = [source]
        masks = [target if target.suffix.lower() == ".png" else target / f"{source.stem}.png"]
    else:
        raise UserError(f"{source}: no such image or folder")
    kinds = ["overlay"] + ["uncertainty"] * uncertainty + ["steps"] * steps
    jobs = [
        Job(image, mask, **{kind: mask.with_name(f"{mask.stem}_{kind}.png") for kind in kinds})
        for image, mask in zip(images, masks, strict=True)
    ]
    written = Counter(path for job in jobs for path in job[1:] if path)
    if twice := next((path for path, count in written.items() if count > 1), None):
        raise UserError(f"{twice}: results of two images of {source} would both be written here; rename one")
    results = {path.resolve() for path in written}
    if same := next((image for image in images if image.resolve() in results), None):
        raise UserError(f"{same}: a result would overwrite this image; choose another output folder")
    return jobs


def classes_and_palette(data: Data, palette: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Return class names and (K, 3) uint8 RGB colours.

    `palette`: "auto" takes the dataset's own colours, a dataset's name that one's, anything else is a text file with
    one line `r g b` per class. Raises UserError when it does not have a colour for every class.
    """
    classes, colours = palette_of(data)
    if palette in ("cityscapes", "ade20k"):
        colours = palette_of(replace(data, dataset=cast(Literal["cityscapes", "ade20k"], palette)))[1]
    elif palette != "auto":
        try:
            lines = Path(palette).read_text(encoding="utf-8").splitlines()
            rows = np.array([[int(v) for v in line.replace(",", " ").split()] for line in lines if line.strip()])
            colours = rows.astype(np.uint8)
            valid = rows.ndim == 2 and rows.shape[1] == 3 and (colours == rows).all()
        except (OSError, ValueError):
            valid = False
        if not valid:
            raise UserError(
                f"--palette {palette}: give auto, cityscapes, ade20k, or a text file with `r g b` (0-255) per line"
            )
    if len(colours) < len(classes):
        raise UserError(
            f"--palette {palette} has {len(colours)} colours for {len(classes)} classes; add the missing ones"
        )
    return classes, colours[: len(classes)]


def check_classes(model: Segmentor, classes: Sequence[str]) -> None:
    """Raise UserError when the model does not have the dataset's number of classes."""
    if model.num_classes != len(classes):
        raise UserError(
            f"the model has {model.num_classes} classes but data.dataset {len(classes)}; "
            "set data.dataset and data.classes to what the model was trained on"
        )


def run(model: Segmentor, exp: Experiment, jobs: Sequence[Job], palette: np.ndarray, *, opacity: float = 0.5) -> None:
    """Predict every image at its own size and write the files of its job, each whole or not at all.

    The mask holds class indices; it is the same whatever is written beside it. The noise follows from `exp.seed` alone,
    so an image's answer does not depend on the other files. Images that cannot be read are left out; then a UserError
    at the end names them.
    """
    if not 0 <= opacity <= 1:
        raise UserError(f"--opacity {opacity} is not between 0 and 1")
    early = exp.evaluate.until_converged is not None
    if not model.diffusion and (early or any(job.uncertainty or job.steps for job in jobs)):
        raise model.no_diffusion()
    device = next(model.parameters()).device
    failures: list[str] = []
    taken: list[int] = []
    with progress("predicting") as advance:
        for done, job in enumerate(jobs):
            try:
                image = read_image(job.image, exp.data.channels, exp.data.bit_depth)
            except UserError as error:
                failures.append(str(error))
                continue
            try:
                classes = predict_image(model, exp, image, device, taken)
            except UserError as error:  # too small for the model
                failures.append(f"{job.image}: {error}")
                continue
            job.mask.parent.mkdir(parents=True, exist_ok=True)
            write_class_png(job.mask, classes, palette)
            write_image(job.overlay, overlay(displayable(image), classes, palette, opacity))
            if job.uncertainty:
                write_image(job.uncertainty, grey(image_uncertainty(model, exp, image, classes, device)))
            if job.steps:
                maps = {**image_steps(model, exp, image, device), "answer": classes}
                write_image(job.steps, step_strip(displayable(image), maps, palette))
            advance(done + 1, len(jobs))
    written = len(jobs) - len(failures)
    print(f"{written} of {len(jobs)} images written below {os.path.commonpath([job.mask.parent for job in jobs])}")
    if taken:
        print(f"{sum(taken) / len(taken):.2f} denoising steps on average")
    if failures:
        more = f" (and {len(failures) - 1} more images)" if len(failures) > 1 else ""
        raise UserError(f"{failures[0]}{more}")


def predict_image(
    model: Segmentor, exp: Experiment, image: np.ndarray, device: torch.device, taken: list[int] | None = None
) -> np.ndarray:
    """Return the classes (H, W) of an image (H, W, C) in the units of its file: the model's configured answer.

    With `evaluate.until_converged` denoising ends early, and the numbers of steps are appended to `taken`.
    """
    percent = exp.evaluate.until_converged
    network = None if percent is None else partial(until_converged, model, percent, [] if taken is None else taken)
    entries = _predict(predict_classes, model, exp, image, device, network=network)
    return list(entries.values())[-1].cpu().numpy()


def image_uncertainty(
    model: Segmentor, exp: Experiment, image: np.ndarray, classes: np.ndarray, device: torch.device
) -> np.ndarray:
    """Return, per pixel, the probability (H, W) in 0..1 of another class than that of `classes` (H, W).

    See `segcore.evaluation.uncertainty`; only diffusion models can tell, others raise UserError.
    """
    return _predict(predict_uncertainty, model, exp, image, device, classes=[torch.from_numpy(classes)]).cpu().numpy()


def image_steps(model: Segmentor, exp: Experiment, image: np.ndarray, device: torch.device) -> dict[str, np.ndarray]:
    """Return the classes (H, W) after every denoising step, from the first noise start; empty without such steps."""
    entries = _predict(predict_classes, model, exp, image, device, network=model.predict_trace)
    return {step: classes.cpu().numpy() for step, classes in entries.items()}


def _predict(
    predict: Callable[..., list[Any]], model: Segmentor, exp: Experiment, image: np.ndarray, device: torch.device,
    **options: Any,
) -> Any:  # fmt: skip
    """Return what a function of `segcore.evaluation` predicts for one image with the settings of `exp`."""
    settings = replace(exp.evaluate, steps=())  # as configured, whatever `test` reports
    [answer] = predict(
        model, [image], evaluate=settings, data=exp.data, seeds=[exp.seed],
        device=device, precision=exp.train.precision, channels_last=exp.train.channels_last, **options,
    )  # fmt: skip
    return answer


def step_strip(image: np.ndarray, maps: Mapping[str, np.ndarray], palette: np.ndarray, side: int = 512) -> np.ndarray:
    """Return the image and then the class maps (H, W) by caption, side by side, none longer than `side` pixels.

    From the second map on the caption says how many of the pixels changed.
    """
    height, width = image.shape[:2]
    scale = min(1, side / max(height, width))
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    panels = {"input": cv2.resize(image, size, interpolation=cv2.INTER_AREA)}
    before = None
    for name, classes in maps.items():
        changed = "" if before is None else f": {(classes != before).mean():.1%} changed"
        colours = cv2.resize(colorize(classes, palette), size, interpolation=cv2.INTER_NEAREST)
        panels[f"{name}{changed}"], before = colours, classes
    return strip(list(panels.values()), list(panels))
