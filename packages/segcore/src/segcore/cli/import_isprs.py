"""`import potsdam` and `import vaihingen`."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar


@dataclass(frozen=True)
class ImportIsprs:
    """The places of both commands, and how they cut."""

    name: ClassVar[str]
    folder: Path = field(kw_only=True)
    """The folder where the archives are unpacked; folders in it are searched."""
    out: Path = field(kw_only=True)
    """The folder to write, for data.root; it must be new or empty."""

    def run(self, package: str | None) -> None:
        from segcore.data.isprs import cut

        done = cut(self.name, self.folder, self.out)
        print(f"{self.out}: {', '.join(f'{count} tiles in {split}' for split, count in done.tiles.items())}")
        for area, colors in done.other_colors.items():
            print(f"note: {area}: pixels of the colors {colors} belong to no class and are ignored")
        if done.absent:
            print(f"note: no files of {', '.join(done.absent)}")
        print(f"to check and train: {shlex.join(['--data.dataset', self.name, '--data.root', str(self.out)])}")


class ImportPotsdam(ImportIsprs):
    """Cut ISPRS Potsdam (2_Ortho_RGB.zip, 5_Labels_all_noBoundary.zip) into MMSegmentation's 512x512 tiles."""

    name = "potsdam"


class ImportVaihingen(ImportIsprs):
    """Cut ISPRS Vaihingen (its archive, and ground_truth_eroded_COMPLETE) into MMSegmentation's 512x512 tiles."""

    name = "vaihingen"
