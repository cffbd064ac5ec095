"""Time the four methods on a GPU, as fast as they run here against plain float32, and a training run of DDP.

    python benchmarks/models_gpu.py [--repeats 20] [--train] [--small] [--device cpu]

Forms, at 1024x2048 (DDPS: 512x1024, DGMN2: 769x769), batch 1, random weights:

- plain: float32, eager, PyTorch's own operators (torch's defaults: convolutions may use TF32, products may not);
- fast: bfloat16, channels-last, batch norms folded (DDRNet), compiled kernels of seg-cuda-ops;
- compiled: the same through `torch.compile`;
- graph: fast, captured in a CUDA graph, with the noise as a constant, so without drawing it.

A line per model says how the fastest form compares with the target (`TARGETS`). DDRNet's row is also its frames per
second: the paper (arXiv 2101.06085) states 102 for DDRNet-23-slim at 1024x2048, batch 1, on one RTX 2080 Ti. `--train`
trains DDP ConvNeXt-T for a few steps at 512x1024 on generated 1024x2048 scenes and prints images per second and the
share of the time in which it waited for images (target: at most 2%). `--small` and `--device cpu` rehearse the command;
the times then say nothing. A CPU has the first two forms only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import segcore
from segcore import ops
from segcore.demo.toy import generate
from segcore.deploy.bench import Settings, reason, time_forward
from segcore.environment import environment
from segcore.models.segmentor import Segmentor

ROWS = {
    "ddp_convnext_t_4x4_512x1024_160k_cityscapes": (1024, 2048),
    "ddps_segformer_mit_b2_cityscapes20_multistep": (512, 1024),
    "ddrnet_23_slim_cityscapes": (1024, 2048),
    "fpn_dgmn2_tiny_4x2_769x769_40k_cityscapes": (769, 769),
}
TARGETS = dict.fromkeys(ROWS, 3.0) | {"ddp_convnext_t_4x4_512x1024_160k_cityscapes": 5.0}
"""How many times as fast as the plain form the fastest one should be."""
WAIT = 0.02
"""The share of training's time that it may wait for images."""
TRAINED = next(iter(ROWS))
Forward = Callable[[Tensor], object]


def plain(model: Segmentor, images: Tensor) -> Forward:
    """Float32 without the compiled kernels."""
    ops.unload()
    return model.to(memory_format=torch.contiguous_format)


def fast(model: Segmentor, images: Tensor) -> Forward:
    """Bfloat16, channels-last, folded norms, compiled kernels."""
    ops.load()
    network = model.fuse().to(memory_format=torch.channels_last)

    def forward(images: Tensor) -> object:
        with torch.autocast(images.device.type, torch.bfloat16):
            return network(images.contiguous(memory_format=torch.channels_last))

    return forward


def compiled(model: Segmentor, images: Tensor) -> Forward:
    """`fast`, compiled."""
    torch.compiler.reset()
    return torch.compile(fast(model, images))


def graph(model: Segmentor, images: Tensor) -> Forward:
    """`fast` with constant noise, captured."""
    ops.load()
    network = model.fuse().to(memory_format=torch.channels_last).exportable(images, dynamic=False)
    static = images.contiguous(memory_format=torch.channels_last)

    def forward() -> object:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return network(static)

    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            forward()
    torch.cuda.current_stream().wait_stream(beside)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        forward()

    def replay(images: Tensor) -> None:
        static.copy_(images)
        captured.replay()

    return replay


@torch.no_grad()
def compare(name: str, size: tuple[int, int], repeats: int, device: torch.device) -> None:
    """Print a line per form of a model, and one on its target."""
    exp = segcore.load_experiment(name)
    torch.manual_seed(0)
    model = exp.model.build().eval().to(device)
    images = torch.randn(1, 3, *size, device=device)
    settings = Settings((size,), warmup=3, repeats=repeats)
    times: dict[str, float] = {}
    for form in (plain, fast, graph, compiled) if device.type == "cuda" else (plain, fast):
        try:
            ms = time_forward(form(model, images), images, settings)["latency_ms"] or 0.0
        except (RuntimeError, AssertionError) as error:
            print(f"{name:50} {form.__name__:9} {reason(error)}")
            continue
        times[form.__name__] = ms
        ratio = times.get("plain", 0) / ms
        print(f"{name:50} {form.__name__:9} {ms:9.2f} ms {1e3 / ms:8.1f} images/s {ratio:6.2f}x", flush=True)
    print(f"{name:50} {verdict(times, TARGETS[name])}", flush=True)


def verdict(times: dict[str, float], target: float) -> str:
    """Return measured, target, reached or not, for the times by form."""
    if "plain" not in times:
        return f"– / at least {target}x plain, which did not run / no"
    fastest = min(times, key=times.__getitem__)
    ratio = times["plain"] / times[fastest]
    return f"{ratio:.2f}x ({fastest}) / at least {target}x plain / {'yes' if ratio >= target else 'no'}"


def train(small: bool, device: str) -> None:
    """Print the speed of a training run over its last half, and its wait for images."""
    side, iterations, batch = (64, 4, 2) if small else (1024, 60, 8)
    with tempfile.TemporaryDirectory() as folder:
        root, run = Path(folder, "toy"), Path(folder, "run")
        generate(root, train=2 * batch, val=1, height=side, width=2 * side)
        words = [
            sys.executable, "-m", "segcore", "train", TRAINED, f"--work-dir={run}", f"--device={device}",
            "--data.dataset=toy", f"--data.root={root}", "--data.crop", str(side // 2), str(side),
            "--data.img-scale", str(2 * side), str(side), f"--schedule.iterations={iterations}",
            f"--train.batch-size={batch}", f"--train.device-batch-size={batch}", "--train.precision=bf16",
            f"--train.log-every={iterations // 2}", "--train.evaluate-every=0", "--train.init-from=None",
            f"--data.workers={1 if small else 8}",
        ]  # fmt: skip
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["mode"] == "train"][-1]
    wait = last["data_seconds"] / last["seconds"]
    reached = f"at most {WAIT:.0%} / {'yes' if wait <= WAIT else 'no'}"
    rate = f"{last['images_per_second']:.2f} images/s; {wait:.1%} of the time waiting for images / {reached}"
    print(f"training {TRAINED}, batch {batch}, bf16: {rate}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--train", action="store_true", help="the training run alone")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    found = environment()
    device = torch.device(args.device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else found["machine"]["cpu"]
    print(f"{gpu}, torch {torch.__version__}, git {found['versions']['git']}")
    if args.train:
        train(args.small, args.device)
        return
    for name, size in ROWS.items():
        if args.only in name:
            compare(name, (64, 128) if args.small else size, args.repeats, device)


if __name__ == "__main__":
    main()
