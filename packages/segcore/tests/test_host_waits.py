"""No pass of a method makes the host wait for the device: told on the CPU, where the meta device stands for a GPU."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import segcore
from segcore.models import layers
from segcore.models.stepwise import StepwiseSegmentor
from segcore.testing import contract
from segcore.testing.host_reads import HostReads

METHODS = ["ddp_resnet18_toy", "ddps_segformer_b0_toy", "ddrnet_23_slim_toy", "setr_mla_dgmn2_nano_toy"]


class Copies(TorchDispatchMode):
    """Counts copies from device to device that wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.device != args[0].device and not kwargs.get("non_blocking"):
            self.found.append(f"{tuple(out.shape)} from {args[0].device} to {out.device}")
        return out


class OnCPU(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        return torch._C.Generator("cpu")


@pytest.fixture
def waits(monkeypatch) -> Iterator[list[str]]:
    """What would wait for a GPU from here on. The meta device has no generators and no autocast."""

    def to_device(tensor: Tensor, device: torch.device) -> Tensor:
        return tensor.to(device, non_blocking=True)

    for module in [m for m in sys.modules.values() if getattr(m, "to_device", None) is layers.to_device]:
        monkeypatch.setattr(module, "to_device", to_device)
    reads, copies = HostReads(), Copies()
    copies.found = reads.found

    def from_numbers(function: Callable[..., Tensor], data: Any, **options: Any) -> Tensor:
        if not isinstance(data, Tensor) and torch.device(options.get("device") or "cpu").type != "cpu":
            reads.found.append(f"{function.__name__}({data})")  # the meta device copies no numbers
        return function(data, **options)

    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, partial(from_numbers, getattr(torch, name)))
    own = Tensor.new_tensor

    def new_tensor(like: Tensor, data: Any, **options: Any) -> Tensor:
        if like.device.type != "cpu":
            reads.found.append(f"new_tensor({data})")
        return own(like, data, **options)

    monkeypatch.setattr(Tensor, "new_tensor", new_tensor)
    monkeypatch.setattr(torch, "Generator", OnCPU)
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
    with reads, copies:
        yield reads.found


def build(name: str, device: str) -> tuple[segcore.Segmentor, Tensor, Tensor]:
    model = segcore.load_experiment(name).model.build()
    images, labels = contract.images(2), contract.labels(model, 2)
    return model.to(device), images.to(device), labels.to(device)


def answer(model: segcore.Segmentor, images: Tensor) -> object:
    return model.predict_steps(images, seeds=[1, 2]) if isinstance(model, StepwiseSegmentor) else model(images)


@pytest.mark.parametrize("name", METHODS)
def test_neither_training_nor_inference_waits(name, request):
    model, images, labels = build(name, "meta")
    waits = request.getfixturevalue("waits")
    model.train().losses(images, labels, seeds=[1, 2])["loss"].backward()
    with torch.no_grad():
        answer(model.eval(), images)
    assert waits == []


def test_what_waits_is_found(waits):
    torch.tensor([1.0], device="meta")
    torch.zeros(2).to("meta").new_tensor([1.0])
    assert len(waits) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("name", METHODS)
def test_cuda_is_not_waited_for(name):
    model, images, labels = build(name, "cuda")
    for mode in ("default", "error"):  # the first time sets up
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            model.train().losses(images, labels, seeds=[1, 2])["loss"].backward()
            with torch.no_grad():
                answer(model.eval(), images)
        finally:
            torch.cuda.set_sync_debug_mode("default")
