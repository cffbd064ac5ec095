"""`predict`: a user's own images in; class-index PNGs and overlays out, of diffusion models uncertainty and steps."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, cast

import cv2
import numpy as np
import torch

from segcore.config.schema import DataConfig, Experiment
from segcore.data.images import IMAGE_SUFFIXES, read_image, read_label
from segcore.data.layouts import palette_of
from segcore.errors import UserError
from segcore.evaluation.predictor import Predictor, check_ensemble, early_exit_entry
from segcore.evaluation.uncertainty import predict_uncertainty
from segcore.models.segmentor import Segmentor
from segcore.progress import progress
from segcore.reporting.figures import (
    JPEG,
    colorize,
    hstack_panels,
    overlay,
    step_title,
    to_gray,
    to_uint8_rgb,
    write_animation,
    write_class_png,
    write_image,
)


class Job(NamedTuple):
    """One image and the files it becomes."""

    image: Path
    mask: Path
    overlay: Path
    uncertainty: Path | None = None
    steps: Path | None = None
    animation: Path | None = None
    start: Path | None = None
    """The mask that the denoising starts from."""

    @property
    def written(self) -> list[Path]:
        """The files that it becomes."""
        results = (self.mask, self.overlay, self.uncertainty, self.steps, self.animation)
        return [path for path in results if path]


def plan(
    source: Path, target: Path,
    *, uncertainty: bool = False, steps: bool = False, animation: bool = False, start: Path | None = None,
) -> list[Job]:  # fmt: skip
    """Return what to do for an image file or a folder of images (searched recursively; its structure is kept).

    Everything goes below the folder `target`: the mask `NAME.png`, `NAME_overlay.png` and, where asked for,
    `NAME_uncertainty.png`, `NAME_steps.png` and `NAME_animation.gif`. Of a single image `target` may be the mask's own
    name, which ends in .png, or the overlay's, which ends in .jpg; the others lie beside it. `start` is a mask to start
    from, or a folder of such under the results' names. Raises UserError when there is nothing to read or two images
    would share a name.
    """
    kind = "" if target.is_dir() else target.suffix.lower()
    if kind in IMAGE_SUFFIXES and kind not in (".png", *JPEG):
        raise UserError(f"{target}: results are written as .png or .jpg; choose one of these, or a folder")
    if source.is_dir():
        if kind in (".png", *JPEG):
            raise UserError(f"{target}: one file for all images of the folder {source}; give a folder")
        if target.resolve() == source.resolve():
            raise UserError(f"{target}: is the folder of the images; choose another output folder")
        found = sorted(p for p in source.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        inside = source.resolve() in target.resolve().parents  # then leave out the results of an earlier run
        images = [p for p in found if not (inside and target.resolve() in p.resolve().parents)]
        if not images:
            raise UserError(f"{source}: no images in this folder (looked for {', '.join(IMAGE_SUFFIXES)})")
        names = [p.relative_to(source).with_suffix(".png") for p in images]
        masks = [target / name for name in names]
    elif source.is_file():
        images = [source]
        masks = [target.with_suffix(".png") if kind in (".png", *JPEG) else target / f"{source.stem}.png"]
        names = [Path(masks[0].name)]
    else:
        raise UserError(f"{source}: no such image or folder")
    wanted = {"overlay": True, "uncertainty": uncertainty, "steps": steps, "animation": animation}
    suffixes = {kind: "gif" if kind == "animation" else "png" for kind in wanted if wanted[kind]}
    starts = [start / name if start and start.is_dir() else start for name in names]
    jobs = [
        Job(image, mask, start=begin, **{k: mask.with_name(f"{mask.stem}_{k}.{end}") for k, end in suffixes.items()})
        for image, mask, begin in zip(images, masks, starts, strict=True)
    ]
    if kind in JPEG:  # a lossy file cannot hold classes
        jobs = [jobs[0]._replace(overlay=target)]
    written = Counter(path for job in jobs for path in job.written)
    if twice := next((path for path, count in written.items() if count > 1), None):
        raise UserError(f"{twice}: results of two images of {source} would both be written here; rename one")
    results = {path.resolve() for path in written}
    if same := next((image for image in images if image.resolve() in results), None):
        raise UserError(f"{same}: a result would overwrite this image; choose another output folder")
    return jobs


def classes_and_palette(data: DataConfig, palette: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Return class names and (K, 3) uint8 RGB colors.

    `palette`: "auto" takes the dataset's own colors, a dataset's name that one's, anything else is a text file with
    one line `r g b` per class. Raises UserError when it does not have a color for every class.
    """
    classes, colors = palette_of(data)
    if palette in ("cityscapes", "ade20k"):
        colors = palette_of(replace(data, dataset=cast(Literal["cityscapes", "ade20k"], palette)))[1]
    elif palette != "auto":
        try:
            lines = Path(palette).read_text(encoding="utf-8").splitlines()
            rows = np.array([[int(v) for v in line.replace(",", " ").split()] for line in lines if line.strip()])
            colors = rows.astype(np.uint8)
            valid = rows.ndim == 2 and rows.shape[1] == 3 and (colors == rows).all()
        except (OSError, ValueError):
            valid = False
        if not valid:
            raise UserError(
                f"--palette {palette}: give auto, cityscapes, ade20k, or a text file with `r g b` (0-255) per line"
            )
    if len(colors) < len(classes):
        raise UserError(
            f"--palette {palette} has {len(colors)} colors for {len(classes)} classes; add the missing ones"
        )
    return classes, colors[: len(classes)]


