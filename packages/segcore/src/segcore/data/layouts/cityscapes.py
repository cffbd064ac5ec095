"""Cityscapes: 19 classes of street scenes, 2975 training and 500 validation images of 1024 x 2048 pixels.

Layout: `leftImg8bit/{train,val}/CITY/STEM_leftImg8bit.png` and `gtFine/{train,val}/CITY/STEM_gtFine_KIND.png`. KIND
is `labelTrainIds` (0 .. 18, 255 ignored) or, as downloaded, `labelIds` (raw ids, mapped here by the official table).
The 1525 images of `leftImg8bit/test` have no labels: the files of that name are blank.
"""

from pathlib import Path

from segcore.config.data_sets import SERVER_FILES
from segcore.config.schema import DataConfig
from segcore.data.dataset import Dataset
from segcore.data.labels import IGNORE, label_lut, read_classes
from segcore.data.layouts.files import list_files, pair_files

CLASSES, PALETTE = read_classes(Path(__file__).with_name("cityscapes.txt"))
RAW_IDS = SERVER_FILES["cityscapes"].values
"""Raw id of every class, in the order of the train ids."""

TABLES = {
    "_gtFine_labelTrainIds.png": label_lut(len(CLASSES)),
    # Raw ids are 0 .. 33 and -1, which a PNG holds as 255.
    "_gtFine_labelIds.png": label_lut(
        dict.fromkeys((*range(34), IGNORE), IGNORE) | {raw: index for index, raw in enumerate(RAW_IDS)}
    ),
}
"""Ending of the label files -> table of their values, the preferred kind first."""


def open_split(data: DataConfig, split: str) -> Dataset:
    """Return the split `train` or `val` below `data.root`, with the kind of label that covers more of its images, or
    `test` without labels.

    Raises UserError when a folder is missing or has no images.
    """
    image_root, label_root = data.root / "leftImg8bit" / split, data.root / "gtFine" / split
    images = list_files(image_root, "_leftImg8bit.png")
    if split == "test":
        samples, *_ = pair_files(images, None, (f"{image_root}/*/*_leftImg8bit.png", "none"))
        return Dataset(CLASSES, PALETTE, IGNORE, samples, image_root, label_lut(len(CLASSES)))
    labels = {suffix: list_files(label_root, suffix) for suffix in TABLES}
    # On a tie, such as both kinds complete, the first wins.
    suffix = max(TABLES, key=lambda suffix: len(images.keys() & labels[suffix].keys()))
    samples, missing, unmatched = pair_files(
        images, labels[suffix], (f"{image_root}/*/*_leftImg8bit.png", f"{label_root}/*/*{suffix}")
    )
    return Dataset(
        CLASSES, PALETTE, IGNORE, samples, image_root, TABLES[suffix], missing=missing, unmatched_labels=unmatched
    )
