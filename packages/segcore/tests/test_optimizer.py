"""The settings of each parameter, and the effect of one step."""

import pytest
import torch
from torch import nn

from segcore.config.schema import OptimizerConfig, ParamRule
from segcore.errors import UserError
from segcore.models.segmentor import Segmentor
from segcore.training.optimizer import build_optimizer, load_optimizer_state, optimizer_state, param_settings
from segcore.training.parameters import freeze

RULES = {
    "ddp": (ParamRule("pos_block", decay_mult=0), ParamRule("norm", decay_mult=0), ParamRule("head")),
    "swin_like": tuple(
        ParamRule(key, decay_mult=0) for key in ("absolute_pos_embed", "relative_position_bias_table", "norm")
    ),
    "longest_first": (
        ParamRule("back", lr_mult=0.1),
        ParamRule("head", lr_mult=10),
        ParamRule("decode_head.norm", lr_mult=2, decay_mult=0),
        ParamRule("backbone", lr_mult=0.5, decay_mult=0.3),
    ),
    "same_length": (ParamRule("norm", decay_mult=0), ParamRule("neck", lr_mult=3), ParamRule("conv", lr_mult=7)),
}


@pytest.mark.parametrize(
    ("case", "name", "lr", "decay"),
    [
        ("ddp", "backbone.norm1.weight", 1, 0),
        ("ddp", "decode_head.norm1.weight", 1, 1),  # `head` is as long as `norm` and comes first
        ("ddp", "decode_head.pos_block.bias", 1, 0),
        ("ddp", "backbone.bn.weight", 1, 1),
        ("longest_first", "decode_head.norm1.weight", 2, 0),
        ("longest_first", "backbone.conv.bias", 0.5, 0.3),
        ("same_length", "neck.conv.weight", 7, 1),
    ],
)
def test_one_rule_supplies_both_settings(case: str, name: str, lr: float, decay: float) -> None:
    settings = param_settings([name], OptimizerConfig(lr=6e-5, weight_decay=0.01, rules=RULES[case]))
    assert settings[name] == pytest.approx((6e-5 * lr, 0.01 * decay), rel=1e-12)


@pytest.mark.parametrize("case", RULES)
def test_settings_of_the_published_constructor(golden, case: str) -> None:
    expected = golden("eval/golden/schedules.npz")
    names = [str(name) for name in expected[f"paramwise_{case}_names"]]
    lr, decay = zip(
        *param_settings(names, OptimizerConfig(lr=6e-5, weight_decay=0.01, rules=RULES[case])).values(), strict=True
    )
    assert lr == pytest.approx(expected[f"paramwise_{case}_lr"], rel=1e-12)
    assert decay == pytest.approx(expected[f"paramwise_{case}_wd"], rel=1e-12)


class Tiny(Segmentor):
    """Two convolutions with a tied bias, a norm, and a frozen scale; published names differ from the model's."""

    num_classes = 2

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.second.bias = self.first.bias
        self.bn = nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)

    def logits(self, images, seeds=None):
        return self.second(self.bn(self.first(images))) * self.scale

    def losses(self, images, labels, **options):
        return {"loss": nn.functional.softplus(self(images)).mean()}

    def key_map(self):
        return {name: name.replace("bn.", "backbone.norm.") for name in self.state_dict()}


def tiny(optimizer: OptimizerConfig, **layout: torch.memory_format) -> tuple[Tiny, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Tiny().to(**layout)
    return model, build_optimizer(model, optimizer)


def steps(model: Tiny, optimizer: torch.optim.Optimizer, count: int) -> None:
    for i in range(count):
        optimizer.zero_grad()
        images = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(i))
        model.losses(images, images)["loss"].backward()
        optimizer.step()


