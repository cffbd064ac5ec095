"""`predict`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from segcore.cli.common import PROVIDER, STEPWISE, Parallel, check_file, load
from segcore.config.data_sets import ServerFiles, server_files
from segcore.config.options import Flag
from segcore.errors import UserError
from segcore.files import write_zip

if TYPE_CHECKING:
    from segcore.cli.predict_files import Job
    from segcore.inference import LoadedModel

NOT_NOTED = (
    *("experiment", "folder", "checkpoint", "input", "palette"),  # in another form they are
    *("device", "offline", "gpus", "output", "resume", "frames", "zip"),
)
"""Fields that are not in predict.json, with which the results of a folder were made."""


@dataclass(frozen=True)
class Predict(Parallel):
    """Segment an image, every image of a folder, a video or a camera: class-index PNGs, overlays, probabilities."""

    checkpoint: str = field(kw_only=True)
    """A run folder (its best checkpoint), a checkpoint folder, a weights file, `official` (published weights) or
    hub:USER/REPO."""
    input: Path = field(kw_only=True)
    """An image file, a folder of images (subfolders too, which the output repeats), a video, or a camera's number."""
    output: Path = field(kw_only=True)
    """A folder; for one image also the mask's file (.png) or the overlay's (.jpg), for a video a video file: .mp4,
    .m4v, .mov, .mkv or .webm. For an image of any size a .tif: it is read and predicted in windows (evaluate.crop,
    evaluate.stride) and the mask is written without an overlay, with the image's georeference and 255 (65535 above 255
    classes) where it has no data. classes.json in the folder, or NAME_classes.json beside the file, lists the values
    of masks with names and colors."""
    provider: str | None = field(default=None, metadata=PROVIDER)
    """What runs an exported model: openvino, or one of ONNX Runtime's that is installed: cpu (the default), cuda,
    tensorrt, coreml …"""
    palette: str = "auto"
    """Colors: of the configuration's dataset (auto), of a named one, or of a text file with `r g b` per line."""
    opacity: float = 0.5
    """Share of the colors in the overlay, 0 to 1."""
    legend: Flag = False
    """Add the names and colors of its classes below the overlay; of a video, those of all classes."""
    contours: Flag = False
    """Draw the borders between classes as lines in the overlay; with `--opacity 0` only these."""
    confidence: Flag = False
    """Also write NAME_confidence.png, gray; value / 255 is the probability of the class in the mask. With a .tif, a
    .tif whose 0 means no data."""
    probabilities: Flag = False
    """Also write NAME_probabilities.npz: class probabilities (K, H, W) float16 as `probabilities`, `names` (K,) and
    `values` (K,), each class's value in the mask. It takes 2 bytes per class and pixel: 80 MB for 19 classes at
    2048x1024. With a .tif, a .tif with a float32 band for each class."""
    uncertainty: Flag = field(default=False, metadata=STEPWISE)
    """Also write NAME_uncertainty.png, gray; value / 255 is the probability of another class."""
    steps: Flag = field(default=False, metadata=STEPWISE)
    """Also write NAME_steps.png, a strip of the map after every denoising step."""
    animate: Flag = field(default=False, metadata=STEPWISE)
    """Also write NAME_animation.gif, the same maps one after the other."""
    start_mask: Path | None = field(default=None, metadata=STEPWISE)
    """DDPS only: start the denoising from this mask of class indices instead of a random one; 255, or 65535 above 255
    classes, stands for no class. For a folder of images, a folder of masks under the results' names."""
    label_ids: Flag = False
    """Images only: also write what the benchmark server of the data set takes, its values and file names, into the
    folder label_ids (cityscapes, ade20k, loveda, voc2012)."""
    zip: Path | None = None
    """Images only: a file .zip to pack the label_ids into, or without --label-ids the masks."""
    ensemble: tuple[str, ...] = ()
    """Images only: average in a second model's probabilities: its CONFIG and CHECKPOINT, or its run folder alone."""
    resume: Flag = False
    """Folders only: go on where the same command was ended. Images whose results are whole and up to date are kept; it
    is refused if they were made with other settings or weights."""
    frames: int | None = None
    """Videos and cameras only: stop after this many frames. Ctrl-C also ends a camera's recording."""

    def run_in_process(self) -> None:
        from segcore import distributed
        from segcore.cli import predict_files, predict_raster, predict_video
        from segcore.data import video
        from segcore.deploy.runtimes import require_probabilities

        moving = video.is_video(self.input)
        large = self.output.suffix.lower() in predict_raster.SUFFIXES and not (moving or self.output.is_dir())
        kinds = {"confidence": self.confidence, "probabilities": self.probabilities}
        look = {"opacity": self.opacity, "legend": self.legend, "contours": self.contours}
        self._refuse(moving, large)
        if moving:
            path = video.plan(self.input, self.output)
        elif large:
            targets = predict_raster.plan(self.input, self.output, **kinds)
        else:
            kinds |= {"uncertainty": self.uncertainty, "steps": self.steps, "animation": self.animate}
            start, server = self.start_mask, self._server()
            jobs = distributed.on_main_process(
                lambda: predict_files.plan(self.input, self.output, start=start, look=look, server=server, **kinds)
            )
        seg = replace(load(self, self.checkpoint, self.ensemble), colors=self.palette)
        _ = seg.palette  # a palette that does not fit is refused before anything is written
        if large or self.confidence or self.probabilities:
            require_probabilities(seg.predictor)
        if moving:
            predict_video.run(seg, self.input, path, frames=self.frames, **look)
            return
        if not self.input.is_dir():  # the record of a folder writes its own
            seg.write_classes(predict_files.classes_path(self.output), nodata=large)
        if large:
            predict_raster.run(seg, self.input, **targets)
        else:
            self._images(seg, jobs)

    def _refuse(self, moving: bool, large: bool) -> None:
        """Raise UserError about options that do not suit what is read or written."""
        from segcore import distributed

        check_file("zip", self.zip, ".zip", (self.input, self.checkpoint, self.start_mask, *self.ensemble))
        if not 0 <= self.opacity <= 1:
            raise UserError(f"--opacity {self.opacity} is not between 0 and 1")
        steps = self.uncertainty or self.steps or self.animate or self.start_mask
        only_images = steps or self.label_ids or self.zip
        if moving and (only_images or self.confidence or self.probabilities or self.ensemble):
            raise UserError(
                f"{self.input}: --confidence, --probabilities, --uncertainty, --steps, --animate, --start-mask, "
                "--label-ids, --zip and --ensemble are for images, not for videos"
            )
        if self.frames is not None and not moving:
            raise UserError(f"{self.input}: --frames is for videos and cameras; leave it out")
        if large and (only_images or self.legend or self.contours or self.opacity != Predict.opacity):
            raise UserError(
                f"{self.output}: with --uncertainty, --steps, --animate, --start-mask, --label-ids, --zip, --legend, "
                "--contours and --opacity, give a folder"
            )
        if (self.resume or distributed.world_size() > 1) and not self.input.is_dir():
            raise UserError(f"{self.input}: --resume, --gpus and torchrun are for a folder of images; leave them out")

    def _server(self) -> ServerFiles | None:
        data = self.experiment.data
        return server_files(data.dataset, bool(data.classes or data.labels)) if self.label_ids else None

    def _images(self, seg: LoadedModel, jobs: Sequence[Job]) -> None:
        from segcore import distributed
        from segcore.cli import predict_images
        from segcore.cli.predict_record import Record
        from segcore.reporting.label_ids import FOLDER

        many = self.input.is_dir()
        options = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in NOT_NOTED}
        record = Record(self.input, self.output, seg, options, self.resume) if many else None
        try:
            predict_images.run(seg, jobs, record)
        except UserError as error:
            if self.zip:
                error.args = (f"{error}; {self.zip} is not written",)
            raise
        if self.zip:
            root = self.output if many else jobs[0].mask.parent
            root = root / FOLDER if self.label_ids else root
            names = [(job.label_ids or job.mask).relative_to(root).as_posix() for job in jobs]
            path = self.zip
            distributed.on_main_process(lambda: write_zip(path, root, names))
            if not distributed.rank():
                print(path)
