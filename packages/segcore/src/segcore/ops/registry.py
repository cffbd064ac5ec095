"""Registration of operators with torch.library, and of the kernels that serve them.

An operator is a schema, a plain kernel for every device, shapes for tracing, and a closed-form gradient that is also
an operator. An installed package of compiled kernels adds its own by device: its entry point in the group
`segcore.kernels` is called as `register(library, defaults)` when `segcore.ops` is imported, unless the environment
variable SEG_KERNELS is 0. The entry point is named after the schema that the package is made for; of another schema,
nothing of it is loaded.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor

from segcore.errors import UserError

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PLAIN = "plain PyTorch"
SCHEMA = "schema_1"
"""Changes when an operator's arguments or results do, as kernels would then be called with what they do not expect."""

library = torch.library.Library("segcore", "FRAGMENT")  # must stay alive
defaults: dict[str, Callable[..., Any]] = {}
"""The plain kernel of every operator and of its gradient, `NAME` and `NAME_backward`, and its check, `NAME_shape`."""

_devices: dict[str, str] = {}  # device type -> package whose compiled kernels serve it
_refused: dict[str, str] = {}  # device type -> why none serves it
_libraries: list[torch.library.Library] = []


def define(
    name: str,
    inputs: str,
    kernel: Callable[..., Tensor],
    backward: Callable[..., tuple[Tensor, ...]],
    shape: Callable[..., tuple[int, ...]],
) -> None:
    """Register `segcore::NAME(inputs) -> Tensor` and `segcore::NAME_backward`, which returns each tensor's gradient.

    `inputs` is the schema's argument list. `backward` takes the output's gradient and then the inputs; it returns
    contiguous gradients in the inputs' shapes and dtypes, an empty tensor for an optional input that is None. `shape`
    checks the inputs and returns the shape of the output, whose dtype is the first input's. A second derivative raises.
    """
    kinds = [part.split()[0] for part in inputs.split(", ")]
    slots = [i for i, kind in enumerate(kinds) if kind in ("Tensor", "Tensor?")]
    tags = (torch.Tag.pt2_compliant_tag,)
    library.define(f"{name}({inputs}) -> Tensor", tags=tags)
    library.define(
        f"{name}_backward(Tensor grad_output, {inputs}) -> ({', '.join(['Tensor'] * len(slots))})", tags=tags
    )
    for suffix, function in (("", kernel), ("_backward", backward)):
        defaults[name + suffix] = _without_autocast(function)
        library.impl(name + suffix, defaults[name + suffix], "CompositeExplicitAutograd")

    defaults[f"{name}_shape"] = shape

    def fake(*args: Any) -> Tensor:
        like: Tensor = args[0]
        return like.new_empty(shape(*args))

    def fake_backward(grad_output: Tensor, *args: Any) -> tuple[Tensor, ...]:
        return tuple(empty_gradient(args[i], grad_output) for i in slots)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*(inputs[i] for i in slots))
        ctx.rest = [None if i in slots else value for i, value in enumerate(inputs)]

    def autograd(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        args = list(ctx.rest)
        for i, tensor in zip(slots, ctx.saved_tensors, strict=True):
            args[i] = tensor
        grads = getattr(torch.ops.segcore, f"{name}_backward")(grad_output.contiguous(), *args)
        by_slot = dict(zip(slots, grads, strict=True))
        return tuple(by_slot[i] if i in slots and args[i] is not None else None for i in range(len(args)))

    def no_double_backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"segcore::{name} does not support double backward")  # without this it would return zeros

    torch.library.register_fake(f"segcore::{name}", fake, lib=library)
    torch.library.register_fake(f"segcore::{name}_backward", fake_backward, lib=library)
    torch.library.register_autograd(f"segcore::{name}", autograd, setup_context=setup_context, lib=library)
    torch.library.register_autograd(f"segcore::{name}_backward", no_double_backward, lib=library)


