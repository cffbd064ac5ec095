"""What surrounds the packages: workflows, hooks and the links between pages."""

import importlib.util
import os
import re
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import yaml

ROOT = Path(__file__).parents[3]
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_sessions_that_exist(workflow):
    noxfile = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    sessions = set(re.findall(r"^def (\w+)\(session", noxfile, re.MULTILINE))
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"].values()
    commands = "\n".join(step.get("run", "") for job in jobs for step in job["steps"])
    called = re.findall(r'nox -s "?(\w+)', commands)
    listed = [session for job in jobs for session in job.get("strategy", {}).get("matrix", {}).get("session", [])]
    called += [session.partition("(")[0] for session in listed]
    assert called
    assert set(called) <= sessions
    scripts = re.findall(r"^(\.\w+/\w+)$", commands, re.MULTILINE)
    assert all((ROOT / script).is_file() for script in scripts)


@pytest.mark.skipif(os.name != "posix", reason="elsewhere uv's cache is in another folder")
@pytest.mark.parametrize("home", ["folder", "file", "folder/missing"])
def test_sessions_work_without_a_home_to_write_to(home, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    kept = {name: value for name, value in os.environ.items() if name not in ("UV_CACHE_DIR", "XDG_CACHE_HOME")}
    monkeypatch.setattr(os, "environ", kept | {"HOME": str(tmp_path / home)})
    monkeypatch.setitem(sys.modules, "nox", MagicMock())
    spec = importlib.util.spec_from_file_location("noxfile", ROOT / "noxfile.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert ("UV_CACHE_DIR" in os.environ) == (home == "file")


def test_the_lines_of_the_readme_show_their_downloads():
    """Gigabytes that arrive in silence look like a hung program."""
    noxfile = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r'^python3 -m venv .* -s "?(\w+)', readme, re.MULTILINE)
    assert lines == ["demo", "tests"]
    for session in lines:
        (install,) = re.findall(rf"def {session}\(session.*?(session\.install\(.*?\))  #", noxfile, re.DOTALL)
        assert install.endswith("silent=False)")


def test_hooks_have_the_versions_of_lint():
    """A commit that the hooks let through must not fail `nox -s lint` on a rule of another version."""
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    for tool in ("ruff", "codespell"):
        (rev,) = (repo["rev"] for repo in repos if tool in repo["repo"])
        assert f"{tool}=={rev.removeprefix('v')}" in constraints


def test_broken_links_are_found(tmp_path):
    check_links = load_script("check_links")
    (tmp_path / "other page.md").write_text("# What `it` does, twice\n\n# What it does, twice\n", encoding="utf-8")
    page = tmp_path / "page.md"
    good = (
        "[a](other%20page.md#what-it-does-twice) [b](#top) [c](https://example.org/none) `[d](none)`",
        "[e](other%20page.md#what-it-does-twice-1) ![f](../) [g](https://github.com/any/segcore/blob/main/README.md)",
        "```\n[h](none)\n```",
    )
    bad = ("none.md", "other%20page.md#none", "#none", "https://github.com/any/segcore/blob/main/docs/none.md")
    images = "![i](none.png)\n"
    page.write_text("# Top\n\n" + "\n\n".join((*good, *(f"[x]({link})" for link in bad), images)), encoding="utf-8")
    found = [re.search(r":\d+: (.*?): ", line)[1] for line in check_links.broken(page)]
    assert found == [*bad, "none.png"]
