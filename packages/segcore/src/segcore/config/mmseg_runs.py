"""Rules for what a configuration of MMSegmentation says beside the model: data, optimizer, schedule, runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from segcore.config.mmseg_model import start_weights
from segcore.config.mmseg_read import Table
from segcore.config.mmseg_rules import SKIP, By, Choice, Is, Maybe, Steps, To
from segcore.config.schema import ParamRule

SETS = {
    "CityscapesDataset": ("cityscapes", False),
    "ADE20KDataset": ("ade20k", False),
    "Cityscapes20Dataset": ("cityscapes", True),
    "ADE20K151Dataset": ("ade20k", True),
}
"""Data set, and whether it has a background class in front, as DDPS's."""
FOLDERS = {
    ("cityscapes", "train"): ("leftImg8bit/train", "gtFine/train"),
    ("cityscapes", "val"): ("leftImg8bit/val", "gtFine/val"),
    ("ade20k", "train"): ("images/training", "annotations/training"),
    ("ade20k", "val"): ("images/validation", "annotations/validation"),
}
LABELS: dict[tuple[str, bool], tuple[Any, int]] = {
    ("cityscapes", False): (False, 255),
    ("ade20k", False): (True, 255),
    ("cityscapes", True): ("background", 0),
    ("ade20k", True): (False, 0),
}
"""`reduce_zero_label` and the label of padding, for each of them."""


def longest_first(scale: Any) -> tuple[int, ...]:
    """Return an image scale as (long side, short side)."""
    first, second = scale
    return max(first, second), min(first, second)


def square(size: Any) -> tuple[int, ...]:
    """Return a size as (height, width)."""
    return size if isinstance(size, tuple) else (size, size)


def names(value: Any) -> tuple[str, ...]:
    """Return the names of metrics as a tuple, in our spelling."""
    return tuple("mBIoU" if name == "mbIoU" else name for name in ((value,) if isinstance(value, str) else value))


def count(items: Any) -> int:
    """Return the length of a list."""
    if not isinstance(items, tuple):
        raise ValueError("a list is known here")
    return len(items)


def whole(number: Any) -> int:
    """Return a whole number."""
    if not isinstance(number, int):
        raise ValueError("a whole number is known here")
    return number


def clip_norm(value: Any) -> float:
    """Return the norm that gradients are clipped to."""
    if not isinstance(value, Table) or value.keys() - {"max_norm", "norm_type"} or value.get("norm_type", 2) != 2:
        raise ValueError("known here: dict(max_norm=…, norm_type=2)")
    norm: float = value["max_norm"]
    return norm


def param_rules(keys: Any) -> tuple[ParamRule, ...]:
    """Return the multipliers of parameters by parts of their names."""
    for value in keys.values():
        if value.keys() - {"lr_mult", "decay_mult"}:
            raise ValueError("known here, for each: lr_mult and decay_mult")
    return tuple(ParamRule(key, **value) for key, value in keys.items())


LOAD: dict[str, Any] = {
    "LoadImageFromFile": {"to_float32": Maybe(Is(False)), "backend_args": SKIP},
    "LoadAnnotations": {"reduce_zero_label": Maybe(To("_labels"), False)},
    "LoadAnnotationsCityscapes20": {"type": Choice({"LoadAnnotationsCityscapes20": {"_labels": "background"}})},
}
IMAGE, LABELED = Is(("img",)), Is(("img", "gt_semantic_seg"))
NORMALIZE = {"mean": To("data.mean"), "std": To("data.std"), "to_rgb": Maybe(Is(True))}
PAD = {"pad_val": Maybe(Is(0)), "seg_pad_val": Maybe(To("_pad"), 255)}
AUGMENT: dict[str, Any] = {
    "RandomCrop": {
        "crop_size": To("data.crop", square),
        "cat_max_ratio": Maybe(To("data.cat_max_ratio"), 1.0),
        "ignore_index": Maybe(Is(255)),
    },
    "RandomFlip": {"prob": To("data.flip"), "direction": Maybe(Is("horizontal"))},
    "PhotoMetricDistortion": {"type": Choice({"PhotoMetricDistortion": {"data.photometric": True}})},
}
TRAIN_0 = Steps(
    {
        **LOAD,
        "Resize": {
            "img_scale": To("data.img_scale", longest_first),
            "ratio_range": Maybe(To("data.ratio_range")),
            "keep_ratio": Maybe(Is(True)),
        },
        **AUGMENT,
        "Normalize": NORMALIZE,
        "Pad": {"size": To("data.crop", square), **PAD},
        "DefaultFormatBundle": {},
        "Collect": {"keys": LABELED},
    },
    ("LoadImageFromFile", "RandomCrop", "Normalize", "Pad", "DefaultFormatBundle", "Collect"),
)
VIEW_0 = Steps(
    {
        "Resize": {"keep_ratio": Is(True)},
        "RandomFlip": {},
        "Normalize": NORMALIZE,
        "Pad": {"size_divisor": Choice({16: {"data.add_background_class": True}}), **PAD},  # DDPS's, which ours does
        "ImageToTensor": {"keys": IMAGE},
        "Collect": {"keys": IMAGE},
    },
    ("Resize", "Normalize", "ImageToTensor", "Collect"),
)
TEST_0 = Steps(
    {
        "LoadImageFromFile": LOAD["LoadImageFromFile"],
        "MultiScaleFlipAug": {
            "img_scale": To("evaluate.img_scale", longest_first),
            "img_ratios": Maybe(To("evaluate.img_ratios")),
            "flip": Maybe(To("evaluate.flip"), False),
            "transforms": VIEW_0,
        },
    },
    ("LoadImageFromFile", "MultiScaleFlipAug"),
)
TRAIN_1 = Steps(
    {
        **LOAD,
        "RandomResize": {
            "scale": To("data.img_scale", longest_first),
            "ratio_range": Maybe(To("data.ratio_range")),
            "keep_ratio": Is(True),
        },
        **AUGMENT,
        "PackSegInputs": {},
    },
    ("LoadImageFromFile", "LoadAnnotations", "RandomCrop", "PackSegInputs"),
)
TEST_1 = Steps(
    {
        "LoadImageFromFile": LOAD["LoadImageFromFile"],
        "Resize": {"scale": To("evaluate.img_scale", longest_first), "keep_ratio": Is(True)},
        "LoadAnnotations": LOAD["LoadAnnotations"],
        "PackSegInputs": {},
    },
    ("LoadImageFromFile", "PackSegInputs"),
)
PREPROCESSOR = {
    "type": Is("SegDataPreProcessor"),
    "size": To("data.crop", square),
    "mean": To("data.mean"),
    "std": To("data.std"),
    "bgr_to_rgb": Is(True),
    **PAD,
}