def define_inference(
    name: str,
    inputs: str,
    outputs: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    shape: Callable[..., tuple[int, ...]],
) -> None:
    """Register `segcore::NAME(inputs) -> outputs`, an operator without gradient; see `define`."""
    library.define(f"{name}({inputs}) -> {outputs}", tags=(torch.Tag.pt2_compliant_tag,))
    defaults[name], defaults[f"{name}_shape"] = _without_autocast(kernel), shape
    library.impl(name, defaults[name], "CompositeExplicitAutograd")
    torch.library.register_fake(f"segcore::{name}", fake, lib=library)


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Disable autocast, which affects kernels written in PyTorch: their matrix products would use half precision."""

    def kernel(*args: Any) -> Any:
        with torch.autocast(args[0].device.type, enabled=False):
            return function(*args)

    return kernel


def empty_gradient(tensor: Tensor | None, like: Tensor) -> Tensor:
    """Return a contiguous uninitialized gradient of `tensor`, or for None an empty one on the device of `like`."""
    if tensor is None:
        return like.new_empty(0)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def check_tensors(op: str, tensors: Mapping[str, tuple[Tensor | None, int]]) -> None:
    """Raise ValueError unless each tensor has its number of dimensions, a known dtype and the first one's device."""
    first = next(iter(tensors))
    device = getattr(tensors[first][0], "device", None)
    for name, (tensor, ndim) in tensors.items():
        if tensor is None:
            continue
        if tensor.dim() != ndim:
            raise UserError(f"{op}: {name} has shape {tuple(tensor.shape)}; it needs {ndim} dimensions")
        if tensor.dtype not in DTYPES:
            raise UserError(f"{op}: {name} is {tensor.dtype}; convert it to one of {', '.join(map(str, DTYPES))}")
        if tensor.device != device:
            raise UserError(f"{op}: {name} is on {tensor.device} but {first} on {device}; move it there")


def exporting() -> bool:
    """Return whether a graph is being traced for other runtimes, which lack these operators."""
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()


def compiled(device: torch.device) -> bool:
    """Return whether compiled kernels serve a device."""
    return device.type in _devices


def kernels() -> dict[str, dict[str, str]]:
    """Return per operator and device type ("cpu", "cuda") the serving package and version, or why there is none."""
    names = [name for name in defaults if not name.endswith(("_backward", "_shape"))]
    return {name: {device: _served(name, device) for device in ("cpu", "cuda")} for name in names}


def _served(name: str, device: str) -> str:
    package = _devices.get(device)
    if package is None:
        return f"{PLAIN}: {_refused[device]}"
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"segcore::{name}", device.upper())
    return package if has_kernel else f"{PLAIN}: {package} has no kernel for it"


def load() -> None:
    """Register the compiled kernels of the installed package, if any; warn about a package that fails."""
    unload()
    if os.environ.get("SEG_KERNELS") == "0":
        _refused.update(dict.fromkeys(("cpu", "cuda"), "the environment variable SEG_KERNELS is 0"))
        return
    for entry in entry_points(group="segcore.kernels"):
        package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
        if entry.name != SCHEMA:
            reason = (
                f"{package} is made for {entry.name} of the operators, not {SCHEMA}; install one of segcore's version"
            )
            _refused.update(dict.fromkeys(("cpu", "cuda"), reason))
            warnings.warn(f"segcore: compiled kernels are not used: {reason}", stacklevel=2)
            continue
        implementations = torch.library.Library("segcore", "IMPL")
        try:
            reasons = entry.load()(implementations, dict(defaults))
        except Exception as error:  # whatever the error, the plain kernels still work
            implementations._destroy()
            _refused.update(dict.fromkeys(("cpu", "cuda"), f"{entry.value} failed with {error!r}"))
            warnings.warn(f"segcore: compiled kernels are not used, {entry.value} failed: {error!r}", stacklevel=2)
            continue
        _libraries.append(implementations)
        _devices.update({device: package for device, reason in reasons.items() if not reason})
        _refused.update({device: f"{package}: {reason}" for device, reason in reasons.items() if reason})


def unload() -> None:
    """Remove compiled kernels; every operator falls back to its plain kernel."""
    while _libraries:
        _libraries.pop()._destroy()
    _devices.clear()
    _refused.update(dict.fromkeys(("cpu", "cuda"), "no package of compiled kernels is installed (seg-cuda-ops)"))
