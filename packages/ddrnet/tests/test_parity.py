"""The model computes what the published code computed: every golden case at the tolerance of its README."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ddrnet_seg.configs.cityscapes import CLASS_WEIGHT
from ddrnet_seg.model import DDRNetClassifier
from segcore.config.schema import LossConfig, ScheduleConfig
from segcore.evaluation.metrics import ConfusionMatrix
from segcore.models.layers import resize
from segcore.models.losses import cross_entropy, ohem_cross_entropy, ohem_pyradd
from segcore.training.schedule import learning_rate

VARIANTS = ("23_slim", "23", "39")
WEIGHT = torch.tensor(CLASS_WEIGHT)


def normal(seed, shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype("float32"))


def check(ours, expected, atol=1e-4):
    assert ours.shape == expected.shape
    worst = (ours - expected).abs().max().item()
    assert worst <= atol, f"off by {worst:.3g}, allowed {atol:.3g}"


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def slim(filled):
    return filled("23_slim")


@torch.no_grad()
def test_logits(filled, golden, variant):
    case, model = golden("logits_64x128"), filled(variant)
    features = model.backbone(case["x"])
    check(model.decode(features), case[f"ddrnet_{variant}_main"])
    check(model.auxiliary_head(features.middle), case[f"ddrnet_{variant}_aux"])


@torch.no_grad()
def test_logits_at_full_size(slim, filled, golden):
    case = golden("logits_64x128")
    check(slim(case["x"]), case["ddrnet_23_slim_main_full_align_false"])
    check(filled("23_slim", align_corners=True)(case["x"]), case["ddrnet_23_slim_main_full_align_true"])


@torch.no_grad()
def test_logits_of_another_size(slim, golden):
    case = golden("logits_23_slim_96x160")
    features = slim.backbone(case["x"])
    check(slim.decode(features), case["main"])
    check(slim.auxiliary_head(features.middle), case["aux"])


@torch.no_grad()
def test_classifier(manifest, official, golden, variant):
    case, model = golden("classification_64x96"), DDRNetClassifier(variant).eval()
    names, state = model.key_map(), official(f"ddrnet_{variant}_imagenet")
    model.load_state_dict({n: state[o] for n, o in names.items() if o in state}, strict=False)
    shapes = {names[n]: list(t.shape) for n, t in model.state_dict().items()}
    assert shapes == manifest(f"ddrnet_{variant}_imagenet")["state_dict"]
    check(model(case["x"]), case[f"ddrnet_{variant}"])


@torch.no_grad()
def test_context_module(slim, golden):
    case, seen = golden("dappm_23_slim"), {}
    parts = {f"scale{i}": x for i, x in enumerate(slim.context.scales)}
    parts |= {f"process{i}": x for i, x in enumerate(slim.context.processes, 1)}
    parts |= {"compression": slim.context.compression, "shortcut": slim.context.shortcut}
    hooks = [
        part.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
        for name, part in parts.items()
    ]
    try:
        for size, x in (("4x8", case["x_4x8"]), ("16x32", normal(111, (1, 512, 16, 32)))):
            check(slim.context(x), case[f"out_{size}"])
            for name in parts:
                if f"{name}_{size}" in case:
                    check(seen[name], case[f"{name}_{size}"])
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
@pytest.mark.parametrize(("name", "rounds"), [("23_slim", ("s3", "s4")), ("39", ("s31", "s32", "s4"))])
def test_bilateral_fusions(filled, golden, name, rounds):
    case, model = golden(f"fusion_{name}_64x128"), filled(name)
    backbone = model.backbone
    x = backbone.conv1(golden("logits_64x128")["x"])
    if "stem" in case:
        check(x, case["stem"])
        check(backbone.layer1(x), case["layer1"])
    low = high = backbone.layer2(F.relu(backbone.layer1(x)))
    if "layer2" in case:
        check(low, case["layer2"])
    for tag, fusion in zip(rounds, backbone.fusions, strict=True):
        alone = {"low": fusion.low(F.relu(low)), "high": fusion.high(F.relu(high))}
        alone["down"] = fusion.down(F.relu(alone["high"]))
        alone["compressed"] = fusion.compress(F.relu(alone["low"]))
        low, high = fusion(low, high)
        for part, value in {**alone, "low_fused": low, "high_fused": high}.items():
            if f"{tag}_{part}" in case:
                check(value, case[f"{tag}_{part}"])
    if "spp" in case:
        low, high = backbone.low5(F.relu(low)), backbone.high5(F.relu(high))
        check(low, case["s5_low"])
        check(high, case["s5_high"])
        check(model.context(low), case["spp"])
        check(resize(model.context(low), high.shape[-2:]) + high, case["head_input"])


@torch.no_grad()
def test_training_mode(slim, golden):
    case, model = golden("train_mode_23_slim_128x128"), copy.deepcopy(slim).train()
    features = model.backbone(normal(132, (3, 3, 128, 128)))
    check(model.decode(features), case["main"], 1e-3)
    check(model.auxiliary_head(features.middle), case["aux"], 1e-3)
    state = {official: model.state_dict()[name] for name, official in model.key_map().items()}
    for name in case["bn_names"]:
        for statistic in ("running_mean", "running_var"):
            check(state[f"{name}.{statistic}"], case[f"{name}.{statistic}"], 1e-3)


# Losses. `ignore` is the label of a file's ignored pixels.


def weighted(tag):
    return None if "unweighted" in tag else WEIGHT


def settings(tag):
    """The threshold and the number of pixels in a tag such as t005_k6000_weighted."""
    threshold, kept = tag.split("_")[:2]
    return {"threshold": float(f"{threshold[1]}.{threshold[2:]}"), "min_kept": int(kept[1:])}


def chen(main, aux, labels, tag, align_corners=False):
    """The separate terms: OHEM on either head, and the auxiliary cross entropy over all pixels, as `chen` has them."""
    options = {"ignore_index": 255, "class_weight": weighted(tag)}
    main, aux = (resize(x, labels.shape[-2:], align_corners=align_corners) for x in (main, aux))
    ohem = [ohem_cross_entropy(x, labels, **settings(tag), **options) for x in (main, aux)]
    return {"ohem_main": ohem[0], "ohem_aux": ohem[1], "ce_aux": cross_entropy(aux, labels, **options)}


def totals(terms):
    """The total loss of each code base."""
    return {
        "mmseg": terms["ohem_main"] + 0.4 * terms["ohem_aux"],
        "as_coded": 0.4 * terms["ohem_main"] + terms["ce_aux"],
        "aux04": terms["ohem_main"] + 0.4 * terms["ce_aux"],
    }


def seed_losses(main, aux, labels, tag, align_corners=True):
    """The loss of pyradd/DDRNet-pytorch without and with the auxiliary head."""
    options = {"ignore_index": -1}
    if tag == "plain_ce":
        options |= {"threshold": 1.0}  # every pixel is hard enough
    else:
        options |= {"class_weight": weighted(tag), **({} if tag == "default" else settings(tag))}
    resized = (resize(x, labels.shape[-2:], align_corners=align_corners) for x in (main, aux))
    first, second = (ohem_pyradd(x, labels, **options) for x in resized)
    return {"off": first, "on": first + 0.4 * second}


def check_chen(case, prefix, tag, main, aux, labels, align_corners=False):
    terms = chen(main, aux, labels, tag, align_corners)
    for name, value in (terms | totals(terms)).items():
        key = f"{prefix}mmseg_{tag}" if name == "mmseg" else f"{prefix}chen_{tag}_{name}"
        assert value.item() == pytest.approx(case[key].item(), rel=1e-5), key


def test_class_weights(golden):
    check(WEIGHT, golden("losses_full_resolution")["class_weights"].float(), 1e-7)


def test_losses_at_full_resolution(golden):
    case = golden("losses_full_resolution")
    main, aux, labels = case["logits_main"], case["logits_aux"], case["labels"].long()
    tags = sorted({k.removeprefix("pyradd_").rsplit("_aux_", 1)[0] for k in case if k.startswith("pyradd_")}, key=len)
    assert len(tags) == 8
    for tag in tags:
        for name, value in seed_losses(main, aux, labels, tag).items():
            assert value.item() == pytest.approx(case[f"pyradd_{tag}_aux_{name}"].item(), rel=1e-5), tag
    ours = torch.where(labels == -1, 255, labels)
    tags = [k.removeprefix("mmseg_") for k in case if k.startswith("mmseg_")]
    assert len(tags) == 8
    for tag in tags:
        check_chen(case, "", tag, main, aux, ours)


def test_losses_at_an_eighth(golden):
    case = golden("losses_eighth_resolution")
    main, aux, labels = case["logits_main"], case["logits_aux"], case["labels"].long()
    for align_corners in (False, True):
        prefix = f"ac_{str(align_corners).lower()}_"
        tags = [k.removeprefix(f"{prefix}mmseg_") for k in case if k.startswith(f"{prefix}mmseg_")]
        assert len(tags) == 6
        for tag in tags:
            check_chen(case, prefix, tag, main, aux, labels, align_corners)


def test_losses_of_many_pixels(golden):
    case, random = golden("losses_default_min_kept_384"), np.random.RandomState(122)
    labels = random.randint(0, 19, (1, 384, 384))
    labels[random.uniform(size=labels.shape) < 0.1] = -1
    logits = torch.from_numpy((2 * random.standard_normal((1, 19, 384, 384))).astype("float32"))
    labels = torch.from_numpy(labels)
    assert (labels >= 0).sum().item() == case["valid"].item()
    seed = ohem_pyradd(logits, labels, ignore_index=-1, class_weight=WEIGHT)
    assert seed.item() == pytest.approx(case["pyradd_default_aux_off"].item(), rel=1e-5)
    plain = ohem_pyradd(logits, labels, ignore_index=-1, class_weight=WEIGHT, threshold=1.0)
    assert plain.item() == pytest.approx(case["weighted_ce"].item(), rel=1e-5)
    for kept in (131_072, 100_000):
        loss = ohem_cross_entropy(logits, labels, ignore_index=-1, min_kept=kept, class_weight=WEIGHT)
        assert loss.item() == pytest.approx(case[f"mmseg_t09_k{kept}"].item(), rel=1e-5)


def gradient_case(key, main, aux, labels):
    """The loss of a stored gradient case, from logits at 1/8."""
    if key.startswith("pyradd_"):
        tag = key.removeprefix("pyradd_").rsplit("_aux_", 1)[0]
        return seed_losses(main, aux, labels, tag)[key.rsplit("_", 1)[1]]
    kind, tag = key.removesuffix("_as_coded").split("_", 1)
    terms = totals(chen(main, aux, torch.where(labels == -1, 255, labels), f"{tag}_weighted"))
    return terms["mmseg" if kind == "mmseg" else "as_coded"]


def test_gradients(slim, golden):
    case, model = golden("gradients_23_slim_eval_bn"), copy.deepcopy(slim)
    official = {official: name for name, official in model.key_map().items()}
    parameters = dict(model.named_parameters())
    keys = [key.removesuffix("_loss") for key in case if key.endswith("_loss")]
    assert len(keys) == 7
    features = model.backbone(case["x"])
    main, aux = model.decode(features), model.auxiliary_head(features.middle)
    for key in keys:
        model.zero_grad()
        loss = gradient_case(key, main, aux, case["labels"].long())
        loss.backward(retain_graph=True)
        assert loss.item() == pytest.approx(case[f"{key}_loss"].item(), rel=1e-5), key
        gradients = {n: torch.zeros(1) if p.grad is None else p.grad for n, p in parameters.items()}
        norms = [gradients[official[name]].double().norm().item() for name in case["param_names"]]
        assert norms == pytest.approx(case[f"{key}_gradnorm"].tolist(), rel=1e-3, abs=1e-7), key
        total = torch.stack([g.double().norm() for g in gradients.values()]).norm().item()
        assert total == pytest.approx(case[f"{key}_total_gradnorm"].item(), rel=1e-3), key


def test_the_models_own_loss(filled, golden):
    """`losses` combines the same terms: MMSegmentation's default, and pyradd's with its last resize."""
    case = golden("gradients_23_slim_eval_bn")
    labels = torch.where(case["labels"] == -1, 255, case["labels"]).long()
    model = filled("23_slim")
    found = model.losses(case["x"], labels, loss=LossConfig("ohem", CLASS_WEIGHT))
    assert found["loss"].item() == pytest.approx(case["mmseg_t09_k131072_loss"].item(), rel=1e-5)
    model = filled("23_slim", align_corners=True)
    loss = LossConfig("ohem_pyradd", CLASS_WEIGHT, ohem_threshold=0.05, ohem_min_kept=6000)
    expected = case["pyradd_t005_k6000_aux_on_loss"].item()
    assert model.losses(case["x"], labels, loss=loss)["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_schedules(golden):
    case = golden("schedule")

    def rates(steps, base=0.003, **settings):
        schedule = ScheduleConfig(**{"iterations": 100, "power": 0.9, "warmup_iterations": 0, **settings})
        return [learning_rate(schedule, base, int(step)) for step in steps]

    ten = {"warmup_iterations": 10, "warmup_ratio": 1 / 3}
    for key, settings in {
        "no_warmup": {},
        "linear_warmup10": {**ten, "warmup": "linear"},
        "constant_warmup10": {**ten, "warmup": "constant"},
        "target_lr_1e_4": {**ten, "warmup": "linear", "min_lr": 1e-4},
    }.items():
        assert rates(case["steps"], **settings) == pytest.approx(case[key].tolist(), rel=1e-6), key
    ours = rates(case["steps_default_run"], iterations=148_750)
    assert ours == pytest.approx(case["default_run"].tolist(), rel=1e-6)
    # There the first two iterations use the base rate, so all later ones lag by one step.
    ours = rates((case["chen_steps"] - 1).clamp(min=0), base=0.01)
    assert ours == pytest.approx(case["chen_lr_used_at_step"].tolist(), rel=1e-6)


def test_metric(golden):
    case = golden("metric")
    matrix = ConfusionMatrix(19, ignore_index=-1)
    for logits, labels in zip(case["logits"], case["labels"].long(), strict=True):
        matrix.update(logits.argmax(0), labels)
    figures = matrix.compute()
    assert float(figures["mIoU"]) == pytest.approx(case["miou_nanmean"].item(), rel=1e-6)
    assert float(figures["aAcc"]) == pytest.approx(case["pixacc_standard"].item(), rel=1e-6)
    iou = torch.as_tensor(figures["IoU"]).float()
    torch.testing.assert_close(iou, case["iou_per_class_nan"].float(), equal_nan=True, rtol=1e-6, atol=1e-6)
    # An absent class counts as 0 in pyradd's mean.
    assert iou.nan_to_num().mean().item() == pytest.approx(case["pyradd_miou"].item(), rel=1e-5)
