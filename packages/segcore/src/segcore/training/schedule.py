"""The length of a run, and the learning rate of an iteration (reference: evaluation specification, section 5)."""

import math
from dataclasses import replace

from segcore.config.schema import Experiment, ScheduleConfig


def resolve_epochs(exp: Experiment, images: int) -> tuple[Experiment, list[str]]:
    """Return `exp` with the iterations of its `schedule.epochs` over a number of training images, and a line about it.

    Without epochs, return `exp` itself and no line.
    """
    schedule, batch = exp.schedule, exp.train.batch_size
    if schedule.epochs is None:
        return exp, []
    total = math.ceil(schedule.epochs * images / batch)
    note = f"schedule.epochs {schedule.epochs}: {total} iterations ({images} images, train.batch_size {batch})"
    if total != schedule.iterations:
        note += f" in place of schedule.iterations {schedule.iterations}"
    if total <= schedule.warmup_iterations:
        note += f", all of them within the {schedule.warmup_iterations} of the warm-up"
    return replace(exp, schedule=replace(schedule, iterations=total)), [note]


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
        case "cosine":
            rate = (base - schedule.min_lr) * (1 + math.cos(math.pi * iteration / total)) / 2 + schedule.min_lr
        case "step":
            rate = max(base * schedule.gamma ** (iteration // schedule.step), schedule.min_lr)
    return factor * (rate - floor) + floor