def check_classes(model: Segmentor, classes: Sequence[str]) -> None:
    """Raise UserError when the model does not have the dataset's number of classes."""
    if model.num_classes != len(classes):
        raise UserError(
            f"the model has {model.num_classes} classes but data.dataset {len(classes)}; "
            "set data.dataset and data.classes to what the model was trained on"
        )


def run(
    model: Segmentor, exp: Experiment, jobs: Sequence[Job], palette: np.ndarray,
    *, opacity: float = 0.5, others: Sequence[Segmentor] = (),
) -> None:  # fmt: skip
    """Predict every image at its own size and write the files of its job, each whole or not at all.

    The mask holds class indices, of which a class `background` is none: it becomes 255. The mask is the same whatever
    is written beside it. From a job's `start`, a mask of that kind, only DDPS can start. `others` are averaged into the
    answer, see `check_ensemble`. The noise follows from `exp.seed` alone, so an image's answer does not depend on the
    other files. Images that cannot be read are left out; then a UserError at the end names them.
    """
    if not 0 <= opacity <= 1:
        raise UserError(f"--opacity {opacity} is not between 0 and 1")
    early = exp.evaluate.early_exit_threshold is not None
    if not model.diffusion and (early or any(j.uncertainty or j.steps or j.animation or j.start for j in jobs)):
        raise model.no_diffusion()
    check_ensemble(model, others)
    if (others or early or exp.evaluate.ensemble_steps) and any(job.start for job in jobs):
        raise UserError(
            "a run from a mask goes to its end and is not averaged: with --start-mask leave out --ensemble, "
            "--early-exit-threshold and evaluate.ensemble_steps"
        )
    failures: list[str] = []
    taken: list[int] = []
    with progress("predicting") as advance:
        for done, job in enumerate(jobs):
            try:
                image = read_image(job.image, exp.data.channels, exp.data.bit_depth)
            except UserError as error:
                failures.append(str(error))
                continue
            maps: dict[str, np.ndarray] = {}
            try:
                if job.start:
                    maps = steps_from(model, exp, image, start_map(job.start, image, exp.data))
                elif job.steps or job.animation:
                    maps = image_steps(model, exp, image)
                classes = list(maps.values())[-1] if job.start else predict_image(model, exp, image, taken, others)
            except UserError as error:  # too small for the model
                failures.append(f"{job.image}: {error}")
                continue
            job.mask.parent.mkdir(parents=True, exist_ok=True)
            bare, colors = (_bare(classes), palette[1:]) if exp.data.add_background_class else (classes, palette)
            write_class_png(job.mask, bare, colors)
            write_image(job.overlay, overlay(to_uint8_rgb(image), bare, colors, opacity))
            if job.uncertainty:
                write_image(job.uncertainty, to_gray(image_uncertainty(model, exp, image, classes)))
            panels = step_panels(to_uint8_rgb(image), {**maps, "answer": classes}, palette) if maps else {}
            if job.steps:
                write_image(job.steps, hstack_panels(list(panels.values()), list(panels)))
            if job.animation:
                write_animation(job.animation, [hstack_panels([panel], [name]) for name, panel in panels.items()])
            advance(done + 1, len(jobs))
    written = len(jobs) - len(failures)
    if len(jobs) > 1:
        print(f"{written} of {len(jobs)} images written below {os.path.commonpath([job.mask.parent for job in jobs])}")
    elif written:
        print(*jobs[0].written, sep="\n")
    if taken:
        print(f"{sum(taken) / len(taken):.2f} denoising steps on average")
    if failures:
        more = f" (and {len(failures) - 1} more images)" if len(failures) > 1 else ""
        raise UserError(f"{failures[0]}{more}")


