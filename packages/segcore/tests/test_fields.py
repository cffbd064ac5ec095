"""Every field of every configuration dataclass, those of all installed methods too, refuses what it cannot hold."""

import dataclasses
import math
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from segcore.config import options
from segcore.config.fields import TRAIN, reads, setting
from segcore.config.registry import experiments, load_experiment
from segcore.config.schema import (
    DataConfig,
    EvalConfig,
    Experiment,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParamRule,
    ScheduleConfig,
    TrainConfig,
)
from segcore.errors import UserError


@dataclass(frozen=True)
class Part:
    """Part of a user's model, without a base class of ours."""

    depths: tuple[int, ...] = setting((2, 2), least=1)
    kind: Literal["plain", "bottleneck"] = "plain"


@dataclass(frozen=True)
class Own(ModelConfig):
    """A user's model, whose fields have annotations alone."""

    width: int = 8
    dropout: float = setting(0.1, least=0, below=1)
    part: Part = Part()

    def __post_init__(self):
        """Forgets the base class's: the Experiment checks all the same."""

    def build(self):
        raise NotImplementedError


SECTIONS = [DataConfig(), ParamRule("norm"), OptimizerConfig(), ScheduleConfig(), LossConfig(), TrainConfig()]
INSTANCES: dict[type, Any] = {type(node): node for node in [*SECTIONS, EvalConfig(), Experiment("own", Own())]}
for build in experiments().values():
    exp = build()
    INSTANCES.setdefault(type(exp.model), exp.model)


