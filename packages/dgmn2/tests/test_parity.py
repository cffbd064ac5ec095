"""The model computes what the published code computed: every golden case at the tolerance of its README.

The cases of the deformable unfold are in segcore's tests, with the operator.
"""

import pytest
import torch

from dgmn2_seg.backbone import VARIANTS, Attention, Backbone, RelativePositionBias
from dgmn2_seg.official import RULES
from segcore.config.schema import EvalConfig, LossConfig
from segcore.evaluation import predictor as inference
from segcore.evaluation.scores import to_probabilities
from segcore.models.key_map import rename

ATTENTION = {
    "qkv.weight": "qkv.weight",
    "qkv.bias": "qkv.bias",
    "proj.weight": "proj.weight",
    "proj.bias": "proj.bias",
    "offset.weight": "conv_offset.weight",
    "offset.bias": "conv_offset.bias",
    "position.y": "pos_emb.rel_height",
    "position.x": "pos_emb.rel_width",
}
SLIDE = EvalConfig((2048, 1024), mode="slide", crop=(65, 65), stride=(43, 43))


def check(ours, expected, atol=1e-4):
    assert ours.shape == expected.shape
    worst = (ours - expected).abs().max().item()
    assert worst <= atol, f"off by {worst:.3g}, allowed {atol:.3g}"


@pytest.mark.parametrize("tag", ["native7x7", "square9x9", "h5w8", "h8w5", "h3w12"])
def test_position_term(golden, tag):
    case = golden("rel_pos_emb")
    position = RelativePositionBias(7, 8)
    position.load_state_dict({"y": case["rel_height"], "x": case["rel_width"]})
    q = case[f"{tag}_q"].requires_grad_()  # each of the two is one head of one image
    bias = position(q.unsqueeze(3)).squeeze(1)
    expected = case[f"{tag}_bias"]
    check(bias, expected.flatten(1, 2), 1e-5)
    bias.backward(case[f"{tag}_grad_bias"].flatten(1, 2))
    check(q.grad, case[f"{tag}_grad_q"], 1e-5)
    check(position.y.grad, case[f"{tag}_grad_rel_height"], 1e-5)
    check(position.x.grad, case[f"{tag}_grad_rel_width"], 1e-5)