def test_parameters_with_equal_settings_share_a_group() -> None:
    rules = (ParamRule("norm", lr_mult=2, decay_mult=0), ParamRule("second", decay_mult=0.5))
    model, optimizer = tiny(OptimizerConfig(lr=0.1, weight_decay=0.01, rules=rules))
    groups = [(len(g["params"]), g["initial_lr"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert groups == [(2, 0.1, 0.1, 0.01), (1, 0.1, 0.1, 0.005), (2, 0.2, 0.2, 0.0)]
    trained = [p for g in optimizer.param_groups for p in g["params"]]
    assert sum(p is model.first.bias for p in trained) == 1  # tied: once, by its first name
    assert not any(p is model.scale for p in trained)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_step_is_the_textbook_one(kind: str) -> None:
    """Compares with one group per parameter and the unfused step, in a layout that the fused step must handle."""
    settings = OptimizerConfig(
        kind, lr=0.01, weight_decay=0.1, momentum=0.9, rules=(ParamRule("norm", lr_mult=3, decay_mult=0),)
    )
    model, optimizer = tiny(settings, memory_format=torch.channels_last)
    twin, _ = tiny(settings)
    by_name = param_settings(twin.key_map().values(), settings)
    groups = []
    for name, parameter in twin.named_parameters():
        lr, decay = by_name[twin.key_map()[name]]
        groups.append({"params": [parameter], "lr": lr, "weight_decay": decay})
    plain = torch.optim.AdamW(groups) if kind == "adamw" else torch.optim.SGD(groups, momentum=0.9)
    steps(model, optimizer, 3)
    steps(twin, plain, 3)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, twin.state_dict()[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_state_by_name_survives_another_grouping(kind: str) -> None:
    model, optimizer = tiny(OptimizerConfig(kind, lr=0.01, weight_decay=0.01, momentum=0.9))
    steps(model, optimizer, 2)
    saved = {name: {k: v.clone() for k, v in s.items()} for name, s in optimizer_state(model, optimizer).items()}
    assert set(saved) == {"first.weight", "first.bias", "second.weight", "bn.weight", "bn.bias"}
    # a rule whose multipliers change nothing, but which groups the parameters differently
    other, regrouped = tiny(
        OptimizerConfig(
            kind, lr=0.01, weight_decay=0.01, momentum=0.9, rules=(ParamRule("first", decay_mult=1 + 1e-12),)
        )
    )
    assert len(regrouped.param_groups) == 2
    other.load_state_dict(model.state_dict())
    load_optimizer_state(other, regrouped, saved)
    assert [g["initial_lr"] for g in regrouped.param_groups] == [0.01, 0.01]
    steps(model, optimizer, 1)
    steps(other, regrouped, 1)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], msg=name)


def rates(model: Tiny, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    """Return (learning rate, weight decay) by parameter name."""
    groups = {p: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    return {name: groups[p] for name, p in model.named_parameters() if p in groups}


def test_factors_by_prefix_multiply_those_of_the_rules() -> None:
    """The longest prefix counts, of own names (`bn`) or published ones (`backbone`), in whole words."""
    rules = (ParamRule("norm", lr_mult=2, decay_mult=0),)
    factors = (("first.weight", 5.0), ("first", 0.5), ("backbone", 0.25))
    found = rates(*tiny(OptimizerConfig(lr=1.0, weight_decay=0.1, rules=rules, lr_mult=factors)))
    assert found == {
        "first.weight": (5.0, 0.1),
        "first.bias": (0.5, 0.1),
        "second.weight": (1.0, 0.1),
        "bn.weight": (0.5, 0.0),
        "bn.bias": (0.5, 0.0),
    }
    assert found == rates(*tiny(OptimizerConfig(lr=1.0, weight_decay=0.1, rules=rules, lr_mult=factors[::-1])))


@pytest.mark.parametrize(
    ("prefix", "near"),
    [("firs", " (did you mean first?)"), ("bakbone.norm", " (did you mean backbone.norm?)"), ("zzz", "")],
)
def test_a_prefix_without_parameters_is_one_line(prefix: str, near: str) -> None:
    text = f"{prefix}: no parameter's name begins with it{near}; the model's parts are scale, first, second, bn"
    with pytest.raises(UserError) as caught:
        tiny(OptimizerConfig(lr_mult=((prefix, 0.1),)))
    assert str(caught.value) == f"optimizer.lr_mult {text}"
    with pytest.raises(UserError) as caught:
        freeze(Tiny(), ["first", prefix])
    assert str(caught.value) == f"train.freeze {text}"


def test_frozen_parts_are_not_trained() -> None:
    """A module whose parameters are all frozen is returned, also one frozen by published name; no other one."""
    model = Tiny()
    assert freeze(model, []) == []
    assert freeze(model, ["first.weight"]) == []
    assert freeze(model, ["backbone"]) == [model.bn]
    optimizer = build_optimizer(model, OptimizerConfig())
    assert set(rates(model, optimizer)) == {"first.bias", "second.weight"}
    with pytest.raises(UserError, match=r"^train.freeze first second: leaves no parameter to train; freeze fewer"):
        freeze(model, ["first", "second"])


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_state_is_restored_when_other_parts_are_frozen(kind: str) -> None:
    """Parts that train later start as at the first step, even if that step is skipped; frozen ones lose their state."""
    settings = OptimizerConfig(kind, lr=0.01, momentum=0.9)
    model, _ = tiny(settings)
    freeze(model, ["bn"])
    optimizer = build_optimizer(model, settings)
    steps(model, optimizer, 1)
    saved = optimizer_state(model, optimizer)
    later, _ = tiny(settings)
    freeze(later, ["second"])
    optimizer = build_optimizer(later, settings)
    load_optimizer_state(later, optimizer, saved)
    key = {"adamw": "exp_avg", "sgd": "momentum_buffer"}[kind]
    assert torch.equal(optimizer.state[later.first.bias][key], saved["first.bias"][key])
    before = later.bn.weight.clone()
    optimizer.found_inf = torch.tensor(1.0)
    steps(later, optimizer, 1)
    assert torch.equal(later.bn.weight, before)
    optimizer.found_inf = torch.tensor(0.0)
    steps(later, optimizer, 1)
    assert not torch.equal(later.bn.weight, before)
    assert later.bn.weight.isfinite().all()
    assert set(optimizer_state(later, optimizer)) == {"first.weight", "first.bias", "bn.weight", "bn.bias"}


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_state_has_the_memory_layout_of_the_parameters(kind: str) -> None:
    """Resumed with another `train.channels_last`, as the fused kernels for CUDA need it."""
    model, optimizer = tiny(OptimizerConfig(kind, momentum=0.9))
    steps(model, optimizer, 1)
    saved = optimizer_state(model, optimizer)
    model, optimizer = tiny(OptimizerConfig(kind, momentum=0.9))
    model.to(memory_format=torch.channels_last)
    load_optimizer_state(model, optimizer, saved)
    key = {"adamw": "exp_avg", "sgd": "momentum_buffer"}[kind]
    found = optimizer.state[model.first.weight][key]
    assert found.stride() == model.first.weight.stride() != saved["first.weight"][key].stride()
    assert torch.equal(found, saved["first.weight"][key])


@pytest.mark.parametrize(("kind", "later"), [("adamw", "sgd"), ("sgd", "adamw")])
def test_state_of_another_kind_is_refused(kind: str, later: str) -> None:
    model, optimizer = tiny(OptimizerConfig(kind, momentum=0.9))
    steps(model, optimizer, 1)
    saved = optimizer_state(model, optimizer)
    model, optimizer = tiny(OptimizerConfig(later, momentum=0.9))
    with pytest.raises(UserError, match=f"is that of {kind}; resume with --optimizer.kind {kind}"):
        load_optimizer_state(model, optimizer, saved)


def test_momentum_after_none_starts_at_zero() -> None:
    model, optimizer = tiny(OptimizerConfig("sgd", momentum=0.0))
    steps(model, optimizer, 1)
    saved = optimizer_state(model, optimizer)
    model, optimizer = tiny(OptimizerConfig("sgd", momentum=0.9))
    load_optimizer_state(model, optimizer, saved)
    assert all(torch.equal(each["momentum_buffer"], torch.zeros_like(p)) for p, each in optimizer.state.items())
    assert len(optimizer.state) == sum(len(group["params"]) for group in optimizer.param_groups)


def test_state_of_another_model_is_refused() -> None:
    model, optimizer = tiny(OptimizerConfig())
    with pytest.raises(UserError, match=r"1 parameters that are not trained here \(first: third.weight\)"):
        load_optimizer_state(model, optimizer, {"third.weight": {}})
