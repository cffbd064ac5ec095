"""Every check and the demo, each in an environment of its own; `nox -l` lists them.

uv makes the environments where it is installed, `python -m venv` otherwise; they are kept for the next time. Words
after `--` go to the command, as in `nox -s tests -- packages/ddp -k losses`.
"""

import os
import re
import shlex
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
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
COMPILER = os.name == "posix" and next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
"""Without one the tests of the compiled kernels skip, and everything else runs on the plain ones. On Windows, CMake
would take Visual Studio's, whatever else there is, and packages/cuda-ops needs Clang."""
COMPILED = ["packages/cuda-ops"] if COMPILER else []
GPU_BUNDLE = Path(".gpu_bundle")
"""What `scripts/make_gpu_bundle.sh` prepares for machines without a network."""
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
PARALLEL = ("-n", "auto", "--maxprocesses=8", "--dist=worksteal")
"""One test process per core, each with one thread (packages/conftest.py): threads of several would wait for another."""
SCHEMAS = {
    "github-workflows": ".github/workflows/*.yml",
    "github-issue-forms": ".github/ISSUE_TEMPLATE/*.yml",
    "dependabot": ".github/dependabot.yml",
    "citation-file-format": "CITATION.cff",
}
"""Schemas that come with check-jsonschema, and the files that must follow them."""

OPENMMLAB = {
    "0.x": ["mmcv==1.7.2"],
    "1.x": ["mmcv-lite==2.1.0", "mmengine==0.10.7"],
    "onedl": ["onedl-mmcv==2.3.6", "onedl-mmengine==0.10.12"],  # the forks of 1.x that are maintained
}
"""The lines of OpenMMLab by name, with what is installed with its dependencies."""
OPENMMLAB_ALONE = {
    "0.x": ["mmsegmentation==0.30.0", "mmcls==0.25.0", "cityscapesscripts"],
    "1.x": ["mmsegmentation==1.2.2", "mmpretrain==1.2.0", "cityscapesscripts"],
    "onedl": ["onedl-mmsegmentation==1.4.2", "cityscapesscripts"],
}
"""What is installed without its dependencies, which would pull in a second OpenCV, or a mmcv with operators."""
OPENMMLAB_TESTS = [
    f"packages/segcore/tests/test_{name}.py" for name in ("openmmlab", "openmmlab_oracle", "import_config")
]
"""Where the marked tests are; collecting all others, in each process, takes longer than many of them."""


def home_has_a_cache() -> bool:
    """Return whether uv can keep its cache in the user's home, which containers often lack."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "uv")
        cache.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return False
    return os.access(cache, os.W_OK)


if os.name == "posix" and not home_has_a_cache():
    os.environ.setdefault("UV_CACHE_DIR", str(Path(".nox", "uv-cache").resolve()))


def group(name: str) -> list[str]:
    """Return the requirements of a dependency group of the root pyproject.toml."""
    return nox.project.dependency_groups(nox.project.load_toml("pyproject.toml"), name)


def build_for(device: str) -> dict[str, str]:
    """Return the environment in which packages/cuda-ops is built for "cpu" alone, or for "cuda" too."""
    return {"CMAKE_ARGS": f"-DSEG_CUDA={'ON' if device == 'cuda' else 'OFF'}"}


def git(session: nox.Session, *words: str) -> str:
    """Return what a git command prints."""
    return str(session.run("git", *words, external=True, silent=True))


def oldest() -> list[str]:
    """Return segcore's dependencies pinned to the oldest version that its pyproject.toml admits."""
    project = nox.project.load_toml("packages/segcore/pyproject.toml")["project"]
    return [requirement.replace(">=", "==") for requirement in project["dependencies"]]


@nox.session
def tests(session: nox.Session) -> None:
    """Test every package with the newest dependencies; the compiled kernels where there is a C++ compiler."""
    if not COMPILER:
        session.log("no C++ compiler on the path: the tests of the compiled kernels will skip")
    session.install(*EDITABLE, *COMPILED, *group("test"), env=build_for("cpu"), silent=False)  # shows the downloads
    session.run("pytest", *PARALLEL, *session.posargs)


