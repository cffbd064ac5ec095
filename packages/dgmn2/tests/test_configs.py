"""The published rows: names, parameters, recipes, figures; and how weights files are recognized."""

import json
from typing import get_args, get_type_hints

import pytest
import torch

import segcore
from dgmn2_seg.backbone import VARIANTS
from dgmn2_seg.configs import DGMN2Config, cityscapes, experiments
from dgmn2_seg.official import PUBLISHED
from segcore.checkpoints.load import load_init, load_weights
from segcore.config.registry import published
from segcore.config.schema import multi_scale
from segcore.testing.contract import refusal

HEADS, SIZES = ("fpn", "setr_naive", "setr_pup", "setr_mla"), ("tiny", "small", "medium", "large")
ROWS = [f"{head}_dgmn2_{size}_4x2_769x769_40k_cityscapes" for head in HEADS for size in SIZES]
# Parameters of the tiny rows and of the backbones, which a clone without the reference also checks.
PARAMETERS = dict(zip(HEADS, (15_838_211, 11_598_211, 13_954_947, 13_369_731), strict=True))
BACKBONES = dict(zip(SIZES, (11_588_464, 20_455_360, 35_298_712, 47_773_762), strict=True))


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def on_meta(name):
    with torch.device("meta"):
        return segcore.load_experiment(name).model.build()


def test_parameter_counts():
    for row in ROWS:
        model = on_meta(row)
        size = segcore.load_experiment(row).model.backbone
        assert parameters(model.backbone) == BACKBONES[size]
    assert {head: parameters(on_meta(f"{head}_dgmn2_tiny_4x2_769x769_40k_cityscapes")) for head in HEADS} == PARAMETERS


@pytest.mark.parametrize("row", ROWS)
def test_names_and_shapes_equal_the_manifest(manifest, row):
    expected, model = manifest(row), on_meta(row)
    names = model.key_map()
    assert {names[k]: list(v.shape) for k, v in model.state_dict().items()} == expected["state_dict"]
    assert parameters(model) == expected["params"]


def test_recipe():
    assert [name for name in experiments() if "_4x2_" in name] == ROWS
    for row in ROWS:
        exp = segcore.load_experiment(row)
        head, size = row.removesuffix("_4x2_769x769_40k_cityscapes").split("_dgmn2_")
        assert exp == cityscapes.recipe(head, size)
        assert (exp.name, exp.model) == (row, DGMN2Config(backbone=size, head=head))
    assert (exp.model.drop_path, exp.model.img_size, exp.model.dropout) == (0.0, 769, 0.1)
    assert not exp.loss.avg_non_ignore
    assert (exp.optimizer.kind, exp.optimizer.lr, exp.optimizer.weight_decay) == ("adamw", 1e-4, 1e-4)
    assert (exp.optimizer.rules, exp.optimizer.clip_norm, exp.optimizer.betas) == ((), None, (0.9, 0.999))
    assert (exp.schedule.iterations, exp.schedule.power, exp.schedule.min_lr) == (40_000, 0.9, 0.0)
    assert (exp.schedule.warmup_iterations, exp.train.batch_size, exp.train.device_batch_size) == (0, 8, 2)
    assert (exp.data.img_scale, exp.data.crop, exp.data.ratio_range) == ((2049, 1025), (769, 769), (0.5, 2.0))
    assert (exp.evaluate.img_scale, exp.evaluate.mode) == ((2049, 1025), "slide")
    assert (exp.evaluate.crop, exp.evaluate.stride) == ((769, 769), (513, 513))
    evaluate = multi_scale(exp.evaluate)
    assert (evaluate.img_ratios, evaluate.flip) == ((0.5, 0.75, 1.0, 1.25, 1.5, 1.75), True)


def test_figures_equal_the_published_list(reference):
    rows = [r for r in json.loads((reference / "published.json").read_text()) if r["method"] == "dgmn2"]
    assert len(rows) == len(PUBLISHED) == 20
    for row in rows:
        name = row.get("config") or f"{row['imagenet'].lower().replace('-', '_')}_imagenet"
        ours = published(name)
        assert row["checkpoint"].split("/")[5] in ours.url
        assert ours.file == f"{name}.pth"
        if "config" in row:
            assert ours.miou == {"single scale": row["miou"], "multi scale": row["miou_ms_flip"]}
        else:
            assert ours.note.endswith(f" {row['top1']}")


