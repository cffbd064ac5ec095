"""Install mmcv-full with operators compiled for the CPU, for the Python that runs this; it has torch and setuptools<81.

The sdist does not build as it is: headers of torch since 2.15 want C++20. The wheel takes minutes, and is kept by
versions in `segcore-mmcv-full` of the user's cache folder. MAX_JOBS limits the compilers that run at once.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch

VERSION = "1.7.2"
PIP = (sys.executable, "-m", "pip")

cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "segcore-mmcv-full")
folder = cache / f"mmcv-{VERSION}-torch-{torch.__version__}-{sys.implementation.cache_tag}"
if not any(folder.glob("*.whl")):
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        source = ("--no-deps", "--no-build-isolation", "--no-binary", "mmcv-full", f"mmcv-full=={VERSION}")
        subprocess.run([*PIP, "download", "--dest", temporary, *source], check=True)
        with tarfile.open(next(Path(temporary).glob("*.tar.gz"))) as archive:
            archive.extractall(temporary, filter="data")
        (setup,) = Path(temporary).glob("*/setup.py")
        setup.write_text(setup.read_text().replace("-std=c++17", "-std=c++20"))
        wheels = Path(temporary, "wheels")
        build = (*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(setup.parent))
        subprocess.run(build, check=True, env={**os.environ, "MMCV_WITH_OPS": "1", "CUDA_VISIBLE_DEVICES": ""})
        wheels.replace(folder)
(wheel,) = folder.glob("*.whl")
subprocess.run([*PIP, "install", "--no-deps", str(wheel)], check=True)
