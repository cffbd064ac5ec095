"""The same DDRNet-23-slim trained here and by MMSegmentation 1.x: time, time for data, and loss, side by side.

    nox -s "openmmlab(1.x)" -- -k nothing      (makes the environment)
    .nox/openmmlab-1-x/bin/python benchmarks/mmseg_ddrnet.py [--data data/CamVid] [--iterations 200]

MMSegmentation trains its own DDRNet with its own pipeline, loss, optimizer and runner; the weights it starts from are
given to ours. Both read the same files in the same order, and draw the same scale, crop, flip and colors for each, as
theirs is seeded per sample as ours is. One after the other on the same threads, float32, no workers, AdamW, poly decay.
Then ours again as the row trains, in bfloat16 with channels_last. The table goes to results/camvid/mmseg_ddrnet.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.runner import Runner
from mmseg.registry import MODELS, TRANSFORMS
from mmseg.utils import register_all_modules

import segcore
from segcore.config.schema import Experiment, LossConfig
from segcore.data.layouts import open_dataset
from segcore.data.loader import sample_index
from segcore.environment import processor, usable_cpus, versions
from segcore.files import write
from segcore.reporting.run_record import read_log
from segcore.seeds import augmentation_seed
from segcore.training.loop import train

CONFIG = ".mim/configs/ddrnet/ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024.py"
RESULTS = Path(__file__).parent / "results/camvid"


class TheirSamples(torch.utils.data.Dataset):
    """CamVid through MMSegmentation's training pipeline, in our order, with our seeds; item i is sample i of a run."""

    def __init__(self, exp: Experiment) -> None:
        data, self.seed, self.batch = exp.data, exp.seed, exp.train.batch_size
        self.length, self.total = len(open_dataset(data, "train")), exp.schedule.iterations * exp.train.batch_size
        self.images = sorted((data.root / "train").glob("*.png"))
        assert len(self.images) == self.length
        steps: list[dict[str, Any]] = [
            {"type": "LoadImageFromFile"},
            {"type": "LoadAnnotations"},
            {"type": "RandomResize", "scale": data.img_scale, "ratio_range": data.ratio_range, "keep_ratio": True},
            {"type": "RandomCrop", "crop_size": data.crop, "cat_max_ratio": data.cat_max_ratio},
            {"type": "RandomFlip", "prob": data.flip},
            {"type": "PhotoMetricDistortion"},
            {"type": "PackSegInputs"},
        ]
        self.steps = [TRANSFORMS.build(step) for step in steps]

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, item: int) -> dict[str, Any]:
        iteration, position = divmod(item, self.batch)
        image = self.images[sample_index(self.seed, iteration, position, self.batch, self.length)]
        np.random.seed(augmentation_seed(self.seed, iteration, position))
        mask = image.parent.with_name("trainannot") / image.name
        found: Any = {"img_path": str(image), "seg_map_path": str(mask), "seg_fields": [], "reduce_zero_label": False}
        found["label_map"] = {11: 255}  # void
        for step in self.steps:
            found = step(found)
        return dict(found)


def build_theirs(exp: Experiment) -> torch.nn.Module:
    """Return MMSegmentation's DDRNet-23-slim for CamVid, with random weights and the loss of `exp`."""
    import mmseg

    config = Config.fromfile(str(Path(mmseg.__file__).parent / CONFIG))
    model = config.model
    model.backbone.init_cfg = None
    model.backbone.norm_cfg = model.decode_head.norm_cfg = {"type": "BN", "requires_grad": True}
    model.data_preprocessor = {
        "type": "SegDataPreProcessor", "mean": list(exp.data.mean), "std": list(exp.data.std), "bgr_to_rgb": True,
        "size": exp.data.crop, "pad_val": 0, "seg_pad_val": 255,
    }  # fmt: skip
    model.decode_head.num_classes = exp.model.num_classes
    for loss, weight in zip(model.decode_head.loss_decode, (1.0, 0.4), strict=True):
        loss.update(
            thres=exp.loss.ohem_threshold, min_kept=exp.loss.ohem_min_kept, class_weight=None, loss_weight=weight
        )
    torch.manual_seed(0)
    return revert_sync_batchnorm(MODELS.build(model))


