"""`import-config`: configurations of MMSegmentation become equal ones of ours, or are refused; nothing is executed."""

import contextlib
import importlib.util
import os
import re
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from segcore.cli.main import main, parse
from segcore.config.mmseg_config import import_config, translate
from segcore.config.mmseg_read import MAX_BYTES, Table, read_config
from segcore.config.mmseg_runs import LINE_0, LINE_1
from segcore.config.record import differences, settings_of
from segcore.config.registry import experiments, load_experiment
from segcore.errors import UserError

BN = "norm_cfg = dict(type='SyncBN', requires_grad=True)\n"
NORM = "mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375]"
CITYSCAPES = ("CityscapesDataset", "data/cityscapes/", "leftImg8bit/{}", "gtFine/{}", "train", "val")
ADE20K = ("ADE20KDataset", "data/ade/ADEChallengeData2016", "images/{}", "annotations/{}", "training", "validation")
LOSS = "loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight={})"
WHOLE = "train_cfg=dict(), test_cfg=dict(mode='whole')"


def data_0(crop, scale, images, where=CITYSCAPES):
    """The data of a 0.x file, whose names are used as the published ones do."""
    kind, root, image, mask, train, val = where
    zero = ", reduce_zero_label=True" if kind == "ADE20KDataset" else ""
    part = "dict(type='{}', data_root='{}', img_dir='{}', ann_dir='{}', pipeline={}_pipeline)"
    splits = (("train", train, "train"), ("val", val, "test"), ("test", val, "test"))
    parts = ", ".join(
        f"{name}={part.format(kind, root, image.format(folder), mask.format(folder), pipeline)}"
        for name, folder, pipeline in splits
    )
    return f"""
img_norm_cfg = dict({NORM}, to_rgb=True)
crop_size = {crop}
train_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'{zero}),
    dict(type='Resize', img_scale={scale}, ratio_range=(0.5, 2.0)),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75), dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'), dict(type='Normalize', **img_norm_cfg),
    dict(type='Pad', size=crop_size, pad_val=0, seg_pad_val=255), dict(type='DefaultFormatBundle'),
    dict(type='Collect', keys=['img', 'gt_semantic_seg'])]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='MultiScaleFlipAug', img_scale={scale}, flip=False,
    transforms=[dict(type='Resize', keep_ratio=True), dict(type='RandomFlip'), dict(type='Normalize', **img_norm_cfg),
                dict(type='ImageToTensor', keys=['img']), dict(type='Collect', keys=['img'])])]
data = dict(samples_per_gpu={images}, workers_per_gpu=2, {parts})
"""


def run_0(iterations, every):
    return f"""
log_config = dict(interval=50, hooks=[dict(type='TextLoggerHook', by_epoch=False)])
dist_params = dict(backend='nccl')
load_from = None
workflow = [('train', 1)]
optimizer = dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=0.0005)
optimizer_config = dict()
lr_config = dict(policy='poly', power=0.9, min_lr=1e-4, by_epoch=False)
runner = dict(type='IterBasedRunner', max_iters={iterations})
checkpoint_config = dict(by_epoch=False, interval={every})
evaluation = dict(interval={every}, metric='mIoU', pre_eval=True)
"""


def adamw(head, delete="_delete_=True, "):
    return f"""
optimizer = dict({delete}type='AdamW', lr=0.00006, betas=(0.9, 0.999), weight_decay=0.01, paramwise_cfg=dict(
    custom_keys={{'pos_block': dict(decay_mult=0.), 'norm': dict(decay_mult=0.), 'head': dict(lr_mult={head})}}))
lr_config = dict({delete}policy='poly', warmup='linear', warmup_iters=1500, warmup_ratio=1e-6, power=1.0, min_lr=0.0,
                 by_epoch=False)
"""


def fcn(channels, index, classes):
    return (
        f"auxiliary_head=dict(type='FCNHead', in_channels={channels}, in_index={index}, channels=256, num_convs=1, "
        f"concat_input=False, dropout_ratio=0.1, num_classes={classes}, norm_cfg=norm_cfg, align_corners=False, "
        f"{LOSS.format(0.4)})"
    )


