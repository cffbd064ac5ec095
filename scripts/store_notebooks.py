"""Put executed notebooks into notebooks/, without what differs from machine to machine.

python scripts/store_notebooks.py FILE.ipynb …     (`nox -s notebooks -- --store` calls it)
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import nbformat

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def cleaned(notebook: Any) -> Any:
    """Return the notebook without metadata of its execution and without standard error, which shows progress."""
    notebook = nbformat.from_dict(notebook)
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    for file in map(Path, sys.argv[1:]):
        nbformat.write(cleaned(nbformat.read(file, as_version=4)), FOLDER / file.name)