def data_set(split: str, pipeline: Steps, *, new: bool) -> By:
    """Return the rules of a data set's dict for the split `train` or `val`."""
    rules = {}
    for kind, (name, background) in SETS.items():
        images, masks = (Is(folder, f"{folder}/") for folder in FOLDERS[name, split])
        folders = {"data_prefix": {"img_path": images, "seg_map_path": masks}}
        rules[kind] = {
            "type": Choice({kind: {"data.dataset": name, "data.add_background_class": background}}),
            "data_root": To("data.root", Path),
            **(folders if new else {"img_dir": images, "ann_dir": masks}),
            "pipeline": pipeline,
        }
    return By("type", rules)


RULES = Maybe({"custom_keys": To("optimizer.rules", param_rules)})
"""`paramwise_cfg`."""
_RATE = {"lr": To("optimizer.lr")}
OPTIMIZER: dict[str, dict[str, Any]] = {
    "AdamW": {
        "type": Choice({"AdamW": {"optimizer.kind": "adamw"}}),
        **_RATE,
        "betas": Maybe(To("optimizer.betas"), (0.9, 0.999)),
        "weight_decay": Maybe(To("optimizer.weight_decay"), 0.01),
    },
    "SGD": {
        "type": Choice({"SGD": {"optimizer.kind": "sgd"}}),
        **_RATE,
        "momentum": Maybe(To("optimizer.momentum"), 0.0),
        "weight_decay": Maybe(To("optimizer.weight_decay"), 0.0),
    },
}
CLIP = Maybe(To("optimizer.clip_norm", clip_norm))
DECAY_0: dict[str, dict[str, Any]] = {
    "poly": {
        "policy": Choice({"poly": {"schedule.kind": "poly"}}),
        "power": Maybe(To("schedule.power"), 1.0),
        "min_lr": Maybe(To("schedule.min_lr"), 0.0),
        "by_epoch": Is(False),
    },
    "step": {
        "policy": Choice({"step": {"schedule.kind": "step"}}),
        "step": To("schedule.step"),
        "gamma": Maybe(To("schedule.gamma"), 0.1),
        "min_lr": Maybe(To("schedule.min_lr"), 0.0),
        "by_epoch": Is(False),
    },
}
WARMUP_0 = {
    "warmup": Choice({"linear": {"schedule.warmup": "scheduled"}}),
    "warmup_iters": To("schedule.warmup_iterations"),
    "warmup_ratio": Maybe(To("schedule.warmup_ratio"), 0.1),
}
POLY_1 = {
    "type": Choice({"PolyLR": {"schedule.kind": "poly"}}),
    "eta_min": Maybe(To("schedule.min_lr"), 0.0),
    "power": Maybe(To("schedule.power"), 1.0),
    "begin": Maybe(To("_begin"), 0),
    "end": To("schedule.iterations"),
    "by_epoch": Is(False),
}
LINEAR_1 = {
    "type": Choice({"LinearLR": {"schedule.warmup": "linear"}}),
    "start_factor": To("schedule.warmup_ratio"),
    "begin": Maybe(Is(0)),
    "end": To("schedule.warmup_iterations"),
    "by_epoch": Is(False),
}
EMA = {
    "momentum": To("train.ema", lambda momentum: 1 - momentum),
    "interval": To("train.ema_every"),
    "eval_interval": SKIP,
    "auto_resume": SKIP,
    "priority": SKIP,
}
HOOKS = Maybe(Steps({"ConstantMomentumEMAHook": EMA}))
START = {
    "load_from": Maybe(To("_load_from", start_weights({}))),
    "resume_from": Maybe(Is(None)),
    "resume": Maybe(Is(False)),
}
RUNTIME = dict.fromkeys(
    (
        *("log_config", "log_level", "dist_params", "workflow", "cudnn_benchmark", "work_dir", "seed"),
        *("find_unused_parameters", "auto_resume", "custom_imports", "opencv_num_threads", "mp_start_method", "device"),
        *("default_scope", "env_cfg", "vis_backends", "visualizer", "log_processor", "randomness"),
        *("tta_model", "tta_pipeline", "launcher"),
    ),
    SKIP,
)
"""Keys without influence on results, but for the draws, which are not MMSegmentation's with any seed."""
LINE_0: dict[str, Any] = {
    **RUNTIME,
    "data": {
        "samples_per_gpu": To("train.device_batch_size", whole),
        "workers_per_gpu": SKIP,
        "train": data_set("train", TRAIN_0, new=False),
        "val": data_set("val", TEST_0, new=False),
        "test": data_set("val", TEST_0, new=False),
    },
    "optimizer": By("type", {kind: {**rules, "paramwise_cfg": RULES} for kind, rules in OPTIMIZER.items()}),
    "optimizer_config": Maybe({"grad_clip": CLIP}),
    "lr_config": By(
        "policy",
        {
            kind: By("warmup", {None: {**rules, "warmup": SKIP}, "linear": {**rules, **WARMUP_0}})
            for kind, rules in DECAY_0.items()
        },
    ),
    "runner": {"type": Is("IterBasedRunner"), "max_iters": To("schedule.iterations")},
    "checkpoint_config": {"by_epoch": Is(False), "interval": To("train.save_every"), "max_keep_ckpts": SKIP},
    "evaluation": {
        "interval": To("train.evaluate_every"),
        "metric": Maybe(To("evaluate.metrics", names), "mIoU"),
        "pre_eval": SKIP,
        "save_best": SKIP,
    },
    "custom_hooks": HOOKS,
    **START,
    "gpu_ids": Maybe(To("_devices", count)),
    "fp16": Maybe(Is(None)),
    "momentum_config": Maybe(Is(None)),
}
_SAMPLER = {"persistent_workers": SKIP, "num_workers": SKIP, "pin_memory": SKIP}
VALIDATION_1 = {
    **_SAMPLER,
    "batch_size": To("evaluate.batch_size"),
    "sampler": Is({"type": "DefaultSampler", "shuffle": False}),
    "dataset": data_set("val", TEST_1, new=True),
}
METRIC_1 = {"type": Is("IoUMetric"), "iou_metrics": Maybe(To("evaluate.metrics", names), ("mIoU",))}
LINE_1: dict[str, Any] = {
    **RUNTIME,
    "train_dataloader": {
        **_SAMPLER,
        "batch_size": To("train.device_batch_size", whole),
        "sampler": Is({"type": "InfiniteSampler", "shuffle": True}),
        "dataset": data_set("train", TRAIN_1, new=True),
    },
    "val_dataloader": VALIDATION_1,
    "test_dataloader": VALIDATION_1,
    "val_evaluator": METRIC_1,
    "test_evaluator": METRIC_1,
    "optim_wrapper": {
        "type": Is("OptimWrapper"),
        "optimizer": By("type", OPTIMIZER),
        "paramwise_cfg": RULES,
        "clip_grad": CLIP,
    },
    "param_scheduler": Steps({"LinearLR": LINEAR_1, "PolyLR": POLY_1}, ("PolyLR",)),
    "train_cfg": {
        "type": Is("IterBasedTrainLoop"),
        "max_iters": To("schedule.iterations"),
        "val_interval": To("train.evaluate_every"),
    },
    "val_cfg": Is({"type": "ValLoop"}),
    "test_cfg": Is({"type": "TestLoop"}),
    "default_hooks": {
        **dict.fromkeys(("timer", "logger", "param_scheduler", "sampler_seed", "visualization"), SKIP),
        "checkpoint": {
            "type": Is("CheckpointHook"),
            "by_epoch": Is(False),
            "interval": To("train.save_every"),
            "save_best": SKIP,
            "max_keep_ckpts": SKIP,
        },
    },
    "custom_hooks": HOOKS,
    **START,
    "auto_scale_lr": Maybe({"enable": Is(False), "base_batch_size": SKIP}),
}
HELPERS = (
    *("norm_cfg", "backbone_norm_cfg", "img_norm_cfg", "crop_size", "dataset_type", "data_root", "train_pipeline"),
    *("test_pipeline", "val_pipeline", "checkpoint", "checkpoint_file", "class_weight", "iters", "img_ratios"),
    *("data_preprocessor", "optimizer"),
)
"""Variables that published files define, used or not: MMSegmentation reads none of them."""
