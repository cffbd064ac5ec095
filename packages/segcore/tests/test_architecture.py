"""The layout of the packages: who may import whom, how long files are, what imports torch, what a wheel holds."""

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
PACKAGES = {path.parent.name: path.parent for path in ROOT.glob("packages/*/src/*/__init__.py")}
METHODS = sorted(set(PACKAGES) - {"segcore", "seg_cuda_ops"})

ORDER = (
    *("errors", "seeds", "files", "distributed", "progress", "ops", "environment"),
    *("config", "data", "models", "checkpoints", "evaluation", "reporting", "training", "deploy"),
    *("result", "inference", "openmmlab", "web", "demo", "cli", "__main__", "testing"),
)
"""Folders and modules of segcore in import order: each imports only those before it."""


def runtime_imports(path: Path) -> Iterator[str]:
    """Yield the dotted name of everything a file imports, at any depth, except for type checking only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import; write the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules(package: str) -> list[Path]:
    return sorted(PACKAGES[package].rglob("*.py"))


def project_of(package: str) -> dict[str, Any]:
    """Return the table [project] of a package's pyproject.toml."""
    return tomllib.loads((PACKAGES[package].parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def folder_of(name: str) -> str:
    """Return the folder or module of segcore that a dotted name lies in; names of the package itself are `config`."""
    part = (name + ".").split(".")[1]
    inside = PACKAGES["segcore"] / part
    return part if part and (inside.is_dir() or inside.with_suffix(".py").is_file()) else "config"


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_packages_import_only_what_they_may(package):
    may = {"segcore": {"segcore", "seg_cuda_ops"}, "seg_cuda_ops": {"seg_cuda_ops"}}.get(package, {package, "segcore"})
    wrong = []
    for path in modules(package):
        plugin = path.name == ("openmmlab.py" if package == "segcore" else "mmseg.py")
        forbidden = set(PACKAGES) - may | (set() if plugin else {"mmcv", "mmseg", "mmengine"})
        wrong += [
            f"{path.relative_to(ROOT)}: {name}" for name in runtime_imports(path) if name.split(".")[0] in forbidden
        ]
    assert not wrong


def test_imports_inside_segcore_go_one_way():
    wrong = []
    for path in modules("segcore"):
        here = path.relative_to(PACKAGES["segcore"]).parts[0].removesuffix(".py")
        if here == "__init__":
            continue
        for name in runtime_imports(path):
            there = folder_of(name) if name.split(".")[0] == "segcore" else here
            if ORDER.index(there) > ORDER.index(here):
                wrong.append(f"{path.relative_to(ROOT)}: {name}")
    assert not wrong


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_files_and_functions_are_short(package):
    """At most 400 lines a file and 60 a function. Tables of class names and colors are data files."""
    wrong = []
    for path in modules(package):
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 400:
            wrong.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60:
                wrong.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert not wrong


def test_no_modules_import_each_other_in_a_circle():
    files = {".".join(path.relative_to(PACKAGES[name].parent).with_suffix("").parts).removesuffix(".__init__"): path
             for name in PACKAGES for path in modules(name)}  # fmt: skip
    imports = {name: set(imported_modules(path, files)) - {name} for name, path in files.items()}
    circles = []
    for name in files:
        seen, left = set(), set(imports[name])
        while left:
            seen.add(module := left.pop())
            left |= imports[module] - seen
        if name in seen:
            circles.append(name)
    assert not circles


def imported_modules(path: Path, files: dict[str, Path]) -> Iterator[str]:
    """Yield the modules among `files` that a file imports when it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        names = node.names if isinstance(node, ast.ImportFrom) else []
        compiled = [alias.name for alias in names if path.with_name(f"{alias.name}.pyi").exists()]
        for name in (f"{node.module}.{alias.name}" for alias in names if alias.name not in compiled):
            yield from [found for found in (name, name.rpartition(".")[0]) if found in files][:1]
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)


def test_import_rules_detect_violations(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "import segcore.demo.toy\n"
        "if TYPE_CHECKING:\n    import torch\n"
        "def f():\n    from segcore.models import segmentor\n"
    )
    assert list(runtime_imports(file)) == ["typing.TYPE_CHECKING", "segcore.demo.toy", "segcore.models.segmentor"]
    folders = {
        "segcore.demo.toy": "demo",
        "segcore.errors.UserError": "errors",
        "segcore.load_experiment": "config",
        "segcore": "config",
    }
    assert {name: folder_of(name) for name in folders} == folders


def test_configuration_imports_no_torch():
    names = [
        "segcore",
        "segcore.errors",
        "segcore.seeds",
        "segcore.config.schema",
        "segcore.config.registry",
        "segcore.cli.main",
    ]
    for method in METHODS:
        names += [method, f"{method}.__main__", f"{method}.official", f"{method}.configs"]
        names += [f"{method}.configs.{path.stem}" for path in sorted((PACKAGES[method] / "configs").glob("[!_]*.py"))]
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, f'{name} imports torch'\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_training_imports_neither_timm_nor_torchvision_nor_tensorboard():
    """Importing them takes seconds, and DDRNet and DGMN2 need none of them."""
    code = (
        "import sys\n"
        "import segcore.training.loop\n"
        "for name in sys.argv[1:]:\n"
        "    __import__(name)\n"
        "found = {'timm', 'torchvision', 'tensorboard', 'torch.utils.tensorboard', 'onnx'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    models = [f"{name}.model" for name in METHODS if name in ("ddrnet_seg", "dgmn2_seg")]
    done = subprocess.run([sys.executable, "-c", code, *models], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_operators_for_other_projects_import_torch_alone():
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "from segcore.ops.compat import deformable_detr, mmcv, torchvision\n"
        "added = {name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "assert added <= {'segcore', 'seg_cuda_ops', 'torch'}, added\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", sorted(set(PACKAGES) - {"seg_cuda_ops"}))
def test_wheel_is_pure_and_complete(package, tmp_path):
    hatchling = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed")
    source = PACKAGES[package].parents[1]
    (wheel,) = hatchling.WheelBuilder(str(source)).build(directory=str(tmp_path), versions=["standard"])
    assert wheel.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (license,) = [archive.read(name) for name in names if name.endswith("/LICENSE")]
    assert f"{package}/py.typed" in names
    files = [path for path in PACKAGES[package].rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {path.relative_to(PACKAGES[package].parent).as_posix() for path in files} <= names
    assert license == (ROOT / "LICENSE").read_bytes()


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_import_what_there_is(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")


def test_every_package_states_the_version_in_one_file(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("set_version", ROOT / "scripts" / "set_version.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    texts = script.texts()
    assert len(texts) == 1 + 2 * len(PACKAGES)
    wrong = [path for path, text in texts.items() if path.read_text(encoding="utf-8") != text]
    assert not wrong, "run: python scripts/set_version.py"
    for path, text in texts.items():  # and a new one would reach every file
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text, encoding="utf-8")
    (tmp_path / "VERSION").write_text("7.31.2\n")
    monkeypatch.setattr(script, "ROOT", tmp_path)
    for path, text in script.texts().items():
        assert len(re.findall(r"\b7\.31\.2\b", text)) == 1, path
        assert "==0." not in text
        series = ["segcore", "seg-cuda-ops"][path.parent.name == "segcore"]
        optional = path.name != "pyproject.toml" or path.parent.name == "cuda-ops"
        assert optional or f'"{series}==7.31.*"' in text, path


def test_methods_have_the_extras_of_segcore():
    extras = set(project_of("segcore")["optional-dependencies"])
    for method in METHODS:
        assert project_of(method)["optional-dependencies"] == {name: [f"segcore[{name}]"] for name in extras}
    (everything,) = project_of("segcore")["optional-dependencies"]["all"]
    assert set(re.findall(r"\w+", everything)) == extras - {"all", "kernels"} | {"segcore"}


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_links_of_a_readme_work_on_an_index_page(package):
    """There they are not relative to a checkout; those into the project lead to files that exist."""
    home = project_of(package)["urls"]["Homepage"]
    text = (PACKAGES[package].parents[1] / "README.md").read_text(encoding="utf-8")
    for link in (*re.findall(r"\]\(([^)]+)\)", text), *project_of(package)["urls"].values()):
        assert link.startswith("https://"), link
        if match := re.match(rf"{home}/(?:tree|blob)/main/([^#]+)", link):
            assert (ROOT / match[1]).exists(), link


def test_constraints_cover_every_dependency():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0] for line in lines if "==" in line}
    for package in PACKAGES:
        project = project_of(package)
        wanted = {re.split(r"[>=\[ ]", need)[0] for need in project["dependencies"]} - {"segcore"}
        assert wanted <= pinned