def test_start_weights_are_published_files():
    for row in ROWS:
        exp = segcore.load_experiment(row)
        assert exp.train.init_from == f"official:dgmn2_{exp.model.backbone}_imagenet"
        assert exp.train.init_from.removeprefix("official:") in PUBLISHED


@pytest.fixture(scope="module")
def imagenet():
    """Random ImageNet weights of the nano backbone, as the authors name them."""
    torch.manual_seed(1)
    model = DGMN2Config(backbone="nano").build()
    names = model.key_map()
    state = {names[n].removeprefix("backbone."): t for n, t in model.state_dict().items() if n.startswith("backbone.")}
    return {**state, "head.weight": torch.zeros(1000, 192), "head.bias": torch.zeros(1000)}


@pytest.mark.parametrize("wrap", ["flat", "state_dict", "model", "module.", "backbone."])
@pytest.mark.parametrize("head", ["fpn", "setr_mla"])
def test_imagenet_weights_fill_the_backbone(imagenet, tmp_path, wrap, head):
    state = imagenet
    if wrap.endswith("."):
        state = {n if n.startswith("head.") and wrap == "backbone." else wrap + n: t for n, t in imagenet.items()}
    content = {wrap: state, "epoch": 3} if wrap in ("state_dict", "model") else state
    torch.save(content, tmp_path / "file.pth")
    model = DGMN2Config(backbone="nano", head=head).build()
    classifier = model.head.classifier.weight.clone()
    line = load_init(model, str(tmp_path / "file.pth"))
    assert f"backbone only: ImageNet weights: loaded {len(imagenet) - 2} tensors" in line
    assert "dropped 2 of head" in line
    ours = {model.key_map()[n]: t for n, t in model.state_dict().items()}
    assert all(torch.equal(ours[f"backbone.{n}"], t) for n, t in imagenet.items() if not n.startswith("head."))
    assert torch.equal(classifier, model.head.classifier.weight)


def test_missing_and_unknown_tensors_in_imagenet_weights_are_refused(imagenet):
    model = DGMN2Config(backbone="nano").build()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    less = {n: t for n, t in imagenet.items() if n != "block2.0.attn.conv_offset.bias"}
    assert "1 tensors missing (backbone.block2.0.attn.conv_offset.bias)" in refusal(lambda: model.load_backbone(less))
    assert "1 unknown (backbone.norm.weight)" in refusal(
        lambda: model.load_backbone({**imagenet, "norm.weight": torch.ones(192)})
    )
    assert "missing" in refusal(lambda: model.load_backbone({"model_ema": torch.ones(1)}))
    wide = {**imagenet, "block1.0.attn.pos_emb.rel_width": torch.zeros(65, 32)}
    assert "1 shapes differ (backbone.block1.0.attn.pos_emb.rel_width is (65, 32), not (64, 32))" in refusal(
        lambda: model.load_backbone(wide)
    )
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    counts = {n: t for n, t in imagenet.items() if not n.endswith("num_batches_tracked")}
    assert model.load_backbone(counts).loaded == len(counts) - 2


def test_a_trained_checkpoint_loads_under_published_names(tmp_path):
    torch.manual_seed(2)
    first, second = (DGMN2Config(backbone="nano", head="setr_pup").build() for _ in range(2))
    names = first.key_map()
    state = {names[n]: t for n, t in first.state_dict().items()}
    torch.save({"state_dict": state, "meta": {"epoch": 1}}, tmp_path / "file.pth")
    report = load_weights(second, tmp_path / "file.pth")
    assert (report.loaded, report.dropped, report.ignored) == (len(state), (), ())
    assert all(torch.equal(t, second.state_dict()[n]) for n, t in first.state_dict().items())
    other = DGMN2Config(backbone="nano", head="setr_mla").build()
    assert "name the configuration" in refusal(lambda: load_weights(other, tmp_path / "file.pth"))
    assert other.is_full_checkpoint(state)


def test_all_backbones_are_available():
    assert set(VARIANTS) == {"nano", *SIZES} == set(get_args(get_type_hints(DGMN2Config)["backbone"]))
