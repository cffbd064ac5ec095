"""What a dataset is here: image and label files in a fixed order, and the table from label values to train ids.

Layouts are in `cityscapes`, `ade20k` and `folder`; `open_dataset` picks one. Nothing here imports torch, and
everything pickles, so that worker processes start with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from PIL import Image

from segcore.errors import UserError
from segcore.experiment import Data

IGNORE = 255
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".jp2", ".gif", ".npy")
"""Files that count as images where a folder is searched, lower case."""
_FORBIDDEN = 254  # what a label table holds for values that may not occur

# Unreadable files raise UserError: one line, without OpenCV's own in front. Its version 5 moved the function.
(cv2.setLogLevel if hasattr(cv2, "setLogLevel") else cv2.utils.logging.setLogLevel)(0)


@dataclass(frozen=True)
class Sample:
    """An image file and its label file, if it has one."""

    image: Path
    label: Path | None


@dataclass(frozen=True, eq=False)
class Dataset:
    """The samples of one split.

    Attributes:
        classes: K names in the order of the train ids.
        palette: (K, 3) uint8 RGB.
        ignore_index: the train id that takes no part in loss and metric.
        samples: the files, in a fixed order.
        image_root: folder that `name` is relative to.
        table: (256,) uint8, value in the label file -> train id; see `index_table`.
        channels, bit_depth: what the image files must hold.
        unpaired: a line about every image without a label, which is then no sample; `open_dataset` refuses these.
        spare: label files that belong to no image.
    """

    classes: tuple[str, ...]
    palette: np.ndarray
    ignore_index: int
    samples: tuple[Sample, ...]
    image_root: Path
    table: np.ndarray
    channels: int = 3
    bit_depth: int = 8
    unpaired: tuple[str, ...] = ()
    spare: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        """Return the image's path below the image folder, with `/` and without its suffix: a name for outputs."""
        return self.samples[index].image.relative_to(self.image_root).with_suffix("").as_posix()

    def image(self, index: int) -> np.ndarray:
        """Return (H, W, C) RGB, uint8 or uint16 by bit depth. Raises UserError as `read_image` does."""
        return read_image(self.samples[index].image, self.channels, self.bit_depth)

    def label(self, index: int) -> np.ndarray:
        """Return (H, W) uint8 train ids: 0 .. K-1 and `ignore_index`.

        Raises UserError naming the file and the values when it holds one that is neither a class nor ignored.
        """
        path = self.samples[index].label
        if path is None:
            raise UserError(f"{self.samples[index].image}: has no label file; give the masks of this split")
        raw = read_label(path)
        label = cv2.LUT(raw, self.table)
        if (label == _FORBIDDEN).any():
            found = np.unique(raw[label == _FORBIDDEN])
            allowed = np.flatnonzero(self.table != _FORBIDDEN)
            raise UserError(
                f"{path}: label values {_ranges(found)} are no classes; allowed are {_ranges(allowed)}: "
                "correct the mask or data.dataset and data.classes"
            )
        return label

    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return (image, label) as `image` and `label` do, None for a sample without label file.

        Raises UserError when the two differ in height or width.
        """
        sample, image = self.samples[index], self.image(index)
        if sample.label is None:
            return image, None
        label = self.label(index)
        check_sizes(sample, image.shape[:2], label.shape)
        return image, label


def check_sizes(sample: Sample, image: tuple[int, ...], label: tuple[int, ...]) -> None:
    """Raise UserError when the (height, width) of a sample's image and label differ."""
    if image != label:
        raise UserError(
            f"{sample.label}: label of {label[0]}x{label[1]} pixels (height x width) for an image of "
            f"{image[0]}x{image[1]} ({sample.image}); make their sizes equal"
        )


def open_dataset(data: Data, split: Literal["train", "val"]) -> Dataset:
    """Return the training or validation split of `data`, which also says the layout, the channels and the classes.

    `toy` is generated below `data.root` first when it is not complete there. Raises UserError when the folder is
    missing, a split is empty, or an image has no label.
    """
    if data.dataset == "toy":
        from segcore.data import toy

        toy.complete(data.root)
    dataset = find_files(data, split)
    if dataset.unpaired:
        more = f" (and {len(dataset.unpaired) - 1} more; `check` lists them)" if len(dataset.unpaired) > 1 else ""
        raise UserError(dataset.unpaired[0] + more)
    return dataset


