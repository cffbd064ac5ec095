"""Small stored values of a method's parts, which detect changes even in a clone without the reference numbers.

A method's `tests/test_reference.py` computes them with the weights from `filled`, and calls `check`.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def normal(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return standard normal float32 numbers determined by a name; numpy's legacy stream is frozen."""
    return torch.from_numpy(np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype("float32"))


@torch.no_grad()
def filled(model: Any) -> Any:
    """Return the model in evaluation mode, with weights determined by the published names, at their usual scales.

    `model` is a Segmentor or has its `key_map`. Tables whose name begins with `log_` keep their values.
    """
    names = model.key_map()
    convert = getattr(model, "convert", lambda _, tensor: tensor)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not name.startswith("log_"):
            noise = normal(names[name], tensor.shape)
            if tensor.ndim > 1:
                noise /= (tensor.numel() / tensor.shape[0]) ** 0.5
            elif names[name].endswith(("weight", "gamma", "running_var")):
                noise = 1 + 0.1 * noise.abs()
            else:
                noise *= 0.1
            tensor.copy_(convert(names[name], noise))
    return model.eval()


def check(values: Mapping[str, Tensor], file: Path) -> None:
    """Raise AssertionError unless `values` match `file`: the same names, and equal numbers up to rounding."""
    with np.load(file) as expected:
        assert set(values) == set(expected), f"other names than in {file}: {set(values) ^ set(expected)}"
        for name, value in values.items():
            rtol = 1e-3 if "gradients" in name else 1e-4
            np.testing.assert_allclose(value.numpy(), expected[name], rtol=rtol, atol=2e-4, err_msg=name)


def write(values: Mapping[str, Tensor], file: Path) -> None:
    """Store `values` in `file`."""
    arrays: dict[str, Any] = {name: value.numpy() for name, value in values.items()}
    np.savez_compressed(file, **arrays)
