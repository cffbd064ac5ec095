"""Backbones, heads and losses that methods share."""

import math

import pytest
import timm
import torch

from segcore.config.schema import LossConfig
from segcore.errors import UserError
from segcore.models.backbones import build_backbone, shifted_window_mask
from segcore.models.heads import FPN, FCNHead
from segcore.models.layers import DropPath
from segcore.models.losses import cross_entropy, pixel_accuracy, segmentation_loss

IMAGE = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["convnext_t", "swin_t", "resnet18"])
def test_four_maps_at_strides_4_to_32(name):
    backbone = build_backbone(name)
    maps = backbone(IMAGE)
    assert [tuple(x.shape) for x in maps] == [
        (1, c, 64 // s, 96 // s) for c, s in zip(backbone.channels, (4, 8, 16, 32), strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "convnext_xxl",
            r"no backbone 'convnext_xxl' .did you mean convnext_\w+\?\); known are convnext_t, convnext_s",
        ),
        ("mobilenetv3_smal_050", r"did you mean mobilenetv3_small_050\?"),
        ("resnet18.a1_in1k", r"did you mean resnet18\?"),
        ("hf_hub:timm/resnet18.a1_in1k", "there is no backbone"),
        ("x", "there is no backbone 'x'; known are"),
        (
            "vit_tiny_patch16_224",
            r"no maps at strides 4, 8, 16, 32 .* .its strides are 16, 16, 16, 16.; choose another",
        ),
        ("efficientvit_m0", "efficientvit_m0 has no maps at strides 4, 8, 16, 32 for images of any size; choose"),
        (
            "coatnet_pico_rw_224",
            "coatnet_pico_rw_224 has no maps at strides 4, 8, 16, 32 for images of any size; choose",
        ),
    ],
)
def test_backbone_that_cannot_be_used_is_named(name, text, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    with pytest.raises(UserError, match=text) as caught:
        build_backbone(name)
    assert "\n" not in str(caught.value)


FAMILIES = ("mobilenetv3_small_050", "regnetx_002", "convnextv2_atto", "mambaout_femto", "swinv2_tiny_window8_256")
"""Models of timm with other stems, names and layouts: the last two answer (N, H, W, C), Swin is made for one size."""


@pytest.mark.parametrize(("name", "in_channels"), [*zip(FAMILIES, (1, 5, 1, 5, 1), strict=True)])
def test_any_model_of_timm_gives_maps_of_any_image(name, in_channels):
    backbone = build_backbone(name, in_channels=in_channels)
    assert backbone.training
    for height, width in ((51, 70), (33, 64), (64, 96)):
        images = torch.randn(2, in_channels, height, width)
        maps = backbone(images)
        sides = [(math.ceil(height / s), math.ceil(width / s)) for s in backbone.strides]
        assert [tuple(x.shape) for x in maps] == [(2, c, *hw) for c, hw in zip(backbone.channels, sides, strict=True)]
    torch.stack([x.mean() for x in maps]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())


@pytest.mark.parametrize("name", [*FAMILIES, "resnet18", "hrnet_w18_small", "twins_svt_small"])
def test_timm_weights_of_any_model_load_strictly(name):
    options = {"img_size": (64, 96)} if name.startswith("swin") else {}
    source, backbone = timm.create_model(name, **options).eval(), build_backbone(name).eval()
    state = timm.create_model(name).state_dict()
    source.load_state_dict(state)
    report = backbone.load_pretrained(state)
    assert report.loaded + len(report.dropped) + len(report.ignored) == len(state)
    with torch.no_grad():
        if name != "hrnet_w18_small":  # whose own maps timm gives in no other way
            expected = source.forward_intermediates(IMAGE, indices=4, intermediates_only=True)
            torch.testing.assert_close(backbone(IMAGE), expected, atol=1e-4, rtol=1e-4)
    assert report.dropped, "the classifier is no part of the backbone"
    used = [name for name, tensor in state.items() if name not in report.dropped and "weight" in name]
    for wrong in (
        {name: tensor for name, tensor in state.items() if name != used[0]},
        state | {used[-1]: torch.ones(3, 3)},
        state | {used[-1].replace("weight", "more"): torch.ones(3)},  # as of a deeper model
    ):
        with pytest.raises(UserError, match="do not fit this backbone"):
            backbone.load_pretrained(wrong)


@pytest.mark.parametrize(("name", "tag"), [("convnext_t", "convnext_tiny"), ("swin_t", "swin_tiny_patch4_window7_224")])
def test_timm_weights_load_strictly_and_answer_as_timm(name, tag):
    torch.manual_seed(0)
    source = timm.create_model(tag, pretrained=False).eval()
    backbone = build_backbone(name).eval()
    report = backbone.load_pretrained(source.state_dict())
    assert set(report.dropped) >= {n for n in source.state_dict() if n.startswith("head.fc")}
    with torch.no_grad():
        if name == "convnext_t":  # whose three downsampling norms have another eps: too small to see here
            theirs = source.stages[0](source.stem(IMAGE))
            ours = backbone.net.stages[0](backbone.net.stem(IMAGE))
            torch.testing.assert_close(backbone.norms[3].weight, source.head.norm.weight)
        else:  # at its own size timm's order of padding and shifting makes no difference, before the last stage
            image = torch.randn(1, 3, 224, 224)
            theirs = source.layers[:3](source.patch_embed(image)).permute(0, 3, 1, 2)
            backbone.norms[2] = torch.nn.Identity()
            ours = backbone(image)[2]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    state = source.state_dict()
    state.pop(next(n for n in state if n.endswith("mlp.fc1.weight")))
    with pytest.raises(UserError, match="1 tensors missing"):
        backbone.load_pretrained(state)


def test_official_backbone_names_load_as_well():
    source, target = build_backbone("swin_t"), build_backbone("swin_t")
    names = source.key_map()
    state = {f"backbone.{names[n]}": t for n, t in source.state_dict().items() if n.startswith("net.")}
    for n in state:
        if ".downsample." in n:  # what the loader must undo
            parts = state[n].reshape(*state[n].shape[:-1], 2, 2, -1)
            state[n] = parts.movedim((-3, -2, -1), (-1, -2, -3)).reshape(state[n].shape)
    target.load_pretrained(state)
    assert all(torch.equal(source.state_dict()[n], t) for n, t in target.state_dict().items() if n.startswith("net."))


def test_window_tables_are_resized_and_stems_adapted():
    source = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False)
    backbone = build_backbone("swin_t", in_channels=5, window=12)
    backbone.load_pretrained(source.state_dict())
    name = "layers.0.blocks.0.attn.relative_position_bias_table"
    before, after = source.state_dict()[name], backbone.net.state_dict()[name]
    assert after.shape == (23 * 23, 3)
    expected = torch.nn.functional.interpolate(before.T.reshape(1, 3, 13, 13), size=(23, 23), mode="bicubic")
    torch.testing.assert_close(after, expected.reshape(3, -1).T)
    assert backbone.net.patch_embed.proj.weight.shape[1] == 5


