"""A failed step is undone on the device."""

import pytest
import torch
from torch import nn

from segcore.errors import UserError
from segcore.testing.host_reads import HostReads
from segcore.training.guard import KeptBuffers, guarded_passes


class Buffers(nn.Module):
    """Buffers of all kinds: a norm's, one in channels-last layout, one of bool, and a constant that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("wide", torch.randn(2, 3, 4, 5, dtype=torch.float64).to(memory_format=torch.channels_last))
        self.register_buffer("flag", torch.tensor([True, False]))
        self.register_buffer("table", torch.randn(3), persistent=False)


@pytest.mark.parametrize("bad", [True, False])
def test_buffers_are_restored_bit_for_bit_only_when_the_step_is_bad(bad: bool) -> None:
    model = Buffers()
    buffers = KeptBuffers(model)
    model.norm.running_mean.uniform_(-1, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    buffers.keep()
    with torch.no_grad():
        model.norm.running_mean.fill_(float("nan"))
        model.norm.running_var.mul_(-3e38).mul_(10)
        model.norm.num_batches_tracked.add_(2**40)
        model.wide.add_(0.1)
        model.flag.logical_not_()
        model.table.add_(1)
    after, table = {name: value.clone() for name, value in model.state_dict().items()}, model.table.clone()
    with HostReads() as reads:
        buffers.put_back(torch.tensor(bad))
    assert reads.found == []
    expected = before if bad else after
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(7), expected[name].nan_to_num(7)), name
    assert torch.equal(model.table, table), "a constant is not looked after"


def fail(model: nn.Module, buffers: KeptBuffers, error: Exception) -> None:
    with guarded_passes(buffers, "lower the batch"):
        model(torch.randn(2, 3, 4, 4))
        raise error


def test_buffers_are_restored_after_an_error() -> None:
    model = nn.BatchNorm2d(3)
    buffers = KeptBuffers(model)
    for happens, text in ((UserError("broken"), "broken"), (torch.OutOfMemoryError("9 GiB"), "lower the batch")):
        with pytest.raises(UserError, match=text):
            fail(model, buffers, happens)
        assert not model.running_mean.any()
        assert model.num_batches_tracked == 0
