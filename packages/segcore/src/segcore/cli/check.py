"""`check`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from segcore import files
from segcore.cli.common import Command, check_file
from segcore.errors import UserError


@dataclass(frozen=True)
class Check(Command):
    """Read every file of the data set: counts, sizes, label histogram, and a line about everything that is wrong."""

    split: Literal["train", "val", "both"] = "both"
    """What to read."""
    json: Path | None = None
    """Also write the report as JSON to this file."""
    save_images: Path | None = None
    """Also write pages of augmented training crops with their labels to this folder, rarest classes first."""

    def run(self, package: str | None) -> None:
        from segcore.data.check import check
        from segcore.data.layouts import source_of

        exp = self.experiment
        check_file("json", self.json, ".json", [self.record])
        if self.save_images and self.save_images.exists() and not self.save_images.is_dir():
            raise UserError(f"--save-images {self.save_images}: is a file; name a folder")
        both: tuple[Literal["train", "val"], ...] = ("train", "val")
        reports = [check(exp.data, s, exp.model.num_classes) for s in both if self.split in (s, "both")]
        print(*reports, sep="\n\n")
        if self.json:
            text = json.dumps({report.split: report.to_json() for report in reports}, indent=1)
            files.write(self.json, text + "\n")
        if self.save_images:
            print("", self._draw(self.save_images), sep="\n")
        if count := sum(len(report.problems) for report in reports):
            found = f"{count} problem{'s' * (count > 1)}"
            raise UserError(f"{source_of(exp.data)}: {found}, listed above; fix them first")

    def _draw(self, folder: Path) -> str:
        """Write the pages and return a line about them."""
        from segcore.data.layouts import find_files
        from segcore.reporting.crops import write_crop_pages

        data = self.experiment.data
        try:
            dataset = find_files(data, "train")
        except UserError as error:  # reported already
            return f"no pages of crops: {error}"
        pages = write_crop_pages(folder, dataset, data, self.experiment.seed)
        return "\n".join(map(str, pages)) or "no pages of crops: train has no labels"
