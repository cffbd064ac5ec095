"""The files that `predict` writes for images: their names, and what stands in them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from segcore.cli.predict_raster import SUFFIXES as TIFF
from segcore.config.data_sets import ServerFiles
from segcore.data.images import IMAGE_SUFFIXES, read_label
from segcore.data.labels import ignored_label
from segcore.data.layouts.files import walk
from segcore.errors import UserError
from segcore.reporting.figures import JPEG, colorize, hstack_panels, to_gray, to_uint8_rgb, write_animation, write_image
from segcore.reporting.label_ids import FOLDER, write_label_ids
from segcore.result import Result


class Job(NamedTuple):
    """One image and the files it becomes."""

    image: Path
    mask: Path
    overlay: Path
    confidence: Path | None = None
    probabilities: Path | None = None
    uncertainty: Path | None = None
    steps: Path | None = None
    animation: Path | None = None
    label_ids: Path | None = None
    """The mask as the benchmark server takes it."""
    start: Path | None = None
    """The mask that the denoising starts from."""
    look: Mapping[str, Any] = {}
    """Arguments of `Result.overlay`."""

    @property
    def written(self) -> list[Path]:
        """The files that it becomes."""
        results = (self.mask, self.overlay, self.confidence, self.probabilities, self.uncertainty, self.steps)
        return [path for path in (*results, self.animation, self.label_ids) if path]


ENDINGS = {
    "confidence": ".png", "probabilities": ".npz", "uncertainty": ".png", "steps": ".png", "animation": ".gif",
}  # fmt: skip
"""What can be written beside mask and overlay, as NAME_<kind><ending>."""


def plan(
    source: Path,
    target: Path,
    *,
    start: Path | None = None,
    look: Mapping[str, Any] | None = None,
    server: ServerFiles | None = None,
    **kinds: bool,
) -> list[Job]:
    """Return what to do for an image file or a folder of images (searched recursively; its structure is kept).

    Everything goes below the folder `target`: the mask `NAME.png`, `NAME_overlay.png` and, of the `kinds` in ENDINGS,
    those asked for. Of a single image `target` may be the mask's own name, which ends in .png, or the overlay's, which
    ends in .jpg; the others lie beside it. `start` is a mask to start from, or a folder of such under the results'
    names; `look` are arguments of `Result.overlay`. Raises UserError when there is nothing to read or two images would
    share a name.
    """
    kind = "" if target.is_dir() else target.suffix.lower()
    if kind in IMAGE_SUFFIXES and kind not in (".png", *JPEG):
        raise UserError(f"{target}: results are written as .png or .jpg; choose one of these, or a folder")
    if source.is_dir():
        if kind in (".png", *JPEG):
            raise UserError(f"{target}: one file for all images of the folder {source}; give a folder")
        if realpath(target) == realpath(source):
            raise UserError(f"{target}: is the folder of the images; choose another output folder")
        found = sorted(p for p in walk(source) if p.suffix.lower() in IMAGE_SUFFIXES)
        inside = realpath(source) in realpath(target).parents  # then leave out the results of an earlier run
        images = [p for p in found if not (inside and realpath(target) in realpath(p).parents)]
        if not images:
            raise UserError(f"{source}: no images in this folder (looked for {', '.join(IMAGE_SUFFIXES)})")
        names = [p.relative_to(source).with_suffix(".png") for p in images]
        masks = [target / name for name in names]
    elif source.exists():
        images = [source]
        masks = [target.with_suffix(".png") if kind in (".png", *JPEG) else target / f"{source.stem}.png"]
        names = [Path(masks[0].name)]
    else:
        raise UserError(f"{source}: no such image or folder")
    endings = {"overlay": ".png", **{k: ENDINGS[k] for k, asked in kinds.items() if asked}}
    jobs = []
    for image, name, mask in zip(images, names, masks, strict=True):
        files = {k: mask.with_name(f"{mask.stem}_{k}{ending}") for k, ending in endings.items()}
        begin = start / name if start and start.is_dir() else start
        jobs.append(Job(image, mask, start=begin, look=look or {}, **files))
    if server:
        below = [p.relative_to(source) if source.is_dir() else Path(p.name) for p in images]
        root = target if source.is_dir() else masks[0].parent
        paths = [root / FOLDER / server.path(name.with_suffix("").as_posix()) for name in below]
        jobs = [job._replace(label_ids=path) for job, path in zip(jobs, paths, strict=True)]
    if kind in JPEG:  # a lossy file cannot hold classes
        jobs = [jobs[0]._replace(overlay=target)]
    written = Counter(path for job in jobs for path in job.written)
    if twice := next((path for path, count in written.items() if count > 1), None):
        raise UserError(f"{twice}: results of two images of {source} would both be written here; rename one")
    results = {realpath(path) for path in written}
    inputs = [*images, *(job.start for job in jobs if job.start)]
    if same := next((path for path in inputs if realpath(path) in results), None):
        raise UserError(f"{same}: a result would overwrite this file; choose another output folder")
    return jobs


def classes_path(target: Path) -> Path:
    """Return the file of the list of classes: classes.json in a folder, NAME_classes.json beside a file."""
    if target.is_dir() or target.suffix.lower() not in (".png", *JPEG, *TIFF):
        return target / "classes.json"
    return target.with_name(f"{target.stem}_classes.json")


def realpath(path: Path) -> Path:
    """Return the path without links, as far as they lead anywhere: `Path.resolve` raises for a link to itself."""
    return Path(os.path.realpath(path))


def write(job: Job, result: Result, maps: Mapping[str, np.ndarray], uncertainty: np.ndarray | None) -> None:
    """Write the files of a job; `maps` are the classes after every denoising step by title."""
    result.write(job.mask, job.overlay, job.confidence, job.probabilities, **job.look)
    if job.label_ids:
        write_label_ids(job.label_ids, result.mask, result.loaded.experiment.data.dataset)
    if job.uncertainty and uncertainty is not None:
        write_image(job.uncertainty, to_gray(uncertainty))
    if not (job.steps or job.animation):
        return
    image, answer = to_uint8_rgb(result.image), result.classes
    panels = step_panels(image, {**maps, "answer": answer}, result.loaded.palette)
    if job.steps:
        write_image(job.steps, hstack_panels(list(panels.values()), list(panels)))
    if job.animation:
        write_animation(job.animation, [hstack_panels([panel], [name]) for name, panel in panels.items()])


def start_map(path: Path, image: np.ndarray, classes: int, background: bool) -> np.ndarray:
    """Return the start classes (H, W) int64 of an image from a mask as `predict` writes it.

    With a background class in front, they are one more than in the mask, and 0 where it has the ignored label. Raises
    UserError when the file cannot be read, has another size than the image, or values of no class.
    """
    found = read_label(path).astype(np.int64)
    if found.shape != image.shape[:2]:
        raise UserError(f"{path}: is {found.shape[1]}x{found.shape[0]} pixels; give a mask of the image's size")
    ignored = ignored_label(classes)
    wrong = found[(found >= classes) & ~(background & (found == ignored))]
    if wrong.size:
        more = f", or {ignored} for no class" if background else ""
        raise UserError(f"{path}: has the value {wrong[0]}; give 0 to {classes - 1}{more}")
    return np.where(found == ignored, 0, found + 1) if background else found


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
        colors = colorize(classes, palette, ignored_label(len(palette)))
        colors = cv2.resize(colors, size, interpolation=cv2.INTER_NEAREST)
        panels[f"{name}{changed}"], before = colors, classes
    return panels
