"""DDPS computes what the published code computes: every stored case of the reference."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import segcore
from ddps_seg import unet
from ddps_seg.configs.published import rows
from ddps_seg.diffusion import (
    NoiseSchedule,
    alphas_and_betas,
    log_q_posterior,
    log_q_pred,
    q_pred,
    sample,
    step_list,
)
from segcore.config.schema import ScheduleConfig
from segcore.environment import LIBRARIES
from segcore.evaluation.evaluate import Results
from segcore.evaluation.metrics import BoundaryIoU, ConfusionMatrix
from segcore.evaluation.predictor import window_boxes
from segcore.models.key_map import rename
from segcore.models.layers import resize
from segcore.reporting.tables import summary
from segcore.training.ema import start_ema, update_ema
from segcore.training.schedule import learning_rate

B2 = "segformer_b2_ade20k_multistep_inference"
STEPS = (0, 10, 19)


def normal(seed, shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def close(ours, theirs, atol):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


# The UNet and the noise


@torch.no_grad()
@pytest.mark.parametrize(("case", "arguments", "seed", "shape"), [
    ("a", (272, 128, 256, (1, 1, 1)), 1, (3, 272, 8, 12)),
    ("b", (20, 32, 24, (1, 2, 4)), 2, (3, 20, 16, 8))])  # fmt: skip
@pytest.mark.parametrize("library", LIBRARIES)
def test_unet(golden, fill, monkeypatch, library, case, arguments, seed, shape):
    monkeypatch.setenv("SEG_LINEAR", library)
    monkeypatch.setattr(unet, "SMALLEST", 0)  # these maps are small
    g, model = golden("unet"), unet.UNet(*arguments).eval()
    names = {rename(name, unet.RULES): name for name in model.state_dict()}
    state = fill({k: model.state_dict()[v].shape for k, v in names.items()})
    x, t = normal(seed, shape), g["t"]
    model.load_state_dict({names[k]: v for k, v in state.items()})
    if case == "a":
        close(unet.sinusoid(t, 128), g["a_time_sinusoid"], 1e-5)
        close(model.embed_time(t), g["a_time_mlp"], 1e-5)
    else:
        close(x, g["b_input"], 0)
    close(model(x, t), g[f"{case}_out"], 1e-4)
    gains = {k: v * v.shape[1] ** 0.5 if k.endswith(".g") else v for k, v in state.items()}
    model.load_state_dict({names[k]: v for k, v in gains.items()})  # this also clears the cached weights
    close(model(x, t), g[f"{case}_out_gscaled"], 1e-4)
    one_by_one = [model(x[i : i + 1], t[i : i + 1]) for i in range(3)]  # one time for all takes another path
    close(torch.cat(one_by_one), g[f"{case}_out_gscaled"], 1e-4)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("timesteps", "classes"), [(20, 150), (20, 19), (20, 151), (20, 20), (100, 151)])
def test_schedules_are_equal_to_the_last_bit(golden, schedule, timesteps, classes):
    g = golden("schedules")
    name = f"{'cos' if schedule == 'cosine' else 'linear'}_T{timesteps}_N{classes}"
    for kind, values in zip(("at", "bt", "att", "btt"), alphas_and_betas(timesteps, classes, schedule), strict=True):
        assert torch.equal(values, g[f"{name}_{kind}"]), kind


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_noising_and_posterior(golden, schedule):
    g, prefix = golden("q_tiny"), "cos" if schedule == "cosine" else "linear"
    noise = NoiseSchedule(*(v.log() for v in alphas_and_betas(20, 5, schedule)))
    x0, xt, uniform, t = (g[f"{prefix}_{name}"] for name in ("x0", "xt", "uniform", "t"))
    for case, index in enumerate(t):
        log_p = log_q_pred(x0, index, noise, 5)
        close(log_p, g[f"{prefix}_pred_logp_{case}"], 2e-6)
        assert torch.equal(sample(log_p, uniform), g[f"{prefix}_pred_sample_{case}"])
        assert torch.equal(q_pred(x0, index, noise, uniform), g[f"{prefix}_pred_sample_{case}"])
        log_p = log_q_posterior(x0, xt, index, noise, 5)
        close(log_p, g[f"{prefix}_post_logp_{case}"], 2e-6)
        assert torch.equal(sample(log_p, uniform), g[f"{prefix}_post_sample_{case}"])


# Inference


@pytest.fixture(scope="module")
def b2(filled):
    return filled(B2)


def run(model, g, name="q_pred", guidance=1.0):
    condition = model.encode(g["input"])
    uniforms = torch.stack([g["draw_rand_1"], g["draw_rand_2"]])
    return list(
        model.denoising_steps(condition, g["draw_randint_0"], uniforms, steps=2, mode=name, guidance_scale=guidance)
    )


@torch.no_grad()
def test_condition(golden, b2):
    g = golden("ddps_b2")
    close(b2.encode(g["input"]), g["condition"], 2e-5)


@torch.no_grad()
@pytest.mark.parametrize(("name", "mode", "guidance"), [
    ("q_pred_g1", "q_pred", 1.0), ("q_pred_g2", "q_pred", 2.0), ("q_posterior_g1", "q_posterior", 1.0)])  # fmt: skip
@pytest.mark.parametrize("library", LIBRARIES)
def test_denoising(golden, b2, monkeypatch, library, name, mode, guidance):
    monkeypatch.setenv("SEG_LINEAR", library)
    g = golden("ddps_b2")
    steps = run(b2, g, mode, guidance)
    assert [step.key for step in steps] == [str(t) for t in STEPS]
    for k, step in enumerate(steps):
        assert torch.equal(step.noisy, g[f"{name}_masks"][k])
        close(step.logits, g[f"{name}_logits_t{step.key}"], 3e-4 if guidance == 2 else 1e-4)
        assert torch.equal(step.logits.argmax(1), g[f"{name}_pred_t"][k])


@torch.no_grad()
def test_shipped_guidance(golden, b2):
    g = golden("ddps_b2")
    steps = run(b2, g, guidance=b2.guidance_scale)
    assert torch.equal(torch.stack([s.logits.argmax(1) for s in steps]), g["q_pred_g0.4_pred_t"])
    close(steps[-1].logits[:, :8], g["q_pred_g0.4_logits_t19_ch0_8"], 3e-4)


@torch.no_grad()
def test_labels_at_the_original_size(golden, b2):
    g = golden("ddps_b2")
    for k, step in enumerate(run(b2, g)):
        logits = resize(resize(step.logits, (64, 64))[..., :56, :64], (50, 70))
        agree = (logits.softmax(1).argmax(1)[0] == g["simple_test_pred"][k]).float().mean()
        assert agree >= 0.999


@torch.no_grad()
def test_sliding_window(golden, filled):
    model, g = filled("ddps_segformer_mit-b0_cityscapes20_multistep"), golden("ddps_b0_slide")
    images = normal(80, (1, 3, 48, 64))
    total, count = {t: torch.zeros(1, 20, 48, 64) for t in STEPS}, torch.zeros(48, 64)
    boxes = window_boxes(48, 64, (32, 32), (16, 32))
    assert boxes == [(0, 0, 32, 32), (0, 32, 32, 64), (16, 0, 48, 32), (16, 32, 48, 64)]
    for i, (y1, x1, y2, x2) in enumerate(boxes):
        condition = model.encode(images[..., y1:y2, x1:x2])
        uniforms = g["draw_rand"].view(4, 2, 1, 20, 8, 8)[i]
        found = model.denoise_steps(condition, g["draw_randint"][i], uniforms=uniforms, inference_timesteps=2)
        for t in STEPS:
            total[t][..., y1:y2, x1:x2] += resize(found[str(t)], (32, 32))
        count[y1:y2, x1:x2] += 1
    close((total[0] / count)[:, :4], g["logits_t0_ch0_4"], 1e-4)
    close((total[19] / count)[..., ::2, ::2], g["logits_t19"], 1e-4)
    for k, t in enumerate(STEPS):
        labels = resize(total[t] / count, (60, 90)).softmax(1).argmax(1)[0]
        assert (labels == g["simple_test_pred"][k]).float().mean() >= 0.999


@torch.no_grad()
@pytest.mark.parametrize("kind", ["r50", "m-v2"])
def test_deeplab_composite(golden, filled, kind):
    model, g = filled(f"ddps_deeplabv3plus_{kind}_cityscapes20_multistep"), golden("ddps_deeplabv3plus_composite")
    condition = model.encode(normal(70, (1, 3, 64, 64)))
    close(condition[:, ::16], g[f"{kind}_condition_every16"], 2e-5)
    close(torch.stack([condition.mean(), condition.std()]), g[f"{kind}_condition_mean_std"].float(), 2e-5)
    uniforms = torch.stack([g["draw_rand_1"], g["draw_rand_2"]])
    for k, step in enumerate(model.denoising_steps(condition, g["draw_randint_0"], uniforms, steps=2)):
        assert torch.equal(step.noisy, g[f"{kind}_masks"][k])
        close(step.logits, g[f"{kind}_logits_t{step.key}"], 1e-4)


STEP_LISTS = {
    (20, 1): [0, 19],
    (20, 2): [0, 10, 19],
    (20, 3): [0, 6, 12, 18, 19],
    (20, 5): [0, 4, 8, 12, 16, 19],
    (20, 7): [*range(0, 20, 2), 19],
    (20, 15): [*range(20)],
    (20, 99): [*range(20)],
    (100, 3): [0, 33, 66, 99],
    (100, 10): [*range(0, 100, 10), 99],
}


@pytest.mark.parametrize("case", STEP_LISTS)
def test_timesteps(case):
    assert step_list(*case) == STEP_LISTS[case]


# Training


def in_mode(model, batch_statistics):
    """The reference's training mode: no dropout, no stochastic depth, batch norm as asked."""
    model.train()
    for module in model.modules():
        stochastic = isinstance(module, torch.nn.Dropout2d) or type(module).__name__ == "DropPath"
        if stochastic or (isinstance(module, torch.nn.BatchNorm2d) and not batch_statistics):
            module.eval()
    return model