def find_files(data: Data, split: Literal["train", "val"]) -> Dataset:
    """Return the split as `open_dataset` does, but leave out images without a label, which `unpaired` then lists.

    Nothing is generated; of a toy set `unpaired` lists every file that it has lost.
    """
    from segcore.data import ade20k, cityscapes, folder

    if not data.root.is_dir():
        raise UserError(
            f"{data.root}: no such folder; set data.root to the folder of the {data.dataset} dataset"
            + (", or let `train` generate it there" if data.dataset == "toy" else "")
        )
    if data.dataset == "folder":
        dataset = folder.open_split(data, split)
    else:
        dataset = (ade20k if data.dataset == "ade20k" else cityscapes).open_split(data.root, split)
    if data.dataset == "toy":
        from segcore.data import toy

        gone = tuple(f"{file}: missing; `train` generates it again" for file in toy.lost(data.root, [split]))
        dataset = replace(dataset, unpaired=gone)
    dataset = replace(dataset, channels=data.channels, bit_depth=data.bit_depth)
    return with_background(dataset) if data.background else dataset


def palette_of(data: Data) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the class names and (K, 3) uint8 RGB colours that `open_dataset` would give, without needing the files."""
    from segcore.data import ade20k, cityscapes, folder

    if data.dataset == "folder":
        classes, palette = data.classes, folder.distinct_colours(len(data.classes))
    else:
        module = ade20k if data.dataset == "ade20k" else cityscapes
        classes, palette = module.CLASSES, module.PALETTE
    return _behind_background(classes, palette) if data.background else (classes, palette)


def with_background(dataset: Dataset) -> Dataset:
    """Return the dataset with a class `background` in front: train ids move up by one, and what was ignored becomes 0.

    Background is then the ignored class. This is how DDPS sees ADE20K (raw values 0 .. 150) and Cityscapes (train ids
    + 1).
    """
    classes, palette = _behind_background(dataset.classes, dataset.palette)
    table = np.where(dataset.table == _FORBIDDEN, _FORBIDDEN, dataset.table + 1).astype(np.uint8)
    table[dataset.table == dataset.ignore_index] = 0
    return replace(dataset, classes=classes, palette=palette, ignore_index=0, table=table)


def _behind_background(classes: tuple[str, ...], palette: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    return ("background", *classes), np.concatenate([np.zeros((1, 3), np.uint8), palette])


def index_table(values: Mapping[int, int] | int) -> np.ndarray:
    """Return the (256,) uint8 table of label values -> train ids; every value that is not given may not occur.

    An integer K stands for 0 .. K-1 as they are and 255 ignored.
    """
    if isinstance(values, int):
        values = {IGNORE: IGNORE} | {index: index for index in range(values)}
    table = np.full(256, _FORBIDDEN, np.uint8)
    table[list(values)] = list(values.values())
    return table


def parse_classes(text: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Return names and (K, 3) uint8 RGB colours of a text such as `road 804080; sidewalk f423e8`."""
    names, colours = zip(*(entry.strip().rsplit(" ", 1) for entry in text.split(";")), strict=True)
    palette = np.array([list(bytes.fromhex(colour)) for colour in colours], np.uint8)
    return tuple(" ".join(name.split()) for name in names), palette


