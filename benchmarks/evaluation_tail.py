"""Time what follows the network in an evaluation: from its logits to classes, against the former way.

    python benchmarks/evaluation_tail.py [--repeats 7] [--threads 1] [--images 6] [--no-network]

Resize, softmax, two divisions by 1 and the maximum (evaluation_tail_plain.py) against `ops.resize_argmax`, plain and
compiled, for classes alone and with their probability. Then what `ddrnet-seg test` runs, DDRNet-23-slim over generated
street scenes of 1024x2048, read from PNG files, with the former way and with this one. Forms take turns in one process,
and the best times count: those of the processor with one thread, of the clock with more. Pixels whose class differs are
counted.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from evaluation_tail_plain import FormerPredictor, classes_and_confidence
from torch import Tensor

from ddrnet_seg.model import DDRNet
from segcore import ops
from segcore.config.schema import DataConfig, EvalConfig
from segcore.data.layouts import open_dataset
from segcore.demo.toy import generate
from segcore.environment import environment
from segcore.evaluation.evaluate import evaluate
from segcore.evaluation.predictor import Predictor
from segcore.ops import registry

CASES = [
    (19, (128, 256), (1024, 2048), False),
    (19, (97, 193), (769, 1531), True),
    (151, (300, 400), (1200, 1600), False),
    (150, (128, 171), (512, 683), False),
]


def best_times(forms: dict[str, Callable[[], object]], repeats: int, threads: int) -> dict[str, float]:
    """Return the best time of each form in ms; they take turns."""
    clock = time.process_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats):
        for name, form in forms.items():
            start = clock()
            form()
            times[name].append(1e3 * (clock() - start))
    return {name: min(found) for name, found in times.items()}


def tail(repeats: int, threads: int) -> None:
    """Print the times of all cases."""
    forms = {"plain": registry.defaults["resize_argmax"]}
    if registry.compiled(torch.device("cpu")):
        forms["compiled"] = torch.ops.segcore.resize_argmax
    for classes, given, size, corners in CASES:
        logits = torch.randn(1, classes, *given, generator=torch.Generator().manual_seed(0))
        wanted, probability = classes_and_confidence(logits, size, corners)

        def call(form: Callable[..., tuple[Tensor, Tensor]], confidence: bool) -> tuple[Tensor, Tensor]:
            return form(logits, size, size, corners, confidence)  # noqa: B023  (called before the next case)

        named: dict[str, Callable[[], object]] = {
            "former": lambda: classes_and_confidence(logits, size, corners)  # noqa: B023
        }
        for name, form in forms.items():
            named[name] = lambda form=form: call(form, False)
            named[f"{name}, with probability"] = lambda form=form: call(form, True)
        times = best_times(named, repeats, threads)
        print(f"{classes} classes, {given[0]}x{given[1]} -> {size[0]}x{size[1]}, corners aligned: {corners}")
        for name, ms in times.items():
            note = ""
            if name != "former":
                found, confidence = call(forms[name.split(",")[0]], True)
                differ = int((found[0] != wanted).sum())
                note = f"{times['former'] / ms:6.1f}x   {differ} pixels of {wanted.numel()} differ, probability"
                note += f" within {(confidence[0] - probability).abs().max():.0e}"
            print(f"    {name:28} {ms:8.1f} ms {note}")


def end_to_end(repeats: int, threads: int, images: int) -> None:
    """Print the times of an evaluation of DDRNet-23-slim."""
    torch.manual_seed(0)
    model = DDRNet(variant="23_slim").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 4:
                parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    model = model.fuse().to(memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder), train=1, val=images, height=1024, width=2048)
        data = DataConfig("toy", Path(folder))
        dataset, settings = open_dataset(data, "val"), EvalConfig(img_scale=None, channels_last=True)
        ours, theirs = Predictor(model, settings, data), FormerPredictor(model, settings, data)
        found = {"former": evaluate(theirs, dataset), "now": evaluate(ours, dataset)}
        pixels, differ = (f(*(x.confusion["final"] for x in found.values())) for f in (_sum, _difference))
        times = best_times(
            {"former": lambda: evaluate(theirs, dataset), "now": lambda: evaluate(ours, dataset)}, repeats, threads
        )
    print(f"ddrnet-seg test, DDRNet-23-slim, {images} images of 1024x2048; {ops.kernels()['resize_argmax']['cpu']}")
    for name, ms in times.items():
        print(f"    {name:28} {ms / images:8.1f} ms per image {times['former'] / ms:6.2f}x")
    print(f"    counts of (label, class) differ by {differ} of {pixels} pixels")


def _sum(first: Tensor, _: Tensor) -> int:
    return int(first.sum())


def _difference(first: Tensor, second: Tensor) -> int:
    return int((first - second).abs().sum()) // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("repeats", 7), ("threads", 1), ("images", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--no-network", action="store_true", help="leave out DDRNet")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    threads = f"{args.threads} thread" + "s" * (args.threads > 1)
    print(f"{environment()['machine']['cpu']}, torch {torch.__version__}, {threads}\n")
    tail(args.repeats, args.threads)
    if not args.no_network:
        end_to_end(args.repeats, args.threads, args.images)


if __name__ == "__main__":
    main()
