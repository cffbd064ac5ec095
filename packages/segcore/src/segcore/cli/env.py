"""`env`."""

from __future__ import annotations

import json
from dataclasses import dataclass

from segcore.config.options import Flag


@dataclass(frozen=True)
class Env:
    """Print what a bug report needs: versions, GPU and driver, processor, variables. Paths are left out."""

    json: Flag = False
    """As JSON."""

    def run(self, package: str | None) -> None:
        from segcore.environment import as_text, environment

        found = environment()
        print(json.dumps(found, indent=1) if self.json else as_text(found))
