"""Print what the CUDA kernels compile to: registers, warps per multiprocessor and instructions. Needs no GPU.

    python benchmarks/ops_sass.py [--architecture sm_90] [--source packages/cuda-ops/csrc/bind_cuda.cu]

Needs nvcc (CUDACXX names one elsewhere), pybind11, Python's headers, and cuobjdump: nvcc's own or that of the Triton
wheel. Forms are named by dtype, channels of a thread, threads of a sample, and 1 for 32-bit offsets and no bounds. For
each: registers of a thread, for how many of the at most 64 warps of a multiprocessor these suffice, bytes of shared
memory of a block, all instructions, those of the innermost loops (smallest first), and how many access memory, by
width in bits. A kernel that spills or keeps an array in memory has LDL or STL.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "packages" / "cuda-ops" / "csrc" / "bind_cuda.cu"
REGISTERS, WARPS = 65536, 64
"""Of a multiprocessor."""
WIDTHS = {"U8": "8", "S8": "8", "U16": "16", "64": "64", "F64": "64", "128": "128", "F32x4": "128"}
ACCESSES = ("LDG", "STG", "REDG", "LDS", "STS", "LDL", "STL")


@dataclass
class Kernel:
    """A compiled kernel: its name with the arguments of its template, and its instructions by address."""

    name: str
    registers: int = 0
    shared: int = 0
    code: dict[int, str] = field(default_factory=dict)

    def warps(self) -> int:
        """Return for how many warps a multiprocessor has registers, which each takes 256 at a time."""
        return min(WARPS, REGISTERS // (-(-self.registers * 32 // 256) * 256) // 4 * 4)

    def counts(self) -> Counter[str]:
        """Return the numbers of instructions that access memory, such as LDG.128, or other lanes, SHFL."""
        found: Counter[str] = Counter()
        for text in self.code.values():
            name, *modifiers = re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")
            if name in ACCESSES:
                found[f"{name}.{next((WIDTHS[m] for m in modifiers if m in WIDTHS), '32')}"] += 1
            elif name == "SHFL":
                found[name] += 1
        return found

    def loops(self) -> list[int]:
        """Return the numbers of instructions of the innermost loops."""
        spans = []
        for at, text in self.code.items():
            target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
            if target and int(target[1], 16) < at:
                spans.append((int(target[1], 16), at))
        inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
        return sorted((end - begin) // 16 + 1 for begin, end in inner)


def compiler() -> str | None:
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def disassembler() -> str | None:
    """Return the path of cuobjdump: beside nvcc, or in the Triton wheel."""
    triton = find_spec("triton")
    folders = triton.submodule_search_locations if triton else None
    in_wheel = [shutil.which("cuobjdump", path=f"{folder}/backends/nvidia/bin") for folder in folders or ()]
    return next(filter(None, [shutil.which("cuobjdump"), *in_wheel]), None)


def compiled(source: Path, architecture: str) -> list[Kernel]:
    """Compile a source for an architecture and return its kernels by name. Needs `compiler` and `disassembler`."""
    import pybind11

    include = [f"-I{folder}" for folder in (pybind11.get_include(), sysconfig.get_path("include"))]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [compiler(), "-std=c++17", "-O3", f"-arch={architecture}", "-Xcompiler", "-fPIC", *include]
        for part in ([*command, "-cubin", source, "-o", cubin], [disassembler(), "-sass", "-res-usage", cubin]):
            done = subprocess.run(part, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{part[0]} failed:\n{done.stderr}")
    return read(done.stdout + done.stderr)


def read(text: str) -> list[Kernel]:
    """Return the kernels of a disassembly by name."""
    kernels: dict[str, Kernel] = {}
    current = None
    for line in text.splitlines():
        if header := re.match(r"\s*Function\s*:?\s*(\w+)", line):
            current = kernels.setdefault(header[1], Kernel(readable(header[1])))
        elif not current:
            continue
        elif usage := re.match(r"\s*REG:(\d+) .*SHARED:(\d+)", line):
            current.registers, current.shared = int(usage[1]), int(usage[2])
        elif instruction := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?!NOP)(\S.*?);", line):
            current.code[int(instruction[1], 16)] = instruction[2]
    return sorted(kernels.values(), key=lambda kernel: kernel.name)


def readable(symbol: str) -> str:
    """Return a mangled name as `ms_deform_attn bf16 8`: the kernel and the arguments of its template."""
    name = re.search(r"(?<=\d)(ms_deform_attn|columns|unfold|local_attn)(_backward)?(?=I)", symbol)
    if not name:
        return symbol
    types = {"13__nv_bfloat16": "bf16", "6__half": "f16", "f": "f32", "d": "f64"}
    form = re.match(r"I(?:\w*4FormI)?(13__nv_bfloat16|6__half|f|d)((?:L[ib]\d+E)+)", symbol[name.end() :])
    return " ".join([name[0], types[form[1]], *re.findall(r"L[ib](\d+)E", form[2])]) if form else symbol


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="sm_90")
    parser.add_argument("--source", type=Path, default=SOURCE)
    args = parser.parse_args()
    if not (compiler() and disassembler()):
        sys.exit("ops_sass.py needs nvcc and cuobjdump")
    kernels = compiled(args.source, args.architecture)
    print(f"{'kernel':34}{'registers':>10}{'warps':>7}{'shared':>8}{'all':>7}  innermost loops; memory")
    for kernel in kernels:
        loops = " ".join(map(str, kernel.loops()))
        memory = ", ".join(f"{count} {name}" for name, count in sorted(kernel.counts().items()))
        sizes = f"{kernel.registers:10}{kernel.warps():7}{kernel.shared:8}{len(kernel.code):7}"
        print(f"{kernel.name:34}{sizes}  {loops or '-'}; {memory}")


if __name__ == "__main__":
    main()