def test_shifted_window_mask_separates_what_the_shift_brings_together():
    mask = shifted_window_mask(8, 8, 4, torch.device("cpu"))
    assert mask.shape == (4, 16, 16)
    assert torch.equal(mask, mask.transpose(1, 2))
    assert not mask[0].any(), "the first window is one region"
    assert mask[3].unique().tolist() == [-100.0, 0.0]
    assert mask[3, 0].eq(0).sum() == 4, "the last window has four regions of 2x2"
    assert shifted_window_mask(3, 3, 4, torch.device("cpu")).shape == (1, 16, 16), "a window never shrinks"


def test_fpn_adds_coarse_to_fine():
    fpn = FPN((8, 16), 32).eval()
    fine, coarse = torch.randn(1, 8, 6, 7), torch.randn(1, 16, 3, 4)
    a, b = fpn([fine, coarse])
    assert a.shape == (1, 32, 6, 7)
    assert torch.equal(b, fpn.output[1](fpn.lateral[1](coarse)))
    assert not torch.allclose(a, fpn.output[0](fpn.lateral[0](fine)))


def test_fcn_head_starts_near_zero():
    logits = FCNHead(32, 32, 5).eval()(torch.randn(2, 32, 4, 4))
    assert logits.shape == (2, 5, 4, 4)
    assert logits.abs().max() < 1


def test_cross_entropy_averages_over_ignored_pixels_too():
    logits = torch.zeros(1, 4, 2, 2)
    labels = torch.tensor([[[0, 255], [255, 255]]])
    assert cross_entropy(logits, labels, ignore_index=255).item() == pytest.approx(math.log(4) / 4)
    assert cross_entropy(logits, torch.full((1, 2, 2), 255), ignore_index=255) == 0


def test_accuracy_counts_the_labeled_pixels():
    logits = torch.eye(4)[None, :, :, None]  # pixel i is of class i
    labels = torch.tensor([[[0], [1], [3], [255]]])
    assert pixel_accuracy(logits, labels, 255).item() == pytest.approx(200 / 3)
    assert pixel_accuracy(logits, torch.full_like(labels, 255), 255) == 0  # a NaN would be that of all the others


def test_class_weights_leave_the_mean_over_pixels():
    logits = torch.zeros(1, 4, 2, 2)
    labels = torch.tensor([[[0, 1], [1, 255]]])
    loss = cross_entropy(logits, labels, ignore_index=255, class_weight=torch.tensor([5.0, 0.5, 1, 1]))
    assert loss.item() == pytest.approx((5 + 0.5 + 0.5) * math.log(4) / 4)


def test_logits_are_resized_and_the_loss_is_computed_in_float32():
    logits = torch.randn(1, 3, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    loss, _ = segmentation_loss(logits, torch.zeros(1, 9, 7, dtype=torch.int64), LossConfig(), ignore_index=255)
    assert loss.dtype == torch.float32
    loss.backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(2000, 3), (2000, 2, 3, 4)])
def test_drop_path_is_that_of_torchvision_and_timm(shape):
    """The same draws, by sample; what is kept is scaled, so that the mean stays."""
    torchvision = pytest.importorskip("torchvision")
    x, found = torch.ones(shape), []
    for layer in (DropPath(0.25), torchvision.ops.StochasticDepth(0.25, "row"), timm.layers.DropPath(0.25)):
        torch.manual_seed(0)
        found.append(layer.train()(x))
        assert layer.eval()(x) is x
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    rows = found[0].flatten(1)
    assert ((rows == 0).all(1) | (rows == 1 / 0.75).all(1)).all()
    assert rows.mean() == pytest.approx(1, abs=0.05)
    assert not DropPath(1.0)(x).any()
    assert DropPath(0.0)(x) is x
