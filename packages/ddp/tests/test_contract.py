"""DDP satisfies the contract of every segmentor."""

from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file

from ddp_seg.configs import DDPConfig
from ddp_seg.model import DDP
from segcore.checkpoints.load import load_init
from segcore.config.schema import LossConfig
from segcore.errors import UserError
from segcore.testing import contract, start_weights

SMALL = {"num_classes": 5, "width": 32, "decoder_layers": 1, "heads": 4, "drop_path": 0.0}
VARIANTS = {
    "resnet": DDPConfig(backbone="resnet18", **SMALL),
    "convnext": DDPConfig(backbone="convnext_t", **SMALL),
    "swin": DDPConfig(backbone="swin_t", accumulation=True, **SMALL),
    "timm": DDPConfig(backbone="convnextv2_atto", **SMALL),
    "ddpm": DDPConfig(backbone="resnet18", sampler="ddpm", randsteps=2, **SMALL),
    "aligned": DDPConfig(backbone="resnet18", self_aligned=True, auxiliary=False, **SMALL),
}


def build(variant, **settings):
    torch.manual_seed(0)
    return replace(VARIANTS[variant], **settings).build()


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward(variant):
    contract.check_forward(build(variant))


@pytest.mark.parametrize("variant", VARIANTS)
def test_seeds(variant):
    contract.check_seeds(build(variant))


@pytest.mark.parametrize("variant", ["convnext", "swin"])
def test_products(variant):
    contract.check_products(build(variant))


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps(variant):
    contract.check_steps(build(variant), (1, 2, 3))


@pytest.mark.parametrize("variant", ["resnet", "swin", "ddpm"])
def test_denoising(variant):
    contract.check_denoising(build(variant))


def test_a_run_starts_from_noise_only():
    model, masks = build("resnet"), torch.zeros(1, 64, 96, dtype=torch.long)
    assert "leave out --start-mask" in contract.refusal(lambda: model.refine_mask(contract.images(1), masks))


def test_probabilities(tmp_path):
    contract.check_probabilities(build("resnet"), VARIANTS["resnet"], tmp_path)


def test_arguments():
    contract.check_arguments(DDPConfig, DDP)


def test_zero_steps_are_refused():
    assert "at least 1 step" in contract.refusal(
        lambda: build("resnet").predict_steps(contract.images(1), steps=(3, 0))
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_backward(variant):
    contract.check_backward(build(variant))


@pytest.mark.parametrize("variant", ["resnet", "convnext", "swin", "aligned"])
def test_recomputed_activations(variant):
    contract.check_recomputation(lambda: build(variant, drop_path=0.3))


@pytest.mark.parametrize("variant", ["resnet", "aligned"])
def test_training_draws_and_ignored_batches(variant):
    contract.check_training_draws(build(variant))
    contract.check_all_ignored(build(variant))
    contract.check_losses(build(variant))


@pytest.mark.parametrize("variant", ["resnet", "convnext", "swin"])
def test_state_dict(variant):
    contract.check_state_dict(lambda: VARIANTS[variant].build())


@pytest.mark.parametrize("shape", [(), (1,), (0, 8), (192, 384, 1)])
def test_shapes_that_cannot_be_converted_are_refused(shape):
    model, name = build("swin"), "backbone.stages.0.downsample.reduction.weight"
    state = model.official_state() | {name: torch.ones(shape)}
    assert "1 shapes differ" in contract.refusal(lambda: model.load_official(state))
    backbone = {key: tensor for key, tensor in state.items() if key.startswith("backbone.")}
    assert "do not fit this backbone" in contract.refusal(lambda: model.load_pretrained(backbone))


def test_start_weights_of_other_classes(tmp_path):
    start_weights.check_other_classes(VARIANTS["resnet"], tmp_path)


def test_start_weights_of_other_channels(tmp_path):
    start_weights.check_other_channels(VARIANTS["resnet"], tmp_path)


def test_configs():
    contract.check_configs("ddp_seg")


def test_help():
    contract.check_help("ddp_seg")


def test_wrong_number_of_seeds_is_refused():
    with pytest.raises(ValueError, match="2 seeds for 3 images"):
        build("resnet")(contract.images(3), seeds=[1, 2])


def test_other_channel_counts():
    model = DDPConfig(backbone="resnet18", in_channels=5, **SMALL).build().eval()
    assert model(contract.images(1, channels=5)).shape == (1, 5, 64, 96)


def test_timm_weights_start_a_backbone_of_timm(tmp_path, monkeypatch):
    """Tag, file and report are those of the adapted backbones; the stem is adapted to five channels."""
    source = timm.create_model("mobilenetv3_small_050").state_dict()
    save_file(source, tmp_path / "mobilenetv3_small_050.lamb_in1k.safetensors")
    monkeypatch.setenv("SEGCORE_WEIGHTS", str(tmp_path))
    model = DDPConfig(backbone="mobilenetv3_small_050", in_channels=5, **SMALL).build()
    report = load_init(model, "mobilenetv3_small_050.lamb_in1k", offline=True)
    assert report.startswith("mobilenetv3_small_050.lamb_in1k: backbone only: loaded 240 tensors")
    assert torch.equal(model.backbone.net.blocks[3][0].conv_pw.weight, source["blocks.3.0.conv_pw.weight"])
    assert model.backbone.net.conv_stem.weight.shape[1] == 5
    assert model(contract.images(1, 51, 70, channels=5)).shape == (1, 5, 51, 70)
    with pytest.raises(UserError, match=r"mobilenetv3_small_050.lamb_in1k: the start weights do not fit this backbone"):
        load_init(build("timm"), "mobilenetv3_small_050.lamb_in1k", offline=True)


def test_half_precision_keeps_noise_levels_and_time_embedding_exact():
    model, seen = build("resnet").eval(), []
    hook = model.time_embedding.register_forward_hook(lambda module, args, output: seen.append((*args, output)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        answer = model.predict_steps(contract.images(1), steps=(1,))["1"]
    hook.remove()
    level, embedding = seen[0]
    assert answer.isfinite().all()
    assert level.item() == pytest.approx(-18.907475, abs=1e-5)
    assert torch.equal(embedding, model.time_embedding(level))


def test_float64_model():
    model = build("resnet").double().eval()
    assert model(contract.images(1).double()).dtype == torch.float64


def test_class_weights_scale_both_heads():
    model = build("resnet").eval()
    plain = model.losses(contract.images(2), contract.labels(model, 2), seeds=[1, 2])
    loss = LossConfig(class_weight=(3.0,) * 5)
    tripled = model.losses(contract.images(2), contract.labels(model, 2), seeds=[1, 2], loss=loss)
    for name in ("loss", "decode.loss_ce", "aux.loss_ce"):
        torch.testing.assert_close(tripled[name], 3 * plain[name])


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "size"), [("convnext", (64, 128)), ("swin", (97, 129))])
def test_onnx(variant, size, tmp_path):
    """The published size 512x1024, reduced, and one with remainders."""
    pytest.importorskip("onnxscript")
    contract.check_onnx(build(variant), VARIANTS[variant], size, tmp_path / "model.onnx")
