"""DDP's noise starts and steps at inference: the mean over both, and early exit."""

import dataclasses
import itertools

import pytest
import torch

from ddp_seg.configs import DDPConfig
from segcore.models.layers import resize
from segcore.testing.contract import images

SMALL = DDPConfig(
    num_classes=5,
    backbone="resnet18",
    width=32,
    decoder_layers=1,
    heads=4,
    drop_path=0.0,
    num_inference_steps=6,
    auxiliary=False,
)
VARIANTS = {
    "ddim": SMALL,
    "accumulated": dataclasses.replace(SMALL, accumulation=True, randsteps=2),
    "ddpm": dataclasses.replace(SMALL, sampler="ddpm", randsteps=2),
}
SEEDS = [3, 4, 5]


@pytest.fixture(params=VARIANTS)
def model(request):
    """A model whose outputs differ from step to step: random weights, but label embeddings as strong as the noise."""
    torch.manual_seed(1)
    model = dataclasses.replace(VARIANTS[request.param], bit_scale=1.0).build().eval()
    with torch.no_grad():
        model.time_embedding.frequencies.mul_(0.05)  # neighboring times look alike, as in a trained model
    return model


def steps_of(model, batch, seeds, runs=1):
    """Return the logits of every step (T, N, R, K, h, w), image by image; R counts the noise starts of all runs."""
    found = []
    for row, seed in enumerate(seeds):
        features = model.encode(batch[row : row + 1])
        starts = []
        for run in range(runs):
            start, noise = model.draw(features, [seed], run=run)
            starts.append(torch.stack([s.logits for s in model.denoising_steps(features, start, noise)]))
        found.append(torch.cat(starts, 1))
    return torch.stack(found, 1)


@torch.no_grad()
def test_the_marginal_is_the_mean_over_starts_and_all_steps_but_the_first(model):
    batch = images(3)
    expected = steps_of(model, batch, SEEDS, runs=3)[1:].softmax(3).mean((0, 2)).log()
    found = model.log_mean_probs(batch, SEEDS, starts=3)
    torch.testing.assert_close(found, resize(expected, (64, 96)), atol=1e-4, rtol=1e-4)
    other = model.log_mean_probs(batch, [8, 8, 8], starts=3)
    assert not torch.allclose(found, other), "the noise plays no part"


def stops(model, answers, percent):
    """Return the step (from 1) at which each image exits: the first that changes fewer than `percent` %."""
    classes = answers.argmax(2).flatten(2)
    changed = 100 * (classes[1:] != classes[:-1]).float().mean(2)
    quiet = [(column < percent).nonzero().flatten().tolist() for column in changed.T]
    return [where[0] + 2 if where else model.num_inference_steps for where in quiet], changed


@torch.no_grad()
def test_images_leave_the_batch_when_few_pixels_change(model):
    """Compare with a full run of every image alone, at thresholds between the changes that occur."""
    batch = images(3)
    answers = steps_of(model, batch, SEEDS)
    if model.accumulation:
        counts = torch.arange(1, model.num_inference_steps + 1).view(-1, 1, 1, 1, 1, 1)
        answers = answers.softmax(3).cumsum(0) / counts
    answers = answers.mean(2)
    changes = sorted(set(stops(model, answers, 1)[1].flatten().tolist()))
    assert len(changes) > 2, "the case shows nothing"
    seen = set()
    for low, high in itertools.pairwise(changes[::2]):
        percent = (low + high) / 2
        expected, _ = stops(model, answers, percent)
        found, taken = model.early_exit(batch, percent, SEEDS)
        assert taken == expected
        seen.add(tuple(taken))
        for row, count in enumerate(taken):
            alone = resize(answers[count - 1, row : row + 1], (64, 96))
            torch.testing.assert_close(found[row : row + 1], alone, atol=1e-4, rtol=1e-4)
    assert any(len(set(taken)) > 1 for taken in seen), "no batch ever shrank"


@torch.no_grad()
def test_a_run_that_never_converges_is_the_configured_one(model):
    found, taken = model.early_exit(images(2), 1e-9, [1, 2])
    torch.testing.assert_close(found, model(images(2), seeds=[1, 2]), atol=1e-5, rtol=1e-5)
    assert max(taken) <= 6


@torch.no_grad()
def test_a_single_step_is_the_configured_output():
    model = dataclasses.replace(SMALL, num_inference_steps=1).build().eval()
    found, taken = model.early_exit(images(2), 100.0, [1, 2])
    assert taken == [1, 1]
    torch.testing.assert_close(found, model(images(2), seeds=[1, 2]))
    one = model.log_mean_probs(images(2), [1, 2], starts=1).softmax(1)
    assert torch.equal(one.argmax(1), found.argmax(1)), "the only step there is"


@torch.no_grad()
def test_too_few_draws_are_refused():
    model = SMALL.build().eval()
    features = torch.randn(1, 32, 4, 4)
    start, noise = torch.randn(1, 32, 4, 4), torch.randn(3, 1, 32, 4, 4)
    with pytest.raises(ValueError, match="2 draws for a run of 4 steps; it takes 3"):
        model.denoise(features, start, steps=4, sampler="ddpm", step_noise=noise[:2])
    with pytest.raises(ValueError, match="sampler is 'dpm'; it must be ddim or ddpm"):
        model.denoise(features, start, steps=1, sampler="dpm")
    assert model.denoise(features, start, steps=4, sampler="ddpm", step_noise=noise).isfinite().all()
