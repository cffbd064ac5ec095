"""Every check and the demo, each in an environment of its own; `nox -l` lists them.

uv makes the environments where it is installed, `python -m venv` otherwise; they are kept for the next time. Words
after `--` go to the command, as in `nox -s tests -- packages/ddp -k losses`.
"""

import os
import shutil
import sys
from pathlib import Path

import nox

os.environ["UV_PYTHON_DOWNLOADS"] = "never"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait slow a busy machine down
nox.needs_version = ">=2025.10.14"
nox.options.default_venv_backend = "uv|venv"
nox.options.download_python = "never"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests", "lint"]

METHODS = ("ddp", "ddps", "ddrnet", "dgmn2")
PACKAGES = ("packages/segcore", *(f"packages/{method}" for method in METHODS))
EDITABLE = [word for package in PACKAGES for word in ("-e", package)]
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
"""Without one the tests of the compiled kernels skip, and everything else runs on the plain ones."""
COMPILED = ["-e", "packages/cuda-ops"] if COMPILER else []


def group(name: str) -> list[str]:
    """Return the requirements of a dependency group of the root pyproject.toml."""
    return nox.project.dependency_groups(nox.project.load_toml("pyproject.toml"), name)


def oldest() -> list[str]:
    """Return segcore's dependencies pinned to the oldest version that its pyproject.toml admits."""
    project = nox.project.load_toml("packages/segcore/pyproject.toml")["project"]
    return [requirement.replace(">=", "==") for requirement in project["dependencies"]]


@nox.session
def tests(session: nox.Session) -> None:
    """Test every package with the newest dependencies; the compiled kernels where there is a C++ compiler."""
    session.install(*EDITABLE, *COMPILED, *group("test"))
    session.run("pytest", *session.posargs)


@nox.session
def slow_tests(session: nox.Session) -> None:
    """Run the tests that take minutes: runs of several processes that are killed, starved and resumed."""
    session.install(*EDITABLE, *group("test"))
    session.run("pytest", "-m", "slow and not gpu", *session.posargs)


@nox.session(python="3.11")
def tests_oldest(session: nox.Session) -> None:
    """Test every package with the oldest supported Python, torch and other dependencies."""
    session.install(*EDITABLE, *COMPILED, *group("test"), *oldest())
    session.run("pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and types, with the versions in constraints.txt so that a new linter breaks no old commit."""
    session.install("-c", "constraints.txt", *EDITABLE, *group("lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")


@nox.session(python=["3.11", "3.12", "3.13"])
def wheels(session: nox.Session) -> None:
    """Build the wheel of compiled kernels into dist/ and test it beside the oldest and the newest torch."""
    session.install("build", "uv")
    folder = Path("dist", f"cpu-{session.python}")
    shutil.rmtree(folder, ignore_errors=True)
    session.run("python", "-m", "build", "--wheel", "--installer", "uv", "--outdir", str(folder), "packages/cuda-ops")
    (wheel,) = folder.glob("*.whl")
    if wheel.stat().st_size > 3e6:
        session.error(f"{wheel} has {wheel.stat().st_size / 1e6:.1f} MB; keep it below 3 MB")
    for torch in ("torch==2.10.*", "torch"):
        session.install("--upgrade", torch, "torchvision", "-e", "packages/segcore", str(wheel), *group("test"))
        session.run("pytest", "packages/cuda-ops", "packages/segcore/tests/test_deform_ops.py", *session.posargs)


@nox.session
@nox.parametrize("method", METHODS, ids=METHODS)
def demo(session: nox.Session, method: str) -> None:
    """Generate street scenes, train a small model on the CPU, evaluate it and write a page with pictures."""
    session.install(*EDITABLE)
    session.run("python", "-m", f"{method}_seg", "demo", *session.posargs)


@nox.session
def gpu_tests(session: nox.Session) -> None:
    """Run the tests that need a CUDA device; with `nox --no-venv` in the environment that nox itself is in."""
    python, env = "python", {}
    if session.venv_backend == "none":  # nothing can be installed: take the packages from the source tree
        sources = [str(Path(package, "src").resolve()) for package in PACKAGES]
        python = sys.executable
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [*sources, os.environ.get("PYTHONPATH")]))
    else:
        session.install(*EDITABLE, *group("test"))
    seen = session.run(python, "-c", "import torch; print(torch.cuda.is_available())", silent=True, external=True)
    if not str(seen).strip().endswith("True"):
        session.error("gpu_tests needs a CUDA device, and torch sees none on this machine")
    session.run(python, "-m", "pytest", "-m", "gpu", *session.posargs, env=env, external=True)
