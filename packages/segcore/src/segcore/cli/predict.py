"""`predict`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from segcore.cli.common import STEPWISE, Parallel, load
from segcore.config.options import Flag
from segcore.errors import UserError

NOT_NOTED = (
    *("experiment", "folder", "checkpoint", "input", "palette"),  # in another form they are
    *("device", "offline", "gpus", "output", "resume", "frames"),
)
"""Fields that are not in predict.json, with which the results of a folder were made."""


@dataclass(frozen=True)
class Predict(Parallel):
    """Segment an image, every image of a folder, a video or a camera: class-index PNGs and color overlays."""

    checkpoint: str = field(kw_only=True)
    """A run folder (its best checkpoint), a checkpoint folder, a weights file, or `official`: published weights."""
    input: Path = field(kw_only=True)
    """An image file, a folder of images (subfolders too, which the output repeats), a video, or a camera's number."""
    output: Path = field(kw_only=True)
    """A folder; for one image also the mask's file (.png) or the overlay's (.jpg), for a video a video file: .mp4,
    .m4v, .mov, .mkv or .webm. For an image of any size a .tif: it is read and predicted in windows (evaluate.crop,
    evaluate.stride) and only the mask is written, with the image's georeference and 255 (65535 above 255 classes)
    where it has no data."""
    palette: str = "auto"
    """Colors: of the configuration's dataset (auto), of a named one, or of a text file with `r g b` per line."""
    opacity: float = 0.5
    """Share of the colors in the overlay, 0 to 1."""
    uncertainty: Flag = field(default=False, metadata=STEPWISE)
    """Also write NAME_uncertainty.png, gray; value / 255 is the probability of another class."""
    steps: Flag = field(default=False, metadata=STEPWISE)
    """Also write NAME_steps.png, a strip of the map after every denoising step."""
    animate: Flag = field(default=False, metadata=STEPWISE)
    """Also write NAME_animation.gif, the same maps one after the other."""
    start_mask: Path | None = field(default=None, metadata=STEPWISE)
    """DDPS only: start the denoising from this mask of class indices instead of a random one; 255 stands for no class.
    For a folder of images, a folder of masks under the results' names."""
    ensemble: tuple[str, ...] = ()
    """Images only: average in a second model's probabilities: its CONFIG and CHECKPOINT, or its run folder alone."""
    resume: Flag = False
    """Folders only: go on where the same command was ended. Images whose results are whole and up to date are kept; it
    is refused if they were made with other settings or weights."""
    frames: int | None = None
    """Videos and cameras only: stop after this many frames. Ctrl-C also ends a camera's recording."""

    def run_in_process(self) -> None:
        from segcore import distributed
        from segcore.cli import predict_files, predict_images, predict_raster, predict_video
        from segcore.cli.predict_record import Record
        from segcore.data import video

        if not 0 <= self.opacity <= 1:
            raise UserError(f"--opacity {self.opacity} is not between 0 and 1")
        moving = video.is_video(self.input)
        large = self.output.suffix.lower() in predict_raster.SUFFIXES and not (moving or self.output.is_dir())
        shown = self.uncertainty or self.steps or self.animate or self.start_mask
        if moving and (shown or self.ensemble):
            raise UserError(
                f"{self.input}: --uncertainty, --steps, --animate, --start-mask and --ensemble are for images, "
                "not for videos"
            )
        if large and shown:
            raise UserError(f"{self.output}: with --uncertainty, --steps, --animate and --start-mask, give a folder")
        many = self.input.is_dir()
        if (self.resume or distributed.world_size() > 1) and not many:
            raise UserError(f"{self.input}: --resume, --gpus and torchrun are for a folder of images; leave them out")
        if moving:
            path = video.plan(self.input, self.output)
        elif large:
            predict_raster.check(self.input, self.output)
        else:
            jobs = distributed.on_main_process(
                lambda: predict_files.plan(
                    self.input, self.output, uncertainty=self.uncertainty, steps=self.steps, animation=self.animate,
                    start=self.start_mask,
                )
            )  # fmt: skip
        seg = replace(load(self, self.checkpoint, self.ensemble), colors=self.palette)
        _ = seg.palette  # a palette that does not fit is refused before anything is written
        if moving:
            predict_video.run(seg, self.input, path, opacity=self.opacity, frames=self.frames)
        elif large:
            predict_raster.run(seg, self.input, self.output)
        else:
            options = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in NOT_NOTED}
            record = Record(self.input, self.output, seg, options, self.resume) if many else None
            predict_images.run(seg, jobs, opacity=self.opacity, record=record)
