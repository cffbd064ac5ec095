"""Peak memory of `predict scene.tif out.tif` over small and large images: it does not grow with their size.

    python benchmarks/large_image.py [--sides 2000 10000 20000] [--folder FOLDER]

Each square RGB image is made tile by tile and predicted in a process of its own on the CPU, in windows of 512x512 every
341 pixels, whose greatest resident memory (ru_maxrss) is printed. The model is one 1x1 convolution to 19 classes, so
that what the windows need beside a network remains. Needs Linux or macOS, and 3 bytes of disk per pixel.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
import torch
from evaluation_memory import Pointwise

from segcore.cli.predict_raster import run
from segcore.config.schema import DataConfig, EvalConfig, Experiment, ModelConfig
from segcore.data import rasters
from segcore.environment import environment
from segcore.evaluation.predictor import Predictor
from segcore.inference import LoadedModel


@dataclass(frozen=True)
class PointwiseConfig(ModelConfig):
    """The model's configuration."""

    def build(self) -> Pointwise:
        return Pointwise()


def tiles(side: int) -> Iterator[np.ndarray]:
    """Yield the tiles of an image of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3)).astype(np.uint8)
    for _ in range((-(-side // 512)) ** 2):
        yield noise


def peak(folder: Path, side: int) -> str:
    """Predict an image of `side` x `side` pixels and return this process's peak memory in MB and the time."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    scene = folder / "scene.tif"
    tifffile.imwrite(
        scene, tiles(side), shape=(side, side, 3), dtype=np.uint8, tile=(512, 512), photometric="rgb", metadata=None
    )
    exp = Experiment("pointwise", PointwiseConfig(), DataConfig("cityscapes"), evaluate=EvalConfig())
    start = time.monotonic()
    run(LoadedModel(exp, Predictor.of(Pointwise().eval(), exp)), scene, folder / "out.tif")
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    reader = "rasterio" if rasters._rasterio() else "tifffile"
    return f"{side}x{side}   peak {used:6.0f} MB   {time.monotonic() - start:5.0f} s   read with {reader}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[2000, 10000, 20000])
    parser.add_argument("--folder", type=Path, help="where to keep the images meanwhile; by default the system's")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # set in the process that measures one size
    args = parser.parse_args()
    if args.one:
        print(peak(args.folder, args.one))
        return
    print(f"{environment()['machine']['cpu']}, torch {torch.__version__}, 1 thread")
    for side in args.sides:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            command = [sys.executable, __file__, "--folder", folder, "--one", str(side)]
            print(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
