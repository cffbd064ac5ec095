"""ADE20K (ADEChallengeData2016): 150 classes, 20210 training and 2000 validation images of many sizes.

Layout: `images/{training,validation}/NAME.jpg` and `annotations/{training,validation}/NAME.png`. Raw label 0 is
unlabeled and becomes the ignored 255, raw 1 .. 150 become 0 .. 149. Road and skyscraper share a color in the
published palette. The test images, of an archive of their own, belong into `images/testing`.
"""

from pathlib import Path

from segcore.config.schema import DataConfig
from segcore.data.dataset import Dataset
from segcore.data.labels import IGNORE, label_lut, read_classes
from segcore.data.layouts.files import list_files, pair_files

CLASSES, PALETTE = read_classes(Path(__file__).with_name("ade20k.txt"))
TABLE = label_lut({0: IGNORE, IGNORE: IGNORE} | {index + 1: index for index in range(len(CLASSES))})


def open_split(data: DataConfig, split: str) -> Dataset:
    """Return the split `train`, `val` or `test` (without labels) below `data.root`.

    Raises UserError without a folder or without images.
    """
    name = {"train": "training", "val": "validation", "test": "testing"}[split]
    image_root, label_root = data.root / "images" / name, data.root / "annotations" / name
    wanted = (f"{image_root}/*.jpg", f"{label_root}/*.png")
    labels = None if split == "test" else list_files(label_root, ".png")
    samples, missing, unmatched = pair_files(list_files(image_root, ".jpg"), labels, wanted)
    return Dataset(CLASSES, PALETTE, IGNORE, samples, image_root, TABLE, missing=missing, unmatched_labels=unmatched)