@pytest.mark.parametrize(("tag", "size", "heads"), [("h6w9", (6, 9), 2), ("h7w7", (7, 7), 1)])
def test_attention(golden, fill, tag, size, heads):
    case = golden("attention")
    x = case[f"{tag}_x"].requires_grad_()
    attention = Attention(x.shape[2], heads, side=7)
    weights = fill({official: attention.state_dict()[name].shape for name, official in ATTENTION.items()})
    attention.load_state_dict({name: weights[official] for name, official in ATTENTION.items()})
    out = attention(x, *size)
    check(out, case[f"{tag}_out"], 1e-5)
    out.backward(case[f"{tag}_grad_out"])
    check(x.grad, case[f"{tag}_grad_x"], 1e-5)
    check(attention.offset.weight.grad, case[f"{tag}_grad_conv_offset_weight"], 3e-5)
    check(attention.position.y.grad, case[f"{tag}_grad_rel_height"], 1e-5)
    check(attention.position.x.grad, case[f"{tag}_grad_rel_width"], 1e-5)
    check(attention.qkv.bias.grad, case[f"{tag}_grad_qkv_bias"], 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("size", ["64x96", "65x65"])
def test_backbone(golden, fill, size):
    """In its three output modes; tensors are filled by names without `backbone.` here."""
    case = golden("backbone_tiny")
    for mode, dense, first in (("neck", False, 0), ("decode_head", True, 3), ("decode_head_multi", True, 0)):
        backbone = Backbone(VARIANTS["tiny"], dense=dense).eval()
        for name, tensor in backbone.state_dict(prefix="backbone.").items():
            if tensor.is_floating_point():
                official = rename(name, RULES).removeprefix("backbone.")
                tensor.copy_(fill({official: tensor.shape})[official])
        maps = backbone(case[f"{size}_image"])[first:]
        for k, x in enumerate(maps):
            check(x, case[f"{size}_{mode}_{k}"])
        assert f"{size}_{mode}_{len(maps)}" not in case


@torch.no_grad()
def test_logits_of_semantic_fpn(golden, filled):
    case, model = golden("logits"), filled("fpn")
    maps = model.backbone(case["fpn_image"])
    for k, x in enumerate(model.head.fpn(maps)):
        check(torch.stack((x.mean(), x.std())), case[f"fpn_neck_{k}_mean_std"])
    check(model.head(maps, (64, 64)), case["fpn_head_logits"])
    check(model(case["fpn_image"]), case["fpn_logits"])


@torch.no_grad()
@pytest.mark.parametrize("name", ["naive", "pup", "mla"])
def test_logits_of_setr(golden, filled, name):
    case, model = golden("logits"), filled(f"setr_{name}", img_size=81)
    logits = model.logits(case[f"{name}_image"])
    assert list(logits.shape) == case[f"{name}_head_shape"].tolist()
    if name == "pup":
        check(logits[..., ::8, ::8], case["pup_head_logits_sub8"])
    check(model(case[f"{name}_image"]), case[f"{name}_logits"])


def test_loss_and_gradients(golden, filled):
    case, model = golden("loss_fpn_tiny"), filled("fpn")
    image, label = case["image"].requires_grad_(), case["label"].long()
    losses = model.losses(image, label)
    losses["loss"].backward()
    assert losses["loss"].item() == pytest.approx(case["loss"].item(), abs=1e-5)
    assert losses["decode.acc_seg"].item() == pytest.approx(case["acc_seg"].item(), abs=1e-3)
    official = {official: name for name, official in model.key_map().items()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    norms = [gradients[official[str(name)]].double().norm().item() for name in case["grad_names"]]
    assert norms == pytest.approx(case["grad_norms"].tolist(), rel=1e-4)
    total = torch.stack([g.double().norm() for g in gradients.values()]).norm().item()
    assert total == pytest.approx(case["total_grad_norm"].item(), rel=1e-4)
    check(image.grad, case["grad_image"], 1e-6)
    check(gradients["backbone.stages.0.blocks.0.attention.offset.bias"], case["grad_conv_offset_bias"], 2e-6)
    check(gradients["backbone.stages.3.blocks.0.attention.position.x"], case["grad_rel_width"], 1e-6)


@torch.no_grad()
def test_loss_over_labeled_pixels_only(golden, filled):
    case, model = golden("loss_fpn_tiny"), filled("fpn")
    labeled = LossConfig(avg_non_ignore=True)
    loss = model.losses(case["image"], case["label"].long(), loss=labeled)["loss"].item()
    assert loss == pytest.approx(case["loss_mean_over_valid_only"].item(), abs=1e-5)
    assert loss == pytest.approx((case["loss"] / case["valid_fraction"]).item(), abs=1e-5)


@torch.no_grad()
def test_training_mode(golden, filled):
    case, model = golden("loss_fpn_tiny"), filled("fpn", dropout=0.0).train()
    loss = model.losses(case["image"], case["label"].long())["loss"].item()
    assert loss == pytest.approx(case["loss_train_bn"].item(), abs=1e-5)
    norm = model.backbone.stages[0].embed[0].norm
    check(norm.running_mean, case["train_bn_running_mean_after"], 1e-5)
    check(norm.running_var, case["train_bn_running_var_after"], 1e-5)


def slide(model, image):
    """The mean of the windows' logits, as `test` computes it."""
    [(_, mean)] = inference.mean_over_windows(lambda x, seeds: [("final", model(x))], image, SLIDE, [0], 0)
    return mean


@torch.no_grad()
def test_sliding_windows(golden, filled):
    """Includes non-square windows, for which SETR's heads output square maps."""
    case = golden("slide")
    logits = slide(filled("fpn"), case["fpn_image"])
    check(logits, case["fpn_slide_logits"])
    probabilities = to_probabilities(logits, (72, 104), True)
    check(probabilities[..., ::3, ::3], case["fpn_prob_rescaled_sub3"], 1e-5)
    assert (probabilities.argmax(1) == case["fpn_pred_rescaled"]).double().mean() > 0.999
    naive = filled("setr_naive", img_size=65)
    check(slide(naive, case["naive_image"]), case["naive_slide_logits"])


@torch.no_grad()
def test_multi_scale_and_flip(golden, filled):
    case, model, views = golden("slide"), filled("fpn"), []
    for image in (case["fpn_image"], case["fpn_image2"]):
        views.append(to_probabilities(slide(model, image), (72, 104), True))
        views.append(to_probabilities(slide(model, image.flip(-1)), (72, 104), True).flip(-1))
    mean = torch.stack(views).mean(0)
    check(mean[..., ::3, ::3], case["fpn_msflip_prob_sub3"], 1e-5)
    clear = case["fpn_msflip_margin"][0] > 1e-3
    assert torch.equal(mean.argmax(1)[0][clear], case["fpn_msflip_pred"].long()[clear])