@nox.session
def slow_tests(session: nox.Session) -> None:
    """Run the tests that take minutes: whole runs killed, starved and resumed; the CUDA kernels where there is nvcc."""
    session.install(
        *EDITABLE, *COMPILED, *group("test"), "pybind11", "gradio", env=build_for("cuda" if NVCC else "cpu")
    )
    session.run("pytest", *PARALLEL, "-m", "slow and not gpu", *session.posargs)


@nox.session
def oracle_tests(session: nox.Session) -> None:
    """Compare with libraries that nothing else needs: transformers, MLflow, Ray Data, the Cityscapes scripts."""
    session.install(*EDITABLE, *group("test"), *group("oracle"))
    session.run("pytest", "-m", "oracle", *session.posargs, env={"HF_HUB_OFFLINE": "1"})


@nox.session(python="3.11")
@nox.parametrize("line", list(OPENMMLAB), ids=list(OPENMMLAB))
def openmmlab(session: nox.Session, line: str) -> None:
    """Run our models inside MMSegmentation 0.30, 1.x and its fork, with an mmcv that has no compiled operators."""
    session.install("setuptools<81", "wheel", *EDITABLE, *group("test"))
    # The setup.py of mmcv 1 needs setuptools; that of onedl-mmcv compiles its operators where it sees torch.
    alone = ["--no-build-isolation"] if line == "0.x" else []
    session.install(*alone, *OPENMMLAB[line], *group("openmmlab"))
    session.install("--no-deps", *OPENMMLAB_ALONE[line])
    session.run("python", "scripts/mmcv_without_operators.py")
    session.run("pytest", *PARALLEL, "-m", "openmmlab and not gpu", *OPENMMLAB_TESTS, *session.posargs)


@nox.session(name="openmmlab(full)", python="3.11")
def openmmlab_full(session: nox.Session) -> None:
    """Run the tests of the 0.x line beside mmcv-full, and compare its operators with ours; builds it the first time."""
    session.install("setuptools<81", "wheel", "pip", "ninja", *EDITABLE, *group("test"), *group("openmmlab"))
    session.install("addict", "packaging", "pyyaml", "yapf")  # what mmcv needs: the wheel asks for a second OpenCV, too
    session.run("python", "scripts/build_mmcv_full.py")
    session.install("--no-deps", *OPENMMLAB_ALONE["0.x"], "mmdet==2.28.2")
    session.run("pytest", "-m", "openmmlab and not gpu", *session.posargs)


