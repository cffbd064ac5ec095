"""The learning rate of an iteration (reference: evaluation specification, section 5)."""

from segcore.experiment import Schedule


def learning_rate(schedule: Schedule, base: float, iteration: int) -> float:
    """Return the rate that step `iteration` (counted from 0) uses, for a parameter group whose own base rate is `base`.

    The warm-up scales the rate that the schedule gives at that iteration, so the curve has no jump where it ends.
    """
    if schedule.kind == "poly":
        left = 1 - iteration / schedule.iterations
        rate = (base - schedule.min_lr) * left**schedule.power + schedule.min_lr
    else:
        rate = max(base * schedule.gamma ** (iteration // schedule.step), schedule.min_lr)
    if iteration < schedule.warmup_iterations:
        rate *= 1 - (1 - iteration / schedule.warmup_iterations) * (1 - schedule.warmup_ratio)
    return rate
