"""`import coco`."""

from __future__ import annotations

import importlib.util
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from segcore.errors import UserError


@dataclass(frozen=True)
class ImportCoco:
    """Turn annotations of COCO's format, instances or stuff, into images and masks for `data.dataset folder`.

    Polygons and RLE are read, crowds like other objects. Where outlines overlap, the smaller one is on top. Mask
    values are 0, 1, 2 … in the order of the category ids; OUT/labels.csv names them. Images are hard links to your
    files, which cost no space (an edit changes both), or copies where the file system has none. a/b.jpg becomes
    a_b.jpg.
    """

    file: Path = field(kw_only=True)
    """The annotations, a .json file."""
    images: Path = field(kw_only=True)
    """The folder where the file names in it begin."""
    out: Path = field(kw_only=True)
    """The folder to write; it must be new or empty."""
    val: Path | None = None
    """Annotations of validation images, likewise. Without them, hold out a share in training: data.val_share."""
    val_images: Path | None = None
    """The folder of the validation images; by default IMAGES."""
    background: str = "background"
    """Class of all pixels without an annotation, a new one (the last) or one of the file. `ignore`: they are left out
    of training and evaluation, as in sets where every pixel should be annotated."""

    def run(self, package: str | None) -> None:
        from segcore.data.import_coco import import_coco

        if importlib.util.find_spec("pycocotools") is None:
            raise UserError("COCO's format needs pycocotools; pip install 'segcore[coco]'")
        sources = {"train": (self.file, self.images)}
        if self.val:
            sources["val"] = (self.val, self.val_images or self.images)
        done = import_coco(sources, self.out, self.background)
        counts = ", ".join(f"{count} images in {split}" for split, count in done.images.items())
        print(f"{self.out}: {counts}; {len(done.classes)} classes: {', '.join(done.classes)}")
        if done.unused:
            print(f"note: no annotation is of {', '.join(done.unused)}")
        what = "ignored" if self.background == "ignore" else f"of class {self.background!r} (or: --background ignore)"
        print(f"{done.free:.1%} of the pixels have no annotation and are {what}")
        words = ["--data.dataset", "folder", "--data.root", str(self.out)]
        words += ["--data.labels", str(self.out / "labels.csv"), *([] if self.val else ["--data.val-share", "0.1"])]
        print(f"to check and train: {shlex.join(words)}")
