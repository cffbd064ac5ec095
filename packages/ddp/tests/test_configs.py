"""The published rows: names, parameters, recipes and figures."""

import dataclasses
import json

import pytest
import torch

import segcore
from ddp_seg.configs import experiments
from ddp_seg.official import PUBLISHED
from segcore.config.registry import published
from segcore.training.optimizer import param_settings

ROWS = sorted(PUBLISHED)


def on_meta(name):
    with torch.device("meta"):
        return segcore.load_experiment(name).model.build()


def test_every_published_row_is_a_configuration(reference):
    manifests = {path.stem for path in (reference / "ddp" / "manifests").glob("*.json")}
    assert set(ROWS) == manifests
    assert set(ROWS) < set(experiments())
    for name in ROWS:
        assert segcore.load_experiment(name.replace("_", "-")).name == name


@pytest.mark.parametrize("name", ROWS)
def test_parameters_equal_the_manifest(reference, name):
    manifest = json.loads((reference / "ddp" / "manifests" / f"{name}.json").read_text())
    model = on_meta(name)
    assert sum(p.numel() for p in model.parameters()) == manifest["params"]
    assert sum(p.numel() for p in model.backbone.parameters()) == manifest["params_backbone"]
    names, shapes = model.key_map(), {k: list(v.shape) for k, v in model.state_dict().items()}
    expected = {k: v for k, v in manifest["state_dict"].items() if not k.endswith("relative_position_index")}
    assert {names[k]: shape for k, shape in shapes.items()} == expected
    with torch.device("meta"):
        lean = dataclasses.replace(segcore.load_experiment(name).model, auxiliary=False).build()
    assert sum(p.numel() for p in lean.parameters()) == manifest["params_without_aux"]


@pytest.mark.parametrize(("name", "without"), [(ROWS[0], None), ("ddp_convnext_t_4x4_512x1024_160k_cityscapes", 44),
                                               ("ddp_swin_t_4x4_512x1024_160k_cityscapes", 64)])  # fmt: skip
def test_weight_decay_applies_as_published(name, without):
    exp, model = segcore.load_experiment(name), on_meta(name)
    official = model.key_map()
    settings = param_settings([official[n] for n, _ in model.named_parameters()], exp.optimizer)
    free = [n for n, (_, decay) in settings.items() if decay == 0]
    assert all(n.startswith("backbone.") for n in free)
    assert without in (None, len(free))
    assert {lr for lr, _ in settings.values()} == {exp.optimizer.lr}


def test_recipes():
    exp = segcore.load_experiment("ddp_swin_b_2x8_512x512_160k_ade20k")
    assert (exp.model.window, exp.model.accumulation, exp.model.drop_path, exp.model.num_inference_steps) == (
        12,
        True,
        0.3,
        3,
    )
    assert (exp.data.crop, exp.data.img_scale, exp.evaluate.img_scale) == ((512, 512), (2048, 512), (2048, 512))
    assert (exp.optimizer.clip_norm, exp.train.batch_size, exp.train.device_batch_size) == (0.1, 16, 2)
    exp = segcore.load_experiment("ddp_convnext_l_4x4_512x1024_5k_cityscapes_aligned")
    assert (exp.optimizer.lr, exp.optimizer.clip_norm, exp.schedule.iterations) == (6e-6, None, 5000)
    assert (exp.model.self_aligned, exp.model.num_inference_steps, exp.train.evaluate_every) == (True, 10, 500)
    assert exp.train.init_from == "official:ddp_convnext_l_4x4_512x1024_160k_cityscapes"
    assert segcore.load_experiment("ddp_convnext_s_4x4_512x1024_160k_cityscapes").model.drop_path == 0.3
    assert segcore.load_experiment("ddp_swin_b_4x4_512x1024_160k_cityscapes").model.window == 7


def test_figures_equal_the_published_list(reference):
    rows = [r for r in json.loads((reference / "published.json").read_text()) if r["method"] == "ddp"]
    assert len(rows) == 13  # the 14th configuration has no figures
    for row in rows:
        ours = published(row["config"])
        assert list(ours.miou.values()) == [float(v) for v in row["miou"].split("/")]
        assert ours.url == row["checkpoint"]
