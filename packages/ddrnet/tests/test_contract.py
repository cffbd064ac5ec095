"""DDRNet satisfies the contract of every segmentor."""

import pytest
import torch

from ddrnet_seg.configs import DDRNetConfig
from ddrnet_seg.model import DDRNet
from segcore.config.schema import LossConfig
from segcore.models.layers import ConvNorm
from segcore.testing import contract, start_weights

VARIANTS = {
    "23_slim": DDRNetConfig(num_classes=5),
    "pyradd": DDRNetConfig(num_classes=5, auxiliary=False, align_corners=True),
    "39": DDRNetConfig(num_classes=5, variant="39"),
}


def build(variant):
    """A model with weights scaled by fan-in: with the initial weights, maps grow from block to block."""
    torch.manual_seed(0)
    model = VARIANTS[variant].build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 4:
                parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    return model


SMALL = ["23_slim", "pyradd"]


@pytest.mark.parametrize("variant", SMALL)
def test_forward_and_seeds(variant):
    contract.check_forward(build(variant))
    contract.check_seeds(build(variant))


def test_products():
    contract.check_products(build(SMALL[0]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_plain(variant):
    contract.check_plain(build(variant))


@pytest.mark.parametrize("variant", SMALL)
def test_training(variant):
    contract.check_backward(build(variant))
    contract.check_training_draws(build(variant))
    contract.check_all_ignored(build(variant))
    contract.check_losses(build(variant))


def test_recomputed_activations():
    contract.check_recomputation(lambda: build("23_slim"))


def test_probabilities(tmp_path):
    contract.check_probabilities(build("23_slim"), VARIANTS["23_slim"], tmp_path)


def test_arguments():
    contract.check_arguments(DDRNetConfig, DDRNet)


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict(variant):
    contract.check_state_dict(lambda: VARIANTS[variant].build())


def test_start_weights_of_other_classes(tmp_path):
    start_weights.check_other_classes(VARIANTS["23_slim"], tmp_path)


def test_start_weights_of_other_channels(tmp_path):
    start_weights.check_other_channels(VARIANTS["23_slim"], tmp_path)


def test_configs():
    contract.check_configs("ddrnet_seg")


def test_help():
    contract.check_help("ddrnet_seg")


@torch.no_grad()
def test_padding_equals_mean_color_around_the_image():
    """57x90 becomes 64x96: the output equals that for the image surrounded by the mean color."""
    model, images = build("23_slim").eval(), contract.images(1)
    images[..., 57:, :] = 0
    images[..., :, 90:] = 0
    torch.testing.assert_close(model(images[..., :57, :90]), model(images)[..., :57, :90])


@torch.no_grad()
def test_fuse_returns_a_copy_with_the_same_output():
    model = build("23_slim")
    with torch.no_grad():
        model.train()(contract.images(4))  # running statistics other than the initial ones
    names = set(model.state_dict())
    fused = model.fuse()
    folded = [m for m in fused.modules() if isinstance(m, ConvNorm)]
    assert len(folded) == 43
    assert not any(hasattr(m, "norm") for m in folded)
    assert fused.training is False
    assert set(model.state_dict()) == names
    assert model.training
    assert model.auxiliary_head is not None
    images = contract.images(2, 51, 70)
    torch.testing.assert_close(fused(images), model.eval()(images), atol=1e-4, rtol=1e-4)


def test_a_single_image_cannot_be_trained_on():
    model = build("23_slim")
    assert "device_batch_size" in contract.refusal(lambda: model.losses(contract.images(1), contract.labels(model, 1)))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    assert model.losses(contract.images(1), contract.labels(model, 1))["loss"].isfinite()


def test_wrong_settings_are_refused():
    assert "model.auxiliary_weight" in contract.refusal(lambda: DDRNetConfig(auxiliary_weight=0.0))
    for wrong in ({"ohem_threshold": 0.0}, {"ohem_min_kept": 0}):
        (name,) = wrong
        assert f"loss.{name}" in contract.refusal(lambda wrong=wrong: LossConfig("ohem", **wrong))


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "size"), [(SMALL[0], (128, 256)), (SMALL[-1], (97, 129))])
def test_onnx(variant, size, tmp_path):
    """The published size 1024x2048, reduced, and one that is padded."""
    pytest.importorskip("onnxscript")
    contract.check_onnx(build(variant), VARIANTS[variant], size, tmp_path / "model.onnx")
