"""Settings of the data. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

from segcore.config.data_sets import OF_FILES, LayoutName, check_also
from segcore.config.fields import INPUT, MOST_CHANNELS, Section, setting
from segcore.config.label_rows import check_classes, read_rows
from segcore.config.user_code import check_reference
from segcore.errors import UserError

_CLASSES = ("test", "predict", "web", "export", "check")
"""Commands that need to know what the classes are."""
_SPLIT = ("test", "check", "export")
"""Commands that open the validation images."""
_TRAINING = ("check", "export")
"""Commands that open the training images."""
_CHECK = ("check",)
"""The command that draws the crops of training."""


WITHOUT_FILES = ("cityscapes", "ade20k", "toy")
"""Data sets that read none of these."""


@dataclass(frozen=True)
class DataConfig(Section):
    """Where the images are and what training does to them."""

    section: ClassVar[str] = "data"
    commands: ClassVar[tuple[str, ...]] = ()

    dataset: LayoutName | str = setting("folder", commands=_CLASSES)
    """Layout of the files (docs/datasets.md), or `file.py:open_split`, a function of yours that opens a split. `toy`
    generates street scenes in the Cityscapes layout. For the settings of `folder`, sets known by name have defaults."""
    root: Path = setting(Path("data"), commands=(*_SPLIT, "verify"))
    """Folder of the dataset."""
    train_images: str = setting("images/train/*", commands=_TRAINING)
    """`folder` only: glob of the training images, relative to the root."""
    train_masks: str = setting("masks/train/*", commands=_TRAINING)
    """`folder` only: glob of the training masks, paired with the images by file stem."""
    val_images: str = setting("images/val/*", commands=_SPLIT)
    """`folder` only: glob of the validation images."""
    val_masks: str = setting("masks/val/*", commands=_SPLIT)
    """`folder` only: glob of the validation masks."""
    train_list: Path | None = setting(None, commands=_TRAINING)
    """`folder` only: text file with one training image per line: its stem, or image and mask relative to the root."""
    val_list: Path | None = setting(None, commands=_SPLIT)
    """`folder` only: the same for validation, which may then share the folders of training."""
    val_share: float = setting(0.0, least=0, below=1, commands=_SPLIT)
    """`folder` only: share of the training images that is held out for validation, drawn by `data.val_seed`. 0: none,
    validation has images of its own."""
    val_seed: int = setting(0, commands=_SPLIT)
    """`folder` only: seed of that draw."""
    classes: tuple[str, ...] = setting((), commands=_CLASSES)
    """`folder` only: class names in the order of the mask values 0, 1, 2 …; 255 is ignored (65535 above 255 classes).
    Alone, it also sets `model.num_classes`."""
    labels: tuple[str, ...] = setting((), commands=_CLASSES)
    """`folder` only, for other mask values: rows `value=name` or `#rrggbb=name` (`0=road 7=car 255=ignore`), or a CSV
    file of `value,name` rows. Several values may have one name; `ignore` leaves pixels out. It sets `data.classes`."""
    unlisted: Literal["stop", "ignore"] = setting("stop", commands=_CLASSES)
    """`folder` only: mask values that are no class end the run, or are ignored."""
    also: tuple[str, ...] = ()
    """NAME=FOLDER …: further sets known by name to train on; their classes count where the first has the same name."""
    palette: tuple[str, ...] = ()
    """Color `rrggbb` of each class in overlays and reports; empty: those of the data set, or distinct ones."""
    add_background_class: bool = setting(False, commands=_CLASSES)
    """Put a class `background` in front (label 0, which is then the ignored one) and move the others up by one."""
    channels: int = setting(3, least=1, most=MOST_CHANNELS, commands=INPUT)
    """Channels per image: 1 gray, 3 RGB, more for multi-band files."""
    bit_depth: Literal[8, 16, 32] = setting(8, commands=INPUT)
    """Bits per channel of the files: 8, 16, or 32 for float. Images keep their numbers until they are normalized."""
    max_pixels: int = setting(1 << 28, least=1, most=1 << 30, commands=INPUT)
    """Pixels that an image or label may have at most: a small file can claim to hold any number."""
    tile: int | None = setting(None, least=1, commands=_SPLIT)
    """Cut TIFFs into samples of at most this many pixels a side, read one by one; None: an image is one sample."""
    img_scale: tuple[int, int] | None = setting(None, least=1, commands=_CHECK)
    """Base size (long side, short side) that the random ratio multiplies; None: each image's own size."""
    ratio_range: tuple[float, float] = setting((1.0, 1.0), above=0, commands=_CHECK)
    """The ratio is drawn uniformly from this range."""
    crop: tuple[int, int] = setting((512, 512), least=1, stated=True, commands=_CHECK)
    """Training crop (height, width)."""
    cat_max_ratio: float = setting(1.0, above=0, most=1, commands=_CHECK)
    """A crop in which one class fills this share or more is drawn again, up to 10 times; 1 accepts every crop."""
    rare_class_sampling: float | None = setting(None, above=0)
    """Draw a class, the rarer the likelier, then an image with it. This is DAFormer's temperature, there 0.01; low
    values draw rare classes most. None: every image once per epoch."""
    flip: float = setting(0.0, least=0, most=1, commands=_CHECK)
    """Probability of the horizontal flip."""
    vertical_flip: float = setting(0.0, least=0, most=1, commands=_CHECK)
    """Probability of the vertical flip, for images without an upside such as aerial ones."""
    quarter_turns: bool = setting(False, commands=_CHECK)
    """Turn each sample by 0, 90, 180 or 270 degrees. It has the shape `crop` afterwards, square or not."""
    photometric: bool = setting(False, commands=INPUT)
    """Photometric distortion in training (brightness, contrast, saturation, hue); 8-bit RGB only."""
    blur: float = setting(0.0, least=0, most=1, commands=_CHECK)
    """Probability of a Gaussian blur, whose standard deviation is drawn from 0 to 1 pixels."""
    augment: str | None = setting(None, commands=_CHECK)
    """`file.py:function`, called on image, mask and a RandomState after the other steps; returns both. None: none."""
    mean: tuple[float, ...] = setting((123.675, 116.28, 103.53), commands=INPUT)
    """Mean per channel, RGB, in units of the file (0..255 with 8 bits); the default is ImageNet's."""
    std: tuple[float, ...] = setting((58.395, 57.12, 57.375), above=0, commands=INPUT)
    """Standard deviation per channel, likewise."""
    workers: int | Literal["auto"] = setting("auto", least=0, commands=("test", "predict", "export", "verify"))
    """Processes per device that read and transform images; 0: the main process reads. Samples do not depend on it.
    `predict` reads in that many threads, and writes in as many. auto: a share of the usable CPUs, 1 to 8."""
    cache: Path | None = None
    """Folder, best on a fast disk, where training keeps decoded images and labels, which are then not decoded again.
    The run says first how much space it needs (docs/own_data.md). None: none."""
    on_error: Literal["stop", "skip"] = setting("stop", commands=("test",))
    """A file that cannot be read ends the run, or is skipped (training takes the next sample), reported and counted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_reference("data.dataset", self.dataset, get_args(LayoutName))
        check_reference("data.augment", self.augment)
        object.__setattr__(self, "labels", read_rows(self.labels))  # so that what is stored names no file
        check_classes(self.classes, self.labels)
        given = [name for name in OF_FILES if getattr(self, name) != getattr(type(self), name)]
        if given and self.dataset in WITHOUT_FILES:
            name = f"data.{given[0]}"
            raise UserError(f"{name} is not read with data.dataset {self.dataset}; add --data.dataset folder")
        check_also(self.also, self.dataset)
        low, high = self.ratio_range
        if low > high:
            raise UserError(f"data.ratio_range is {low} to {high}; give the smaller ratio first")
        if not len(self.mean) == len(self.std) == self.channels:
            raise UserError(
                f"data.mean and data.std have {len(self.mean)} and {len(self.std)} values "
                f"for {self.channels} channels; give one value per channel"
            )
        if self.photometric and (self.channels != 3 or self.bit_depth != 8):
            raise UserError("data.photometric works on 8-bit RGB images; set data.photometric to False")
        if self.bit_depth > 8 and self.mean == DataConfig.mean:
            bits = self.bit_depth
            raise UserError(f"data.mean and data.std are those of 8-bit images; give those of your {bits}-bit images")
