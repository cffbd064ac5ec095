"""The output of a model for one image: classes, probabilities, overlay, files."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from segcore.data.labels import ignored_label
from segcore.files import write
from segcore.reporting import figures

if TYPE_CHECKING:
    from segcore.inference import LoadedModel


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
    kept: np.ndarray | Callable[[], np.ndarray] | None = field(default=None, repr=False)
    """`probabilities`, if the call was asked to keep them, or what computes them without another run."""

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Class probabilities (K, H, W) float32 in 0..1, which add up to 1; a model with one class has its alone.

        Unless the call kept them, they are computed on first use, by another run with the same draws.
        """
        if self.kept is None:
            return self.loaded.probabilities(self.image)
        return self.kept() if callable(self.kept) else self.kept

    @cached_property
    def confidence(self) -> np.ndarray:
        """Probability (H, W) float32 in 0..1 of the class in `classes`; computed from `probabilities`."""
        return probability_of(self.classes, self.probabilities)

    @property
    def mask(self) -> np.ndarray:
        """The mask that `save` writes, see `LoadedModel.mask`."""
        return self.loaded.mask(self.classes)

    def overlay(
        self, legend: bool | Literal["all"] = False, opacity: float = 0.5, contours: bool = False
    ) -> Image.Image:
        """Return the image overlaid with the classes' colors.

        `legend` adds the names of its classes below; "all" those of all classes, so that images of one size stay so.
        `contours` draws the borders between classes as lines in their full colors.
        """
        (names, colors), mask = self.loaded.mask_classes, self.mask
        painted = figures.overlay(
            figures.to_uint8_rgb(self.image), mask, colors, opacity, ignored_label(len(names)), contours=contours
        )
        if legend:
            present = range(len(names)) if legend == "all" else [k for k in np.unique(mask) if k < len(names)]
            painted = figures.add_legend(painted, [names[k] for k in present], colors[present])
        return Image.fromarray(painted)

    def save(
        self, output: str | Path, *, confidence: bool = False, probabilities: bool = False,
        opacity: float = 0.5, legend: bool = False, contours: bool = False,
    ) -> tuple[Path, ...]:  # fmt: skip
        """Write NAME.png, the mask of class indices, and NAME_overlay.png into the folder `output`; return the paths.

        If asked for, NAME_confidence.png and NAME_probabilities.npz, too, see `write`. classes.json in the folder lists
        the mask's values with names and colors.
        """
        mask, overlay = Path(output, f"{self.name}.png"), Path(output, f"{self.name}_overlay.png")
        gray = mask.with_name(f"{self.name}_confidence.png") if confidence else None
        floats = mask.with_name(f"{self.name}_probabilities.npz") if probabilities else None
        self.loaded.write_classes(mask.with_name("classes.json"))
        self.write(mask, overlay, gray, floats, opacity=opacity, legend=legend, contours=contours)
        return mask, overlay, *filter(None, (gray, floats))

    def write(
        self, mask: Path, overlay: Path, confidence: Path | None = None, probabilities: Path | None = None,
        *, opacity: float = 0.5, legend: bool = False, contours: bool = False,
    ) -> None:  # fmt: skip
        """Write the mask (.png) and the overlay (.png or .jpg), each atomically; missing folders are created.

        `confidence` is an 8-bit gray PNG; value / 255 is the probability of the class in the mask. `probabilities` is
        an .npz of `probabilities` (K, H, W) float16, `names` (K,) and `values` (K,), the mask's value of each class:
        `values[probabilities.argmax(0)]` is the mask, but for ties in float16.
        """
        if self.classes.dtype == np.uint8:
            figures.write_class_png(mask, self.mask, self.loaded.mask_classes[1])
        else:
            figures.write_image(mask, self.mask)
        figures.write_image(overlay, np.array(self.overlay(legend, opacity, contours)))
        if confidence:
            figures.write_image(confidence, figures.to_gray(self.confidence))
        if probabilities:
            data = io.BytesIO()
            np.savez(
                data,
                probabilities=self.probabilities.astype(np.float16),
                names=np.array(self.loaded.class_names),
                values=self.loaded.mask_values,
            )
            write(probabilities, data.getvalue())


def probability_of(classes: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return, per pixel, the probability (H, W) of its class (H, W) from those of all classes (K, H, W).

    With one class, 0 stands for its absence.
    """
    if len(probabilities) == 1:
        found: np.ndarray = np.where(classes == 1, probabilities[0], 1 - probabilities[0])
    else:
        found = np.take_along_axis(probabilities, classes[None].astype(np.int64), 0)[0]
    return found