DDP = f"""
checkpoint = 'https://host/convnext/' \\
             'convnext-tiny_3rdparty_32xb128-noema_in1k_20220301.pth'
{BN}gn = dict(type='GN', num_groups=32)
model = dict(type='DDP', timesteps=3, bit_scale=0.01, pretrained=None,
    backbone=dict(type='mmcls.ConvNeXt', arch='tiny', out_indices=[0, 1, 2, 3], drop_path_rate=0.4,
        layer_scale_init_value=1.0, gap_before_final_norm=False,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone.')),
    neck=[dict(type='FPN', in_channels=[96, 192, 384, 768], out_channels=256, act_cfg=None, norm_cfg=gn, num_outs=4),
          dict(type='MultiStageMerging', in_channels=[256, 256, 256, 256], out_channels=256, kernel_size=1,
               norm_cfg=gn, act_cfg=None)],
    {fcn(256, 0, 19)},
    decode_head=dict(type='DeformableHeadWithTime', in_channels=[256], channels=256, in_index=[0], dropout_ratio=0.,
        num_classes=19, norm_cfg=norm_cfg, align_corners=False, num_feature_levels=1,
        encoder=dict(type='DetrTransformerEncoder', num_layers=6, transformerlayers=dict(
            type='BaseTransformerLayer', use_time_mlp=True,
            attn_cfgs=dict(type='MultiScaleDeformableAttention', embed_dims=256, num_levels=1, num_heads=8, dropout=0.),
            ffn_cfgs=dict(type='FFN', embed_dims=256, feedforward_channels=1024, ffn_drop=0.,
                act_cfg=dict(type='GELU')),
            operation_order=('self_attn', 'norm', 'ffn', 'norm'))),
        positional_encoding=dict(type='SinePositionalEncoding', num_feats=128, normalize=True, offset=-0.5),
        {LOSS.format(1.0)}),
    {WHOLE})
"""
SEGFORMER = f"""{BN}model = dict(type='EncoderDecoder', pretrained=None,
    backbone=dict(type='MixVisionTransformer', in_channels=3, embed_dims=32, num_stages=4, num_layers=[2, 2, 2, 2],
        num_heads=[1, 2, 5, 8], patch_sizes=[7, 3, 3, 3], sr_ratios=[8, 4, 2, 1], out_indices=(0, 1, 2, 3),
        mlp_ratio=4, qkv_bias=True, drop_rate=0.0, attn_drop_rate=0.0, drop_path_rate=0.1),
    decode_head=dict(type='SegformerHead', in_channels=[32, 64, 160, 256], in_index=[0, 1, 2, 3], channels=256,
        dropout_ratio=0.1, num_classes=19, norm_cfg=norm_cfg, align_corners=False, {LOSS.format(1.0)}),
    {WHOLE})
"""
DEEPLAB = f"""{BN}model = dict(type='EncoderDecoder', pretrained='open-mmlab://resnet50_v1c',
    backbone=dict(type='ResNetV1c', depth=50, num_stages=4, out_indices=(0, 1, 2, 3), dilations=(1, 1, 2, 4),
        strides=(1, 2, 1, 1), norm_cfg=norm_cfg, norm_eval=False, style='pytorch', contract_dilation=True),
    decode_head=dict(type='DepthwiseSeparableASPPHead', in_channels=2048, in_index=3, channels=512,
        dilations=(1, 12, 24, 36), c1_in_channels=256, c1_channels=48, dropout_ratio=0.1, num_classes=19,
        norm_cfg=norm_cfg, align_corners=False, {LOSS.format(1.0)}),
    {fcn(1024, 2, 19)}, {WHOLE})
"""
DGMN2 = f"""{BN}model = dict(type='EncoderDecoder', pretrained='pretrained/dgmn2_tiny_model.pth',
    backbone=dict(type='dgmn2_tiny', norm_cfg=norm_cfg, output='neck'),
    neck=dict(type='FPN', in_channels=[64, 128, 320, 512], out_channels=256, num_outs=4),
    decode_head=dict(type='FPNHead', in_channels=[256, 256, 256, 256], in_index=[0, 1, 2, 3],
        feature_strides=[4, 8, 16, 32], channels=128, dropout_ratio=0.1, num_classes=19, norm_cfg=norm_cfg,
        align_corners=True, {LOSS.format(1.0)}),
    test_cfg=dict(mode='slide', crop_size=(769, 769), stride=(513, 513)))
optimizer = dict(type='AdamW', lr=0.0001, weight_decay=0.0001, _delete_=True)
lr_config = dict(min_lr=0.0)
"""
PRIOR = f"""{BN}base = 'pretrained/segformer_mit-b2_512x512_160k_ade20k_20220620_114047-64e4feca.pth'
model = dict(type='EncoderDecoderFreeze', freeze_parameters=['backbone', 'decode_head'], pretrained=base,
    backbone=dict(type='MixVisionTransformerCustomInitWeights', embed_dims=64, num_layers=[3, 4, 6, 3],
        num_heads=[1, 2, 5, 8], drop_path_rate=0.1),
    decode_head=dict(type='SegformerHeadUnetFCHeadSingleStep', pretrained=base, dim=128, out_dim=256, unet_channels=272,
        dim_mults=[1, 1, 1], cat_embedding_dim=16, in_channels=[64, 128, 320, 512], in_index=[0, 1, 2, 3], channels=256,
        dropout_ratio=0.1, num_classes=151, norm_cfg=norm_cfg, align_corners=False, ignore_index=0,
        {LOSS.format(1.0)}),
    {WHOLE})
optimizer = dict(_delete_=True, type='AdamW', lr=0.00015, betas=[0.9, 0.96], weight_decay=0.045)
lr_config = dict(_delete_=True, policy='step', warmup='linear', warmup_iters=1000, warmup_ratio=1e-06, step=10000,
                 gamma=0.5, min_lr=1e-06, by_epoch=False)
evaluation = dict(metric=['mIoU', 'mbIoU'])
gpu_ids = range(0, 8)
"""


