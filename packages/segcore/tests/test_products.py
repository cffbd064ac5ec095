"""Float32 products in CPU inference: which library takes them, and that nothing else changes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from segcore import environment
from segcore.cli.main import main
from segcore.environment import LIBRARIES, product_library
from segcore.errors import UserError
from segcore.models.backbones import build_backbone
from segcore.models.layers import Conv1x1, Linear, linear, use_fast_products
from segcore.ops import flops  # noqa: F401  (registers oneDNN's operators with the counter)

ONEDNN = {"mkldnn._linear_pointwise.default", "aten.mkldnn_convolution.default"}


class Operators(TorchDispatchMode):
    """Collects the names of the operators that run."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names = {*getattr(self, "names", ()), str(func)}
        return func(*args, **(kwargs or {}))


def by_onednn(call) -> bool:
    with Operators() as operators:
        call()
    return bool(operators.names & ONEDNN)


@pytest.fixture
def onednn(monkeypatch):
    monkeypatch.setenv("SEG_LINEAR", "onednn")


@pytest.fixture
def net():
    torch.manual_seed(0)
    return use_fast_products(nn.Sequential(nn.Conv2d(64, 96, 1), nn.GELU(), nn.Linear(32, 96))).eval()


X = torch.randn(1, 64, 32, 32, generator=torch.Generator().manual_seed(0))
WIDE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("x", [WIDE, WIDE.transpose(1, 3), WIDE[:, :, ::2], WIDE[:1].expand(2, 3, 64, 64)])
def test_products_of_any_layout(onednn, x):
    weight, bias = torch.randn(256, x.shape[-1]), torch.randn(256)
    for given in None, bias:
        expected = F.linear(x, weight, given)
        torch.testing.assert_close(linear(x, weight, given), expected, atol=2e-5 * expected.abs().max().item(), rtol=0)
    assert by_onednn(lambda: linear(x, weight))
    assert not by_onednn(lambda: linear(x, weight[:1]))  # few products


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # torch.jit.trace is deprecated
def test_only_float32_inference_on_a_cpu(onednn, net, monkeypatch):
    assert by_onednn(lambda: net(X))
    assert not by_onednn(lambda: copy.deepcopy(net).double()(X.double()))
    assert not by_onednn(lambda: copy.deepcopy(net).to("meta")(X.to("meta")))
    with torch.autocast("cpu"):
        assert not by_onednn(lambda: net(X))
    with torch.enable_grad():
        assert not by_onednn(lambda: net(X).sum().backward())
    graph = str(torch.export.export(net, (X,)).graph)
    assert "mkldnn" not in graph
    assert "linear" in graph
    assert not by_onednn(lambda: torch.jit.trace(net, X, check_trace=False))
    monkeypatch.setenv("SEG_LINEAR", "mkl")
    assert not by_onednn(lambda: net(X))


@torch.no_grad()
def test_a_missing_operator_is_no_error(onednn, net, monkeypatch):
    monkeypatch.setattr(environment, "_has_onednn", lambda: False)
    assert product_library() == "mkl"
    assert not by_onednn(lambda: net(X))


@pytest.mark.parametrize(("vendor", "capability", "library"), [
    ("AuthenticAMD", "AVX512", "onednn"),
    ("AMD64 Family 26 Model 2 Stepping 1, AuthenticAMD", "AVX512", "onednn"),
    ("AuthenticAMD", "AVX2", "mkl"),
    ("GenuineIntel", "AVX512", "mkl"),
    ("arm", "DEFAULT", "mkl")])  # fmt: skip
def test_rule_by_vendor(vendor, capability, library, monkeypatch):
    monkeypatch.delenv("SEG_LINEAR")
    monkeypatch.setattr(environment, "processor", lambda field: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(environment, "_suited_library", environment._suited_library.__wrapped__)
    assert product_library() == library


def test_wrong_variable_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("SEG_LINEAR", "fast")
    with pytest.raises(UserError, match=r"^SEG_LINEAR is 'fast'; set it to mkl or onednn, or unset it$"):
        use_fast_products(nn.Linear(2, 2))
    with pytest.raises(SystemExit):
        main(None, ["env"])
    assert "SEG_LINEAR is 'fast'" in capsys.readouterr().err


@pytest.mark.parametrize("library", LIBRARIES)
def test_env_prints_the_library(library, monkeypatch, capsys):
    monkeypatch.setenv("SEG_LINEAR", library)
    main(None, ["env"])
    assert f"float32 products: {library}\n" in capsys.readouterr().out


def test_layers_of_a_library_keep_everything_else():
    plain = build_backbone("convnext_t")
    kinds = [type(part) for part in plain.modules()]
    ours = use_fast_products(copy.deepcopy(plain))
    assert kinds.count(nn.Linear) == sum(type(part) is Linear for part in ours.modules()) > 30
    assert not any(type(part) is nn.Linear for part in ours.modules())
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert repr(ours) == repr(plain)


def test_copies_keep_their_layers(net):
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert [type(part) for part in copied] == [Conv1x1, nn.GELU, Linear]
        assert torch.equal(copied(X), net(X))


@torch.no_grad()
def test_operations_are_counted_alike(net, monkeypatch):
    counts = []
    for library in LIBRARIES:
        monkeypatch.setenv("SEG_LINEAR", library)
        with FlopCounterMode(display=False) as counter:
            net(X)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 96 * 32 * 32 * 64 + 2 * 96 * 32 * 96 * 32
