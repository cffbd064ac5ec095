"""DDPS on SegFormer-B2 on a CPU against its plain form (`ddps_plain.py`): time and how far the answers differ.

    python benchmarks/ddps_inference.py [--size 128x128] [--threads 1] [--repeats 7]

Three inference steps at timesteps 0, 10 and 19 of 20, 151 classes, float32; both forms encode the image once, with the
same encoder, and get the same draws. They take turns in one process after a warm-up; printed is the best turn of each,
of the whole and of the denoising alone. With one thread the seconds are the process's CPU time, which other programs
disturb less than the clock; with more they are wall time. Weights are random; the answers must agree within 1e-3.
"""

import argparse
import time
from collections.abc import Callable

import torch
from ddps_plain import denoise
from torch import Tensor

import segcore
from segcore.deploy import bench
from segcore.environment import environment

CONFIG = "segformer_b2_ade20k_multistep_inference"
STEPS = (0, 10, 19)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=bench.parse_size, default=(128, 128))
    for name, default in (("threads", 1), ("repeats", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    torch.manual_seed(0)
    model = segcore.load_experiment(CONFIG).model.build().eval()
    names = model.key_map()
    weights = {names[name]: tensor.detach() for name, tensor in model.state_dict().items()}
    height, width = args.size
    images = torch.randn(1, 3, height, width)
    mask = torch.randint(151, (1, height // 4, width // 4))
    uniforms = torch.rand(2, 1, 151, height // 4, width // 4)

    @torch.no_grad()
    def ours(condition: Tensor) -> Tensor:
        return list(model.denoise_steps(condition, mask, uniforms=uniforms, inference_timesteps=2).values())[-1]

    @torch.no_grad()
    def plain(condition: Tensor) -> Tensor:
        return denoise(weights, condition, mask, list(uniforms), STEPS)

    @torch.no_grad()
    def encode() -> Tensor:
        return model.encode(images)

    condition = encode()
    forms: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: plain(encode()),
        "ddps_seg": lambda: ours(encode()),
        "plain, denoising only": lambda: plain(condition),
        "ddps_seg, denoising only": lambda: ours(condition),
    }
    answers = {name: form() for name, form in forms.items()}  # also the warm-up
    best = dict.fromkeys(forms, float("inf"))
    for _ in range(args.repeats):
        for name, form in forms.items():
            start = clock()
            form()
            best[name] = min(best[name], clock() - start)

    difference = (answers["ddps_seg"] - answers["plain"]).abs().max().item()
    unit = "CPU time" if clock is time.process_time else "wall time"
    print(f"{CONFIG}, {height}x{width}, timesteps {STEPS}, batch 1, float32")
    print(f"{environment()['machine']['cpu']}, torch {torch.__version__}, threads {torch.get_num_threads()}")
    print(f"best of {args.repeats} turns, {unit}; logits within {difference:.1e}, ", end="")
    print(f"their standard deviation is {answers['plain'].std():.2f}\n")
    print(f"{'form':28}{'seconds':>9}{'ratio':>8}")
    for name, seconds in best.items():
        yardstick = best["plain, denoising only" if "only" in name else "plain"]
        print(f"{name:28}{seconds:9.3f}{yardstick / seconds:8.2f}")
    if not difference <= 1e-3:
        raise SystemExit(f"the answers differ by {difference:.1e}; they must be the same numbers")


if __name__ == "__main__":
    main()
