"""The masks of an evaluation as files, also as the benchmark server takes them."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from segcore import distributed
from segcore.config.data_sets import ServerFiles
from segcore.data.dataset import Dataset
from segcore.errors import UserError
from segcore.files import write_zip
from segcore.inference import LoadedModel
from segcore.reporting.figures import write_class_png, write_image
from segcore.reporting.label_ids import FOLDER, write_label_ids


@dataclass
class SavedMasks:
    """Writes the masks of this process's images, each whole or not at all.

    The list of classes is there from the start. Raises UserError when two images share a name, or a mask would
    overwrite a file of the data set, or the list one that is none.
    """

    seg: LoadedModel
    """The model, for its classes and colors."""
    dataset: Dataset
    """The images, for their names."""
    folder: Path
    """Where masks go, named as the images are."""
    server: ServerFiles | None = None
    """With one, its files are written, too, below `label_ids`."""
    written: list[str] = field(default_factory=list)
    """Names of the images, see `Dataset.name`."""

    def __post_init__(self) -> None:
        names = [self.dataset.name(index) for index in range(len(self.dataset))]
        if twice := next((name for name, count in Counter(names).items() if count > 1), None):
            raise UserError(f"{twice}: two images of the data set have this name; rename one of them")
        paths = [path for name in names for path in self.paths(name)]
        inputs = {os.path.realpath(path) for s in self.dataset.samples for path in (s.image, s.label) if path}
        if own := next((path for path in paths if os.path.realpath(path) in inputs), None):
            raise UserError(f"{own}: a mask would overwrite this file of the data set; choose another --save folder")
        distributed.on_main_process(lambda: self.seg.write_classes(self.folder / "classes.json"))

    def paths(self, name: str) -> list[Path]:
        """Return the mask's file of an image and, with a server, the one for it."""
        return [self.folder / f"{name}.png", *([self.folder / FOLDER / self.server.path(name)] if self.server else [])]

    def write(self, index: int, classes: Tensor) -> None:
        """Write the classes (H, W) of an image."""
        name, data = self.dataset.name(index), self.seg.experiment.data
        small = self.seg.model.num_classes <= 256
        mask = self.seg.mask(classes.cpu().numpy().astype(np.uint8 if small else np.uint16))
        path, *server = self.paths(name)
        if small:
            write_class_png(path, mask, self.seg.mask_classes[1])
        else:
            write_image(path, mask)
        for file in server:
            write_label_ids(file, mask, data.dataset)
        self.written.append(name)

    def finish(self, archive: Path | None) -> int:
        """Write the archive, once for all processes, and return the number of masks."""
        names = sorted(distributed.all_gather_object(self.written))

        if archive:
            root = self.folder / FOLDER if self.server else self.folder
            files = [self.paths(name)[-1].relative_to(root).as_posix() for name in names]
            files += [] if self.server else ["classes.json"]
            distributed.on_main_process(lambda: write_zip(archive, root, files))
        return len(names)
