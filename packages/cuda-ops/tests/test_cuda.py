"""The CUDA kernels: run on the CPU under sanitizers, compiled within limits, and on a device where there is one."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

PACKAGE = Path(__file__).parents[1]
CSRC = PACKAGE / "csrc"
SANITIZE = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
REGISTERS = 168
"""Of a thread, in any form."""
FORMS = 4 * 2 * 7 + 3 * (4 * 3 + 2 * 2 + 1)
"""Kernels in general forms: dtypes, vectors or not. In exact ones, without float64: four for 4, 8 or 16 lanes, two for
8 or 32, one for one."""


@pytest.fixture(scope="module")
def cpu_kernels(tmp_path_factory) -> Path:
    """The CPU kernels, compiled with sanitizers."""
    return build(["-c", CSRC / "cpu_kernels.cpp"], tmp_path_factory.mktemp("sanitized") / "cpu_kernels.o")


def build(sources: list[str | Path], target: Path) -> Path:
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("no g++")
    flags = ["-std=c++17", "-O0", "-g1", "-Wno-psabi", *SANITIZE, "-DKERNELS_NAME=kernels_under_test"]
    built = subprocess.run([compiler, *flags, *sources, "-o", target], capture_output=True, text=True, timeout=600)
    if "cannot find -lasan" in built.stderr:
        pytest.skip("no sanitizers")
    assert built.returncode == 0, built.stderr
    return target


@pytest.mark.parametrize("program", ["sanitize", "device_code"])
def test_sanitizers_find_nothing(tmp_path, cpu_kernels, program):
    """The CPU kernels, and the device code on the CPU, which must answer the same."""
    executable = build([cpu_kernels, Path(__file__).with_name(f"{program}.cpp")], tmp_path / program)
    done = subprocess.run([executable], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90"])
def test_compiles_within_limits(tmp_path, architecture):
    """No kernel spills registers into memory or keeps an array there, on any of the architectures of a wheel."""
    compiler = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if not compiler:
        pytest.skip("no CUDA compiler")
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed")
    include = [f"-I{folder}" for folder in (pybind11.get_include(), sysconfig.get_path("include"))]
    command = [compiler, "-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas", "-v", "-Xcompiler", "-fPIC", *include]
    built = subprocess.run(
        [*command, "-cubin", CSRC / "bind_cuda.cu", "-o", tmp_path / "kernels.cubin"],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert built.returncode == 0, built.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", built.stderr)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", built.stderr)]
    assert len(registers) == FORMS
    assert all(frame == ("0", "0", "0") for frame in frames), built.stderr
    assert max(registers) <= REGISTERS


@pytest.mark.slow
def test_machine_code(monkeypatch):
    """Nothing lies in a thread's own memory, outputs are written 16 bytes at a time, and there is room for warps."""
    monkeypatch.syspath_prepend(PACKAGE.parents[1] / "benchmarks")
    ops_sass = pytest.importorskip("ops_sass", reason="the benchmarks are in the repository only")
    pytest.importorskip("pybind11", reason="pybind11 is not installed")
    if not (ops_sass.compiler() and ops_sass.disassembler()):
        pytest.skip("no CUDA compiler, or no disassembler")
    kernels = ops_sass.compiled(CSRC / "bind_cuda.cu", "sm_90")
    assert len(kernels) == FORMS
    for kernel in kernels:
        (name, _, vec, _, exact), counts = kernel.name.split(), kernel.counts()
        assert not {"LDL", "STL"} & {access[:3] for access in counts}, kernel.name
        if name in ("columns", "local_attn", "ms_deform_attn") and int(vec) > 1:
            assert {a for a in counts if a[:3] == "STG"} == {"STG.128"}, kernel.name
            assert {a for a in counts if a[:3] == "LDG"} <= {"LDG.128", "LDG.32", "LDG.64"}, kernel.name
        if exact == "1":
            assert kernel.warps() >= (24 if name.endswith("_backward") else 32), kernel.name


