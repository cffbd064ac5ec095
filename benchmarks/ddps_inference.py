"""DDPS on SegFormer-B2 on a CPU against its plain form (`ddps_plain.py`): time and how far the answers differ.

    python benchmarks/ddps_inference.py [--size 128x128] [--threads 1] [--repeats 7]

Three inference steps at timesteps 0, 10 and 19 of 20, 151 classes, float32; both forms encode the image once, with the
same encoder, and get the same draws. Encoder and both forms of the denoising take turns in one process after a warm-up;
printed is the best turn of each, and of the denoising with the encoder. With one thread the seconds are the process's
CPU time, which other programs disturb less than the clock; with more they are wall time. Weights are random.

Answers are compared step by step, with given maps: the plain form gets the noisy label map of each step of ours, and
the logits must agree within 2e-5 of their largest one. From our logits it must draw our next map. Compared at the end
of a run of its own, a class that changed in a tie would change the map of the next step and with it the logits around.
"""

import argparse
import time
from collections.abc import Callable

import torch
from ddps_plain import denoise, noised

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

    last = model.num_train_timesteps - 1
    forms: dict[str, Callable[[], object]] = {
        "encoder": lambda: model.encode(images),
        "plain": lambda: denoise(weights, condition, mask, list(uniforms), STEPS),
        "ddps_seg": lambda: list(model.denoising_steps(condition, mask, uniforms, steps=2, guidance_scale=1.0)),
    }
    best = dict.fromkeys(forms, float("inf"))
    off, largest, other, redrawn = 0.0, 0.0, 0, 0
    with torch.no_grad():
        condition = model.encode(images)
        drawn = None
        steps = list(model.denoising_steps(condition, mask, uniforms, steps=2, guidance_scale=1.0))
        for k, (timestep, step) in enumerate(zip(STEPS, steps, strict=True)):  # also the warm-up
            expected = denoise(weights, condition, step.noisy, [], (timestep,))
            off = max(off, (step.logits - expected).abs().max().item())
            largest = max(largest, expected.abs().max().item())
            other += int((step.logits.argmax(1) != expected.argmax(1)).sum())
            redrawn += int((drawn != step.noisy).sum()) if drawn is not None else 0
            if k + 1 < len(STEPS):
                drawn = noised(weights, step.logits.argmax(1), last - STEPS[k + 1], uniforms[k])
        for _ in range(args.repeats):
            for name, form in forms.items():
                start = clock()
                form()
                best[name] = min(best[name], clock() - start)

    unit = "CPU time" if clock is time.process_time else "wall time"
    print(f"{CONFIG}, {height}x{width}, timesteps {STEPS}, batch 1, float32")
    machine = environment()["machine"]
    print(f"{machine['cpu']}, torch {torch.__version__}, threads {torch.get_num_threads()}, ", end="")
    print(f"products by {machine['float32 products']}")
    print(
        f"best of {args.repeats} turns, {unit}; step by step, logits within {off:.1e}, the largest one {largest:.2f},"
    )
    print(f"{other} of {len(STEPS) * mask.numel()} pixels of another class, {redrawn} drawn otherwise\n")
    print(f"{'form':28}{'seconds':>9}{'ratio':>8}")
    for name, more in (("", best["encoder"]), (", denoising only", 0.0)):
        for form in "plain", "ddps_seg":
            ratio = (best["plain"] + more) / (best[form] + more)
            print(f"{form + name:28}{best[form] + more:9.3f}{ratio:8.2f}")
    if not (off <= 2e-5 * largest and redrawn == 0):
        raise SystemExit("the answers differ; they must be the same numbers")


if __name__ == "__main__":
    main()