def file_1(model, crop, scale, images, where=CITYSCAPES):
    """Data and run of a 1.x file."""
    kind, root, image, mask, train, val = where
    zero = ", reduce_zero_label=True" if kind == "ADE20KDataset" else ""

    def loader(batch, sampler, folder, pipeline):
        return (
            f"dict(batch_size={batch}, num_workers=4, persistent_workers=True, sampler=dict({sampler}), dataset=dict("
            f"type='{kind}', data_root='{root}', data_prefix=dict(img_path='{image.format(folder)}', "
            f"seg_map_path='{mask.format(folder)}'), pipeline={pipeline}))"
        )

    return f"""
crop_size = {crop}
train_pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'{zero}),
    dict(type='RandomResize', scale={scale}, ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75), dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'), dict(type='PackSegInputs')]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale={scale}, keep_ratio=True),
    dict(type='LoadAnnotations'{zero}), dict(type='PackSegInputs')]
img_ratios = [0.5, 1.0]
tta_pipeline = [dict(type='TestTimeAug', transforms=[[dict(type='Resize', scale_factor=r) for r in img_ratios]])]
train_dataloader = {loader(images, "type='InfiniteSampler', shuffle=True", train, "train_pipeline")}
val_dataloader = {loader(1, "type='DefaultSampler', shuffle=False", val, "test_pipeline")}
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
default_scope = 'mmseg'
randomness = dict(seed=304)
data_preprocessor = dict(type='SegDataPreProcessor', size=crop_size, {NORM}, bgr_to_rgb=True, pad_val=0,
                         seg_pad_val=255)
{model.replace("type='EncoderDecoder',", "type='EncoderDecoder', data_preprocessor=data_preprocessor,")}
train_cfg = dict(type='IterBasedTrainLoop', max_iters=iters, val_interval=iters // 10)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(logger=dict(type='LoggerHook', interval=50),
                     checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=iters // 10))
"""


WEIGHTS = str(
    tuple(experiments()["ddrnet_23_slim_cityscapes"]().loss.class_weight),
)
DDRNET = f"""{BN}iters = 120000
ohem = dict(type='OhemCrossEntropy', thres=0.9, min_kept=131072, class_weight={WEIGHTS}, loss_weight=1.0)
model = dict(type='EncoderDecoder',
    backbone=dict(type='DDRNet', in_channels=3, channels=32, ppm_channels=128, norm_cfg=norm_cfg, align_corners=False,
        init_cfg=dict(type='Pretrained', checkpoint='https://host/ddrnet23s-in1kpre_3rdparty-1ccac5b1.pth')),
    decode_head=dict(type='DDRHead', in_channels=32 * 4, channels=64, dropout_ratio=0., num_classes=19,
        align_corners=False, norm_cfg=norm_cfg, loss_decode=[ohem, {{**ohem, 'loss_weight': 0.4}}]),
    {WHOLE})
optimizer = dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=0.0005)
optim_wrapper = dict(type='OptimWrapper', optimizer=optimizer, clip_grad=None)
param_scheduler = [dict(type='PolyLR', eta_min=0, power=0.9, begin=0, end=iters, by_epoch=False)]
"""
SEGFORMER_1 = f"""iters = 160000
{SEGFORMER.replace("=19", "=150").replace("pretrained=None", "pretrained='mit_b0_20220624-7e0fe6dd.pth'")}
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.00006, betas=(0.9, 0.999),
    weight_decay=0.01), paramwise_cfg=dict(custom_keys={{
        'pos_block': dict(decay_mult=0.), 'norm': dict(decay_mult=0.), 'head': dict(lr_mult=10.)}}))
param_scheduler = [dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
                   dict(type='PolyLR', eta_min=0.0, power=1.0, begin=1500, end=160000, by_epoch=False)]
"""
BASES = {
    "_base_/city.py": data_0((512, 1024), (2048, 1024), 4),
    "_base_/city_769.py": data_0((769, 769), (2049, 1025), 2),
    "_base_/ade.py": data_0((512, 512), (2048, 512), 2, ADE20K),
    "_base_/ade151.py": data_0((512, 512), (2048, 512), 4, ADE20K)
    .replace("ADE20KDataset", "ADE20K151Dataset")
    .replace("zero_label=True", "zero_label=False")
    .replace("seg_pad_val=255", "seg_pad_val=0"),
    "_base_/run_160k.py": run_0(160_000, 16_000),
    "_base_/run_80k.py": run_0(80_000, 8_000),
    "_base_/run_40k.py": run_0(40_000, 4_000),
    "_base_/segformer.py": SEGFORMER,
}


def bases(*names):
    return f"_base_ = {[f'../_base_/{name}.py' for name in names]}\n"


