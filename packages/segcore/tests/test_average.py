"""The average of the weights: its formula, its place in a checkpoint, and that the trained weights do not change."""

import pytest
import torch
from torch import nn

from segcore.training.ema import averaged, start_ema, update_ema


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_formula(model: nn.Module) -> None:
    """average = decay * average + (1 - decay) * value, running statistics included, counters not."""
    average = start_ema(model)
    assert "1.running_mean" in average
    assert "1.num_batches_tracked" not in average
    expected = average["0.weight"].clone()
    for _ in range(3):
        with torch.no_grad():
            model[0].weight.add_(1)
            model[1].running_mean.add_(1)
        update_ema(average, model, 0.75)
        expected = 0.75 * expected + 0.25 * model[0].weight.detach()
    torch.testing.assert_close(average["0.weight"], expected)
    torch.testing.assert_close(average["1.running_mean"], torch.full((2,), 1.265625))


def test_the_trained_weights_are_restored(model: nn.Module) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    average = {name: torch.zeros_like(value) for name, value in start_ema(model).items()}
    with averaged(model, average):
        assert not model[0].weight.any()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with averaged(model, None):
        assert torch.equal(model[0].weight, before["0.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_skipped_step_does_not_change_the_average(model: nn.Module, dtype: torch.dtype) -> None:
    model.to(dtype)
    average, expected = start_ema(model), start_ema(model)
    with torch.no_grad():
        model[0].weight.add_(1)
    update_ema(average, model, 0.75, torch.tensor(True))
    assert all(torch.equal(value, expected[name]) for name, value in average.items())
    update_ema(average, model, 0.75, torch.tensor(False))
    update_ema(expected, model, 0.75)
    assert all(torch.equal(value, expected[name]) for name, value in average.items())