@nox.session(python="3.11")
def tests_oldest(session: nox.Session) -> None:
    """Test every package with the oldest supported Python, torch and other dependencies."""
    session.install(*EDITABLE, *COMPILED, *group("test"), *oldest(), env=build_for("cpu"))
    session.run("pytest", *PARALLEL, *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, types, spelling, links and workflows, in the versions of constraints.txt: old commits stay green."""
    session.install("-c", "constraints.txt", *EDITABLE, *group("lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")
    session.run("codespell", *git(session, "ls-files").splitlines())  # not what is built beside them
    session.run("python", "scripts/check_links.py")
    for schema, files in SCHEMAS.items():
        session.run("check-jsonschema", "--builtin-schema", f"vendor.{schema}", *map(str, Path().glob(files)))
    session.run("zizmor", "--offline", "--quiet", ".github")


@nox.session(python=["3.11", "3.12", "3.13"])
@nox.parametrize("device", [nox.param("cpu", id="cpu"), nox.param("cuda", id="cuda")])
def wheels(session: nox.Session, device: str) -> None:
    """Build the wheels of compiled kernels, CPU and CUDA, into dist/; test them beside the oldest and newest torch."""
    if device == "cuda" and not NVCC:
        session.skip("no CUDA compiler: put nvcc on the path or name it in CUDACXX")
    session.install("build", "uv")
    folder = Path("dist", f"{device}-{session.python}")
    shutil.rmtree(folder, ignore_errors=True)
    build = ("python", "-m", "build", "--wheel", "--installer", "uv", "--outdir", str(folder), "packages/cuda-ops")
    session.run(*build, env=build_for(device))
    (wheel,) = folder.glob("*.whl")
    if wheel.stat().st_size > 3e6:
        session.error(f"{wheel} has {wheel.stat().st_size / 1e6:.1f} MB; keep it below 3 MB")
    # torch 2.10 reasons for minutes about sizes that vary; `tests_oldest` waits for it.
    slow = ["--deselect", "packages/segcore/tests/test_deform_ops.py::test_compiles"]
    for torch, less in ("torch==2.10.*", slow), ("torch", []):
        # Not `--upgrade`, with which uv downloads and unpacks into its cache all over again, 12 GB each time.
        session.run("uv", "pip", "uninstall", "--python", session.virtualenv.location, "torch", "torchvision")
        session.install(torch, "torchvision", "-e", "packages/segcore", *group("test"))
        session.install("--no-deps", "--force-reinstall", str(wheel))
        ours = (f"packages/segcore/tests/test_{name}.py" for name in ("deform_ops", "ms_deform_attn"))
        session.run("pytest", *PARALLEL, "packages/cuda-ops", *ours, *less, *session.posargs)


@nox.session(python=["3.11", "3.12", "3.13"])
def first_minute(session: nox.Session) -> None:
    """Follow the lines of the README that set everything up, in a fresh clone; print time and disk.

    nox itself stops there after it has installed what the session needs; words after `--` replace `--install-only`.
    """
    clone = Path(session.create_tmp(), "clone").resolve()
    for line in re.findall(r"^python3 -m venv .*$", Path("README.md").read_text(), re.MULTILINE):
        shutil.rmtree(clone, ignore_errors=True)
        git(session, "clone", "--quiet", ".", str(clone))
        start = time.monotonic()
        with session.chdir(clone):
            line = line.replace("/nox ", f"/nox {shlex.join(session.posargs or ['--install-only'])} ")
            session.run("bash", "-c", line, external=True)
        size = sum(path.lstat().st_blocks for path in clone.rglob("*")) * 512 // 10**6
        session.log(f"{time.monotonic() - start:.0f} s, {size} MB: {line}")
    shutil.rmtree(clone)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into site/, look at its pages in a browser, and run the code on them.

    Words after `--` go to pytest, as in `-- -k own_data`; `-- build` only builds.
    """
    session.install("-c", "constraints.txt", *EDITABLE, *group("docs"), *group("test"))
    shutil.rmtree("site", ignore_errors=True)
    tree = str(Path(session.create_tmp(), "doctrees"))
    session.run("sphinx-build", "--fail-on-warning", "--keep-going", "--nitpicky", "-q", "-E", "-d", tree, ".", "site")
    if session.posargs != ["build"]:
        session.run("pytest", *PARALLEL, "-m", "docs", *session.posargs)


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Run again what the first lines of benchmarks/results/*.txt say; words after `--` choose files by their names.

    The machine should have nothing else to do. A command that fails leaves its file as it was, and the rest goes on.
    """
    session.install(*EDITABLE, *COMPILED, *group("test"), env=build_for("cpu"))
    failed = list[str]()
    for file in sorted(Path("benchmarks", "results").glob("*.txt")):
        command = file.read_text().splitlines()[0]
        chosen = not session.posargs or any(word in file.name for word in session.posargs)
        if not chosen or "_gpu" in file.name or "_before" in file.name:  # of other machines, and of former kernels
            continue
        try:
            text = session.run(*shlex.split(command.removeprefix("$ ")), silent=True, stderr=None)
        except nox.command.CommandFailed:
            failed.append(file.name)
        else:
            session.log(f"{file}\n{text}")
            file.write_text(f"{command}\n{text}")
    if failed:
        session.error(f"these failed: {', '.join(failed)}")


@nox.session
def notebooks(session: nox.Session) -> None:
    """Run the notebooks in a copy of their folder; with `-- --store`, keep their outputs as those of the repository."""
    session.install(*EDITABLE, *group("notebooks"))
    folder = Path(session.create_tmp(), "notebooks").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree("notebooks", folder, ignore=lambda _, names: [name for name in names if ".ipynb" not in name])
    chosen = [name for name in session.posargs if name != "--store"] or sorted(path.name for path in folder.iterdir())
    with session.chdir(folder):
        session.run("pytest", "-c", os.devnull, "--rootdir", ".", "--nbmake", "--overwrite", "--nbmake-timeout=600",
                    "-p", "no:cacheprovider", "--durations=0", *chosen)  # fmt: skip
    if "--store" in session.posargs:
        session.run("python", "scripts/store_notebooks.py", *(str(folder / name) for name in chosen))


@nox.session
def release(session: nox.Session) -> None:
    """Build the packages into dist/release, check them, install each by its name alone, and run a short demo."""
    session.install("uv", "twine", "auditwheel")
    folder, scratch = Path("dist/release").resolve(), Path(session.create_tmp()).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(scratch)
    for name in git(session, "ls-files", "packages", ".gitignore").splitlines():  # a clone elsewhere, built again
        (scratch / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(name, scratch / "tree" / name)
    env = build_for("cpu") | {"SOURCE_DATE_EPOCH": git(session, "log", "-1", "--format=%ct").strip()}
    for package in (*PACKAGES, "packages/cuda-ops"):
        build = ("uv", "build", "--quiet", "--python", f"{session.bin}/python", "--out-dir")
        session.run(*build, str(folder), package, env=env)
        sdist = ["--sdist"] * (package == "packages/cuda-ops")  # another compiler's output is another one
        session.run(*build, str(scratch / "again"), *sdist, str(scratch / "tree" / package), env=env)
    session.run("twine", "check", "--strict", *map(str, folder.glob("*-*")))
    session.run("python", "scripts/check_release.py", "built", str(folder), str(scratch / "again"), *session.posargs)
    if sys.platform == "linux":
        session.run("auditwheel", "show", *map(str, folder.glob("seg_cuda_ops*.whl")))
    install_release(session, folder, scratch)


def install_release(session: nox.Session, folder: Path, scratch: Path) -> None:
    """Install every package in an environment without the others, from a folder and the usual index; run a short demo.

    uv brings the dependencies, as its cache has torch; then pip itself runs, which finds them installed.
    """
    environment = scratch / "environment"
    programs, names = environment / Path(session.bin).name, ("segcore", "seg-cuda-ops", *(f"{m}-seg" for m in METHODS))
    env = {"UV_FIND_LINKS": str(folder), "PIP_FIND_LINKS": str(folder), "PIP_NO_CACHE_DIR": "1", "PIP_QUIET": "1"}
    env |= {"UV_PYTHON": str(environment), "PYTHONPATH": ""}

    def run(program: str, *words: str) -> None:
        session.run(str(programs / program), *words, env=env, external=True)

    session.run("uv", "venv", "--quiet", "--seed", "--python", f"{session.bin}/python", str(environment))
    session.run("uv", "pip", "install", "--quiet", "ddp-seg", env=env)
    for name in names:
        session.run("uv", "pip", "uninstall", "--quiet", *names, env=env)
        run("pip", "install", name)
        run("python", "scripts/check_release.py", "installed", name)
    extras = (f"{name}[all,kernels]" for name in names[2:])
    session.run("uv", "pip", "install", "--quiet", "--dry-run", *extras, env=env)
    run("pip", "install", "ddp-seg[kernels]")
    with session.chdir(scratch):
        run("python", "-c", "from segcore import ops; assert 'plain' not in ops.kernels()['ms_deform_attn']['cpu']")
        few = "import pathlib; from segcore.demo import toy; toy.generate(pathlib.Path('demo/scenes'), train=4, val=2)"
        run("python", "-c", few)
        short = ("--schedule.iterations", "4", "--schedule.warmup-iterations", "1", "--evaluate.steps", "1")
        run("ddp-seg", "demo", "--work-dir", "demo", *short)


@nox.session
def reference(session: nox.Session) -> None:
    """Build the package of reference numbers, fetch it by its hash as CI does, and run parity tests with it alone."""
    source = Path(os.environ.get("SEG_REFERENCE") or "../shared/reference")
    if not source.is_dir():
        session.error(f"no folder {source}: name the reference folder in SEG_REFERENCE")
    folder = Path("dist", "reference").resolve()
    session.run("python", "scripts/build_reference.py", str(source), str(folder))
    home = re.compile(r"https://\S+/(?=segcore_reference)")
    stated = Path(session.create_tmp(), "reference.txt")
    stated.write_text(home.sub(f"{folder.as_uri()}/", Path("reference.txt").read_text()))
    session.install(*EDITABLE, *group("test"))
    site = Path(session.create_tmp(), "site").resolve()
    shutil.rmtree(site, ignore_errors=True)
    session.install("--no-deps", "--target", str(site), "-r", str(stated))
    named = session.posargs or ("packages/ddrnet/tests/test_parity.py", "packages/segcore/tests/test_transforms.py")
    env = {"SEG_REFERENCE": str(site / "segcore_reference")}
    ran = str(session.run("pytest", *PARALLEL, "-rs", *named, env=env, silent=True))
    session.log(ran)
    if "no reference numbers" in ran:
        session.error("these tests do not find the package")


@nox.session
@nox.parametrize("method", METHODS, ids=METHODS)
def demo(session: nox.Session, method: str) -> None:
    """Generate street scenes, train a small model on the CPU, evaluate it and write a page with pictures."""
    session.install(*EDITABLE, silent=False)  # shows the downloads
    session.run("python", "-m", f"{method}_seg", "demo", *session.posargs)


@nox.session
def demos(session: nox.Session) -> None:
    """Run the demos of all methods, one thread each and as many at once as there are cores; they must have learned."""
    session.install(*EDITABLE)
    folder = Path("runs", "demo")
    folder.mkdir(parents=True, exist_ok=True)

    def run(method: str) -> None:
        with Path(folder, f"{method}.log").open("w") as log:
            command = ("python", "-m", f"{method}_seg", "demo", *session.posargs)
            session.run(*command, env={"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        running = {method: pool.submit(run, method) for method in METHODS}
    failed = [method for method, done in running.items() if done.exception()]
    for method in failed:
        session.warn(Path(folder, f"{method}.log").read_text()[-3000:])
    if failed:
        session.error(f"demo failed: {', '.join(failed)}; output is in {folder}/METHOD.log")
    session.run("python", "scripts/check_demos.py")


@nox.session
def gpu_tests(session: nox.Session) -> None:
    """Run the tests that need a CUDA device; with `nox --no-venv` in the environment that nox itself is in."""
    python, env = "python", {}
    if session.venv_backend == "none":
        python = sys.executable
    else:
        session.install(*EDITABLE, *COMPILED, *group("test"), env=build_for("cuda"))
    seen = session.run(python, "-c", "import torch; print(torch.cuda.is_available())", silent=True, external=True)
    if not str(seen).strip().endswith("True"):
        session.error("gpu_tests needs a CUDA device, and torch sees none on this machine")
    if session.venv_backend == "none":  # nothing can be downloaded: what is missing there comes from the bundle
        found = sorted(map(str, GPU_BUNDLE.glob("wheels/*.whl")))
        wheels = [wheel for wheel in found if "seg_cuda_ops" not in wheel]  # which is built here
        if not wheels:
            session.error(f"no wheels in {GPU_BUNDLE}: scripts/make_gpu_bundle.sh makes them where there is a network")
        site = Path(session.create_tmp(), "site").resolve()
        shutil.rmtree(site, ignore_errors=True)
        install = (python, "-m", "pip", "install", "--no-index", "--no-deps", "--upgrade", "--target", str(site))
        session.run(*install, *wheels, external=True)
        session.run(*install, "--no-build-isolation", "packages/cuda-ops", env=build_for("cuda"), external=True)
        sources = [*(str(Path(package, "src").resolve()) for package in PACKAGES), str(site)]
        env = {"PYTHONPATH": os.pathsep.join(filter(None, [*sources, os.environ.get("PYTHONPATH")]))}
    session.run(python, "-m", "pytest", "-m", "gpu", *session.posargs, env=env, external=True)


@nox.session(venv_backend="none")
def gpu_check(session: nox.Session) -> None:
    """Check a GPU within ten minutes, without a network, in the environment that nox itself is in."""
    session.run("scripts/gpu_check.sh", *session.posargs, env={"PYTHON": sys.executable}, external=True)
