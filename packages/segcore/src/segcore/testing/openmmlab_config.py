"""Configs of MMSegmentation for the toy set, one per line, as its users write them."""

from pathlib import Path

COMMON = """
custom_imports = dict(imports=["{module}"], allow_failed_imports=False)
model = dict(type="SegcoreModel", experiment="{experiment}", overrides={overrides})
norm = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
crop = (64, 64)
train_steps = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    {resize}
    dict(type="RandomCrop", crop_size=crop, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
]
train_set, val_set = (
    dict(type="CityscapesDataset", data_root="{root}", {folders})
    for split in ("train", "val")
)
log_level = "INFO"
load_from = None
"""
ZERO = """
train_set.update(pipeline=[
    *train_steps,
    dict(type="Normalize", to_rgb=True, **norm),
    dict(type="Pad", size=crop, pad_val=0, seg_pad_val=255),
    dict(type="DefaultFormatBundle"),
    dict(type="Collect", keys=["img", "gt_semantic_seg"]),
])
val_set.update(pipeline=[
    dict(type="LoadImageFromFile"),
    dict(type="MultiScaleFlipAug", img_scale=(128, 64), flip=False, transforms=[
        dict(type="Resize", keep_ratio=True),
        dict(type="RandomFlip"),
        dict(type="Normalize", to_rgb=True, **norm),
        dict(type="ImageToTensor", keys=["img"]),
        dict(type="Collect", keys=["img"]),
    ]),
])
data = dict(
    samples_per_gpu=2, workers_per_gpu=0, persistent_workers=False, train=train_set, val=val_set, test=val_set
)
optimizer = dict(constructor="SegcoreOptimizer")
optimizer_config = dict()
lr_config = dict(policy="poly", power=0.9, min_lr=1e-4, by_epoch=False)
runner = dict(type="IterBasedRunner", max_iters=2)
checkpoint_config = dict(by_epoch=False, interval=2)
evaluation = dict(interval=2, metric="mIoU", pre_eval=True)
log_config = dict(interval=1, hooks=[dict(type="TextLoggerHook", by_epoch=False)])
dist_params = dict(backend="gloo")
resume_from = None
workflow = [("train", 1)]
"""
ONE = """
default_scope = "mmseg"
train_set.update(pipeline=[*train_steps, dict(type="PackSegInputs")])
val_set.update(pipeline=[
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(128, 64), keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
])
test_pipeline = val_set["pipeline"]
tta_model = dict(type="SegTTAModel")
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="TestTimeAug", transforms=[
        [dict(type="Resize", scale_factor=ratio, keep_ratio=True) for ratio in (0.75, 1.0)],
        [dict(type="RandomFlip", prob=0.0), dict(type="RandomFlip", prob=1.0, direction="horizontal")],
        [dict(type="LoadAnnotations")],
        [dict(type="PackSegInputs")],
    ]),
]
train_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type="InfiniteSampler", shuffle=True), dataset=train_set
)
val_dataloader = dict(batch_size=1, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=False), dataset=val_set)
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
optim_wrapper = dict(type="OptimWrapper", constructor="SegcoreOptimizer")
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=1e-4, begin=0, end=2, by_epoch=False)]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=2, val_interval=2)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=1, log_metric_by_epoch=False),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=2),
    visualization=dict(type="SegVisualizationHook", interval=1),
)
visualizer = dict(type="SegLocalVisualizer", vis_backends=[dict(type="LocalVisBackend")], name="visualizer")
log_processor = dict(by_epoch=False)
"""


def config_text(one: bool, module: str, experiment: str, overrides: list[str], root: Path) -> str:
    """Return the text of a config for MMSegmentation 1.x (`one`) or 0.30, on the toy set below `root`."""
    resize = 'type="RandomResize", scale=(128, 64)' if one else 'type="Resize", img_scale=(128, 64)'
    images, labels = 'f"leftImg8bit/{split}"', 'f"gtFine/{split}"'
    folders = f"img_dir={images}, ann_dir={labels}"
    common = COMMON.format(
        module=module,
        experiment=experiment,
        overrides=["data.crop=64 64", *overrides],
        root=root,
        resize=f"dict({resize}, ratio_range=(0.5, 2.0)),",
        folders=f"data_prefix=dict(img_path={images}, seg_map_path={labels})" if one else folders,
    )
    return common + (ONE if one else ZERO)
