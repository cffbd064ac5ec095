"""DDP ConvNeXt-T on a CPU against its plain form (`ddp_plain.py`): time, peak memory and how far the answers differ.

    python benchmarks/ddp_inference.py [--size 256x512] [--steps 3] [--threads 1] [--repeats 5] [--no-compile]

All forms take turns in one process, on the same image, noise and (random) weights, after a warm-up each. Printed is a
form's best turn and the ratio to the plain form's; one form of ours multiplies by MKL on every processor. With one
thread the seconds are the process's CPU time, which other programs on the machine disturb less than the clock; with
more they are wall time. Memory is the peak of a pass beyond model and image; the difference is the largest one of the
logits, whose standard deviation is printed. Compiled are the decoder's layers, which share one compilation.
"""

import argparse
import copy
import os
import time
from collections.abc import Callable

import torch
from ddp_plain import predict
from torch import Tensor

import segcore
from ddp_seg.model import DDP
from segcore.deploy import bench
from segcore.environment import environment, product_library

CONFIG = "ddp_convnext_t_4x4_512x1024_160k_cityscapes"
Form = Callable[[], Tensor]


def build_forms(images: Tensor, steps: int, with_compile: bool) -> dict[str, Form]:
    """Return the forms by name, the plain one first; each gives logits (1, K, H, W)."""
    torch.manual_seed(0)
    model = segcore.load_experiment(CONFIG).model.build().eval()
    for name, parameter in model.named_parameters():
        if ".sampling_offsets.weight" in name or ".attention_weights.weight" in name:
            torch.nn.init.normal_(parameter, std=0.02)  # zero at the start: all pixels would look alike
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    noise = model.draw(torch.empty(1, 256, images.shape[2] // 4, images.shape[3] // 4), None)[0]

    def ours(network: DDP, dtype: str, library: str = product_library()) -> Form:
        x = images.to(memory_format=torch.channels_last) if network is last else images
        forward = bench.forward_of(network, (steps,), dtype, False, images.device)

        def form() -> Tensor:
            os.environ["SEG_LINEAR"] = library
            return forward(x)[str(steps)]

        return form

    forms = {
        "plain": lambda: predict(weights, images, noise, steps),
        "ddp_seg": ours(model, "fp32"),
        "ddp_seg, SEG_LINEAR=mkl": ours(model, "fp32", "mkl"),
        "ddp_seg, channels_last": ours(last, "fp32"),
        "ddp_seg, bf16": ours(model, "bf16"),
        "ddp_seg, bf16, channels_last": ours(last, "bf16"),
    }
    if with_compile:
        compiled = copy.deepcopy(model)
        for layer in compiled.decoder.layers:
            layer.compile()
        forms |= {"ddp_seg, compiled": ours(compiled, "fp32"), "ddp_seg, bf16, compiled": ours(compiled, "bf16")}
    return forms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=bench.parse_size, default=(256, 512))
    for name, default in (("steps", 3), ("threads", 1), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    torch.manual_seed(1)
    images = torch.randn(1, 3, *args.size)
    with torch.no_grad():
        forms = build_forms(images, args.steps, not args.no_compile)
        answers = {name: form().float() for name, form in forms.items()}  # also the warm-up
        memory = {name: bench.peak_memory(form, images.device) for name, form in forms.items()}
        best = dict.fromkeys(forms, float("inf"))
        for _ in range(args.repeats):
            for name, form in forms.items():
                start = clock()
                form()
                best[name] = min(best[name], clock() - start)

    plain = answers["plain"]
    height, width = args.size
    print(f"{CONFIG}, {height}x{width}, {args.steps} steps, batch 1, float32 unless said otherwise")
    print(f"{environment()['machine']['cpu']}, torch {torch.__version__}, threads {torch.get_num_threads()}")
    unit = "CPU time" if clock is time.process_time else "wall time"
    print(f"best of {args.repeats} turns, {unit}; logits have a standard deviation of {plain.std():.2f}\n")
    print(f"{'form':30}{'seconds':>9}{'ratio':>8}{'MiB':>7}{'difference':>13}{'same class':>12}")
    for name, answer in answers.items():
        off, same = (answer - plain).abs().max(), (answer.argmax(1) == plain.argmax(1)).float().mean()
        peak = "–" if memory[name] is None else f"{memory[name] / 2**20:.0f}"
        ratio = f"{best['plain'] / best[name]:.2f}"
        print(f"{name:30}{best[name]:9.2f}{ratio:>8}{peak:>7}{off:13.1e}{100 * same:11.2f}%")
        if "bf16" not in name and off > 1e-4:
            raise SystemExit(f"{name} differs from the plain form by {off:.1e}; it must compute the same numbers")


if __name__ == "__main__":
    main()