def wrong_values(hint, bounds):
    """Yield values that an annotation or bounds exclude."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        some = [part for part in parts if part is not type(None)]
        if len(some) == 1:
            yield from (
                value for value in wrong_values(some[0], bounds) if value is not None or type(None) not in parts
            )
        else:
            yield from ("nonsense", object(), 1.5, *([] if type(None) in parts else [None]))
        return
    yield from (object(), None)
    if kind is Literal:
        yield from ("nonsense", f"{parts[0]} ", str(parts[0]).upper(), (parts[0],), True)
    elif kind is tuple:
        whole = tuple(1 if part in (int, float) else "x" for part in parts if part is not ...)
        yield from (list(whole), whole[0], "nonsense")
        if ... in parts:
            yield from ((value,) for value in wrong_values(parts[0], bounds))
            if bounds.get("nonempty"):
                yield ()
        else:
            yield from (whole[:-1], (*whole, whole[0]))
            yield from ((value, *whole[1:]) for value in wrong_values(parts[0], bounds))
    elif hint in (int, float):
        yield from ("1", True, (1,))
        yield from ([math.nan, math.inf, -math.inf] if hint is float else [1.5])
        step = 1 if hint is int else 1e-6
        yield from (bounds[name] - step for name in ("least",) if name in bounds)
        yield from (bounds[name] + step for name in ("most",) if name in bounds)
        yield from (hint(bounds[name]) for name in ("above", "below") if name in bounds)
    elif hint is bool:
        yield from (1, "True")
    elif hint in (str, Path):
        yield from (3, ("x",), "x" if hint is Path else Path("x"))


FIELDS = [(cls, item) for cls in INSTANCES for item in dataclasses.fields(cls)]


@pytest.mark.parametrize(("cls", "item"), FIELDS, ids=[f"{cls.__name__}.{item.name}" for cls, item in FIELDS])
def test_every_field_refuses_what_it_cannot_hold(cls, item):
    name = f"{cls.section}.{item.name}".lstrip(".")
    values = list(wrong_values(get_type_hints(cls)[item.name], item.metadata))
    assert len(values) > 1
    for value in values:
        with pytest.raises(UserError) as caught:
            dataclasses.replace(INSTANCES[cls], **{item.name: value})
        text = str(caught.value)
        assert text.startswith((f"{name} is ", f"{name}.")), (value, text)
        assert "; it must be " in text or text == f"{name} is empty; give at least one value"
        assert "\n" not in text


def test_defaults_and_rows_are_within_their_own_bounds():
    for cls in {type(node) for node in INSTANCES.values()} - {ParamRule, Experiment}:
        assert cls() == cls()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: OptimizerConfig("adam"), "optimizer.kind is 'adam'; it must be adamw or sgd"),
        (lambda: ScheduleConfig(kind="cosinus"), "schedule.kind is 'cosinus'; it must be poly, cosine or step"),
        (lambda: TrainConfig(precision="float16"), "train.precision is 'float16'; it must be auto, fp32, bf16 or fp16"),
        (lambda: EvalConfig(mode="sliding"), "evaluate.mode is 'sliding'; it must be whole or slide"),
        (lambda: DataConfig("voc"), "data.dataset is 'voc'; it must be cityscapes, ade20k, folder, toy, camvid, "),
        (lambda: OptimizerConfig(lr=math.nan), "optimizer.lr is nan; it must be at least 0 and finite"),
        (lambda: OptimizerConfig(lr=-1.0), "optimizer.lr is -1.0; it must be at least 0"),
        (lambda: OptimizerConfig(betas=(0.9, 1.0)), "optimizer.betas is 1.0; it must be at least 0 and below 1"),
        (lambda: OptimizerConfig(clip_norm=-1.0), "optimizer.clip_norm is -1.0; it must be above 0 and finite"),
        (lambda: DataConfig(crop=(512,)), "data.crop is (512,); it must be (a whole number, a whole number)"),
        (lambda: DataConfig(root="data"), "data.root is 'data'; it must be a Path"),
        (lambda: Experiment("x", 3), "model is 3; it must be a ModelConfig"),
        (
            lambda: EvalConfig(mode="slide", crop=(64, 64), stride=(64, 65)),
            "evaluate.stride is (64, 65); it must be at most evaluate.crop (64, 64)",
        ),
        (lambda: Experiment("x", Own(width=2.5)), "model.width is 2.5; it must be a whole number"),
        (lambda: Experiment("x", Own(dropout=1)), "model.dropout is 1; it must be at least 0 and below 1"),
        (lambda: Experiment("x", Own(part=Part((0,)))), "model.part.depths is 0; it must be at least 1"),
        (
            lambda: Experiment("x", Own(part=Part(kind="Plain"))),
            "model.part.kind is 'Plain'; it must be plain or bottleneck",
        ),
        (
            lambda: load_experiment("ddrnet_23_slim_cityscapes").with_overrides(["optimizer.lr=-1"]),
            "optimizer.lr is -1.0; it must be at least 0",
        ),
    ],
)
def test_the_line_says_setting_value_and_choices(make, text):
    with pytest.raises(UserError) as caught:
        make()
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize(
    ("name", "values"),
    [("ddp_resnet18_toy", {"sampler": "dpm"}), ("ddps_segformer_b0_toy", {"mode": "posterior"}),
     ("setr_mla_dgmn2_nano_toy", {"head": "fcn"}), ("ddrnet_23_slim_toy", {"variant": "23-slim"})],
)  # fmt: skip
def test_choices_of_a_method_are_checked_from_python_too(name, values):
    [(field, value)] = values.items()
    with pytest.raises(UserError, match=f"model.{field} is '{value}'; it must be "):
        dataclasses.replace(load_experiment(name).model, **values)


def offered(command, node, prefix=""):
    """Return the dotted names of the settings that a command reads."""
    for item in dataclasses.fields(node):
        name, value = prefix + item.name, getattr(node, item.name)
        if dataclasses.is_dataclass(value):
            yield from offered(command, value, f"{name}.")
        elif reads(command, type(node), item):
            yield name


MODEL_ROWS = {type(build().model): name for name, build in experiments().items()}


@pytest.mark.parametrize("name", MODEL_ROWS.values())
def test_commands_read_what_they_need(name):
    exp = load_experiment(name)
    for command in TRAIN:
        assert set(offered(command, exp)) == {name for name in options.settings(exp) if not name[-1:].isdigit()} - {
            name for name in options.settings(exp) if ".rules." in name
        } | {"optimizer.rules"}
    every = set(offered("train", exp))
    for command, sections in {
        "test": {"model", "data", "evaluate", "seed"},
        "predict": {"model", "data", "evaluate", "seed"},
        "export": {"model", "data"},
        "bench": {"model", "data"},
        "check": {"model", "data", "seed"},
    }.items():
        found = set(offered(command, exp))
        assert {name.split(".")[0] for name in found} == sections
        assert found < every
    inference = {f"data.{key}" for key in ("mean", "std", "channels", "bit_depth", "max_pixels", "photometric")}
    labels = {f"data.{key}" for key in ("dataset", "classes", "labels", "unlisted", "add_background_class")}
    predict = set(offered("predict", exp))
    assert {name for name in predict if name.startswith("data.")} == inference | labels | {"data.workers"}
    assert {name for name in offered("bench", exp) if name.startswith("data.")} == inference
    assert {"model.num_classes", "evaluate.mode", "evaluate.precision", "seed"} <= predict
    assert len(predict) <= 35  # and about 25 of its own
    assert {"data.root", "data.val_images", "data.workers", "data.on_error", "evaluate.metrics"} <= set(
        offered("test", exp)
    )
    assert {"data.root", "data.train_images", "data.val_masks", "model.num_classes"} <= set(offered("check", exp))