def check_gradients(model, g, prefix):
    norms = {model.key_map()[n]: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
    expected = dict(zip(g[f"{prefix}_grad_names"].tolist(), g[f"{prefix}_grad_norms"].tolist(), strict=True))
    for name, norm in expected.items():
        full = name if name in norms else f"decode_head.{name}"
        assert norms[full] == pytest.approx(norm, rel=1e-4), name
    if f"{prefix}_grad_norm_total" in g:
        total = sum(norm**2 for norm in norms.values()) ** 0.5
        assert total == pytest.approx(g[f"{prefix}_grad_norm_total"].item(), rel=1e-4)
    return norms


@pytest.mark.parametrize("prefix", ["bn_eval", "bn_train"])
def test_training_step(golden, filled, prefix):
    g, model = golden("train_multistep"), in_mode(filled(B2), prefix == "bn_train")
    images, draws = normal(30, (3, 3, 48, 64)), {"timesteps": g["draw_t"], "uniforms": g["draw_uniform"]}
    masks = torch.zeros(3, 12, 16, dtype=torch.long)
    masks[1:] = g["draw_mask_rand"]
    losses = model.losses(images, g["gt"].long(), draws={**draws, "masks": masks})
    assert losses["loss"].item() == pytest.approx(g[f"{prefix}_loss"].item(), abs=1e-5)
    assert losses["decode.acc_seg"].item() == pytest.approx(g[f"{prefix}_acc_seg"].item(), abs=1e-3)
    losses["loss"].backward()
    assert len(check_gradients(model, g, prefix)) == 220
    if prefix == "bn_train":
        norm = model.head.fuse_conv.norm
        close(norm.running_mean, g["bn_train_fusion_running_mean_after"], 1e-5)
        close(norm.running_var, g["bn_train_fusion_running_var_after"], 1e-5)
        return
    with torch.no_grad():
        condition = model.encode(images)
        first = model._first_prediction(condition, g["gt"].long(), g["draw_t"], masks)
        assert torch.equal(first[1:], g["bn_eval_first_pred"])
        assert torch.equal(first[:1], F.interpolate(g["gt"][:1, None].float(), (12, 16)).long()[:, 0])
        noised = q_pred(first, 19 - g["draw_t"], model.schedule, g["draw_uniform"])
        assert torch.equal(noised, g["bn_eval_noised_mask"])
        close(model.denoise(condition, noised, g["draw_t"])[:, :16], g["bn_eval_logits_ch0_16"], 1e-4)


def test_single_step(golden, filled):
    g, model = golden("single_step"), filled("segformer_b2_ade20k_singlestep")
    images = normal(40, (2, 3, 48, 64))
    with torch.no_grad():
        logits = model.denoise_steps(model.encode(images), g["draw_mask"])["0"]
    close(logits[:, :32], g["eval_logits_ch0_32"], 1e-4)
    assert (logits.argmax(1) != g["eval_pred"]).sum() <= 1
    losses = in_mode(model, False).losses(images, g["gt"].long(), draws={"masks": g["draw_mask"]})
    assert losses["loss"].item() == pytest.approx(g["bn_eval_loss"].item(), abs=1e-5)
    losses["loss"].backward()
    check_gradients(model, g, "bn_eval")


# Parameters and recipes


@pytest.mark.parametrize("name", [name for name in rows() if not name.startswith("ddps") or name.endswith("multistep")])
def test_parameters_equal_the_manifest(manifest, name):
    exp = segcore.load_experiment(name)
    expected = manifest(exp.name)
    with torch.device("meta"):
        model = exp.model.build()
    names = model.key_map()
    assert {names[k]: list(v.shape) for k, v in model.state_dict().items()} == expected["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == expected["params"]
    if "trainable_params" in expected:
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected["trainable_params"]


def test_learning_rates(golden):
    g = golden("ema_lr")
    for step in (10_000, 20_000, 50_000):
        schedule = ScheduleConfig(
            400_000,
            "step",
            step=step,
            gamma=0.5,
            min_lr=1e-6,
            warmup_iterations=1000,
            warmup_ratio=1e-6,
            warmup="scheduled",
        )
        ours = [learning_rate(schedule, 1.5e-4, int(i)) for i in g["lr_iters"]]
        assert ours == pytest.approx(g[f"lr_step{step}"].tolist(), rel=1e-9)


def test_averaged_weights(golden):
    """14 steps that add 0.1 (n + 1), an update every 3; after iterations 6 and 12 the published hook has swapped."""
    g = golden("ema_lr")
    model = torch.nn.Linear(2, 2, bias=False)
    model.load_state_dict({"weight": g["start_weight"]})
    average = start_ema(model)
    for n in range(14):
        with torch.no_grad():
            model.weight += 0.1 * (n + 1)
        if (n + 1) % 3 == 0:
            update_ema(average, model, 0.75)
        swapped = n in (5, 11)
        close(model.weight.detach(), g["ema_buffer_after_iter" if swapped else "weight_after_iter"][n], 1e-6)
        close(average["weight"], g["weight_after_iter" if swapped else "ema_buffer_after_iter"][n], 1e-6)


# Metrics


def pairs(g, name):
    """The labels and predictions of a set, in the convention of its configuration."""
    classes, ignored, _ = g[f"{name}_cfg"].tolist()
    found = []
    for i in range(5):
        label, prediction = g[f"A_label{i}"].long(), g[f"A_pred{i}"].long()
        if name != "A":
            prediction = torch.where(prediction == 0, 3, prediction)
        if name == "B":
            label, prediction = torch.where(label == 0, 255, label - 1), prediction - 1
        found.append((prediction, label))
    return classes, ignored, found


@pytest.mark.parametrize("name", ["A", "A_nozero", "B"])
def test_metrics(golden, name):
    g = golden("metrics")
    classes, ignored, found = pairs(g, name)
    matrix, band = ConfusionMatrix(classes, ignored), BoundaryIoU(classes, ignored)
    for i, (prediction, label) in enumerate(found):
        matrix.update(prediction, label)
        band.update(prediction, label)
        assert torch.equal(BoundaryIoU(classes, ignored).update(prediction, label).intersection,
                           g[f"{name}_boundary_intersect"][i].long())  # fmt: skip
    ours = matrix.compute() | band.compute()
    torch.testing.assert_close(ours["IoU"], g[f"{name}_IoU"].double(), atol=1e-6, rtol=0, equal_nan=True)
    torch.testing.assert_close(ours["BIoU"], g[f"{name}_bIoU"].double(), atol=1e-6, rtol=0, equal_nan=True)
    for key in ("mIoU", "mBIoU", "mAcc", "aAcc"):
        assert ours[key] == pytest.approx(g[f"{name}_{key}"].item(), abs=1e-6), key


def test_printed_line_by_timestep(golden):
    g = golden("metrics")
    entries = {}
    for entry, name in zip(("0", "10", "19"), ("A", "A_nozero", "perfect"), strict=True):
        classes, ignored, found = pairs(g, "A_nozero" if name == "perfect" else name)
        matrix, band = ConfusionMatrix(classes, ignored), BoundaryIoU(classes, ignored)
        for prediction, label in found:
            prediction = label if name == "perfect" else prediction
            matrix.update(prediction, label)
            band.update(prediction, label)
        entries[entry] = matrix.compute() | band.compute()
    text = summary(Results(tuple("abcdefg"), entries, 5, configured="19"), ("mIoU", "mBIoU"))
    table = str(g["eval_summary_table"]).partition("\n\n")[2].strip()
    assert table.replace("mbIoU", "mBIoU") in text
