"""MMSegmentation 0.30: one of our models on small generated scenes in the Cityscapes layout, a few iterations."""

custom_imports = dict(
    imports=["ddp_seg.mmseg", "ddps_seg.mmseg", "ddrnet_seg.mmseg", "dgmn2_seg.mmseg"],  # those that are installed
    allow_failed_imports=False,
)
model = dict(
    type="SegcoreModel",
    experiment="ddrnet_23_slim_toy",  # any of `segcore configs`
    overrides=["train.init_from=None"],  # start from random weights; without this from those of the experiment
)

norm = dict(type="Normalize", mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
crop, scale = (128, 128), (256, 128)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="Resize", img_scale=scale, ratio_range=(0.5, 2.0)),
    dict(type="RandomCrop", crop_size=crop, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    norm,
    dict(type="Pad", size=crop, pad_val=0, seg_pad_val=255),
    dict(type="DefaultFormatBundle"),
    dict(type="Collect", keys=["img", "gt_semantic_seg"]),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="MultiScaleFlipAug",
        img_scale=scale,
        flip=False,
        transforms=[
            dict(type="Resize", keep_ratio=True),
            dict(type="RandomFlip"),
            norm,
            dict(type="ImageToTensor", keys=["img"]),
            dict(type="Collect", keys=["img"]),
        ],
    ),
]
data_set = dict(type="CityscapesDataset", data_root="data/toy")
train_set = dict(img_dir="leftImg8bit/train", ann_dir="gtFine/train", pipeline=train_pipeline, **data_set)
val_set = dict(img_dir="leftImg8bit/val", ann_dir="gtFine/val", pipeline=test_pipeline, **data_set)
data = dict(samples_per_gpu=2, workers_per_gpu=0, persistent_workers=False, train=train_set, val=val_set, test=val_set)

optimizer = dict(constructor="SegcoreOptimizer")  # optimizer and parameter groups of the experiment
optimizer_config = dict()
lr_config = dict(policy="poly", power=0.9, min_lr=1e-4, by_epoch=False)
runner = dict(type="IterBasedRunner", max_iters=2)
workflow = [("train", 1)]
checkpoint_config = dict(by_epoch=False, interval=2)
evaluation = dict(interval=2, metric="mIoU", pre_eval=True)
log_config = dict(interval=1, hooks=[dict(type="TextLoggerHook", by_epoch=False)])
log_level = "INFO"
dist_params = dict(backend="nccl")
load_from = resume_from = None
