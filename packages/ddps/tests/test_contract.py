"""DDPS and its base models satisfy the contract of every segmentor."""

from dataclasses import replace

import pytest
import torch

from ddps_seg.base import BaseModel
from ddps_seg.configs import BaseModelConfig, DDPSConfig
from ddps_seg.model import DDPS
from segcore.errors import UserError
from segcore.models.losses import LOSSES
from segcore.testing import contract, start_weights

SMALL = {
    "num_classes": 5, "width": 8, "multipliers": (1, 1), "output_width": 16, "num_train_timesteps": 4,
    "condition_width": 32, "drop_path": 0.0,
}  # fmt: skip
TRAINED = {**SMALL, "freeze": "none", "train_labels": True}
VARIANTS = {
    "segformer": BaseModelConfig(num_classes=5, backbone="mit_b0", drop_path=0.0),
    "deeplab": BaseModelConfig(num_classes=5, backbone="mobilenet_v2", condition_width=64, auxiliary=True),
    "deeplab on timm": BaseModelConfig(
        num_classes=5, backbone="mobilenetv3_small_050", condition_width=64, auxiliary=True
    ),
    "small base": BaseModelConfig(num_classes=5, backbone="resnet18", condition_width=32),
    "prior on mit": DDPSConfig(backbone="mit_b0", **TRAINED),
    "prior on mobilenet": DDPSConfig(backbone="mobilenet_v2", **{**TRAINED, "noise_schedule": "cosine"}),
    "guided": DDPSConfig(backbone="resnet18", guidance_scale=0.4, condition_dropout=0.5, **TRAINED),
    "posterior": DDPSConfig(backbone="resnet18", mode="q_posterior", num_inference_steps=2, **TRAINED),
    "bayes": DDPSConfig(backbone="resnet18", mode="bayes", **TRAINED),
    "single-step": DDPSConfig(backbone="resnet18", single_step=True, **TRAINED),
}
PLAIN = ["segformer", "deeplab", "deeplab on timm", "small base"]
PRIORS = [name for name, config in VARIANTS.items() if isinstance(config, DDPSConfig) and not config.single_step]


def build(variant, **settings):
    torch.manual_seed(0)
    return replace(VARIANTS[variant], **settings).build()


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_and_seeds(variant):
    model = build(variant)
    contract.check_forward(model)
    contract.check_seeds(model)


@pytest.mark.parametrize("variant", ["segformer", "deeplab", "prior on mit"])
def test_products(variant):
    contract.check_products(build(variant))


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps(variant):
    model = build(variant)
    if variant in PLAIN:
        contract.check_plain(model)
        return
    assert model.default_step == ("3" if variant in PRIORS else "0")
    contract.check_steps(model, (0, 2, 3) if variant in PRIORS else (0,))


@pytest.mark.parametrize("variant", PRIORS)
def test_denoising(variant):
    contract.check_denoising(build(variant))


