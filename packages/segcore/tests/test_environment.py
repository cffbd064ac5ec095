"""What `segcore env` prints, and what it keeps private."""

import json
import subprocess
from pathlib import Path

import pytest

from segcore import environment as module
from segcore.cli.main import main
from segcore.environment import as_text, environment, git_hash, versions


def test_environment_is_plain_data_without_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("SEG_REFERENCE", str(tmp_path))
    monkeypatch.setenv("HOME_SWEET", "home")
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["variables"]["OMP_NUM_THREADS"] == "3"
    assert found["variables"]["SEG_REFERENCE"] == "(set)"
    text = as_text(found)
    assert "HOME_SWEET" not in text
    for path in (tmp_path, Path.home(), Path(module.__file__).parent):
        assert str(path) not in text
    assert f"  torch: {versions()['torch']}\n" in text
    assert found["machine"]["cores"] >= found["machine"]["usable cores"] >= 1


def test_command(capsys) -> None:
    main("ddp_seg", ["env"])
    assert "versions:\n  python: " in capsys.readouterr().out
    main(None, ["env", "--json"])
    assert json.loads(capsys.readouterr().out)["versions"]["segcore"] == versions()["segcore"]


def test_commit_is_that_of_the_code_not_of_an_enclosing_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> None:
        name = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *name, *words], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "environment.py").touch()
    monkeypatch.setattr(module, "__file__", str(tmp_path / "environment.py"))
    git("init")
    git("commit", "--allow-empty", "-m", "someone's own")
    assert git_hash() is None
    git("add", "environment.py")
    git("commit", "-m", "the code")
    found = git_hash()
    assert found is not None
    assert len(found) == 40