B0 = bases("segformer", "ade", "run_160k") + adamw("10.")
MODELS = {
    "ddp_convnext_t_4x4_512x1024_160k_cityscapes": bases("city", "run_160k") + DDP + adamw("1."),
    "segformer_mit-b0_512x512_160k_ade20k": B0
    + "model = dict(pretrained='https://host/mit_b0_20220624-7e0fe6dd.pth', decode_head=dict(num_classes=150))",
    "segformer_mit-b2_512x512_160k_ade20k": "_base_ = './segformer_mit-b0_512x512_160k_ade20k.py'\n"
    "model = dict(pretrained='https://host/mit_b2_20220624-66e8bf70.pth', "
    "backbone=dict(embed_dims=64, num_layers=[3, 4, 6, 3]), decode_head=dict(in_channels=[64, 128, 320, 512]))",
    "deeplabv3plus_r50-d8_512x1024_80k_cityscapes": bases("city", "run_80k") + DEEPLAB + "data=dict(samples_per_gpu=2)",
    "fpn_dgmn2_tiny_4x2_769x769_40k_cityscapes": bases("city_769", "run_40k") + DGMN2,
    "segformer_b2_ade20k_singlestep": bases("ade151", "run_80k") + PRIOR,
    "ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024": file_1(DDRNET, (1024, 1024), (2048, 1024), 6).replace(
        "\ncrop_size", "\niters = 120000\ncrop_size"
    ),
    "segformer_mit-b0_8xb2-160k_ade20k-512x512": file_1(SEGFORMER_1, (512, 512), (2048, 512), 2, ADE20K),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files above, as MMSegmentation arranges them."""
    root = tmp_path_factory.mktemp("mmseg")
    for name, text in (BASES | {f"models/{name}.py": text for name, text in MODELS.items()}).items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    return root / "models"


def changes(row, imported):
    """How an imported configuration differs from a row of ours, except for the name."""
    found = differences(settings_of(experiments()[row.replace("-", "_")]()), settings_of(imported))
    return [line for line in found if not line.startswith("name:")]


@pytest.mark.parametrize("name", list(MODELS)[:-1])
def test_a_published_file_becomes_our_row(folder, name):
    imported = import_config(folder / f"{name}.py").experiment
    assert imported.name == name
    assert changes(name, imported) == []


@pytest.mark.parametrize("name", ["segformer_mit-b0_512x512_160k_ade20k", list(MODELS)[-1]])
def test_the_file_that_their_runner_writes_beside_a_run_is_the_configuration(folder, tmp_path, name):
    """It has no bases and names no variable; what were variables are keys of it."""
    table, _ = read_config(folder / f"{name}.py")
    flat = tmp_path / f"{name}.py"
    flat.write_text("".join(f"{key} = {value!r}\n" for key, value in table.items()))
    written = import_config(flat).experiment
    assert differences(settings_of(import_config(folder / f"{name}.py").experiment), settings_of(written)) == []


def test_1x_warms_up_to_the_base_rate(folder):
    """Unlike 0.x, whose recipe our row has: there the rate decays during the warm-up, too."""
    imported = import_config(folder / "segformer_mit-b0_8xb2-160k_ade20k-512x512.py").experiment
    assert changes("segformer_mit-b0_512x512_160k_ade20k", imported) == ["schedule.warmup: scheduled -> linear"]


def test_a_warm_up_to_a_rate_that_has_a_floor_is_refused(folder):
    """MMEngine's begins at start_factor * lr, ours for 1.x above the floor."""
    name = "segformer_mit-b0_8xb2-160k_ade20k-512x512"
    path = folder / "floor.py"
    path.write_text((folder / f"{name}.py").read_text().replace("eta_min=0.0", "eta_min=1e-5"))
    with pytest.raises(UserError, match=r"floor\.py: .*a linear warm-up before a rate that ends at eta_min 1e-05"):
        import_config(path)


def leaves(value, path=()):
    """Yield the path of every key and list item in a value, and what is there."""
    items = value.items() if isinstance(value, Table) else enumerate(value) if isinstance(value, tuple) else ()
    for key, item in items:
        yield (*path, key), item
        yield from leaves(item, (*path, key))


def changed(value, path, key, item):
    """Return a value that has `key` and `item` in place of what is at a path."""
    if isinstance(value, tuple):
        new = item if len(path) == 1 else changed(value[path[0]], path[1:], key, item)
        return (*value[: path[0]], new, *value[path[0] + 1 :])
    new = (key, item) if len(path) == 1 else (path[0], changed(value[path[0]], path[1:], key, item))
    return Table(dict(new if name == path[0] else (name, old) for name, old in value.items()), value.lines)


def other(value):
    match value:
        case bool():
            return not value
        case int() | float():
            return value * 2 + 1
        case str():
            return value[::-1]
    return 7


@pytest.fixture
def quick(monkeypatch):
    """Look for the installed methods once, which takes long."""
    points = entry_points(group="segcore.methods")
    for module in ("mmseg_config", "registry"):
        monkeypatch.setattr(f"segcore.config.{module}.entry_points", lambda group: points)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("quick")
def test_nothing_is_ignored_in_silence(folder, name):
    """Each value of a file is refused when it changes, or changes the result, or is named as without influence."""
    path = folder / f"{name}.py"
    table, used = read_config(path)
    keys = {"model", *(LINE_1 if "train_dataloader" in table else LINE_0)}
    table = Table({key: value for key, value in table.items() if key in keys}, table.lines)
    plain = translate(path, table, used)

    def is_silent(place, key, item):
        try:
            return translate(path, changed(table, place, key, item), used).experiment == plain.experiment
        except UserError:
            return False

    silent, skipped = [], set()
    for place, item in leaves(table):
        dotted = re.sub(r"\.(\d+)", r"[\1]", ".".join(map(str, place)))
        skipped |= {dotted} & {*plain.skipped}
        inside = any(dotted.startswith((f"{key}.", f"{key}[")) for key in (*plain.skipped, "gpu_ids"))  # how many
        if dotted not in plain.skipped and not inside and is_silent(place, place[-1], other(item)):
            silent.append(dotted)
        if not inside and isinstance(place[-1], str) and is_silent(place, f"{place[-1]}x", item):
            silent.append(f"{dotted}x")
    assert silent == []
    assert skipped == {*plain.skipped}


@pytest.mark.parametrize("name", [next(iter(MODELS)), list(MODELS)[-2]])
@pytest.mark.usefixtures("quick")
def test_values_of_any_kind_are_refused_in_a_line_each(folder, name):
    """Or have a meaning, as None often has; nothing else is raised."""
    path = folder / f"{name}.py"
    table, used = read_config(path)
    refused = 0
    for place, _ in leaves(table):
        for item in (Table(), (), (Table(), 1), "x", "ab", 7, -1.5, True, None):
            try:
                translate(path, changed(table, place, place[-1], item), used)
            except UserError as error:
                refused += 1
                if not all(line.startswith(str(folder.parent)) for line in str(error).split("\n")):
                    raise
    assert refused > 500


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "model = dict(decode_head=dict(dropout_rate=0.2))",
            "3: model.decode_head.dropout_rate is 0.2; this key is not",
        ),
        (
            "model = dict(decode_head=dict(align_corners=True))",
            "3: model.decode_head.align_corners is True; known here: F",
        ),
        ("model = dict(backbone=dict(embed_dims=48))", "3: model.backbone is {'embed_dims': 48"),
        ("model = dict(backbone=dict(type='ResNet'))", "3: model.backbone is {'type': 'ResNet', "),
        ("model = dict(decode_head=dict(type='UPerHead'))", "3: model.decode_head.type is 'UPerHead'; no installed"),
        ("model = dict(decode_head=dict(_delete_=True))", "3: model.decode_head.type is None; no installed"),
        ("model = dict(pretrained='https://host/x.pth')", "3: model.pretrained is 'https://host/x.pth'; these weights"),
        ("model = dict(decode_head=dict(num_classes=0))", "3: model.decode_head.num_classes: model.num_classes is 0;"),
        ("model = 3", "has no `model = dict(…)`"),
        ("model = dict(test_cfg=3)", "3: model.test_cfg is 3; a dict is"),
        ("optimizer = dict(lr='much')", "3: optimizer.lr: optimizer.lr is 'much'; it must be a number"),
        ("optimizer = dict(eps=1e-6)", "3: optimizer.eps is 1e-06; this key is not understood"),
        ("optimizer = dict(type='RMSprop')", "3: optimizer.type is 'RMSprop'; known here: 'AdamW', 'SGD'"),
        ("lr_config = dict(by_epoch=True)", "3: lr_config.by_epoch is True; known here: False"),
        ("lr_config = dict(warmup='exp')", "3: lr_config.warmup is 'exp'; known here: None, 'linear'"),
        ("runner = dict(type='EpochBasedRunner')", "3: runner.type is 'EpochBasedRunner'"),
        ("resume_from = 'latest.pth'", "3: resume_from is 'latest.pth'; known here: None"),
        ("gpu_ids = '0,1'", "3: gpu_ids is '0,1'; a list is known here"),
        ("custom_hooks = [dict(type='Mine')]", "3: custom_hooks[0].type is 'Mine'; known here"),
        ("fp16 = dict(loss_scale=512.)\nimg_ratios = fp16", "3: fp16 is {'loss_scale': 512.0}; known"),
        ("fp16 = dict()", "known here: None; delete it, and set train.precision afterwards"),
        ("data = dict(train=dict(type='RepeatDataset'))", "; name the data set in it alone, as training counts"),
        ("data = dict(train=dict(type='CustomDataset'))", "; write it as a published data set, and set data.dataset,"),
        ("data = dict(train=dict(classes=('a',)))", "not understood; write it as a published data set, and set"),
        ("custom_hooks = [dict(type='EMAHook')]", "; delete it, and set train.ema to 1 - momentum afterwards"),
        ("data = dict(train=dict(data_root='{{ fileDirname }}/ade'))", "'{{ fileDirname }}/ade' is filled in by MMCV"),
        ("optimizer = dict(lr={{_base_.lr}})", "write its value, or import the copy without bases that MMSeg"),
        ("optimiser = dict(lr=1)", "3: optimiser is {'lr': 1}; this key is not understood"),
        ("data = dict(samples_per_gpu=3)", "has 3 images per device but not the number of devices; add --batch-size"),
        ("data = dict(val=dict(img_dir='images/training'))", "3: data.val.img_dir is 'images/training'; known here"),
        ("data = dict(test=dict(pipeline=[]))", "3: data.test.pipeline lacks LoadImageFromFile"),
        (
            "data = dict(train=dict(pipeline=[dict(type='Mixup')]))",
            "data.train.pipeline[0].type is 'Mixup'; known here",
        ),
        ("data = dict(val=dict(data_root='elsewhere'))", "it contradicts data.train.data_root ("),
        ("optimizer = dict(paramwise_cfg=dict(custom_keys={'norm': dict(lr=1)}))", "known here, for each: lr_mult and"),
        (
            "optimizer_config = dict(grad_clip=dict(max_norm=1, norm_type=1))",
            "known here: dict(max_norm=…, norm_type=2)",
        ),
    ],
)
def test_what_is_not_understood_is_named_with_its_line(folder, tmp_path, line, words):
    base = os.path.relpath(folder / "segformer_mit-b0_512x512_160k_ade20k.py", tmp_path)
    file = tmp_path / "mine_8x2.py"
    file.write_text(f"_base_ = '{base}'\n\n{line}\n")
    with pytest.raises(UserError) as error:
        import_config(file)
    assert words in str(error.value)
    assert str(error.value).startswith(f"{file}:3: " if words.startswith("3: ") else f"{file}:")
    assert "\n" not in str(error.value)