@torch.no_grad()
def test_a_single_step_has_nothing_to_compare():
    model = build("single-step").eval()
    found, steps_used = model.early_exit(contract.images(2), 100.0, [1, 2])
    assert steps_used == [1, 1]
    torch.testing.assert_close(found, model(contract.images(2), seeds=[1, 2]), atol=1e-4, rtol=1e-4)
    one = model.log_mean_probs(contract.images(2), [1, 2], starts=1)
    torch.testing.assert_close(one.softmax(1), found.softmax(1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", ["deeplab", "guided"])
def test_probabilities(variant, tmp_path):
    contract.check_probabilities(build(variant), VARIANTS[variant], tmp_path)


def test_arguments():
    contract.check_arguments(BaseModelConfig, BaseModel)
    contract.check_arguments(DDPSConfig, DDPS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_training(variant):
    contract.check_backward(build(variant))
    contract.check_training_draws(build(variant))
    contract.check_all_ignored(build(variant))
    contract.check_losses(build(variant), tuple(LOSSES) if variant in PLAIN else ("cross_entropy",))


@pytest.mark.parametrize(
    ("variant", "settings"),
    [("segformer", {}), ("deeplab", {}), ("prior on mit", {}), ("prior on mit", {"freeze": "published"})],
)
def test_recomputed_activations(variant, settings):
    contract.check_recomputation(lambda: build(variant, drop_path=0.3, **settings))


@pytest.mark.parametrize("variant", ["segformer", "deeplab", "prior on mit", "single-step"])
def test_state_dict(variant):
    contract.check_state_dict(lambda: VARIANTS[variant].build())


@pytest.mark.parametrize("variant", ["deeplab", "prior on mit"])
def test_start_weights_of_other_classes(variant, tmp_path):
    start_weights.check_other_classes(VARIANTS[variant], tmp_path)


def test_start_weights_of_other_channels(tmp_path):
    start_weights.check_other_channels(VARIANTS["deeplab"], tmp_path)


def test_configs():
    contract.check_configs("ddps_seg")


def test_help():
    contract.check_help("ddps_seg")


@pytest.mark.parametrize("variant", ["deeplab", "prior on mobilenet"])
def test_a_single_image_cannot_train_deeplab(variant):
    model = build(variant)
    assert "device_batch_size" in contract.refusal(lambda: model.losses(contract.images(1), contract.labels(model, 1)))
    assert model.eval().losses(contract.images(1), contract.labels(model, 1))["loss"].isfinite()


def test_wrong_number_of_seeds_is_refused():
    assert "2 seeds for 3 images" in contract.refusal(lambda: build("guided")(contract.images(3), seeds=[1, 2]))


def test_a_deeper_unet_takes_images_of_any_size():
    model = DDPSConfig(backbone="mit_b0", **{**SMALL, "multipliers": (1, 1, 1, 1)}).build().eval()
    assert model(torch.zeros(1, 3, 48, 80)).shape == (1, 5, 48, 80)
    assert build("prior on mit").pad_to == DDPS.pad_to == 16


def test_another_noise_schedule_is_refused():
    source, model = build("prior on mit"), build("prior on mit", noise_schedule="cosine")
    remedy = r"set model\.noise_schedule to its own, or model\.ignore_schedule_mismatch to keep this one"
    with pytest.raises(UserError, match=f"trained with another noise schedule; {remedy}"):
        model.load_official(source.official_state())
    keeping = build("prior on mit", noise_schedule="cosine", ignore_schedule_mismatch=True)
    keeping.load_official(source.official_state())
    assert torch.equal(keeping.log_at, model.log_at)
    assert torch.equal(keeping.classifier.weight, source.classifier.weight)


def test_other_channel_counts():
    for backbone in ("mit_b0", "mobilenet_v2", "resnet18"):
        model = DDPSConfig(in_channels=5, backbone=backbone, **SMALL).build().eval()
        assert model(contract.images(1, channels=5)).shape == (1, 5, 64, 96)


def test_float64_and_half_precision():
    model = build("guided").eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(contract.images(1)).isfinite().all()
    assert model.double()(contract.images(1).double()).dtype == torch.float64


def test_the_loss_of_half_precision_resizes_in_float32(monkeypatch):
    model = build("single-step").train()
    logits = torch.randn(1, model.num_classes, 16, 24).bfloat16()
    monkeypatch.setattr(model, "denoise", lambda *_: logits)
    labels = torch.randint(model.num_classes, (1, 64, 96))
    found = model.losses(contract.images(1), labels)["loss"]
    monkeypatch.setattr(model, "denoise", lambda *_: logits.float())
    assert torch.equal(found, model.losses(contract.images(1), labels)["loss"])


@pytest.mark.parametrize("wrong", [{"width": 20}, {"num_train_timesteps": 1}, {"num_inference_steps": 0},
                                   {"multipliers": ()}, {"condition_dropout": 1.0}])  # fmt: skip
def test_wrong_settings_are_refused(wrong):
    (name,) = wrong
    assert f"model.{name}" in contract.refusal(lambda: DDPSConfig(**wrong))


def test_guidance_needs_q_pred():
    assert "q_pred" in contract.refusal(lambda: DDPSConfig(mode="bayes", guidance_scale=2.0))


def test_a_timestep_that_no_run_reaches_is_refused():
    model = build("posterior").eval()
    text = contract.refusal(lambda: model.predict_steps(contract.images(1), steps=(0, 1)))
    assert "has 1" in text
    assert "0, 2, 3" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "size"),
    [("deeplab", (97, 97)), ("prior on mit", (64, 64)), ("prior on mobilenet", (97, 129))],
)
def test_onnx(variant, size, tmp_path):
    """The published sizes 512x512 and 1024x1024, reduced, and some with remainders."""
    pytest.importorskip("onnxscript")
    contract.check_onnx(build(variant), VARIANTS[variant], size, tmp_path / "model.onnx")
