"""The noise of models that denoise in steps: each image draws from generators of its own seed.

Numbers are drawn where the model is, because a GPU draws them in no time and a core takes 4 ns for each; or all on the
CPU (`evaluate.noise_device cpu`), so that they are the same on every device. Then threads draw ahead of a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from segcore.config.schema import NoiseDevice
from segcore.data.workers import in_threads
from segcore.models.layers import to_device
from segcore.seeds import start_seed

THREADS = 4
"""How many images draw at once on the CPU for a model on another device."""


class Generators(NamedTuple):
    """The generators of an image; on the CPU, one for both."""

    host: torch.Generator
    """On the CPU, for the few numbers that the host reads."""
    maps: torch.Generator
    """For maps, on the device of the noise."""


def generators(
    seeds: Sequence[int] | None,
    images: int,
    run: int = 0,
    *,
    device: torch.device | None = None,
    noise_device: NoiseDevice = "model",
) -> list[Generators]:
    """Return the generators of each image, seeded with its seed and, after a seed's first run, the run number.

    `device` is the model's (None: the CPU), where maps are drawn unless `noise_device` is "cpu". None as `seeds` means
    seed 0 for every image. Raises ValueError for another number of seeds than images.
    """
    if seeds is not None and len(seeds) != images:
        raise ValueError(f"{len(seeds)} seeds for {images} images; give one seed per image")
    on_host = device is None or device.type == "cpu" or noise_device == "cpu"
    made = []
    for seed in seeds or [0] * images:
        host = torch.Generator().manual_seed(start_seed(seed, run))
        maps = host if on_host else torch.Generator(device).manual_seed(start_seed(seed, run))
        made.append(Generators(host, maps))
    return made


def draw(function: Callable[[torch.Generator], Tensor], drawing: Iterable[Generators], device: torch.device) -> Tensor:
    """Return `function(generator)` of every image, stacked, on `device`; on the CPU for a GPU, in threads."""
    sources = [each.maps for each in drawing]
    elsewhere = any(source.device.type != device.type for source in sources)
    maps = in_threads(function, sources, THREADS if elsewhere and len(sources) > 1 else 0)
    return to_device(torch.stack([*maps]), device)


def draw_steps(
    function: Callable[[torch.Generator], Tensor], drawing: Sequence[Generators], device: torch.device, steps: int
) -> Iterator[Tensor]:
    """Yield `draw` of every step; a thread draws the next step's on the CPU while a GPU is at work on one."""
    ahead = any(each.maps.device.type != device.type for each in drawing)
    drawn = in_threads(lambda _: torch.stack([function(each.maps) for each in drawing]), range(steps), int(ahead))
    return (to_device(maps, device) for maps in drawn)  # here, because a thread of its own is on the first GPU
