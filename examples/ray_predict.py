"""Masks and overlays of a folder of images with Ray Data, for pipelines that live there.

    pip install "ray[data]"
    python examples/ray_predict.py CONFIG CHECKPOINT photos/ results/ [--models 8] [--batch-size 16] [--gpus 1]

CONFIG and CHECKPOINT are those of `predict`; for a run, give its folder as both. On a cluster every machine sees the
same folders. The masks are those of `predict`, which needs no Ray, goes on after a kill, and takes `--gpus` too.
"""

import argparse
from pathlib import Path
from typing import Any

import ray

import segcore
from segcore.cli.predict_files import plan
from segcore.errors import UserError


class Segmenter:
    """A model in one of Ray's processes, which gets one batch of paths after the other."""

    def __init__(self, config: str, checkpoint: str, source: Path, target: Path, batch_size: int) -> None:
        experiment = segcore.load_experiment(config).with_overrides([f"evaluate.batch_size={batch_size}"])
        self.seg = segcore.load_model(experiment, checkpoint)
        self.source, self.target = source, target

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        paths = [Path(path) for path in batch["path"]]
        try:
            errors = self.save(paths)
        except ValueError:  # one of them is damaged or too small: which?
            errors = []
            for path in paths:
                try:
                    errors += self.save([path])
                except ValueError as error:
                    errors.append(str(error))
        return {"path": batch["path"], "error": errors}

    def save(self, paths: list[Path]) -> list[str]:
        for path, result in zip(paths, self.seg(paths), strict=True):  # equal sizes go through the network together
            result.save(self.target / path.parent.relative_to(self.source))
        return [""] * len(paths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind in (("config", str), ("checkpoint", str), ("source", Path), ("target", Path)):
        parser.add_argument(name, type=kind)
    for name, default, what in (("models", 1, "processes"), ("batch-size", 1, "images"), ("gpus", 0, "per process")):
        parser.add_argument(f"--{name}", type=int, default=default, help=what)
    args = parser.parse_args()
    source, target = args.source.resolve(), args.target.resolve()
    if not source.is_dir():
        parser.error(f"{source}: no such folder")
    try:
        paths = [str(job.image) for job in plan(source, target)]
    except UserError as error:  # results would overwrite images or each other
        parser.error(str(error))
    results = ray.data.from_items([{"path": path} for path in paths]).map_batches(
        Segmenter,
        fn_constructor_args=(args.config, args.checkpoint, source, target, args.batch_size),
        batch_size=args.batch_size,
        compute=ray.data.ActorPoolStrategy(size=args.models),
        num_gpus=args.gpus,
    )
    failed = [row["error"] for row in results.iter_rows() if row["error"]]
    print(f"{len(paths) - len(failed)} of {len(paths)} images written below {target}", *failed, sep="\n")


if __name__ == "__main__":
    main()
