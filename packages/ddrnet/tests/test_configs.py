"""The published rows: names, parameters, recipes, figures; and how weights files are recognized."""

import json

import pytest
import torch

import segcore
from ddrnet_seg.configs import DDRNetConfig, experiments
from ddrnet_seg.configs.cityscapes import CLASS_WEIGHT
from ddrnet_seg.official import PUBLISHED, recognize
from segcore.checkpoints.load import load_init, load_weights
from segcore.config.registry import published
from segcore.testing.contract import refusal

# Parameters without and with the auxiliary head, which a clone without the reference also checks.
PARAMETERS = {
    "23_slim": (5_695_987, 5_734_342),
    "23": (20_148_947, 20_299_366),
    "39": (32_360_275, 32_660_838),
}
MMSEG = "ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024"


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("variant", PARAMETERS)
def test_parameter_counts(variant):
    with torch.device("meta"):
        counts = tuple(
            parameters(DDRNetConfig(variant=variant, auxiliary=auxiliary).build()) for auxiliary in (False, True)
        )
    assert counts == PARAMETERS[variant]


@pytest.mark.parametrize("variant", PARAMETERS)
def test_names_and_shapes_equal_the_manifest(manifest, variant):
    expected = manifest(f"ddrnet_{variant}")
    with torch.device("meta"):
        model = DDRNetConfig(variant=variant).build()
    names = model.key_map()
    assert {names[k]: list(v.shape) for k, v in model.state_dict().items()} == expected["state_dict"]
    assert (expected["params_without_augment"], expected["params"]) == PARAMETERS[variant]


def test_recipes():
    exp = segcore.load_experiment(MMSEG)
    assert exp.name == MMSEG
    assert (exp.train.batch_size, exp.schedule.iterations, exp.optimizer.lr) == (12, 120_000, 0.01)
    assert (exp.loss.kind, exp.loss.ohem_threshold, exp.loss.ohem_min_kept) == ("ohem", 0.9, 131_072)
    assert exp.loss.class_weight == CLASS_WEIGHT
    exp = segcore.load_experiment("ddrnet_23_cityscapes_pyradd")
    assert (exp.train.batch_size, exp.schedule.iterations, exp.optimizer.lr) == (5, 148_750, 0.003)
    assert (exp.data.crop, exp.data.img_scale, exp.model.align_corners) == ((1024, 1024), (2080, 1040), True)
    assert (exp.loss.kind, exp.loss.ohem_threshold, exp.loss.ohem_min_kept) == ("ohem_pyradd", 0.7, 100_000)


def test_figures_equal_the_published_list(reference):
    rows = [r for r in json.loads((reference / "published.json").read_text()) if r["method"] == "ddrnet"]
    theirs = {r["mmsegmentation"]: r for r in rows if "mmsegmentation" in r}
    assert len(theirs) == 2
    for name, row in theirs.items():
        ours = published(name)
        assert list(ours.miou.values()) == list(row["metrics"].values())
        assert ours.url == row["checkpoint"]
    for row in rows:
        if row.get("checkpoint") and "drive" in row["checkpoint"] and "timm" not in row["kind"]:
            kind = "imagenet" if "ImageNet" in row["kind"] else "cityscapes"
            ours = published(f"{row['model'].lower()}_{kind}")
            assert row["checkpoint"].split("/")[5] in ours.url
            assert row["figure"].split()[-1] in (f"{ours.note} {ours.miou.get('single scale')}").split()
    assert published("ddrnet_23_cityscapes_pyradd").miou["single scale"] == 77.382


def test_start_weights_are_published_files():
    for name, build in experiments().items():
        init, suffix = build().train.init_from, "_cityscapes.pth" if name.endswith("_fine_tuned") else "_imagenet.pth"
        assert init is None or PUBLISHED[init.removeprefix("official:")].file.endswith(suffix)


def mmseg_state(reference, official, variant):
    """The reference's weights under MMSegmentation's names."""
    names = json.loads((reference / "ddrnet" / "manifests" / "name_map_mmseg.json").read_text())[variant]["map"]
    state = official(variant)
    return {theirs: state[ours] for theirs, ours in names.items() if ours in state}


@pytest.mark.parametrize("variant", ["ddrnet_23_slim", "ddrnet_23"])
def test_mmseg_names_both_ways(reference, variant):
    table = json.loads((reference / "ddrnet" / "manifests" / "name_map_mmseg.json").read_text())[variant]
    ours = recognize(dict.fromkeys(table["map"], torch.zeros(1))).tensors
    assert list(ours)[: len(table["map"])] == list(table["map"].values())
    assert set(ours) - set(table["map"].values()) == set(table["official_only"])
    with torch.device("meta"):
        model = DDRNetConfig(variant=variant.removeprefix("ddrnet_")).build()
    assert set(ours) == set(model.key_map().values())


