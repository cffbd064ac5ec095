"""The base models compute what MMSegmentation computes: features and logits."""

import json

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import segcore
from ddps_seg.backbones import build
from ddps_seg.configs import BaseModelConfig
from ddps_seg.configs.base_models import rows
from ddps_seg.official import BASE_MODELS, IMAGENET
from segcore.checkpoints.load import load_init
from segcore.config.registry import published
from segcore.errors import UserError
from segcore.training.optimizer import param_settings

GOLDEN = {"r50": "deeplabv3plus_r50-d8_512x512_160k_ade20k", "m-v2": "deeplabv3plus_m-v2-d8_512x512_160k_ade20k"}


def normal(seed, shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


@torch.no_grad()
@pytest.mark.parametrize("variant", ["b0", "b2"])
def test_mit_features(golden, fill, manifest, variant):
    name = f"segformer_mit-{variant}_512x512_160k_ade20k"
    shapes = {k.removeprefix("backbone."): v for k, v in manifest(name)["state_dict"].items() if k[:9] == "backbone."}
    backbone = build(f"mit_{variant}").eval()
    ours = {official: name for name, official in backbone.key_map().items()}
    backbone.load_state_dict({ours[k]: v for k, v in fill(shapes).items()})
    expected = golden("mit_features")
    for stage, x in enumerate(backbone(expected["input"])):
        torch.testing.assert_close(x, expected[f"{variant}_stage{stage}"], atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", GOLDEN)
def test_deeplab_features_and_logits(golden, filled, kind):
    g, model = golden("deeplabv3plus"), filled(GOLDEN[kind])
    maps = model.backbone(g["input"])
    for i, x in enumerate(maps):
        assert list(x.shape) == g[f"{kind}_feat{i}_shape"].tolist()
        assert x.std().item() == pytest.approx(g[f"{kind}_feat{i}_std"].item(), abs=1e-5)
        (name,) = (key for key in g if key.startswith(f"{kind}_feat{i}_every"))
        torch.testing.assert_close(x[:, :: int(name.rpartition("every")[2])], g[name], atol=2e-5, rtol=0)
    torch.testing.assert_close(model.classifier(model.encode(g["input"])), g[f"{kind}_logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(model.auxiliary_head(maps[2])[:, :8], g[f"{kind}_aux_ch0_8"], atol=1e-4, rtol=0)


def test_every_manifest_is_a_configuration(reference):
    names = {path.stem for path in (reference / "ddps" / "manifests").glob("*d8*.json")}
    names |= {path.stem for path in (reference / "ddps" / "manifests").glob("segformer_mit*.json")}
    assert {name.replace("-", "_") for name in names} | {"segformer_mit_b5_640x640_160k_ade20k"} == set(rows())


@pytest.mark.parametrize("name", rows())
def test_parameters_equal_the_manifest(manifest, name):
    exp = segcore.load_experiment(name)
    expected = manifest(exp.name.replace("640x640", "512x512"))
    with torch.device("meta"):
        model = exp.model.build()
    names = model.key_map()
    assert {names[k]: list(v.shape) for k, v in model.state_dict().items()} == expected["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == expected["params"]


# A clone without the reference checks these, too: the backbone alone, and with the head and 19 classes.
PARAMETERS = {
    "mit_b0": 3_319_392,
    "mit_b1": 13_151_424,
    "mit_b2": 24_196_288,
    "mit_b3": 44_072_128,
    "mit_b4": 60_842_688,
    "mit_b5": 81_443_008,
    "mobilenet_v2": 1_811_712,
    "resnet50": 23_527_264,
    "resnet101": 42_519_392,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    with torch.device("meta"):
        assert sum(p.numel() for p in build(name).parameters()) == PARAMETERS[name]


def test_stochastic_depth_grows_linearly():
    rates = [block.drop_path.rate for stage in build("mit_b0").stages for block in stage.blocks]
    assert rates == pytest.approx(np.linspace(0, 0.1, 8))


def test_recipes():
    exp = segcore.load_experiment("segformer_mit-b2_8x1_1024x1024_160k_cityscapes")
    assert (exp.train.batch_size, exp.schedule.iterations, exp.optimizer.lr) == (8, 160_000, 6e-5)
    assert (exp.evaluate.mode, exp.evaluate.crop, exp.evaluate.stride) == ("slide", (1024, 1024), (768, 768))
    exp = segcore.load_experiment("segformer_mit-b5_640x640_160k_ade20k")
    assert (exp.data.crop, exp.data.img_scale, exp.evaluate.img_scale) == ((640, 640), (2048, 640), (2048, 640))
    exp = segcore.load_experiment("deeplabv3plus_m-v2-d8_512x1024_80k_cityscapes")
    assert (exp.train.batch_size, exp.schedule.iterations, exp.schedule.min_lr, exp.optimizer.lr) == (
        8,
        80_000,
        1e-4,
        0.01,
    )


def test_learning_rates_follow_the_published_names():
    exp = segcore.load_experiment("segformer_mit-b0_512x512_160k_ade20k")
    with torch.device("meta"):
        names = exp.model.build().key_map().values()
    settings = param_settings(names, exp.optimizer)
    assert settings["decode_head.convs.0.conv.weight"] == (pytest.approx(6e-4), 0.01)
    assert settings["backbone.layers.0.1.0.norm1.weight"] == (6e-5, 0.0)
    assert settings["backbone.layers.0.1.0.attn.attn.in_proj_weight"] == (6e-5, 0.01)


def test_figures_equal_the_published_list(reference):
    found = [r for r in json.loads((reference / "published.json").read_text()) if "stock_base" in r]
    assert {r["stock_base"].replace("-", "_") for r in found} == set(BASE_MODELS)
    for row in found:
        ours = published(row["stock_base"])
        assert list(ours.miou.values()) == list(row["metrics"].values())
        assert ours.url == row["checkpoint"]


def test_start_weights_have_a_source():
    for build_row in rows().values():
        exp = build_row()
        assert exp.train.init_from.removeprefix("official:") in IMAGENET or "." in exp.train.init_from


@pytest.mark.parametrize("name", ["mit_b0", "mobilenet_v2", "resnet50"])
def test_imagenet_weights_load_under_published_names(name):
    source, target = build(name), build(name)
    state = {source.key_map()[k]: v for k, v in source.state_dict().items()}
    report = target.load_pretrained({**state, "head.fc.weight": torch.ones(3)})
    assert report.loaded == len(state)
    assert all(torch.equal(v, target.state_dict()[k]) for k, v in source.state_dict().items())


@pytest.mark.parametrize(
    "name", ["deeplabv3plus_m_v2_d8_512x512_160k_ade20k", "deeplabv3plus_r50_d8_512x512_160k_ade20k"]
)
def test_timm_weights_start_the_published_recipes(name, tmp_path, monkeypatch):
    exp = segcore.load_experiment(name)
    tag = exp.train.init_from
    source = timm.create_model(tag.partition(".")[0]).state_dict()
    save_file(source, tmp_path / f"{tag}.safetensors")
    monkeypatch.setenv("SEGCORE_WEIGHTS", str(tmp_path))
    model = exp.model.build()
    assert load_init(model, tag, offline=True).startswith(f"{tag}: backbone only: loaded")
    assert all(torch.equal(tensor, source[key]) for key, tensor in model.backbone.net.state_dict().items())


def test_incomplete_start_weights_are_refused():
    source = build("mit_b0")
    state = {source.key_map()[k]: v for k, v in source.state_dict().items()}
    for wrong in ({}, dict(list(state.items())[1:])):
        with pytest.raises(UserError, match=r"do not fit this backbone: \d+ tensors missing"):
            build("mit_b0").load_pretrained(wrong)


@pytest.mark.parametrize(
    ("name", "head", "strides"),
    [
        ("mit_b0", "SegFormerHead", (4, 8, 16, 32)),
        ("resnet18", "SegFormerHead", (4, 8, 16, 32)),
        ("convnext_t", "SegFormerHead", (4, 8, 16, 32)),
        ("resnet50", "DeepLabHead", (4, 8, 8, 8)),
        ("regnetx_002", "DeepLabHead", (4, 8, 8, 8)),
    ],
)
def test_the_backbone_chooses_the_head(name, head, strides):
    model = BaseModelConfig(num_classes=3, backbone=name, in_channels=5).build().eval()
    assert (type(model.head).__name__, model.backbone.strides) == (head, strides)
    images = torch.zeros(1, 5, 51, 70)
    sides = [(-(-51 // stride), -(-70 // stride)) for stride in strides]
    if name not in ("mit_b0", "convnext_t"):  # these two leave out pixels that fill no patch
        assert [tuple(x.shape[2:]) for x in model.backbone(images)] == sides
    assert model(images).shape == (1, 3, 51, 70)


def test_published_tensors_of_swin_are_turned_into_this_layout():
    model = BaseModelConfig(num_classes=3, backbone="swin_t").build()
    name = next(n for n in model.key_map().values() if n.endswith("downsample.reduction.weight"))
    own = model.state_dict()[{v: k for k, v in model.key_map().items()}[name]]
    published = model.official_state()[name]
    assert published.shape == own.shape
    assert not torch.equal(published, own)
    assert torch.equal(model.backbone.convert(name.removeprefix("backbone."), published), own)
    model.load_official(model.official_state())
    assert torch.equal(model.official_state()[name], published)


def test_deeplab_trains_on_one_image_per_process_with_synchronized_norms():
    model = BaseModelConfig(num_classes=3, backbone="regnetx_002").build().train()
    image = torch.zeros(1, 3, 32, 32)
    with pytest.raises(UserError, match=r"DeepLabV3\+ trains on 2 images"):
        model.check_batch(image)
    nn.SyncBatchNorm.convert_sync_batchnorm(model).check_batch(image)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mit_b9", r"no backbone 'mit_b9' \(did you mean mit_b\d\?\); known are mit_b0, mit_b1"),
        ("hgnetv2_b0", "timm's hgnetv2_b0 has no maps at strides 4, 8, 8, 8 for images of any size"),
    ],
)
def test_backbone_that_deeplab_cannot_use_is_named(name, text):
    with pytest.raises(UserError, match=text):
        build(name)