def test_all_that_is_not_understood_is_named_at_once(folder, tmp_path):
    base = os.path.relpath(folder / "segformer_mit-b0_512x512_160k_ade20k.py", tmp_path)
    lines = [
        f"_base_ = '{base}'",
        "model = dict(decode_head=dict(dropout_rate=0.2, align_corners=True))",
        "custom_hooks = [dict(type='Mine'), dict(type='Other')]",
        "optimizer = dict(eps=1e-6)",
        "data = dict(train=dict(pipeline=[dict(type='Mixup')]))",
    ]
    file = tmp_path / "mine_8x2.py"
    file.write_text("\n".join(lines))
    with pytest.raises(UserError) as error:
        import_config(file)
    first, *more = str(error.value).splitlines()
    assert first == f"{file}: 6 values have no equal here:"
    assert sorted(line.removeprefix(f"{file}:").partition(" is ")[0] for line in more) == [
        "2: model.decode_head.align_corners",
        "2: model.decode_head.dropout_rate",
        "3: custom_hooks[0].type",
        "3: custom_hooks[1].type",
        "4: optimizer.eps",
        "5: data.train.pipeline[0].type",
    ]


@pytest.mark.parametrize("name", ["mit_b0_of_mine.pth", "resnet50_v1c_of_mine.pth"])
def test_a_file_of_ones_own_is_never_taken_for_published_weights(folder, tmp_path, name):
    base = os.path.relpath(folder / "segformer_mit-b0_512x512_160k_ade20k.py", tmp_path)
    file = tmp_path / "mine_8x2.py"
    file.write_text(f"_base_ = '{base}'\nmodel = dict(pretrained='weights/{name}')\n")
    assert import_config(file).experiment.train.init_from == f"weights/{name}"