@pytest.mark.slow
def test_architectures_of_an_older_build_folder_are_not_kept(tmp_path):
    """CUDAARCHS names those of this build, whatever the folder was built for before; without it all are built."""
    compiler, cmake = os.environ.get("CUDACXX") or shutil.which("nvcc"), shutil.which("cmake")
    if not (compiler and cmake):
        pytest.skip("no CUDA compiler, or no CMake")
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed")
    options = {"pybind11_DIR": pybind11.get_cmake_dir(), "CMAKE_CUDA_COMPILER": compiler, "SEG_CUDA": "ON"}
    options |= {"Python_EXECUTABLE": sys.executable, "CMAKE_EXPORT_COMPILE_COMMANDS": "ON"}
    command = [cmake, "-S", PACKAGE, "-B", tmp_path, *(f"-D{name}={value}" for name, value in options.items())]
    clean = {name: value for name, value in os.environ.items() if name != "CUDAARCHS"}
    for chosen, expected in [("", {"80", "89", "90"}), ("90", {"90"}), ("", {"80", "89", "90"}), ("80", {"80"})]:
        done = subprocess.run(command, env={**clean, "CUDAARCHS": chosen}, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        found = re.findall(r"arch=compute_(\d+)", (tmp_path / "compile_commands.json").read_text())
        assert set(found) == expected


@pytest.mark.slow  # as building it is
def test_the_module_needs_no_driver():
    """It is imported and asked anywhere; only launching takes a device, and raises without one."""
    cuda = pytest.importorskip("seg_cuda_ops._cuda", reason="this build has no CUDA kernels", exc_type=ImportError)
    assert cuda.built_for >= 12000
    if cuda.driver_version():
        pytest.skip("there is a driver")
    assert "driver" in cuda.probe(0)
    with pytest.raises(RuntimeError, match=r"seg_cuda_ops: .*driver"):
        cuda.ms_deform_attn_f32([0] * 8, [1, 1], [1] * 7, 0, 0)
    ops = pytest.importorskip("segcore.ops", reason="segcore is not installed")
    assert "there is no driver" in ops.kernels()["ms_deform_attn"]["cuda"] or torch.version.cuda is None


def test_says_why_there_is_no_cuda(monkeypatch):
    registration = pytest.importorskip("seg_cuda_ops.registration", reason="the package is not installed")

    class Module:
        built_for = 13000

        def __init__(self, driver):
            self.driver_version = lambda: driver

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for module, reason in [
        (None, "this build has no CUDA kernels"),
        (Module(0), "there is no driver, this build needs 13.0 or newer"),
        (Module(12080), "the driver knows CUDA 12.8, this build needs 13.0 or newer"),
        (Module(13000), ""),
        (Module(13020), ""),
    ]:
        monkeypatch.setattr(registration, "_cuda", module)
        assert registration.why_no_cuda() == reason
    monkeypatch.setattr(torch.version, "cuda", None)
    assert registration.why_no_cuda() == "this torch is built without CUDA"


def test_leaves_to_the_plain_kernels_what_it_cannot_do(monkeypatch):
    registration = pytest.importorskip("seg_cuda_ops.registration", reason="the package is not installed")
    usable = {0: "", 1: "no kernel image is available"}

    class Module:
        probe = usable.get

    monkeypatch.setattr(registration, "_cuda", Module)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old card")
    registration.runs_on.cache_clear()

    def choose(name, *args):
        return registration.or_default(name, lambda *args: "compiled", lambda *args: "plain")(*args)

    class On:
        def __init__(self, index, *shape):
            self.device, self.shape = torch.device("cuda", index), shape

    image, offset = On(0, 1, 1, 46341, 46340), On(0, 1, 2, 4, 4)
    assert choose("deform_unfold", image, offset) == "compiled"
    assert choose("deform_unfold", On(0, 1, 1, 46341, 46342), offset) == "plain"
    with pytest.warns(UserWarning, match="does not run on an old card.*no kernel image"):
        assert choose("deform_unfold", On(1, 1, 1, 4, 4), offset) == "plain"
    assert choose("ms_deform_attn", image, [4] * 32) == "compiled"
    assert choose("ms_deform_attn", image, [4] * 34) == "plain"
    assert choose("ms_deform_attn", image, [4, 4, 2**16, 2**15]) == "plain"
    assert choose("ms_deform_attn_backward", offset, image, [4] * 34) == "plain"
    assert choose("deform_local_attn", image, image, image, offset, None, [4, 4, 3, 3], 1.0) == "compiled"
    assert choose("deform_local_attn", image, image, image, offset, None, [2**16, 2**15, 3, 3], 1.0) == "plain"
    torch.use_deterministic_algorithms(True)
    try:
        assert choose("deform_unfold", image, offset) == "compiled"
        assert choose("deform_unfold_backward", offset, image, offset) == "plain"
    finally:
        torch.use_deterministic_algorithms(False)
        registration.runs_on.cache_clear()
