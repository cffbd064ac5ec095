"""`predict` on images: the loop over the files."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from segcore.cli.predict_files import Job, start_map, write
from segcore.errors import UserError
from segcore.inference import LoadedModel, as_array
from segcore.progress import progress
from segcore.result import Result


def run(seg: LoadedModel, jobs: Sequence[Job]) -> None:
    """Predict every image at its own size and write the files of its job, each whole or not at all.

    The mask is the same whatever is written beside it. Images that cannot be read are left out; then a UserError at the
    end names them.
    """
    failures: list[str] = []
    used: list[float] = []
    with progress("predicting") as advance:
        for done, job in enumerate(jobs):
            try:
                image = as_array(job.image, seg.experiment.data)
            except UserError as error:
                failures.append(str(error))
                continue
            try:
                result, maps = _answer(seg, job, image)
                uncertainty = seg.uncertainty(result) if job.uncertainty else None
            except UserError as error:  # too small for the model
                failures.append(f"{job.image}: {error}")
                continue
            write(job, result, maps, uncertainty)
            used += [result.steps_used] if result.steps_used else []
            advance(done + 1, len(jobs))
    written = len(jobs) - len(failures)
    if len(jobs) > 1:
        print(f"{written} of {len(jobs)} images written below {os.path.commonpath([job.mask.parent for job in jobs])}")
    elif written:
        print(*jobs[0].written, sep="\n")
    if used:
        print(f"{sum(used) / len(used):.2f} denoising steps on average")
    if failures:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise UserError(f"{failures[0]}{more}")


def _answer(seg: LoadedModel, job: Job, image: np.ndarray) -> tuple[Result, dict[str, np.ndarray]]:
    """Return the result of an image and, where its job shows them, the classes after every denoising step by title."""
    keep = bool(job.confidence or job.probabilities)
    if job.start:
        start = start_map(job.start, image, seg.experiment.data.add_background_class)
        return seg.refine(image, start, probabilities=keep)
    return seg(image, probabilities=keep), seg.steps(image) if job.steps or job.animation else {}
