"""Cityscapes: 19 classes of street scenes, 2975 training and 500 validation images of 1024 x 2048 pixels.

Layout: `leftImg8bit/{train,val}/CITY/STEM_leftImg8bit.png` and `gtFine/{train,val}/CITY/STEM_gtFine_KIND.png`. KIND
is `labelTrainIds` (0 .. 18, 255 ignored) or, as downloaded, `labelIds` (raw ids, mapped here by the official table).
"""

from pathlib import Path

from segcore.data.dataset import Dataset
from segcore.data.labels import IGNORE, label_lut, parse_classes
from segcore.data.layouts.files import list_files, pair_files

CLASSES, PALETTE = parse_classes(
    """
    road 804080; sidewalk f423e8; building 464646; wall 66669c; fence be9999; pole 999999; traffic light
    faaa1e; traffic sign dcdc00; vegetation 6b8e23; terrain 98fb98; sky 4682b4; person dc143c; rider ff0000;
    car 00008e; truck 000046; bus 003c64; train 005064; motorcycle 0000e6; bicycle 770b20
    """
)
RAW_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Raw id of every class, in the order of the train ids."""

TABLES = {
    "_gtFine_labelTrainIds.png": label_lut(len(CLASSES)),
    # Raw ids are 0 .. 33 and -1, which a PNG holds as 255.
    "_gtFine_labelIds.png": label_lut(
        dict.fromkeys((*range(34), IGNORE), IGNORE) | {raw: index for index, raw in enumerate(RAW_IDS)}
    ),
}
"""Ending of the label files -> table of their values, the preferred kind first."""


def open_split(root: Path, split: str) -> Dataset:
    """Return the split `train` or `val`, with the kind of label that more of its images have.

    Raises UserError when a folder is missing or has no images.
    """
    image_root, label_root = root / "leftImg8bit" / split, root / "gtFine" / split
    images = list_files(image_root, "_leftImg8bit.png")
    labels = {suffix: list_files(label_root, suffix) for suffix in TABLES}
    # On a tie, such as both kinds complete, the first wins.
    suffix = max(TABLES, key=lambda suffix: len(images.keys() & labels[suffix].keys()))
    wanted = (f"{image_root}/*/*_leftImg8bit.png", f"{label_root}/*/*{suffix}")
    samples, unpaired, spare = pair_files(images, labels[suffix], wanted)
    return Dataset(CLASSES, PALETTE, IGNORE, samples, image_root, TABLES[suffix], unpaired=unpaired, spare=spare)
