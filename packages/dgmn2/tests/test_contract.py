"""DGMN2 satisfies the contract of every segmentor."""

import pytest
import torch

from dgmn2_seg.backbone import Block
from dgmn2_seg.configs import DGMN2Config
from dgmn2_seg.model import DGMN2
from segcore.config.schema import LossConfig
from segcore.testing import contract, start_weights

HEADS = {
    "fpn": DGMN2Config(num_classes=5, backbone="nano"),
    "setr_naive": DGMN2Config(num_classes=5, backbone="nano", head="setr_naive", img_size=65),
    "setr_pup": DGMN2Config(num_classes=5, backbone="nano", head="setr_pup"),
    "setr_mla": DGMN2Config(num_classes=5, backbone="nano", head="setr_mla", img_size=None),
}


def build(head, **settings):
    torch.manual_seed(0)
    config = HEADS[head]
    return DGMN2Config(**{**vars(config), **settings}).build()


every_head = pytest.mark.parametrize("head", HEADS)


def test_products():
    contract.check_products(build("fpn"))


@every_head
def test_forward_and_seeds(head):
    contract.check_forward(build(head))
    contract.check_seeds(build(head))
    contract.check_plain(build(head))


@every_head
def test_training(head):
    contract.check_backward(build(head))
    contract.check_training_draws(build(head))
    contract.check_all_ignored(build(head))
    contract.check_losses(build(head))


@every_head
def test_recomputed_activations(head):
    contract.check_recomputation(lambda: build(head, drop_path=0.3))


@every_head
def test_state_dict(head):
    contract.check_state_dict(lambda: build(head))


@every_head
def test_start_weights_of_other_classes(head, tmp_path):
    start_weights.check_other_classes(HEADS[head], tmp_path)


def test_start_weights_of_other_channels(tmp_path):
    start_weights.check_other_channels(HEADS["fpn"], tmp_path)


def test_configs():
    contract.check_configs("dgmn2_seg")


def test_help():
    contract.check_help("dgmn2_seg")


def test_an_ignored_batch_has_no_loss_where_labeled_pixels_count():
    loss, labels = LossConfig(avg_non_ignore=True), torch.full((2, 64, 96), 255)
    assert build("fpn").losses(contract.images(2), labels, loss=loss)["loss"] == 0


def test_probabilities(tmp_path):
    contract.check_probabilities(build("fpn"), HEADS["fpn"], tmp_path)


def test_arguments():
    contract.check_arguments(DGMN2Config, DGMN2)


@torch.no_grad()
@every_head
def test_every_size_down_to_one_pixel(head):
    model = build(head).eval()
    for size in ((1, 1), (2, 130), (33, 5)):
        assert model(contract.images(1, *size)).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize(
    ("head", "img_size", "expected"),
    [
        ("setr_naive", 65, (65, 65)),
        ("setr_naive", None, (64, 96)),
        ("setr_pup", 65, (192, 192)),  # 16 times the width of 12
        ("setr_pup", None, (128, 192)),
        ("setr_mla", 65, (65, 65)),
        ("setr_mla", None, (64, 96)),
    ],
)
def test_setr_heads_output_squares_by_default(head, img_size, expected):
    model = build(head, img_size=img_size).eval()
    assert model(contract.images(1), resize=False).shape[2:] == expected


@torch.no_grad()
def test_fuse_returns_a_copy_with_the_same_output():
    for head in HEADS:
        model = build(head)
        model.train()(contract.images(4))  # running statistics other than the initial ones
        fused = model.fuse()
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fused.modules())
        assert any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
        images = contract.images(2, 51, 70)
        torch.testing.assert_close(fused(images), model.eval()(images), atol=1e-4, rtol=1e-4)


def test_stochastic_depth_grows_linearly_and_drops_whole_branches():
    model = build("fpn", backbone="tiny", drop_path=0.7)
    rates = [m.drop_path.rate for m in model.modules() if isinstance(m, Block)]
    assert rates == pytest.approx([0.1 * i for i in range(8)])
    block, x = Block(32, 1, 2, 4, 0.5).train(), torch.randn(64, 16, 32)
    unchanged = (block(x, 4, 4) == x).flatten(1).all(1).double().mean()
    assert 0.05 < unchanged < 0.5, "a quarter of the images pass both branches untouched"
    assert not torch.equal(block.eval()(x, 4, 4), x)


def test_dropout_is_for_training_only():
    model = build("fpn", dropout=0.5)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0
    images, labels = contract.images(2), contract.labels(model, 2)
    assert not torch.equal(*(model.train().losses(images, labels)["loss"] for _ in range(2)))
    assert torch.equal(*(model.eval().losses(images, labels)["loss"] for _ in range(2)))


def test_other_channel_counts():
    assert build("fpn", in_channels=5).eval()(contract.images(1, channels=5)).shape == (1, 5, 64, 96)


@torch.no_grad()
def test_half_and_double_precision():
    images = contract.images(1)
    assert build("fpn").double().eval()(images.double()).dtype == torch.float64
    model = build("setr_mla").eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images).isfinite().all()


@pytest.mark.parametrize("wrong", [{"dropout": 1.0}, {"drop_path": -0.1}, {"img_size": 0}])
def test_wrong_settings_are_refused(wrong):
    (name,) = wrong
    assert f"model.{name}" in contract.refusal(lambda: DGMN2Config(**wrong))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "size"), [("fpn", (97, 97)), ("fpn", (97, 193)), ("setr_naive", (129, 129)), ("setr_mla", (97, 97))]
)
def test_onnx(head, size, tmp_path):
    """The published window 769x769 (6 * 128 + 1), reduced, and one that is not square."""
    pytest.importorskip("onnxscript")
    contract.check_onnx(build(head), HEADS[head], size, tmp_path / "model.onnx")
