"""The backbone of DGMN2-Tiny on a CPU against its plain form (`dgmn2_plain.py`): time, peak memory and the difference.

    python benchmarks/dgmn2.py [--size 256x256] [--threads 1] [--repeats 7]

Forms take turns in one process on one image and the same random weights, once with the maps that Semantic FPN takes,
once with SETR's. "unfold" and "grid_sample" are plain forms; the second has other gradients at the border and at pixel
centers. Ratios are the first form's time over a form's own, and a form's memory over the first one's. Times are the
best ones; with one thread they are the process's CPU time, which other programs disturb less than the clock. Memory is
the least peak of a forward and backward pass beyond model and image, the gradients of the weights included. The
difference is the largest of the maps, over their standard deviation.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import dgmn2_plain
import torch
from torch import Tensor

from dgmn2_seg.backbone import VARIANTS, Backbone
from segcore import ops
from segcore.deploy import bench
from segcore.environment import environment

Form = Callable[[], list[Tensor]]
Clock = Callable[[], float]
Figures = dict[str, tuple[float, float, float]]
COMPILED = "dgmn2_seg, "


def build_forms(images: Tensor, dense: bool) -> tuple[Backbone, dict[str, Form]]:
    """Return our model and the forms by name, the yardstick first; each gives the maps of the four stages."""
    torch.manual_seed(0)
    model = Backbone(VARIANTS["tiny"], dense=dense).eval()
    weights = dict(model.state_dict(keep_vars=True))

    def ours() -> list[Tensor]:
        return model(images)

    plain = partial(dgmn2_plain.backbone, weights, images, dense=dense)
    forms: dict[str, Form] = {
        "plain, unfold": plain,
        "plain, grid_sample": partial(plain, unfold=dgmn2_plain.unfold_by_grid_sample),
        "dgmn2_seg": ours,
    }
    ops.load()
    served = ops.kernels()["deform_local_attn"]["cpu"]
    if not served.startswith("plain"):
        forms[f"{COMPILED}{served}"] = ours
    return model, forms


def measure(model: Backbone, forms: dict[str, Form], repeats: int, clock: Clock) -> tuple[Figures, dict[str, float]]:
    """Return by form its best seconds, forward and both ways, and least peak in bytes; and how far its maps are off."""

    def forward(form: Form) -> list[Tensor]:
        with torch.no_grad():
            return form()

    def both(form: Form) -> None:
        model.zero_grad()
        torch.autograd.backward(form(), gradients)

    expected = forward(next(iter(forms.values())))
    gradients = [torch.randn_like(x) for x in expected]
    best, off = {name: (float("inf"),) * 3 for name in forms}, {}
    for turn in range(repeats + 1):
        for name, form in forms.items():
            ops.load() if name.startswith(COMPILED) else ops.unload()
            pairs = zip(forward(form), expected, strict=True)
            off[name] = max(((x - y).abs().max() / y.std()).item() for x, y in pairs)
            figures = []
            for run in forward, both:
                start = clock()
                run(form)
                figures.append(clock() - start)
            model.zero_grad()
            figures.append(bench.peak_memory(partial(both, form), torch.device("cpu")) or 0)
            if turn:
                best[name] = tuple(map(min, best[name], figures))
    return best, off


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=bench.parse_size, default=(256, 256))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    height, width = args.size
    images = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    print(f"DGMN2-Tiny's backbone, {height}x{width}, batch 1, float32, evaluation mode; best of {args.repeats} turns")
    print(f"{environment()['machine']['cpu']}, torch {torch.__version__}, threads {args.threads}")
    for dense in (False, True):
        model, forms = build_forms(images, dense)
        best, off = measure(model, forms, args.repeats, clock)
        print(f"\nmaps at {'1/4, 1/8, 1/8, 1/8' if dense else '1/4, 1/8, 1/16, 1/32'}")
        titles = ("forward ms", "ratio", "both ms", "ratio", "MiB", "ratio", "difference")
        print(f"{'form':27}" + "".join(f"{title:>12}" for title in titles))
        yardstick = best["plain, unfold"]
        for name, (forward, both, peak) in best.items():
            times = f"{1e3 * forward:12.0f}{yardstick[0] / forward:12.2f}{1e3 * both:12.0f}{yardstick[1] / both:12.2f}"
            print(f"{name:27}{times}{peak / 2**20:12.0f}{peak / yardstick[2]:12.2f}{off[name]:12.1e}", flush=True)
            if off[name] > 1e-4:
                raise SystemExit(f"{name}: off by {off[name]:.1e}; it must compute the same numbers")


if __name__ == "__main__":
    main()
