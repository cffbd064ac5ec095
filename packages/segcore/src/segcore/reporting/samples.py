"""The images of a report: which ones, and their panels as embedded pictures of bounded size."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
from PIL import Image

from segcore.data.dataset import Dataset
from segcore.evaluation.evaluate import evaluation_mode
from segcore.evaluation.predictor import Network, Predictor
from segcore.models.stepwise import StepwiseSegmentor
from segcore.reporting.figures import colorize, colormap, overlay, to_uint8_rgb
from segcore.reporting.run_record import ImageRow
from segcore.seeds import evaluation_seed

WORST = RANDOM = 12
STEPS = 4
"""Denoising steps that are shown before the last one."""
SIDE = 640
"""Longer side in pixels above which a picture is reduced."""
BUDGET = 3_500_000
"""Bytes of all pictures of a page; base64 adds a third."""
WRONG, DIM = (255, 45, 85), 0.55
"""Color of wrong pixels, and brightness of the gray photo below them."""


@dataclass(frozen=True)
class Shown:
    """An image and what a model says about it, reduced to `SIDE`: maps by their nearest pixels."""

    photo: np.ndarray
    """(h, w, 3) uint8."""
    label: np.ndarray
    classes: np.ndarray
    """(h, w) class indices, as the label's."""
    confidence: np.ndarray
    """(h, w) float32, 0..1."""
    steps: Mapping[str, np.ndarray]
    """Classes (h, w) after some denoising steps but the last one, by title."""
    palette: np.ndarray
    ignore_index: int

    @property
    def known(self) -> np.ndarray:
        """Which pixels (h, w) count."""
        known: np.ndarray = self.label != self.ignore_index
        return known

    @property
    def right(self) -> np.ndarray:
        """Which of them (h, w) are right."""
        right: np.ndarray = (self.label == self.classes) & self.known
        return right

    def map(self, classes: np.ndarray) -> Picture:
        """Return a map of classes (h, w) in the classes' colors."""
        return Picture(colorize(classes, self.palette, self.ignore_index), flat=True)

    def painted(self) -> Picture:
        """Return the photo with the prediction on top."""
        return Picture(overlay(self.photo, self.classes, self.palette, 0.55, self.ignore_index))

    def errors(self) -> Picture:
        """Return the photo in dim gray with the wrong pixels in a signal color."""
        return self.marked([(self.known & ~self.right, WRONG)])

    def marked(self, masks: Iterable[tuple[np.ndarray, tuple[int, int, int]]]) -> Picture:
        """Return the photo in dim gray with the pixels of masks (h, w) in colors."""
        gray = cv2.cvtColor(self.photo, cv2.COLOR_RGB2GRAY)[..., None].repeat(3, 2)
        gray = (gray * DIM).astype(np.uint8)
        for mask, color in masks:
            gray[mask] = gray[mask] * 0.3 + np.multiply(color, 0.7)
        return Picture(gray)


@dataclass(frozen=True)
class Picture:
    """An image (h, w, 3) uint8 of a page; a `flat` one, of few colors, is stored without loss."""

    image: np.ndarray
    flat: bool = False

    def encoded(self, scale: float) -> bytes:
        """Return a PNG or JPEG, reduced to `scale` times its size."""
        image, data = self.image, io.BytesIO()
        if scale < 1:
            size = [max(round(x * scale), 1) for x in image.shape[1::-1]]
            image = cv2.resize(image, size, interpolation=cv2.INTER_NEAREST if self.flat else cv2.INTER_AREA)
        picture = Image.fromarray(image)
        if self.flat:
            picture.save(data, "PNG")
        else:
            picture.save(data, "JPEG", quality=82)
        return data.getvalue()