def list_files(folder: Path, suffix: str) -> dict[str, Path]:
    """Return the files below `folder` that end in `suffix`, by their relative path without it.

    They are in the order of their relative paths as text, as in the published systems. Raises UserError without the
    folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; unpack the dataset so that it is there, or set data.root")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob(f"*{suffix}"))
    return {name.removesuffix(suffix): folder / name for name in names}


def pair_files(
    images: Mapping[str, Path], labels: Mapping[str, Path] | None, wanted: tuple[str, str]
) -> tuple[tuple[Sample, ...], tuple[str, ...], tuple[Path, ...]]:
    """Return the samples of images and labels under equal names, in the images' order; `labels` None: without labels.

    Beside them a line about each image without a label, and the labels without an image. `wanted` says for the
    messages where images and labels were looked for. Raises UserError when there is no image.
    """
    if not images:
        raise UserError(f"{wanted[0]}: no images found; put them there or set data.root")
    if labels is None:
        return tuple(Sample(path, None) for path in images.values()), (), ()
    remedy = f"no label among {wanted[1]}; add it or remove the image"
    return (
        tuple(Sample(path, labels[name]) for name, path in images.items() if name in labels),
        tuple(f"{path}: {remedy}" for name, path in images.items() if name not in labels),
        tuple(path for name, path in labels.items() if name not in images),
    )


def read_image(path: Path | str, channels: int = 3, bit_depth: int = 8) -> np.ndarray:
    """Return the image (H, W, channels), uint8 or uint16 by `bit_depth`; three channels are RGB, four may be RGBA.

    Three channels are decoded as the published systems do: grey files are repeated, alpha is dropped, EXIF
    orientation is applied. Other counts are taken from the file: grey, RGBA, TIFF with a page per band, .npy (H, W, C).
    Raises UserError for a file that is missing, empty, damaged, or that holds something else than stated.
    """
    path = Path(path)
    try:
        image = _load_npy(path) if path.suffix.lower() == ".npy" else _decode(path.read_bytes(), channels)
    except (OSError, ValueError, EOFError, cv2.error) as error:
        raise UserError(f"{path}: cannot be read as an image ({_reason(error)}); replace the file") from None
    if image.ndim == 2:
        image = image[..., None]
    if image.shape[2:] != (channels,) or image.dtype != (np.uint8 if bit_depth == 8 else np.uint16):
        raise UserError(
            f"{path}: holds {image.dtype} of shape {image.shape}, but data.channels is {channels} and data.bit_depth "
            f"{bit_depth}; set them to what the files hold, or convert the file"
        )
    return image


def read_label(path: Path | str) -> np.ndarray:
    """Return the values of a label file, (H, W) uint8, untouched: a palette PNG yields its indices.

    Raises UserError for a file that is missing, damaged, has more than one channel or values beyond 255.
    """
    try:
        with Image.open(path) as file:
            label = np.array(file)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as a label ({_reason(error)}); replace the file") from None
    if label.ndim != 2:
        raise UserError(f"{path}: a label of shape {label.shape}; save one channel of class indices, not colours")
    if label.dtype not in (np.uint8, np.bool_) and (label.min() < 0 or label.max() > 255):
        raise UserError(
            f"{path}: label values {label.min()} to {label.max()}; save class indices 0 to 254, and 255 to ignore"
        )
    return label.astype(np.uint8, copy=False)


def _decode(data: bytes, channels: int) -> np.ndarray:
    """Return the pixels of an encoded image in RGB order; raises ValueError with the reason when there are none."""
    if not data:
        raise ValueError("the file is empty")
    # OpenCV 4 fills the missing part of a truncated file with grey.
    is_jpeg, is_png = data.startswith(b"\xff\xd8"), data.startswith(b"\x89PNG")
    if (is_jpeg and data.find(b"\xff\xd9", _first_scan(data)) < 0) or (is_png and b"IEND" not in data):
        raise ValueError("the file is cut short")
    colour = {1: cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH, 3: cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH}
    buffer = np.frombuffer(data, np.uint8)
    image = cv2.imdecode(buffer, colour.get(channels, cv2.IMREAD_UNCHANGED))
    if image is None:
        raise ValueError("not an image, or damaged")
    if image.ndim == 2 and channels > 1:  # bands as pages
        return np.dstack(cv2.imdecodemulti(buffer, cv2.IMREAD_UNCHANGED)[1])
    if image.ndim == 3 and image.shape[2] in (3, 4):
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB if image.shape[2] == 3 else cv2.COLOR_BGRA2RGBA)
    return image


def _first_scan(data: bytes) -> int:
    """Return where the first scan of a JPEG begins: past its headers, which may hold a thumbnail with its own marks."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] != 0xDA:
        fill = data[position + 1] == 0xFF  # any number of them may stand in front of a mark
        position += 1 if fill else 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return position


def _load_npy(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _reason(error: Exception) -> str:
    """Return the first line of what went wrong, short."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error) or type(error).__name__).splitlines()[0][:120]


def _ranges(values: np.ndarray) -> str:
    """Return sorted integers as text, runs joined: `0-18, 255`."""
    runs = np.split(values, np.flatnonzero(np.diff(values) != 1) + 1)
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
