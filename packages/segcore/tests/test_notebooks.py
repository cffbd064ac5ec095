"""The stored notebooks: valid, small, executed, and with nothing of the machine that ran them."""

import importlib.util
import re
from pathlib import Path

import nbformat
import pytest

from segcore.progress import progress

ROOT = Path(__file__).parents[3]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
OF_A_MACHINE = re.compile(
    r"https?://|\x1b|\b0x[0-9a-f]{6,}|\b[A-Z]:\\|(?<![\w.])/(?:home|mnt|opt|private|root|srv|tmp|usr|Users|var|work)/"
)
"""Addresses of indexes and objects, absolute paths, colors of a terminal."""

spec = importlib.util.spec_from_file_location("store_notebooks", ROOT / "scripts" / "store_notebooks.py")
store_notebooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(store_notebooks)


def texts(output):
    """Yield what an output says in letters."""
    yield output.get("text", "")
    for kind, value in output.get("data", {}).items():
        if not kind.startswith("image/"):
            yield str(value)


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} >= {"deploy", "diffusion", "own_classes"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_notebooks_are_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert path.stat().st_size < 300_000
    assert notebook == store_notebooks.cleaned(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run it from top to bottom"
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert kinds == {"image/jpeg", "text/plain"}  # an image as PNG is several times as large
    assert not [match[0] for output in outputs for text in texts(output) if (match := OF_A_MACHINE.search(text))]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_of_notebooks_lead_somewhere(path):
    cells = nbformat.read(path, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+)", text)
    assert links
    assert all((path.parent / link).is_file() for link in links)


def test_storing_leaves_out_what_differs_between_machines():
    progress = nbformat.v4.new_output("stream", name="stderr", text="generating: 3/8\n")
    told = nbformat.v4.new_output("stream", name="stdout", text="mIoU 50.0\n")
    cell = nbformat.v4.new_code_cell("train()", outputs=[progress, told], execution_count=1)
    cell.metadata["execution"] = {"iopub.execute_input": "2026-01-01T00:00:00Z"}
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"language_info": {"name": "python", "version": "3.12"}})
    clean = store_notebooks.cleaned(notebook)
    assert clean.cells[0].outputs == [told]
    assert clean.cells[0].metadata == {}
    assert "version" not in clean.metadata.language_info
    assert notebook.cells[0].outputs == [progress, told]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("runs/mine: finished", None),
        ("1/8 and 256x512, own_classes/tmp/a.png", None),
        ("saved to /tmp/a/b.png", "/tmp/"),
        ("<object at 0x7f00deadbeef>", "0x7f00deadbeef"),
        (r"C:\Users\a", "C:\\"),
        ("Looking in indexes: https://example.org/simple", "https://"),
    ],
)
def test_traces_of_a_machine_are_found(text, found):
    match = OF_A_MACHINE.search(text)
    assert (match and match[0]) == found


def test_progress_in_a_notebook_goes_to_standard_error(monkeypatch, capsys):
    """Rich would make each line an output of its own, in HTML."""

    class ZMQInteractiveShell:
        pass

    monkeypatch.setattr("rich.console.get_ipython", ZMQInteractiveShell, raising=False)
    with progress("reading") as advance:
        advance(3, 3)
    assert capsys.readouterr().err == "reading: 3/3\n"