def data_uris(pictures: Sequence[Picture]) -> list[str]:
    """Return pictures as `data:` URLs, all reduced by the same factor as far as `BUDGET` demands it."""
    scale = 1.0
    while True:
        files = [picture.encoded(scale) for picture in pictures]
        if (total := sum(map(len, files))) <= BUDGET or scale < 0.1:
            break
        scale *= min(0.9, (BUDGET / total) ** 0.6)
    kinds = ["png" if picture.flat else "jpeg" for picture in pictures]
    return [f"data:image/{k};base64,{base64.b64encode(f).decode()}" for k, f in zip(kinds, files, strict=True)]


def choose(rows: Sequence[ImageRow]) -> tuple[list[ImageRow], list[ImageRow]]:
    """Return the images of lowest mIoU, the worst first, and others at random in the order of the data set."""
    judged = [row for row in rows if row.miou is not None]
    worst = sorted(judged, key=lambda row: (row.miou, row.index))[:WORST]
    others = [row for row in rows if row not in worst]
    drawn = np.random.RandomState(0).permutation(len(others))[:RANDOM]  # alike in every report
    return worst, [others[i] for i in sorted(drawn)]


def predict_shown(
    predictor: Predictor,
    dataset: Dataset,
    indices: Sequence[int],
    seed: int,
    main: str,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Shown]:
    """Predict images of a data set as `evaluate` does with this seed; `main` is the entry that counts.

    Raises UserError when an image cannot be read.
    """
    model, found = predictor.model, []
    network: Network | None = None
    if isinstance(model, StepwiseSegmentor) and main == model.default_step and not predictor.evaluate.ensemble_steps:
        network = model.trajectory_answers  # its last step is the answer
    with evaluation_mode(model):
        for done, index in enumerate(indices, 1):
            image, label = dataset.pair(index)
            assert label is not None
            [entries] = predictor.classes_and_confidence([image], [evaluation_seed(seed, index)], network=network)
            *before, last = entries
            classes, confidence = entries[main if main in entries else last]
            spread = np.linspace(0, len(before) - 1, min(STEPS, len(before))).round().astype(int)
            kept = [before[i] for i in spread] if network else []
            small = partial(_reduced, rows=_nearest(label.shape, 0), columns=_nearest(label.shape, 1))
            photo = to_uint8_rgb(image)
            size = small(label).shape
            if size != label.shape:
                photo = cv2.resize(photo, size[::-1], interpolation=cv2.INTER_AREA)
            steps = {step: small(entries[step][0].cpu().numpy()) for step in kept}
            maps = small(label), small(classes.cpu().numpy()), small(confidence.cpu().numpy())
            found.append(Shown(photo, *maps, steps, dataset.palette, dataset.ignore_index))
            on_progress(done, len(indices))
    return found


def _nearest(shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Return the rows (axis 0) or columns (1) that stay of a map when its longer side is reduced to SIDE."""
    size = shape[axis]
    count = max(round(size * min(1, SIDE / max(shape))), 1)
    return ((np.arange(count) + 0.5) * size / count).astype(int)


def _reduced(values: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return values[rows][:, columns]


def panels(shown: Shown) -> dict[str, Picture]:
    """Return the panels of one image by caption."""
    return {
        "photo": Picture(shown.photo),
        "overlay": shown.painted(),
        "errors": shown.errors(),
        "ground truth": shown.map(shown.label),
        "prediction": shown.map(shown.classes),
        "confidence": Picture(colormap(shown.confidence)),
        **{title: shown.map(classes) for title, classes in shown.steps.items()},
    }


def compared(
    shown: Sequence[Shown], names: Sequence[str], colors: Sequence[tuple[int, int, int]]
) -> dict[str, Picture]:
    """Return the panels of one image that several models have predicted; of two, also which one is right."""
    first, *others = shown
    found = {"photo": Picture(first.photo), "ground truth": first.map(first.label)}
    if len(shown) == 2 and others[0].right.shape == first.right.shape:
        a, b = first.right, others[0].right
        masks = [(a & ~b, colors[0]), (b & ~a, colors[1]), (first.known & ~a & ~b, WRONG)]
        found["who is right"] = first.marked(masks)
    return found | {f"prediction {name}": x.map(x.classes) for name, x in zip(names, shown, strict=True)}
