"""Learning rates equal those of the published schedulers."""

import pytest
import torch
from torch import nn

from segcore.config.schema import ScheduleConfig
from segcore.training.schedule import learning_rate

DDP = ScheduleConfig(160_000, "poly", warmup_iterations=1500, warmup_ratio=1e-6, warmup="scheduled")
DDPS = ScheduleConfig(
    160_000, "step", step=20_000, gamma=0.5, min_lr=1e-6, warmup_iterations=1000, warmup_ratio=1e-6, warmup="scheduled"
)


@pytest.mark.parametrize(
    ("schedule", "base", "iteration", "expected"),
    [
        (DDP, 6e-5, 0, 6e-11),
        (DDP, 6e-5, 1500, 5.94375e-5),  # the warm-up ends on the decayed rate, not on the base
        (DDP, 6e-5, 80_000, 3e-5),
        (DDP, 6e-5, 159_999, 3.75e-10),
        (DDPS, 1.5e-4, 500, 7.500007499999999e-05),
        (DDPS, 1.5e-4, 19_999, 1.5e-4),
        (DDPS, 1.5e-4, 20_000, 7.5e-5),
        (ScheduleConfig(kind="step", step=10, gamma=0.5, min_lr=2.0, warmup_iterations=0), 8.0, 30, 2.0),
        (ScheduleConfig(iterations=10, power=2.0, min_lr=1.0, warmup_iterations=0), 5.0, 5, 2.0),
    ],
)
def test_known_rates(schedule: ScheduleConfig, base: float, iteration: int, expected: float) -> None:
    assert learning_rate(schedule, base, iteration) == pytest.approx(expected, rel=1e-12)


def test_rates_of_the_published_schedulers(golden) -> None:
    rates = golden("eval/golden/schedules.npz")
    dgmn2 = ScheduleConfig(iterations=40_000, power=0.9, warmup_iterations=0)
    sgd = ScheduleConfig(iterations=80_000, power=0.9, min_lr=1e-4, warmup_iterations=0)
    ddps_50k = ScheduleConfig(
        kind="step", step=50_000, gamma=0.5, min_lr=1e-6, warmup_iterations=1000, warmup_ratio=1e-6, warmup="scheduled"
    )
    for schedule, base, iterations, expected in (
        (DDP, 6e-5, "ddp_iters", "ddp_lr"),
        (dgmn2, 1e-4, "dgmn2_iters", "dgmn2_lr"),
        (sgd, 0.01, "dgmn2_iters", "mmseg_sgd_lr_80k"),
        (DDPS, 1.5e-4, "ddps_step_iters", "ddps_step_lr_20k"),
        (ddps_50k, 1.5e-4, "ddps_step_iters", "ddps_step_lr_50k"),
    ):
        ours = [learning_rate(schedule, base, int(i)) for i in rates[iterations]]
        assert ours == pytest.approx(rates[expected], rel=1e-12), expected
    groups = ScheduleConfig(
        160_000, power=0.9, min_lr=1e-6, warmup_iterations=1500, warmup_ratio=1e-6, warmup="scheduled"
    )
    for i, row in zip(rates["groups_iters"], rates["groups_lr_minlr1e-6_power0.9"], strict=True):
        assert [learning_rate(groups, base, int(i)) for base in rates["groups_base"]] == pytest.approx(row, rel=1e-12)


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("base", [0.5, 0.01])
def test_cosine_is_that_of_torch(warmup: int, base: float) -> None:
    """From the base rate after the warm-up to the lowest one, also below it, at the end."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base)
    oracle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.02)
    schedule = ScheduleConfig(20 + warmup, "cosine", min_lr=0.02, warmup_iterations=warmup)
    for iteration in range(21):
        expected = optimizer.param_groups[0]["lr"]
        assert learning_rate(schedule, base, warmup + iteration) == pytest.approx(expected, rel=1e-9)
        optimizer.step()
        oracle.step()
    assert all(learning_rate(schedule, base, i) <= max(base, 0.02) for i in range(warmup))
