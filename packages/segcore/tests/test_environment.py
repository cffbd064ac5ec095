"""What `segcore env` prints, and what it keeps private."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from segcore import environment as module
from segcore.cli.main import main
from segcore.data import workers
from segcore.environment import as_text, environment, git_hash, versions


def test_environment_is_plain_data_without_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("SEG_REFERENCE", str(tmp_path))
    monkeypatch.setenv("SEGCORE_WEIGHTS", r"C:\Users\me")
    monkeypatch.setenv("HOME_SWEET", "home")
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["variables"]["OMP_NUM_THREADS"] == "3"
    assert found["variables"]["SEG_REFERENCE"] == "(set)"
    assert found["variables"]["SEGCORE_WEIGHTS"] == "(set)"
    text = as_text(found)
    assert "HOME_SWEET" not in text
    for path in (tmp_path, Path.home(), Path(module.__file__).parent):
        assert str(path) not in text
    assert f"  torch: {versions()['torch']}\n" in text
    assert found["machine"]["cores"] >= found["machine"]["usable cores"] >= 1


def test_torch_sees_how_its_threads_shall_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP itself says it, when torch is loaded: spinning threads take the cores from each other."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("OMP_DISPLAY_ENV", "TRUE")
    shown = subprocess.run([sys.executable, "-m", "segcore", "env"], capture_output=True, text=True, timeout=120)
    if "OMP_WAIT_POLICY" not in shown.stderr:
        pytest.skip("this OpenMP shows no settings")
    assert re.search(r"OMP_WAIT_POLICY ?= ?'PASSIVE'", shown.stderr)
    assert "OMP_WAIT_POLICY: PASSIVE" in shown.stdout


@pytest.mark.parametrize(("given", "found"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_the_users_own_way_to_wait_wins(monkeypatch: pytest.MonkeyPatch, given: str | None, found: str) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "")  # so that it is as before afterwards
    monkeypatch.delenv("OMP_WAIT_POLICY") if given is None else monkeypatch.setenv("OMP_WAIT_POLICY", given)
    with pytest.raises(SystemExit):
        main(None, ["--version"])
    assert os.environ["OMP_WAIT_POLICY"] == found


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 6),
        ({"cpu.max": "max 100000"}, 6),
        ({"cpu.max": "250000 100000"}, 3),
        ({"cpu.max": "900000 100000"}, 6),
        ({"cpu.max": "1000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 6),
    ],
)
def test_usable_cpus_are_those_of_the_container(tmp_path, monkeypatch, files, cpus) -> None:
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert module.usable_cpus(tmp_path) == cpus


@pytest.mark.parametrize(
    ("cpus", "processes", "count"),
    [(1, None, 1), (2, None, 1), (6, None, 5), (64, None, 8), (32, "4", 7), (8, "8", 1), (4, "0", 3)],
)
def test_auto_workers_share_the_cpus(monkeypatch, cpus: int, processes: str | None, count: int) -> None:
    monkeypatch.setattr(workers, "usable_cpus", lambda: cpus)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert workers.worker_count("auto") == count
    assert workers.worker_count(0) == 0


@pytest.mark.parametrize(
    ("machine", "avx512_bf16", "onednn", "found"),
    [
        ("x86_64", True, True, True),
        ("AMD64", False, True, False),  # oneDNN computes bfloat16 with any AVX-512, but slowly
        ("aarch64", False, True, True),
        ("arm64", False, False, False),
    ],
)
def test_bfloat16_of_processors(machine, avx512_bf16, onednn, found, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn, raising=False)
    cpu = torch.device("cpu")
    assert module.has_bfloat16(cpu) == found
    assert module.computed_precision("auto", cpu) == ("bf16" if found else "fp32")
    assert bool(module.slow_precision("bf16", cpu)) != found
    assert not any(module.slow_precision(given, cpu) for given in ("auto", "fp32", None))


@pytest.mark.parametrize(("capability", "found"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bfloat16_of_gpus(capability, found, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert module.has_bfloat16(torch.device("cuda")) == found
    assert not module.has_bfloat16(torch.device("mps"))
    assert module.slow_precision("bf16", torch.device("mps")) == []  # not known


def test_command(capsys) -> None:
    main("ddp_seg", ["env"])
    assert "versions:\n  python: " in capsys.readouterr().out
    main(None, ["env", "--json"])
    assert json.loads(capsys.readouterr().out)["versions"]["segcore"] == versions()["segcore"]


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert git_hash() is None


@pytest.mark.skipif(not shutil.which("git"), reason="git is not on the path")
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