@pytest.fixture(scope="module")
def sources(reference, official):
    """The same network in the four kinds of file; MMSegmentation's has no biases in its first convolutions."""
    state = official("ddrnet_23_slim")
    return {
        "official": {f"model.{k}": v for k, v in state.items()} | {"loss.criterion.weight": torch.ones(19)},
        "wrapped": {f"module.model.{k}": v for k, v in state.items()},
        "seed": {k: v for k, v in state.items() if not k.startswith("seghead_extra.")},
        "mmseg": mmseg_state(reference, official, "ddrnet_23_slim"),
    }


@torch.no_grad()
@pytest.mark.parametrize("auxiliary", [True, False])
@pytest.mark.parametrize("kind", ["official", "wrapped", "seed", "mmseg"])
def test_checkpoints_are_recognized(sources, filled, tmp_path, kind, auxiliary):
    expected = filled("23_slim", auxiliary=auxiliary)
    if kind == "mmseg":
        expected.backbone.conv1[0].conv.bias.zero_()
        expected.backbone.conv1[1].conv.bias.zero_()
    torch.save({"state_dict": sources[kind], "meta": {}}, tmp_path / "file.pth")
    model = DDRNetConfig(auxiliary=auxiliary).build().eval()
    if kind == "seed" and auxiliary:  # pyradd never built the head
        assert "seghead_extra" in refusal(lambda: load_weights(model, tmp_path / "file.pth"))
        return
    report = load_weights(model, tmp_path / "file.pth")
    assert report.loaded == sum(1 for k in model.state_dict() if not k.endswith("num_batches_tracked"))
    assert ("loss.criterion.weight" in report.dropped) == (kind == "official")
    assert any("seghead" in k for k in report.dropped) == (not auxiliary and kind != "seed")
    assert str(report).startswith("MMSegmentation" if kind == "mmseg" else "official")
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(images), expected(images))


def test_own_checkpoints_are_not_mistaken_for_others(tmp_path):
    model, other = DDRNetConfig().build(), DDRNetConfig().build()
    torch.save(model.state_dict(), tmp_path / "own.pth")
    report = load_weights(other, tmp_path / "own.pth")
    assert (report.source, report.mapped) == ("", 0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert other.is_full_checkpoint(model.state_dict())


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_imagenet_weights_fill_the_backbone(official, manifest, tmp_path, prefix):
    state = official("ddrnet_23_slim_imagenet")
    torch.save({f"{prefix}{k}": v for k, v in state.items()}, tmp_path / "DDRNet23s_imagenet.pth")
    model = DDRNetConfig().build()
    head = model.head.classifier.weight.clone()
    line = load_init(model, str(tmp_path / "DDRNet23s_imagenet.pth"))
    shared = [k for k in state if not k.startswith(("down5.", "last_layer.", "linear."))]
    assert f"backbone only: ImageNet weights: loaded {len(shared)} tensors" in line
    assert "dropped 17 of down5, last_layer, linear" in line
    ours = {official: model.state_dict()[name] for name, official in model.key_map().items()}
    assert all(torch.equal(ours[k], state[k]) for k in shared)
    assert torch.equal(head, model.head.classifier.weight)


def test_mmseg_backbones_without_a_head(reference, official):
    whole = mmseg_state(reference, official, "ddrnet_23_slim")
    backbone = {k.removeprefix("backbone."): v for k, v in whole.items() if k.startswith("backbone.")}
    for context in (True, False):
        model = DDRNetConfig().build()
        state = {k: v for k, v in backbone.items() if context or not k.startswith("spp.")}
        assert not model.is_full_checkpoint(state)
        report = model.load_backbone(state)
        assert (report.source, report.dropped) == ("MMSegmentation", ())
        assert report.loaded == len(state) + 2
        filled = torch.equal(model.context.shortcut.norm.bias, backbone["spp.shortcut.bn.bias"])
        assert filled == context


def test_missing_and_unknown_tensors_are_refused(official):
    state = official("ddrnet_23_slim")
    model = DDRNetConfig().build()
    before = model.head.classifier.weight.clone()
    assert "1 tensors missing (conv1.0.bias)" in refusal(
        lambda: model.load_official({k: v for k, v in state.items() if k != "conv1.0.bias"})
    )
    assert "1 unknown (x)" in refusal(lambda: model.load_official({**state, "model.x": torch.ones(1)}))
    assert "shapes differ" in refusal(lambda: model.load_official(official("ddrnet_23")))
    assert "missing" in refusal(lambda: model.load_backbone({"linear.weight": torch.ones(1)}))
    assert torch.equal(before, model.head.classifier.weight)