HOSTILE = {
    "import": "import os",
    "from": "from os import path",
    "new style": "from mmengine.config import read_base\nwith read_base():\n    from .x import *",
    "call": "x = __import__('os').system('touch executed')",
    "open": "x = open('executed', 'w')",
    "in a dict": 'model = dict(a=dict(b=eval(\'open("executed", "w")\')))',
    "dict of pairs": "x = dict([('a', 1)])",
    "dict shadowed": "dict = print\nx = dict(a=1)",
    "comprehension": "x = [open('executed', 'w') for _ in range(3)]",
    "filter": "x = [i for i in range(3) if open('executed', 'w')]",
    "generator": "x = dict(a=(i for i in [1]))",
    "range": "x = range(10**12)",
    "long range": "x = [0 for i in range(99_000) for j in range(99_000)]",
    "nested ranges": "x = [[j for j in range(9000)] for i in range(9000)]",
    "attribute": "x = dict.__class__",
    "subscript": "x = [1][0]",
    "f-string": "x = f'{1}'",
    "lambda": "x = lambda: 1",
    "walrus": "x = (y := 1)",
    "unbound": "x = y",
    "of a loop": "x = [i for i in range(3)]\ny = i",
    "twice in a dict": "x = dict(a=1, **dict(a=2))",
    "twice, written": "x = dict(a=1, a=2)",
    "star": "x = [*range(3)]",
    "starred dict": "x = dict(**3)",
    "key": "x = {1: 2}",
    "bytes": "x = b'1'",
    "complex": "x = 1j",
    "power": "x = 9 ** 9 ** 9",
    "text times": "x = 'a' * 10 ** 9",
    "list times": "x = [1] * 1000",
    "division": "x = 1 / 0",
    "large": "x = 9999999999 * 9999999999",
    "very large": f"x = 0x{'f' * 9000}",
    "too many digits": f"x = {'9' * 9000}",
    "infinite": "x = 1e999",
    "laughs": "a = [1, 1]\n" + "a = [a, a]\n" * 45,
    "sums": "a = [1]\n" + "a = a + a\n" * 45,
    "texts": "a = 'ha'\n" + "a = a + a\n" * 45,
    "long texts": f"a = '{'x' * 50_000}'\nx = [a for i in range(9000)]",
    "loops": "".join(f"n{i} = 1\n" for i in range(9000)) + "x = [[j for j in [i]] for i in range(90_000)]",
    "growing": "a = dict(b=1)\n" + "a = dict(a=a)\n" * 5000,
    "statement": "for i in range(3):\n    x = i",
    "condition": "if True:\n    x = 1",
    "function": "def f():\n    return 1",
    "unpacking": "x, y = 1, 2",
    "item": "x = dict(a=1)\nx['a'] = 2",
    "augmented": "x = 1\nx += 1",
    "delete": "x = 1\ndel x",
    "class": "class X:\n    pass",
    "syntax": "x = (",
    "control": "x = '\x00'",
    "brackets": "x = " + "[" * 100_000,
    "closed brackets": "x = " + "[" * 90 + "]" * 90,
    "minus": "x = " + "-" * 100_000 + "1",
    "plus": "x = " + "1+" * 50_000 + "1",
    "dots": "x = a" + ".b" * 50_000,
    "some dots": "x = a" + ".b" * 700,
    "calls": "x = a" + "()" * 50_000,
    "huge": "x = 1\n" * 100_000,
    "cycle": "_base_ = './hostile.py'",
    "no base": "_base_ = './missing.py'",
    "base of another kind": "_base_ = '/etc/passwd'",
    "absolute": "_base_ = '/etc/x.py'",
    "address": "_base_ = 'https://host/x.py'",
    "scope": "_base_ = 'mmseg::x.py'",
    "base number": "_base_ = [1]",
    "base dict": "_base_ = dict(a=1)",
    "folder": "_base_ = './folder.py'",
    "pipe": "_base_ = './pipe.py'",
    "device": "_base_ = './device.py'",
    "twice": "_base_ = ['./one.py', './two.py']",
    "a dict over a number": "_base_ = './one.py'\na = dict(b=1)",
    "empty": "",
    "no model": "x = 1",
    "model of no kind": "model = dict(type='EncoderDecoder')",
    "head a number": "model = dict(decode_head=3)",
    "odd key": "model = dict(decode_head=dict(type='FPNHead'), **{'a\\nb': 1})",
    "many keys": f"model = dict(decode_head=dict(type='FPNHead'), {', '.join(f'k{i}=1' for i in range(1000))})",
    "odd value": "model = dict(decode_head=dict(type='x\\ny'))",
    "long value": f"model = dict(decode_head=dict(type='{'x' * 100_000}'))",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch, capsys, kind):
    """One line or some with the file's name and no trace of its code; what is too large or has no end is not read."""
    monkeypatch.chdir(tmp_path)
    Path("hostile.py").write_text(HOSTILE[kind])
    Path("one.py").write_text("a = 1")
    Path("two.py").write_text("a = 2")
    Path("folder.py").mkdir()
    Path("device.py").symlink_to("/dev/zero")
    os.mkfifo("pipe.py")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as end:
        main(None, ["import-config", "hostile.py", "--write", "out.py"])
    assert end.value.code == 1
    first, *more = capsys.readouterr().err.splitlines()
    assert re.match(r"error: (hostile|missing|one|two|folder|pipe|device|mmseg::x)\.py", first)
    assert all(line.startswith("hostile.py:1: ") for line in more)
    assert len(more) <= 20
    assert bool(more) is (kind in ("odd key", "many keys"))
    assert all(len(line) < 500 for line in (first, *more))
    assert sorted(tmp_path.iterdir()) == before