def predict_image(
    model: Segmentor,
    exp: Experiment,
    image: np.ndarray,
    taken: list[int] | None = None,
    others: Sequence[Segmentor] = (),
) -> np.ndarray:
    """Return the classes (H, W) of an image (H, W, C) in the units of its file: the model's configured answer.

    With `evaluate.ensemble_steps` it is the mean over `evaluate.steps`. With `evaluate.early_exit_threshold` denoising
    ends early, and the numbers of steps are appended to `taken`.
    """
    accumulated = {"steps": exp.evaluate.steps, "ensemble_steps": True} if exp.evaluate.ensemble_steps else {}
    percent = exp.evaluate.early_exit_threshold
    network = None if percent is None else partial(early_exit_entry, model, percent, [] if taken is None else taken)
    predictor = _configured(model, exp, others).using(**accumulated)
    [entries] = predictor.classes([image], [exp.seed], network=network)
    return list(entries.values())[-1].cpu().numpy()


def image_uncertainty(model: Segmentor, exp: Experiment, image: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return, per pixel, the probability (H, W) in 0..1 of another class than that of `classes` (H, W).

    See `segcore.evaluation.uncertainty`; only diffusion models can tell, others raise UserError.
    """
    [found] = predict_uncertainty(_configured(model, exp), [image], [torch.from_numpy(classes)], [exp.seed])
    return found.cpu().numpy()


def image_steps(model: Segmentor, exp: Experiment, image: np.ndarray) -> dict[str, np.ndarray]:
    """Return the classes (H, W) after every denoising step, from the first noise start; empty without such steps."""
    [entries] = _configured(model, exp).classes([image], [exp.seed], network=model.denoising_trajectory)
    return {step_title(step, model.step_unit): classes.cpu().numpy() for step, classes in entries.items()}


def steps_from(model: Segmentor, exp: Experiment, image: np.ndarray, start: np.ndarray) -> dict[str, np.ndarray]:
    """Return `start` and the classes (H, W) after every denoising step from there, on the whole image in one view.

    `start` holds classes (H, W). Raises UserError when the model has no such start, or with windows or several views.
    """
    settings = exp.evaluate
    if settings.mode != "whole" or len(settings.img_ratios) > 1 or settings.flip:
        raise UserError(
            "--start-mask takes whole images in one view; set evaluate.mode to whole, no ratios and no flip"
        )
    masks = torch.from_numpy(start)[None]
    [entries] = _configured(model, exp).classes(
        [image], [exp.seed], network=lambda images, seeds: model.refine_mask(images, masks, seeds)
    )
    return {"start": start, **{step: classes.cpu().numpy() for step, classes in entries.items()}}


def start_map(path: Path, image: np.ndarray, data: DataConfig) -> np.ndarray:
    """Return the start classes (H, W) int64 of an image from a file.

    Raises UserError when the file cannot be read or has another size than the image.
    """
    found = read_label(path).astype(np.int64)
    if found.shape != image.shape[:2]:
        raise UserError(f"{path}: is {found.shape[1]}x{found.shape[0]} pixels; give a mask of the image's size")
    return np.where(found == 255, 0, found + 1) if data.add_background_class else found


def _bare(classes: np.ndarray) -> np.ndarray:
    """Return classes (H, W) without the class `background` in front, which becomes 255."""
    return np.where(classes == 0, 255, classes - 1)


def _configured(model: Segmentor, exp: Experiment, ensemble: Sequence[Segmentor] = ()) -> Predictor:
    """Return the predictor of `exp` for the configured answer: without the steps that `test` reports."""
    return Predictor.of(model, exp, ensemble).using(steps=(), ensemble_steps=False)


def step_panels(
    image: np.ndarray, maps: Mapping[str, np.ndarray], palette: np.ndarray, side: int = 512
) -> dict[str, np.ndarray]:
    """Return the image and then the class maps (H, W) in color by caption, none longer than `side` pixels.

    From the second map on the caption says how many of the pixels changed.
    """
    height, width = image.shape[:2]
    scale = min(1, side / max(height, width))
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    panels = {"input": cv2.resize(image, size, interpolation=cv2.INTER_AREA)}
    before = None
    for name, classes in maps.items():
        changed = "" if before is None else f": {(classes != before).mean():.1%} changed"
        colors = cv2.resize(colorize(classes, palette), size, interpolation=cv2.INTER_NEAREST)
        panels[f"{name}{changed}"], before = colors, classes
    return panels
