"""The published rows: recipes, figures, and the initial weights of each stage."""

import json

import pytest
import torch

import segcore
from ddps_seg.configs import BaseModelConfig, DDPSConfig
from ddps_seg.configs.base_models import rows as stock_rows
from ddps_seg.configs.published import rows
from ddps_seg.official import ROWS
from segcore.checkpoints.foreign import read_state
from segcore.checkpoints.load import find_weights, load_init, load_weights
from segcore.config.registry import published
from segcore.config.schema import OptimizerConfig
from segcore.errors import UserError
from segcore.testing.contract import images, labels, refusal
from segcore.training.optimizer import build_optimizer

BACKBONES = {"MobibleNetV2": "m-v2", "MiT-B0": "mit-b0", "ResNet50": "r50", "MiT-B2": "mit-b2", "ResNet101": "r101",
             "MiT-B5": "mit-b5"}  # fmt: skip
SMALL = {"backbone": "resnet18", "condition_width": 32}
PRIOR = {**SMALL, "num_classes": 4, "width": 8, "output_width": 8, "num_train_timesteps": 5}


def test_figures_equal_the_published_list(reference):
    theirs = [r for r in json.loads((reference / "published.json").read_text()) if r.get("model", "")[:5] == "DDPS-"]
    assert len(theirs) == len(ROWS) == 12
    for row in theirs:
        family = "segformer" if "Segformer" in row["model"] else "deeplabv3plus"
        classes = "ade20k151" if row["dataset"] == "ade20k" else "cityscapes20"
        name = f"ddps_{family}_{BACKBONES[row['backbone']]}_{classes}_multistep"
        ours = published(name)
        assert list(ours.miou.values()) == [row["miou_ss"], row["miou_ms"]]
        assert ours.note.startswith(f"mBIoU {row['mbiou']:.2f}; ")
        assert ours.note.endswith(f"published as {row['params_m']} M")
        assert ours.page == row["checkpoint"]


def test_recipes():
    exp = segcore.load_experiment("ddps_deeplabv3plus_r50_cityscapes20_multistep")
    assert (exp.model.width, exp.model.num_train_timesteps, exp.model.num_classes) == (128, 20, 20)
    assert (exp.data.crop, exp.data.add_background_class, exp.train.batch_size) == ((512, 1024), True, 16)
    assert (exp.optimizer.lr, exp.optimizer.betas, exp.optimizer.weight_decay) == (1.5e-4, (0.9, 0.96), 0.045)
    assert (exp.schedule.iterations, exp.schedule.step, exp.schedule.min_lr) == (160_000, 20_000, 1e-6)
    assert (exp.train.ema, exp.train.ema_every, exp.train.evaluate_every) == (0.99, 25, 16_000)
    assert exp.evaluate.steps == tuple(range(20))
    exp = segcore.load_experiment("ddps_segformer_mit-b5_ade20k151_multistep")
    assert (exp.model.width, exp.model.num_train_timesteps, exp.train.batch_size) == (256, 100, 32)
    assert exp.evaluate.steps == (*range(0, 100, 10), 99)
    exp = segcore.load_experiment("segformer_b2_ade20k_multistep_inference")
    assert (exp.model.num_inference_steps, exp.model.guidance_scale, exp.evaluate.steps) == (2, 0.4, (0, 10, 19))


@pytest.mark.parametrize("name", [name for name in rows() if name.startswith("ddps_")])
def test_every_stage_starts_from_the_previous_one(name):
    exp = segcore.load_experiment(name)
    if name.endswith("_multistep"):
        start = segcore.load_experiment(exp.train.init_from.removeprefix("runs/"))
        assert start.model.single_step
        assert (start.model.width, start.data) == (exp.model.width, exp.data)
        assert exp.model.build is not None
    else:
        start = stock_rows()[exp.train.init_from.removeprefix("official:").replace("-", "_")]()
        assert (start.model.backbone, start.data.dataset) == (exp.model.backbone, exp.data.dataset)


def test_a_row_without_a_known_file_says_where_to_look(monkeypatch, tmp_path):
    monkeypatch.setenv("SEGCORE_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits"))
    with pytest.raises(UserError, match=r"DDPS-all/tree/main/segformer_b2_multistep: cannot be listed.*download the"):
        find_weights("official", "ddps_segformer_mit_b2_ade20k151_multistep")


