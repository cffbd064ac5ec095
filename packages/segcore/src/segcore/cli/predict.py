"""`predict`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from segcore.cli.common import Checkpoint, Command, Flag, device_of, load_model, load_others, with_early_exit
from segcore.errors import UserError


@dataclass(frozen=True)
class Predict(Command):
    """Segment an image, every image of a folder, a video or a camera: class-index PNGs and color overlays."""

    checkpoint: Checkpoint = dataclasses.field(kw_only=True)
    """A work folder (its best checkpoint), a checkpoint folder, a weights file, or `official`: published weights."""
    input: Annotated[Positional[Path], arg(metavar="INPUT")] = dataclasses.field(kw_only=True)
    """An image file, a folder of images (subfolders too, which the output repeats), a video, or a camera's number."""
    output: Annotated[Positional[Path], arg(metavar="OUTPUT")] = dataclasses.field(kw_only=True)
    """A folder; for one image also the mask's file (.png) or the overlay's (.jpg), for a video a video file (.mp4)."""
    palette: str = "auto"
    """Colors: of the configuration's dataset (auto), cityscapes, ade20k, or a text file with `r g b` per line."""
    opacity: float = 0.5
    """Share of the colors in the overlay, 0 to 1."""
    uncertainty: Flag = False
    """Diffusion only: also write NAME_uncertainty.png, gray; value / 255 is the probability of another class."""
    steps: Flag = False
    """Diffusion only: also write NAME_steps.png, a strip of the map after every denoising step."""
    animate: Flag = False
    """Diffusion only: also write NAME_animation.gif, the same maps one after the other."""
    start_mask: Path | None = None
    """DDPS only: start the denoising from this mask of class indices instead of a random one; 255 stands for no class.
    For a folder of images a folder of masks under the results' names."""
    early_exit_threshold: float | None = None
    """Diffusion only: end an image's denoising once a step changes fewer than this percentage of its pixels."""
    ensemble: tuple[str, str] | None = None
    """Configuration and checkpoint of a second model, whose class probabilities are averaged in; for images."""
    frames: int | None = None
    """Videos and cameras only: stop after so many frames. Ctrl-C also ends a camera's recording."""

    def run(self, package: str | None) -> None:
        from segcore.cli import predict_images as predict
        from segcore.cli import predict_video
        from segcore.data import video

        exp = with_early_exit(self.experiment, self.early_exit_threshold)
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
        others = load_others(self, self.ensemble, device_of(self.device))
        model = load_model(self, self.checkpoint, device_of(self.device))
        predict.check_classes(model, classes)
        if moving:
            predict_video.run(model, exp, self.input, path, palette, opacity=self.opacity, frames=self.frames)
        else:
            predict.run(model, exp, jobs, palette, opacity=self.opacity, others=others)
