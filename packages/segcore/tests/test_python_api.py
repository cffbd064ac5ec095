"""docs/python_api.md and docs/commands.md show the code as it is."""

import ast
import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "python_api.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["python_api", "commands"])
def test_page_is_what_the_script_writes(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert script.page() == page, f"run: python scripts/{name}.py > docs/{name}.md"


def signatures():
    """Yield the dotted name and the code of every signature on the page: of functions, classes and methods."""
    for entry in PAGE.split("\n### ")[1:]:
        name = entry.partition("\n")[0].strip("`")
        last = name.rpartition(".")[2]
        for block in re.findall(r"```python\n(.*?)```", entry, re.DOTALL):
            code = inspect.cleandoc(block)
            function = code.partition("(")[0]
            yield (name if function == last else f"{name}.{function}"), code
        for code in re.findall(r"^- `(\w+\(.*?)`: ", entry, re.MULTILINE):
            yield f"{name}.{code.partition('(')[0]}", code


SIGNATURES = dict(signatures())


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_that_of_the_code(name):
    parts, value = name.split("."), None
    for end in range(len(parts) - 1, 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:end]))
            break
        except ImportError:
            continue
    for part in parts[end:]:
        value = getattr(value, part)
    found = [item for item in inspect.signature(value).parameters.values() if item.name != "self"]
    [shown] = ast.parse(f"def {SIGNATURES[name]}: ...").body
    usual, named = shown.args.args, shown.args.kwonlyargs
    defaults = [None] * (len(usual) - len(shown.args.defaults)) + shown.args.defaults + shown.args.kw_defaults
    assert [item.arg for item in (*usual, *named)] == [item.name for item in found]
    assert [item.name for item in found if item.kind is item.KEYWORD_ONLY] == [item.arg for item in named]
    for argument, default, item in zip((*usual, *named), defaults, found, strict=True):
        assert ast.unparse(argument.annotation) == ast.unparse(ast.parse(item.annotation, mode="eval"))
        assert (default is None) == (item.default is item.empty)
        if default is not None and not isinstance(default, ast.Call):
            assert ast.literal_eval(default) == item.default
