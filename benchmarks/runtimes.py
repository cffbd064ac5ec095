"""Time DDRNet-23-slim's exports in ONNX Runtime and OpenVINO against PyTorch, and count how often classes agree.

    python benchmarks/runtimes.py [--size 512 1024] [--threads 1] [--repeats 8]

The forms take turns in one process, so that a busy machine slows them alike. Printed are the best times of the clock,
their ratio to the fused model's in the channels-last layout, which `test` and `predict` use, and the share of the
pixels whose class is the same. Weights are random, scaled by fan-in, and images are noise, so the agreement of the
forms with fewer bits is not that of a trained model on photos; `export --int8` measures what it costs in mIoU.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from ddrnet_cpu import build
from torch import Tensor

import segcore
from segcore.deploy import export, quantize
from segcore.deploy.runtimes import load_exported
from segcore.environment import environment


def forms(pixels: Tensor, folder: Path) -> dict[str, Callable[[], Tensor]]:
    """Return what to time on images (1, 3, H, W) in 0..255, the form of `test` and `predict` first."""
    exp = segcore.load_experiment("ddrnet_23_slim_cityscapes").with_overrides(["evaluate.img_scale=None"])
    height, width = pixels.shape[2:]
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (exp.data.mean, exp.data.std))
    images = (pixels - mean) / std
    turned = images.to(memory_format=torch.channels_last)
    fused = build("23_slim").fuse().to(memory_format=torch.channels_last)
    compiled = torch.compile(fused)
    exact, small, classes = (folder / f"{name}.onnx" for name in ("exact", "int8", "classes"))
    export.export(build("23_slim").fuse(), exp, exact, export.Settings(height, width))
    inside = export.Settings(height, width, classes=True, normalize=True)
    export.export(build("23_slim").fuse(), exp, classes, inside)
    photo = pixels[0].permute(1, 2, 0).byte().numpy()
    quantize.quantize(exact, small, [lambda: photo] * 4)

    def run(path: Path, provider: str, precision: str = "fp32", images: Tensor = images) -> Callable[[], Tensor]:
        model = load_exported(path, provider, precision)
        return lambda: model.answer(images)

    def bf16() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return fused(turned)

    return {
        "eager, fused": lambda: fused(turned),
        "eager, fused, bf16 (autocast)": bf16,
        "torch.compile": lambda: compiled(turned),
        "ONNX Runtime": run(exact, "cpu"),
        "ONNX Runtime, pixels to classes": run(classes, "cpu", images=pixels),
        "ONNX Runtime int8": run(small, "cpu"),
        "OpenVINO": run(exact, "openvino"),
        "OpenVINO bf16": run(exact, "openvino", "bf16"),
    }


def of_classes(answer: Tensor) -> Tensor:
    """Return the classes (N, H, W) of logits or classes."""
    return answer if answer.ndim == 3 else answer.argmax(1)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 1024), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pixels = torch.randint(256, (1, 3, *options.size), generator=torch.Generator().manual_seed(0)).float()
    with tempfile.TemporaryDirectory() as folder:
        runs = forms(pixels, Path(folder))
    answers = {name: of_classes(run()) for name, run in runs.items()}
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(options.repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    first = next(iter(runs))
    print(f"DDRNet-23-slim, {options.size[0]}x{options.size[1]}, batch 1, {options.threads} thread(s)")
    print(f"{environment()['machine']['cpu']}, torch {torch.__version__}, best of {options.repeats}")
    for name, seconds in best.items():
        same = (answers[name] == answers[first]).double().mean().item()
        print(f"{name:33}{1e3 * seconds:8.1f} ms {best[first] / seconds:6.2f}x {same:9.3%} same class")


if __name__ == "__main__":
    main()