def test_bases_are_bounded(tmp_path):
    for index in range(100):
        (tmp_path / f"{index}.py").write_text(f"_base_ = './{index + 1}.py'")
    with pytest.raises(UserError, match="more than 64 files by _base_"):
        read_config(tmp_path / "0.py")
    (tmp_path / "0.py").write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(UserError, match="larger than 128 KiB"):
        read_config(tmp_path / "0.py")
    (tmp_path / "0.py").write_bytes(b"x = '\xff'")
    with pytest.raises(UserError, match="not UTF-8"):
        read_config(tmp_path / "0.py")


def tuples(value):
    """Return a value with tuples in place of lists."""
    if isinstance(value, dict):
        return {key: tuples(item) for key, item in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value


def test_expressions_and_bases_mean_what_they_do_in_python(tmp_path):
    """By Python itself, and by the merging rules of MMCV."""
    text = """
a = 3
i = 7
b = [i * 2 for i in range(a)] + [i] + [-a // 2, 7 % 4, 1 / 4, 'x' + 'y']
c = dict(p=a, **dict(q=(1, [2, None, True])), r={'s': 1.5e-3, **dict(t=a - 1)})
d = [dict(i=i) for i in b]
"""
    (tmp_path / "a.py").write_text(text)
    expected: dict = {}
    exec(text, expected)
    found, used = read_config(tmp_path / "a.py")
    assert found == {name: tuples(expected[name]) for name in "aibcd"}
    assert {"a", "b"} <= used
    (tmp_path / "b.py").write_text("_base_ = ['./a.py']\nc = dict(p=dict(x=1), r=dict(_delete_=True, u=1))\nb = 1")
    with pytest.raises(UserError, match=r"b\.py:2: p is a dict, but 3 in the base \(.*a\.py:5\); write _delete_=True"):
        read_config(tmp_path / "b.py")
    (tmp_path / "b.py").write_text("_base_ = ['./a.py']\nc = dict(p=4, r=dict(_delete_=True, u=1))\nb = 1")
    merged, _ = read_config(tmp_path / "b.py")
    assert merged["c"] == {"p": 4, "q": (1, (2, None, True)), "r": {"u": 1}}
    assert merged["b"] == 1
    assert merged["c"].lines["q"].endswith("a.py:5")


def test_the_written_file_is_a_configuration(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = folder / f"{next(iter(MODELS))}.py"
    main(None, ["import-config", str(file), "--write", "new/my.py"])
    out = capsys.readouterr()
    assert "new/my.py: ddp_convnext_t_4x4_512x1024_160k_cityscapes; to train: segcore train new/my.py:experi" in out.out
    assert "16 images per step, 4 per device (4x4 in its name)" in out.err
    assert "without influence on results: data.workers_per_gpu, " in out.err
    command = parse(["train", "new/my.py:experiment", "--train.batch-size", "8"])
    assert command.experiment.train.batch_size == 8
    assert load_experiment("new/my.py:experiment") == import_config(file).experiment
    main(None, ["import-config", str(file)])
    text = Path("new/my.py").read_text()
    assert capsys.readouterr().out == text, "printed without --write"
    main(None, ["import-config", str(file), "--write", "new/my.py"])
    for change in (["--batch-size", "8"], ["--write", "my.txt"], ["--batch-size", "0"]):
        with pytest.raises(SystemExit):
            main(None, ["import-config", str(file), "--write", "new/my.py", *change])
    assert Path("new/my.py").read_text() == text
    assert [path.name for path in tmp_path.rglob("*.*")] == ["my.py"]


def test_the_batch_size_can_be_given(folder):
    given = import_config(folder / f"{next(iter(MODELS))}.py", 8)
    assert (given.experiment.train.batch_size, given.batch) == (8, "--batch-size")


def published_row(stem, rows):
    """The row of ours, one of `rows`, that a published file of either line is."""
    patterns = {
        r"segformer_(mit-b\d)_8xb1-160k_(\w+)-(\w+)": r"segformer_\1_8x1_\3_160k_\2",
        r"segformer_(mit-b\d)_8xb2-160k_(\w+)-(\w+)": r"segformer_\1_\3_160k_\2",
        r"deeplabv3plus_(r\d+)-d8_4xb\d-(\d+k)_(\w+)-(\w+)": r"deeplabv3plus_\1-d8_\4_\2_\3",
        r"mobilenet-v2-d8_deeplabv3plus_4xb\d-(\d+k)_(\w+)-(\w+)": r"deeplabv3plus_m-v2-d8_\3_\1_\2",
    }
    for pattern, name in patterns.items():
        stem = re.sub(f"^{pattern}$", name, stem)
    return stem if stem.replace("-", "_") in rows else None


EXPECTED = {
    # The shipped files name other start weights, no mBIoU, and not the last step.
    "segformer_b2_ade20k_singlestep": {"evaluate.metrics"},
    "segformer_b2_ade20k_multistep": {"evaluate.metrics", "evaluate.steps", "train.init_from"},
    "segformer_b2_ade20k_multistep_inference": {"evaluate.metrics", "train.init_from"},
}


def real_files():
    """The configurations of the MMSegmentation that is installed, and of the folders in MMSEG_CONFIGS."""
    folders = [Path(name) for name in os.environ.get("MMSEG_CONFIGS", "").split(os.pathsep) if name]
    if spec := importlib.util.find_spec("mmseg"):
        folders.append(Path(spec.origin or "").parent / ".mim/configs")
    files = [path for folder in folders for path in folder.rglob("*.py")]
    return files or pytest.skip("no MMSegmentation is installed and MMSEG_CONFIGS names no folder")


@pytest.mark.openmmlab
@pytest.mark.usefixtures("quick")
def test_real_files_become_our_rows():
    """Those that are published for our models do; others are read or refused."""
    seen, rows = 0, experiments()
    for path in (path for path in real_files() if "_base_" not in path.parts):
        row = published_row(path.stem, rows)
        if row is None:
            with contextlib.suppress(UserError):
                import_config(path)
            continue
        imported = import_config(path).experiment
        seen += 1
        expected = {"schedule.warmup"} if "8xb" in path.stem else EXPECTED.get(path.stem, set())
        assert {line.partition(":")[0] for line in changes(row, imported)} == expected, path
    assert seen >= 15


@pytest.mark.openmmlab
def test_real_files_are_read_as_by_their_loader():
    """By MMEngine's or MMCV's, which import a file: only those that ours takes as data."""
    loader = pytest.importorskip("mmengine" if importlib.util.find_spec("mmengine") else "mmcv").Config
    equal = 0
    for path in real_files():
        with contextlib.suppress(UserError):
            ours, _ = read_config(path)
            theirs = loader.fromfile(str(path), import_custom_modules=False)
            assert ours == tuples(theirs._cfg_dict.to_dict()), path
            equal += 1
    assert equal > 500