def save(model, path, official, **extra):
    names = model.key_map()
    state = {names[k] if official else k: v for k, v in model.state_dict().items()}
    torch.save({"state_dict": {**state, **extra}, "meta": {}}, path)
    return path


@pytest.fixture
def chain(tmp_path):
    """Base model, single-step and multi-step model with different weights."""
    torch.manual_seed(0)
    return (
        BaseModelConfig(num_classes=3, auxiliary=True, **SMALL).build(),
        DDPSConfig(**{**PRIOR, "single_step": True}).build(),
        DDPSConfig(**PRIOR).build(),
    )


def same(a, b, *parts):
    mine, theirs = a.state_dict(), b.state_dict()
    return all(torch.equal(mine[n], theirs[n]) for n in mine if n.startswith(parts) and n in theirs)


@pytest.mark.parametrize("official", [True, False])
def test_stages_load_the_weights_of_the_previous_one(chain, tmp_path, official):
    base, single, multi = chain
    tables = [t.clone() for t in multi.schedule]
    before = single.classifier.weight.clone()
    line = load_init(single, str(save(base, tmp_path / "base.pth", official)))
    assert ": base model: loaded" in line
    assert "dropped" in line
    assert same(single, base, "backbone.", "head.")
    assert torch.equal(single.classifier.weight, before)
    line = load_init(multi, str(save(single, tmp_path / "single.pth", official)))
    assert ": single-step variant: loaded" in line
    assert same(multi, single, "backbone.", "head.", "unet.", "label_embedding.", "classifier.")
    assert all(torch.equal(a, b) for a, b in zip(multi.schedule, tables, strict=True))
    other = DDPSConfig(**PRIOR).build()
    assert "loaded" in load_init(other, str(save(multi, tmp_path / "multi.pth", official)))
    assert same(other, multi, "")


def test_test_weights_must_be_whole(chain, tmp_path):
    base, single, multi = chain
    for start in (base, single):
        path = save(start, tmp_path / "start.pth", True)
        assert "missing" in refusal(lambda path=path: load_weights(multi, path))


def test_raw_weights_next_to_averaged_ones_are_ignored(chain, tmp_path):
    *_, multi = chain
    raw = {f"ema_{name.replace('.', '_')}": torch.zeros(1) for name in multi.key_map().values()}
    path = save(multi, tmp_path / "file.pth", True, **raw)
    assert set(read_state(path)) == set(multi.key_map().values())
    assert load_weights(DDPSConfig(**PRIOR).build(), path).loaded == len(multi.state_dict())


def test_another_number_of_timesteps_is_refused_unless_asked_for(chain, tmp_path):
    path = save(chain[-1], tmp_path / "file.pth", True)
    assert refusal(lambda: load_weights(DDPSConfig(**{**PRIOR, "num_train_timesteps": 7}).build(), path)) == (
        f"{path}: trained with 5 timesteps, but the model has 7; set model.num_train_timesteps 5, or "
        "model.ignore_schedule_mismatch to keep this schedule"
    )
    other = DDPSConfig(**{**PRIOR, "num_train_timesteps": 7, "ignore_schedule_mismatch": True}).build()
    load_weights(other, path)
    assert len(other.schedule.log_at) == 7
    assert same(other, chain[-1], "unet.", "label_embedding.")


@pytest.mark.parametrize(("freeze", "moves", "learns"), [("published", True, False), ("eval", False, False),
                                                         ("none", True, True)])  # fmt: skip
def test_frozen_parts(freeze, moves, learns):
    model = DDPSConfig(**{**PRIOR, "freeze": freeze}).build().train()
    norm = model.head.fuse_conv.norm
    before = norm.running_mean.clone()
    model.losses(images(2), labels(model, 2), seeds=[1, 2])["loss"].backward()
    assert torch.equal(norm.running_mean, before) is not moves
    assert (model.head.fuse_conv.conv.weight.grad is not None) is learns
    assert model.label_embedding.weight.grad is None
    assert all(p.grad is not None for part in (model.unet, model.classifier) for p in part.parameters())


