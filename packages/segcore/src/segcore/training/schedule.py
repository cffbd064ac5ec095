"""The learning rate of an iteration (reference: evaluation specification, section 5)."""

from segcore.config.schema import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, base: float, iteration: int) -> float:
    """Return the learning rate of step `iteration` (counted from 0) for a parameter group with base rate `base`.

    The usual warm-up scales the scheduled rate of the iteration, so the curve has no jump at the end of the warm-up.
    """
    warmup, total = schedule.warmup_iterations, schedule.iterations
    factor, floor = 1.0, 0.0
    if iteration < warmup:
        ramp = {"scheduled": iteration / warmup, "linear": iteration / warmup, "constant": 0.0}[schedule.warmup]
        factor = 1 - (1 - ramp) * (1 - schedule.warmup_ratio)
    if schedule.warmup in ("linear", "constant"):
        iteration, total, floor = max(iteration - warmup, 0), max(total - warmup, 1), schedule.min_lr
    match schedule.kind:
        case "poly":
            rate = (base - schedule.min_lr) * (1 - iteration / total) ** schedule.power + schedule.min_lr
        case "step":
            rate = max(base * schedule.gamma ** (iteration // schedule.step), schedule.min_lr)
    return factor * (rate - floor) + floor