def run_theirs(model: torch.nn.Module, exp: Experiment, folder: Path) -> list[dict[str, float]]:
    """Train with MMEngine's runner; return the records of its log."""
    samples = torch.utils.data.DataLoader(
        TheirSamples(exp), exp.train.batch_size, collate_fn=lambda items: {k: [x[k] for x in items] for k in items[0]}
    )
    model.init_weights = lambda: None  # they are made already, and given to ours
    every, total = exp.train.log_every, exp.schedule.iterations
    adamw = {"type": "AdamW", "lr": exp.optimizer.lr, "weight_decay": exp.optimizer.weight_decay}
    # Ours is the rate of MMSegmentation 0.x, which ends one iteration later than 1.x's.
    poly = {"type": "PolyLR", "power": exp.schedule.power, "eta_min": 0, "end": total + 1, "by_epoch": False}
    Runner(
        model, str(folder), samples, train_cfg={"by_epoch": False, "max_iters": total},
        optim_wrapper={"type": "OptimWrapper", "optimizer": adamw}, param_scheduler=[poly], default_scope="mmseg",
        default_hooks={"checkpoint": None, "logger": {"type": "LoggerHook", "interval": every}},
        log_processor={"by_epoch": False, "window_size": every}, experiment_name="theirs",
    ).train()  # fmt: skip
    (log,) = folder.glob("*/vis_data/scalars.json")
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return [{name: x[name] for name in ("step", "loss", "time", "data_time")} for x in records]


def run_ours(exp: Experiment, folder: Path) -> list[dict[str, float]]:
    """Train with our loop; return the records of its log under the names of theirs."""
    train(exp, folder, device=torch.device("cpu"))
    names = {"iteration": "step", "loss": "loss", "seconds": "time", "data_seconds": "data_time"}
    return [{theirs: x[ours] for ours, theirs in names.items()} for x in read_log(folder / "log.jsonl")[0]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/CamVid"))
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE")
    args = parser.parse_args()
    register_all_modules()
    exp = segcore.load_experiment("ddrnet_23_slim_camvid")
    exp = replace(
        exp,
        data=replace(exp.data, root=args.data),
        loss=LossConfig("ohem", ohem_threshold=0.9, ohem_min_kept=100_000),
        schedule=replace(exp.schedule, iterations=args.iterations, warmup_iterations=0),
        train=replace(
            exp.train,
            device_batch_size=exp.train.batch_size,
            precision="fp32",
            channels_last=False,
            log_every=20,
            evaluate_every=0,
            save_every=args.iterations,
        ),
    ).with_overrides(args.overrides)
    theirs = build_theirs(exp)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours = exp.model.build()
        report = ours.load_official(theirs.state_dict())
        assert not report.dropped, report
        torch.save(ours.state_dict(), folder / "start.pth")
        exp = replace(exp, train=replace(exp.train, init_from=str(folder / "start.pth")))
        fast = replace(exp, train=replace(exp.train, precision="bf16", channels_last=True))
        runs = {
            "MMSegmentation": run_theirs(theirs, exp, folder / "theirs"),
            "ours": run_ours(exp, folder / "ours"),
            "ours, bfloat16": run_ours(fast, folder / "fast"),
        }
    text = table(runs, exp)
    write(args.results / "mmseg_ddrnet.md", text)
    print(text, end="")


def table(runs: dict[str, list[dict[str, float]]], exp: Experiment) -> str:
    """Return the loss of all runs by iteration, and their times per iteration without the first logged part."""
    lines = [["iteration", *(f"loss, {name}" for name in runs)]]
    lines += [[f"{x[0]['step']:.0f}", *(f"{each['loss']:.4f}" for each in x)] for x in zip(*runs.values(), strict=True)]
    times = [["", "seconds an iteration", "of them for data"]]
    for name, records in runs.items():
        rest = records[1:] or records
        times.append([name, *(f"{np.mean([x[key] for x in rest]):.3f}" for key in ("time", "data_time"))])
    (height, width), batch = exp.data.crop, exp.train.batch_size
    head = f"DDRNet-23-slim, {exp.schedule.iterations} iterations of {batch} crops of {height}x{width}, CamVid"
    about = f"{processor('model name')}, {usable_cpus()} cores, torch {versions()['torch']}, MMSegmentation 1.2.2"
    return "\n\n".join([head, _markdown(times), _markdown(lines), about]) + "\n"


def _markdown(rows: list[list[str]]) -> str:
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