def test_condition_dropout_hides_the_image():
    model = DDPSConfig(**{**PRIOR, "condition_dropout": 0.5}).build().eval()
    batch, target = images(2), labels(model, 2)
    draws = model.draw_training(model.encode(batch), [1, 2])
    losses = []
    for kept in (0.9, 0.1):
        draws["condition"] = torch.full((2,), kept)
        losses.append([model.losses(x, target, draws=draws)["loss"].item() for x in (batch, batch.flip(3))])
    assert losses[0][0] != losses[0][1]
    assert losses[1][0] == losses[1][1]
    assert losses[0][0] != losses[1][0]


@torch.no_grad()
def test_cached_weights_follow_the_parameters():
    model = DDPSConfig(**PRIOR).build().eval()
    before = model(images(1))
    with torch.inference_mode():
        assert torch.equal(model(images(1)), before)
    model.unet.downs[0].block1.conv1.weight[0, 0, 0, 0] += 5  # in place, as load_state_dict does
    after = model(images(1))
    assert not torch.equal(after, before)
    fresh = DDPSConfig(**PRIOR).build().eval()
    fresh.load_checkpoint(model.state_dict())
    assert torch.equal(fresh(images(1)), after)


def test_the_first_prediction_of_an_iteration_follows_the_optimizer():
    """Fused optimizers change weights without counting a version."""
    config = DDPSConfig(**{**PRIOR, "dropout": 0.0})
    model = config.build().train()  # and stays so: changing the mode would clear the cache
    optimizer = build_optimizer(model, OptimizerConfig("adamw", lr=0.1))
    draws = {"timesteps": torch.tensor([3, 3]), "masks": torch.randint(4, (2, 16, 24))}
    for _ in range(2):
        optimizer.zero_grad()
        model.losses(images(2), labels(model, 2), draws={**draws, "uniforms": torch.rand(2, 4, 16, 24)})[
            "loss"
        ].backward()
        optimizer.step()
    fresh = config.build().train()
    fresh.load_checkpoint(model.state_dict())
    with torch.no_grad():
        arguments = torch.randn(2, model.head.width, 16, 24), draws["masks"], torch.zeros(2, dtype=torch.long)
        assert torch.equal(model.denoise(*arguments), fresh.denoise(*arguments))


@torch.no_grad()
def test_background_can_be_excluded():
    model = DDPSConfig(**{**PRIOR, "suppress_background": True}).build().eval()
    model.classifier.bias[0] += 100
    assert model(images(1)).argmax(1).min() > 0


@torch.no_grad()
def test_a_run_from_a_given_map():
    torch.manual_seed(0)
    model = DDPSConfig(**PRIOR).build().eval()
    start = torch.randint(4, (2, 64, 96))
    found = model.refine_mask(images(2), start, [1, 2])
    assert list(found) == [f"timestep {t}" for t in range(5)]
    assert not torch.equal(found["timestep 0"], model.refine_mask(images(2), 3 - start, [1, 2])["timestep 0"])
    assert "labels" in refusal(lambda: model.refine_mask(images(2), start + 1))


@torch.no_grad()
def test_a_long_run_shows_some_timesteps():
    model = DDPSConfig(**{**PRIOR, "num_train_timesteps": 70}).build().eval()
    shown = list(model.denoising_trajectory(images(1)))
    assert len(shown) == 20
    assert (shown[0], shown[-1]) == ("timestep 0", "timestep 69")


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "posterior"}, "q_pred, q_posterior, bayes"),
        ({"inference_timesteps": 0}, "at least 1"),
        ({"inference_timesteps": -1}, "at least 1"),
        ({"uniforms": torch.rand(3, 1, 4, 16, 24)}, "it takes 4"),
        ({"uniforms": torch.rand(5, 1, 4, 16, 24)}, "it takes 4"),
    ],
)
def test_wrong_arguments_of_a_run_are_refused(options, words):
    model = DDPSConfig(**PRIOR).build().eval()
    condition, mask = model.encode(images(1)), torch.zeros(1, 16, 24, dtype=torch.long)
    assert words in refusal(lambda: model.denoise_steps(condition, mask, **options))


def test_draws_too_large_for_a_file_are_refused():
    model = DDPSConfig(**PRIOR).build().eval()
    assert "--size" in refusal(
        lambda: model.exportable(torch.empty(1, 3, 20_000, 20_000, device="meta"), dynamic=False)
    )
