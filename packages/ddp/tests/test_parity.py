"""The model computes what the official code computed: every golden case at the tolerance of its README."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import segcore
from ddp_seg.configs import DDPConfig
from ddp_seg.decoder import make_grid, pixel_centers, positional_encoding
from ddp_seg.diffusion import alpha_sigma, log_snr, time_pairs
from segcore.models.layers import resize

CITYSCAPES = "ddp_convnext_t_4x4_512x1024_160k_cityscapes"
ALIGNED = "ddp_convnext_t_4x4_512x1024_5k_cityscapes_aligned"
ADE20K = "ddp_swin_t_2x8_512x512_160k_ade20k"
BIG = "model.bit_scale=20"  # of the `big` cases


def normal(seed, shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype("float32"))


def check(ours, expected, atol):
    expected = expected.to(ours.dtype)
    assert ours.shape == expected.shape
    worst = (ours - expected).abs().max().item()
    assert worst <= atol, f"off by {worst:.3g}, allowed {atol:.3g}"


def check_argmax(ours, expected):
    assert torch.equal(ours, expected.long())


@pytest.fixture(scope="module")
def convnext(filled):
    return filled(CITYSCAPES)


@pytest.fixture(autouse=True)
def no_grad_by_default(request):
    with torch.set_grad_enabled("training" in request.node.name):
        yield


@pytest.fixture(scope="module")
def a(golden):
    return golden("a_convnext_t_cityscapes")


def sample(model, features, noise, **options):
    """The output and the noisy maps at the start of every step."""
    own = {k: v for k, v in options.items() if k not in ("accumulate", "step_noise")}
    steps = list(model.denoising_steps(features, noise, options.get("step_noise"), **own))
    return model.denoise(features, noise, **options), steps


def test_backbone_and_necks(convnext, a):
    maps = convnext.backbone(a["img"])
    for i, x in enumerate(maps):
        check(x[:, ::8], a[f"backbone{i}_c8"], 5e-5)
    for i, x in enumerate(convnext.fpn(maps)):
        check(x[:, ::8], a[f"fpn{i}_c8"], 5e-5)
    check(convnext.encode(a["img"]), a["neck"], 5e-5)


def test_one_decoder_call(convnext, a):
    level = log_snr(a["head_t"].reshape(1).float())
    check(level, a["head_log_snr"].reshape(1), 1e-6)
    check(convnext.time_embedding(level), a["head_time_emb"], 2e-5)
    mixed = convnext.transform(torch.cat([a["neck"], a["noise"]], 1))
    check(mixed[:, ::8], a["head_in_c8"], 5e-5)
    check(convnext.decode(a["neck"], a["noise"], level), a["head_logits"], 2e-4)
    check(convnext.auxiliary_head(a["neck"])[:, ::4], a["aux_logits_c4"], 2e-4)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_ddim_steps(convnext, a, steps):
    features = convnext.encode(a["img"])
    logits, trace = sample(convnext, features, a["noise"], steps=steps, accumulate=False)
    check(logits, a[f"ddim{steps}_acc0"], 2e-4)
    check(convnext.denoise(features, a["noise"], steps=steps, accumulate=True), a[f"ddim{steps}_acc1"], 2e-5)
    check_argmax(torch.stack([s.logits.argmax(1) for s in trace]).squeeze(), a[f"ddim{steps}_argmax"].squeeze())
    if steps == 3:
        check(torch.cat([s.logits for s in trace]), a["ddim3_step_logits"].reshape(3, *logits.shape[1:]), 2e-4)
        check(torch.cat([s.noisy for s in trace])[:, ::16], a["ddim3_mask_in_c16"], 1e-6)
        for accumulate in (0, 1):
            answer = convnext.denoise(features, a["noise"], steps=3, accumulate=bool(accumulate))
            full = resize(answer, a["img"].shape[-2:])[..., ::3, ::3]
            check(full, a[f"ddim3_acc{accumulate}_fullres_s3"], 2e-5 if accumulate else 2e-4)
    if steps == 10:
        check(torch.cat([s.noisy for s in trace])[:, ::64], a["ddim10_mask_in_c64"], 1e-6)


def test_large_label_embeddings(filled, a):
    model = filled(CITYSCAPES, BIG)
    logits, trace = sample(model, model.encode(a["img"]), a["noise"], steps=3)
    check(logits, a["ddim3_big_acc0"], 2e-4)
    check(torch.cat([s.noisy for s in trace])[:, ::16], a["ddim3_big_mask_in_c16"], 1e-5)


def test_small_signals_depend_on_the_norms_eps(manifest, fill, a):
    state = fill({k: v for k, v in manifest(CITYSCAPES)["state_dict"].items() if "num_batches" not in k})
    scaled = [f"backbone.downsample_layers.{i}.1." for i in range(4)] + ["transform.conv."]
    for name in state:
        small = name.startswith(tuple(scaled)) or name.endswith(".gamma") or ".output_proj." in name
        if small or (name.startswith("neck.") and name.endswith("conv.weight")):
            state[name] = state[name] * 1e-3
    model = segcore.load_experiment(CITYSCAPES).model.build().eval()
    model.load_official(state)
    for i, x in enumerate(model.backbone(a["img"])):
        check(x[:, ::16], a[f"small_backbone{i}_c16"], 2e-5)
    features = model.encode(a["img"])
    check(features[:, ::16], a["small_neck_c16"], 2e-5)
    level = log_snr(a["head_t"].reshape(1).float())
    check(model.decode(features, torch.zeros_like(features), level), a["small_head_logits"], 2e-5)


def test_odd_size(convnext, a):
    image, noise = normal(102, (1, 3, 51, 70)), normal(206, (1, 256, 12, 17))
    features = convnext.encode(image)
    check(features[:, ::8], a["odd_neck_c8"], 5e-5)
    logits = convnext.denoise(features, noise, steps=3)
    check(logits, a["odd_ddim3_acc0"], 2e-4)
    check(resize(logits, (51, 70))[..., ::3, ::3], a["odd_ddim3_acc0_fullres_s3"], 2e-4)


def test_swin(filled, golden):
    b = golden("b_swin_t_ade20k")
    model = filled(ADE20K)
    for i, x in enumerate(model.backbone(b["img"])):
        check(x[:, ::8], b[f"backbone{i}_c8"], 5e-5)
    features = model.encode(b["img"])
    check(features[:, ::4], b["neck_c4"], 5e-5)
    probabilities, trace = sample(model, features, b["noise"])
    check(probabilities, b["ddim3_acc1"], 2e-5)
    check(model.denoise(features, b["noise"], accumulate=False), b["ddim3_acc0"], 2e-4)
    check_argmax(torch.stack([s.logits.argmax(1) for s in trace]).squeeze(), b["ddim3_argmax"].squeeze())
    check(torch.cat([s.noisy for s in trace])[:, ::16], b["ddim3_mask_in_c16"], 1e-6)
    full = resize(probabilities, b["img"].shape[-2:])
    check(full[:, ::3, ::8, ::8], b["ddim3_acc1_fullres_c3_s8"], 2e-5)
    assert (full.argmax(1) == b["ddim3_acc1_fullres_argmax"]).float().mean() >= 0.999
    image = normal(112, (1, 3, 51, 70))
    for i, x in enumerate(model.backbone(image)):
        check(x[:, ::8], b[f"odd_backbone{i}_c8"], 5e-5)
    check(model.encode(image)[:, ::8], b["odd_neck_c8"], 5e-5)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize(("difference", "big"), [(0, False), (1, False), (2, False), (0, True)])
def test_samplers(filled, golden, convnext, sampler, difference, big):
    c = golden("c_samplers_convnext_t")
    model = filled(CITYSCAPES, BIG) if big else convnext
    features = model.encode(c["img"])
    check(features[:, ::8], c["neck_c8"], 5e-5)
    options = {"steps": 3, "sampler": sampler, "time_difference": difference, "step_noise": c["step_noise"]}
    logits, trace = sample(model, features, c["noise"], **options)
    case = f"{sampler}3_td{difference}" + ("_big" if big else "")
    check(logits, c[case], 2e-4)
    check(torch.cat([s.noisy for s in trace])[:, ::32], c[f"{case}_mask_in_c32"], 1e-5 if big else 1e-6)
    if case == "ddpm3_td0":
        check(model.denoise(features, c["noise"], **options, accumulate=True), c["ddpm3_td0_acc1"], 2e-5)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_linear_schedule(filled, golden, sampler):
    c = golden("c_samplers_convnext_t")
    model = filled(CITYSCAPES, "model.noise_schedule=linear")
    features = model.encode(c["img"])
    logits, trace = sample(model, features, c["noise"], steps=3, sampler=sampler, step_noise=c["step_noise"])
    check(logits, c[f"{sampler}3_linear"], 2e-4)
    check(torch.cat([s.noisy for s in trace])[:, ::32], c[f"{sampler}3_linear_mask_in_c32"], 1e-6)


@pytest.mark.parametrize("accumulate", [False, True])
def test_two_random_starts(convnext, golden, accumulate):
    c = golden("c_samplers_convnext_t")
    noise = torch.cat([c["noise"], c["step_noise"][0]])
    features = convnext.encode(c["img"])
    answer = convnext.denoise(features, noise, steps=3, accumulate=accumulate)
    check(answer, c[f"ddim3_rand2_acc{int(accumulate)}"], 2e-5 if accumulate else 2e-4)
    # The batch of two images, each with its two starts, image-major: both get the output of the image alone.
    both = convnext.denoise(features.repeat(2, 1, 1, 1), noise.repeat(2, 1, 1, 1), steps=3, accumulate=accumulate)
    check(both, answer.repeat(2, 1, 1, 1), 1e-5)


@pytest.mark.parametrize(
    "case", ["ddp_convnext_t", "aligned_convnext_t", "ddp_swin_t", "ddp_convnext_t_big", "aligned_convnext_t_big"]
)
def test_training_step(filled, golden, case):
    d = golden("d_training")
    config = ADE20K if "swin" in case else ALIGNED if "aligned" in case else CITYSCAPES
    model = filled(config, "model.drop_path=0", *([BIG] if case.endswith("_big") else [])).train()
    model.auxiliary_head.dropout.p = 0.0
    model.auxiliary_head.hidden.norm.eval()
    labels = d["gt_ade20k" if "swin" in case else "gt_cityscapes"][:, 0].long()
    seen = {}
    decode = type(model).decode
    model.decode = lambda f, m, level: (
        seen.setdefault("passes", []).append((m, out := decode(model, f, m, level))) or out
    )
    losses = model.losses(d["img"], labels, draws={"times": d["times"], "noise": d["noise"]})
    losses["loss"].backward()

    expected = dict(zip(d[f"{case}.loss_names"].tolist(), d[f"{case}.loss_values"].tolist(), strict=True))
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, abs=1e-5 if "loss" in name else 1e-3), name
    assert losses["loss"].item() == pytest.approx(d[f"{case}.loss"].item(), abs=1e-5)
    noisy, logits = seen["passes"][-1]
    check(noisy[:, ::16], d[f"{case}.noised_map_c16"], 1e-5 if case.endswith("_big") else 1e-6)
    if f"{case}.logits" in d:
        check(logits[:, ::5] if "swin" in case else logits, d[f"{case}.logits"], 2e-4)
    if "aligned" in case:
        check_argmax(seen["passes"][0][1].argmax(1), d[f"{case}.first_pass_argmax"])
    if f"{case}.first_pass_logits" in d:
        check(seen["passes"][0][1], d[f"{case}.first_pass_logits"], 2e-4)

    ours = {official: name for name, official in model.key_map().items()}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    norms = dict(zip(d[f"{case}.grad_names"].tolist(), d[f"{case}.grad_norms"].tolist(), strict=True))
    assert {ours[name] for name in norms} == set(gradients)
    for name, norm in norms.items():
        assert gradients[ours[name]].double().norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-9), name
    total = torch.stack([g.double().norm() for g in gradients.values()]).norm()
    assert total.item() == pytest.approx(d[f"{case}.grad_norm_total"].item(), rel=1e-4)


def test_auxiliary_loss_with_batch_statistics_training(filled, golden):
    d = golden("d_training")
    model = filled(CITYSCAPES, "model.drop_path=0").train()
    model.auxiliary_head.dropout.p = 0.0
    draws = {"times": d["times"], "noise": d["noise"]}
    losses = model.losses(d["img"], d["gt_cityscapes"][:, 0].long(), draws=draws)
    assert losses["aux.loss_ce"].item() == pytest.approx(
        d["ddp_convnext_t.aux_loss_ce_bn_batch_stats"].item(), abs=1e-5
    )


def test_pure_functions(convnext, golden):
    e = golden("e_pure_functions")
    for schedule in ("cosine", "linear"):
        level = log_snr(e["t"], schedule)
        check(level[:-1], e[f"log_snr_{schedule}"][:-1], 1e-6)
        check(level[-1], e[f"log_snr_{schedule}"][-1], 1e-5)
        alpha, sigma = alpha_sigma(level)
        check(alpha, e[f"alpha_{schedule}"], 1e-6)
        check(sigma, e[f"sigma_{schedule}"], 1e-6)
    for steps in (1, 3, 10):
        for difference in (0, 1, 2):
            pairs = torch.tensor(time_pairs(steps, difference), dtype=torch.float32)
            check(pairs, e[f"time_pairs_T{steps}_td{difference}"], 1e-6)
    check(convnext.time_embedding.sinusoid(e["time_mlp_in"]), e["time_mlp_sinusoid"], 1e-6)
    check(convnext.time_embedding(e["time_mlp_in"]), e["time_mlp_out"], 2e-5)
    codes = convnext.embed_labels(torch.arange(20).view(1, 1, 20))[0, :, 0].T
    check(codes, e["label_codes_bit_scale_0.01"], 1e-6)
    position = positional_encoding(8, 16, 256, torch.zeros(1))
    check(position.transpose(1, 2).reshape(1, 256, 8, 16), e["pos_8x16"], 1e-6)
    check(pixel_centers(8, 16, torch.zeros(1)), e["ref_8x16"].reshape(-1, 2), 1e-6)


def test_initial_sampling_offsets_follow_the_compass(golden):
    bias = DDPConfig(backbone="resnet18").build().decoder.layers[0].attention.sampling_offsets.bias
    check(bias, golden("e_pure_functions")["sampling_offset_bias_init"], 1e-6)


def test_decoder_layers(convnext, golden):
    f = golden("f_msda_encoder")
    x = normal(152, (2, 256, 6, 10))
    time = convnext.time_embedding(log_snr(f["enc_t"].float()))
    layer = convnext.decoder.layers[0]
    grid = make_grid(x)
    tokens = x.flatten(2).transpose(1, 2)

    def as_map(tokens):
        return tokens.transpose(1, 2).reshape(2, 256, 6, 10)

    attended = tokens + layer.attention(tokens, grid)
    check(as_map(attended)[:, ::4], f["enc_layer0_attn_c4"], 5e-5)
    normed = layer.norm1(attended)
    check(as_map(normed)[:, ::4], f["enc_layer0_norm0_c4"], 5e-5)
    check(as_map(layer.norm2(normed + layer.fc2(F.gelu(layer.fc1(normed)))))[:, ::4], f["enc_layer0_norm1_c4"], 5e-5)
    check(as_map(layer(tokens, time, grid)), f["enc_layer0_out"], 5e-5)
    out = convnext.decoder.encode(x, time)
    check(out, f["enc_out"], 5e-5)
    check(convnext.decoder.classifier(out), f["enc_logits"], 2e-4)
