"""The scripts that check a GPU on a machine without a network: what they name exists, and they end in time."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import segcore

ROOT = Path(__file__).parents[3]
CHECK = ROOT / "scripts" / "gpu_check.sh"
SCRIPTS = sorted((ROOT / "scripts").glob("*.*"))
needs_bash = pytest.mark.skipif(not shutil.which("timeout") or os.name == "nt", reason="needs bash and coreutils")


def run(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", CHECK, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **variables})


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "bundle" / "wheels").mkdir(parents=True)
    (tmp_path / "bundle" / "wheels" / "one.whl").touch()
    return tmp_path / "bundle"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_what_the_scripts_name_exists(script):
    text = script.read_text(encoding="utf-8")
    for path in set(re.findall(r"\b(?:packages|benchmarks|scripts)/[a-z][\w./-]*", text)):
        assert (ROOT / path).exists(), path
    for plugin in re.findall(r"-p (gpu_\w+)", text):
        assert script.with_name(f"{plugin}.py").exists(), plugin


def test_what_the_benchmarks_time_exists():
    names = re.findall(r"\b[a-z]\w+_cityscapes\w*", CHECK.read_text(encoding="utf-8"))
    assert len({segcore.load_experiment(name).name for name in names}) == 4


@needs_bash
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--what"], "--what: not an option"),
        (["--out"], "--out needs a value"),
        (["--seconds", "soon"], "--seconds soon: not a number"),
        (["--rehearse", "--bundle", "nowhere"], "nowhere: no wheels there; make them with scripts/make_gpu_bundle.sh"),
    ],
)
def test_wrong_words(words, message):
    done = run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@needs_bash
def test_a_step_that_is_cut_off_leaves_its_part(tmp_path, bundle):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho a part\nsleep 60\n")
    python.chmod(0o755)
    out = tmp_path / "out"
    done = run("--rehearse", "--bundle", bundle, "--out", out, "--seconds", 2, PYTHON=str(python))
    first, second, *_, last = done.stdout.splitlines()
    assert re.fullmatch(r"install the bundle +cut off +\d+ s", first)
    assert re.fullmatch(r"build the kernels +left out +0 s", second)
    assert re.fullmatch(r"rehearsed: 0 gpu tests collected, \d+ errors", last)
    assert done.returncode == 1
    assert "a part" in (out / "setup.txt").read_text()
    assert (out / "summary.txt").read_text() == done.stdout


@needs_bash
def test_a_failure_is_shown_and_the_rest_goes_on(tmp_path, bundle):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 3 skipped in 1.0s\necho no such thing >&2\nexit 7\n")
    python.chmod(0o755)
    done = run("--rehearse", "--bundle", bundle, "--out", tmp_path / "out", PYTHON=str(python))
    assert re.search(r"^tests: kernels +failed \(7\) .*\n(    .*\n)*    no such thing\n", done.stdout, re.MULTILINE)
    assert done.stdout.endswith("rehearsed: 9 gpu tests collected, 12 errors\n")
    assert len(list((tmp_path / "out").iterdir())) <= 8
