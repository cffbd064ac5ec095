"""MMSegmentation 1.x: one of our models on small generated scenes in the Cityscapes layout, a few iterations."""

custom_imports = dict(
    imports=["ddp_seg.mmseg", "ddps_seg.mmseg", "ddrnet_seg.mmseg", "dgmn2_seg.mmseg"],  # those that are installed
    allow_failed_imports=False,
)
crop, scale = (128, 128), (256, 128)
model = dict(
    type="SegcoreModel",
    experiment="ddrnet_23_slim_toy",  # any of `segcore configs`
    overrides=["train.init_from=None"],  # start from random weights; without this from those of the experiment
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        size=crop,
        pad_val=0,
        seg_pad_val=255,
    ),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=scale, ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=scale, keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
data_set = dict(type="CityscapesDataset", data_root="data/toy")
train_folders = dict(img_path="leftImg8bit/train", seg_map_path="gtFine/train")
val_folders = dict(img_path="leftImg8bit/val", seg_map_path="gtFine/val")
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(data_prefix=train_folders, pipeline=train_pipeline, **data_set),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(data_prefix=val_folders, pipeline=test_pipeline, **data_set),
)
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])

optim_wrapper = dict(type="OptimWrapper", constructor="SegcoreOptimizer")  # as in the experiment, with its groups
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=1e-4, begin=0, end=2, by_epoch=False)]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=2, val_interval=2)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

default_scope = "mmseg"
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=1, log_metric_by_epoch=False),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=2),
)
log_processor = dict(by_epoch=False)
log_level = "INFO"
load_from = None
