"""Time `predict` on a folder against the plain loop that reads, computes and writes one image after the other.

    python benchmarks/many_images.py [--images 500] [--size 512 512] [--rounds 2] [--workers 4] [--device auto]

DDRNet-23-slim with random weights at the images' own size; the images are generated street scenes as JPEG, of which
each becomes a mask and an overlay. The two forms take turns in one process, so that a busy machine slows them alike.
What `predict` needs to start its threads and to write results.csv counts. The masks are compared, byte by
byte.
"""

import argparse
import contextlib
import io
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

import segcore
from segcore.cli import predict_images
from segcore.cli.predict_files import plan
from segcore.cli.predict_record import Record
from segcore.demo.toy import generate
from segcore.environment import environment
from segcore.files import write
from segcore.inference import LoadedModel
from segcore.reporting.figures import write_class_png

SCENES = 20
"""Different images; more are copies of them."""


def plain(seg: LoadedModel, source: Path, target: Path) -> None:
    """One image after the other, as `predict` did it before, with Pillow's default compression."""
    for path in sorted(source.iterdir()):
        result, overlay = seg(path), io.BytesIO()
        write_class_png(target / f"{path.stem}.png", result.mask, seg.palette)
        result.overlay().save(overlay, format="PNG")
        write(target / f"{path.stem}_overlay.png", overlay.getvalue())


def ours(seg: LoadedModel, source: Path, target: Path) -> None:
    """What `predict` does with the folder."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        predict_images.run(seg, plan(source, target), record=Record(source, target, seg, {}))


def make_images(folder: Path, count: int, size: tuple[int, int]) -> Path:
    """Return a folder of JPEGs."""
    (folder / "photos").mkdir()
    generate(folder / "toy", train=SCENES, val=1, height=size[0], width=size[1])
    for n, path in enumerate(sorted((folder / "toy").rglob("train/**/*leftImg8bit.png"))):
        Image.open(path).save(folder / "photos" / f"{n:05}.jpg", quality=95)
    for n in range(SCENES, count):
        shutil.copy(folder / "photos" / f"{n % SCENES:05}.jpg", folder / "photos" / f"{n:05}.jpg")
    return folder / "photos"


def load(weights: Path, workers: int, device: str) -> LoadedModel:
    """Return DDRNet-23-slim as `predict` loads it."""
    settings = [f"data.workers={workers}", "evaluate.img_scale=None"]
    exp = segcore.load_experiment("ddrnet_23_slim_cityscapes").with_overrides(settings)
    torch.manual_seed(0)
    save_file(exp.model.build().state_dict(), weights)
    return segcore.load_model(exp, weights, device=device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("images", 500), ("rounds", 2), ("workers", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512))
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    print(f"{environment()['machine']['cpu']}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = make_images(folder, args.images, args.size)
        seg = load(folder / "model.safetensors", args.workers, args.device)
        print(f"{args.images} images of {args.size[0]}x{args.size[1]}, {seg!r}, {args.workers} workers, images/s")
        seconds: dict[str, list[float]] = {"plain": [], "predict": []}
        for turn in range(args.rounds):
            for kind, form in (("plain", plain), ("predict", ours)):
                start = time.perf_counter()
                form(seg, source, folder / kind)
                seconds[kind].append(time.perf_counter() - start)
                print(f"turn {turn + 1}  {kind:8}{args.images / seconds[kind][-1]:8.2f}", flush=True)
        for path in (folder / "plain").glob("?????.png"):
            assert path.read_bytes() == (folder / "predict" / path.name).read_bytes(), path
        sizes = [sum(path.stat().st_size for path in (folder / kind).glob("*.png")) for kind in seconds]
    ratios = [round(old / new, 2) for old, new in zip(*seconds.values(), strict=True)]
    print(f"predict is {statistics.mean(ratios):.2f} times as fast as the plain loop: {ratios}")
    print(f"its files have {sizes[1] / sizes[0]:.3f} times the bytes")


if __name__ == "__main__":
    main()
