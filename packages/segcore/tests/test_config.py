import dataclasses
import importlib.metadata
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from segcore.cli.main import parse
from segcore.config import options, registry
from segcore.config.record import VersionError, from_plain, settings_of
from segcore.config.registry import load_experiment
from segcore.config.schema import (
    DataConfig,
    EvalConfig,
    Experiment,
    ModelConfig,
    OptimizerConfig,
    ParamRule,
    ScheduleConfig,
    TrainConfig,
)
from segcore.config.source import source
from segcore.errors import UserError


@dataclass(frozen=True)
class Backbone:
    depths: tuple[int, ...] = (2, 2)
    tag: str | None = None


@dataclass(frozen=True)
class Tiny(ModelConfig):
    num_inference_steps: int = 3
    accumulation: bool = False
    bit_scale: float = 0.01
    backbone: Backbone = Backbone()

    def build(self):
        raise NotImplementedError


EXPERIMENT = Experiment(
    name="tiny",
    model=Tiny(),
    data=DataConfig("toy", Path("data/toy"), photometric=True),
    train=TrainConfig(batch_size=16, device_batch_size=4),
    optimizer=OptimizerConfig(rules=(ParamRule("norm", decay_mult=0.0), ParamRule("head", lr_mult=10.0))),
)


def value_at(node, path):
    """Return the value at a dotted path; digits index a tuple."""
    for part in path.split("."):
        node = node[int(part)] if part.isdigit() else getattr(node, part)
    return node


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("model.num_inference_steps=10", 10),
        ("model.accumulation=True", True),
        ("model.bit_scale=1e-3", 1e-3),
        ("model.backbone.depths=3 4 6 3", (3, 4, 6, 3)),
        ("model.backbone.tag=a name with spaces", "a name with spaces"),
        ("data.root=/data/city scapes", Path("/data/city scapes")),
        ("data.crop=256 512", (256, 512)),
        ("data.crop=256,512", (256, 512)),
        ("data.img_scale=None", None),
        ("data.palette='two words' one", ("two words", "one")),
        ("data.mean=-1e-05 0 1", (-1e-5, 0.0, 1.0)),
        ("evaluate.metrics=mIoU mDice", ("mIoU", "mDice")),
        ("evaluate.steps=1,3,10", (1, 3, 10)),
        ("optimizer.clip_norm=1", 1.0),
        ("optimizer.rules.1.lr_mult=2.5", 2.5),
        ("train.device-batch-size=2", 2),
        ("train.init_from=official:a=b", "official:a=b"),
        ("loss.class_weight=auto", "auto"),
        (f"loss.class_weight={'0.5 ' * 19}", (0.5,) * 19),
        ("name=--odd", "--odd"),
        ("name=", ""),
    ],
)
def test_override_changes_one_setting(override, value):
    path = override.partition("=")[0].replace("-", "_")
    changed = EXPERIMENT.with_overrides([override])
    assert value_at(changed, path) == value
    assert type(value_at(changed, path)) is type(value)
    assert changed.with_overrides([_override(path, value_at(EXPERIMENT, path))]) == EXPERIMENT


def test_overrides_apply_together_and_leave_the_original():
    changed = EXPERIMENT.with_overrides(["data.crop=64 128", "seed=7", "schedule.iterations=10"])
    assert (changed.data.crop, changed.seed, changed.schedule.iterations) == ((64, 128), 7, 10)
    assert EXPERIMENT.data.crop == (512, 512)
    assert EXPERIMENT.with_overrides([]) == EXPERIMENT


def test_pair_that_is_none_takes_two_numbers():
    experiment = EXPERIMENT.with_overrides(["evaluate.img_scale=None"])
    assert experiment.with_overrides(["evaluate.img_scale=20 10"]).evaluate.img_scale == (20, 10)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.num_inference_step=3", ["model.num_inference_step'", "did you mean model.num_inference_steps?"]),
        ("train_init=x", ["did you mean train.init_from?"]),
        ("optimizer.rules.2.key=x", ["optimizer.rules.2.key", "did you mean optimizer.rules."]),
        ("model=x", ["no setting 'model'"]),
        ("help=1", ["no setting 'help'"]),
        ("seed", ["'seed' has no '='", "name=value"]),
        ("model.num_inference_steps=ten", ["--model.num-inference-steps", "ten: expected"]),
        ("model.accumulation=maybe", ["--model.accumulation", "maybe: expected", "True", "False"]),
        ("schedule.kind=poli", ["--schedule.kind", "poli: expected", "poly"]),
        ("data.crop=256", ["--data.crop", "2"]),
        ("data.crop='256 512", ["data.crop", "no closing quotation"]),
        ("evaluate.metrics=IoU", ["--evaluate.metrics", "IoU: expected", "mIoU"]),
    ],
)
def test_wrong_override_is_one_line_that_names_it(override, words, capsys):
    with pytest.raises(UserError) as caught:
        EXPERIMENT.with_overrides([override])
    text = str(caught.value)
    assert "\n" not in text
    assert [word for word in words if word not in text] == []
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("train.batch_size=0", "train.batch_size is 0"),
        ("data.crop=0 64", "data.crop is 0"),
        ("evaluate.stride=1 -1", "evaluate.stride is -1"),
        ("schedule.iterations=0", "schedule.iterations is 0"),
        ("model.in_channels=4", "model.in_channels is 4 but data.channels is 3"),
        ("data.mean=1 2", "data.mean and data.std have 2 and 3 values"),
        ("data.bit_depth=16", "data.photometric"),
        ("data.flip=1.5", "data.flip is 1.5; it must be from 0 to 1"),
        ("data.flip=nan", "data.flip is nan"),
        ("data.ratio_range=2 0.5", "data.ratio_range is 2.0 to 0.5; give the smaller ratio first"),
        ("data.std=1 inf 1", "data.std is inf; it must be above 0 and finite"),
        ("data.mean=1 nan 1", "data.mean is nan; it must be finite"),
        (f"loss.class_weight=0 {'1 ' * 18}", "loss.class_weight is 0.0; it must be above 0"),
    ],
)
def test_settings_that_contradict_are_refused(override, text):
    with pytest.raises(UserError, match=text):
        EXPERIMENT.with_overrides([override])


def test_class_names_alone_set_the_number_of_classes():
    folder = EXPERIMENT.with_overrides(["data.dataset=folder", "data.classes=a b c"])
    assert folder.model.num_classes == 3
    assert folder.with_overrides(["data.classes=a b", "data.add_background_class=True"]).model.num_classes == 3
    assert folder.with_overrides(["data.classes=a b", "model.num_classes=5"]).model.num_classes == 5
    command = parse(["check", "ddrnet_23_slim_toy", "--data.dataset", "folder", "--data.classes", "a", "b"])
    assert command.experiment.model.num_classes == 2


def test_more_bands_are_accepted_when_every_setting_says_so():
    bands = ["data.channels=4", "model.in_channels=4", "data.mean=0 0 0 0", "data.std=1 1 1 1", "data.bit_depth=16"]
    assert EXPERIMENT.with_overrides([*bands, "data.photometric=False"]).data.channels == 4


def _override(path, value):
    """Write a setting the way a user would."""
    if isinstance(value, tuple):
        return f"{path}={' '.join(shlex.quote(str(item)) for item in value)}"
    return f"{path}={value}"


counts = st.integers(1, 10**9)
sizes = st.tuples(counts, counts)
reals = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(1e-6, 1e6)
shares = st.floats(0, 1, exclude_max=True)
words = st.text(st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=("Cs",))).filter(
    lambda word: word != "None"
)
class_names = st.lists(st.from_regex(r"[a-z][a-z '\"-]*", fullmatch=True), max_size=4).map(tuple)
rules = st.tuples(*[st.builds(ParamRule, words, positive, positive)] * 2)
channels = st.integers(1, 5)


@st.composite
def experiments(draw):
    n = draw(channels)
    eight = draw(st.booleans())
    data = st.builds(
        DataConfig,
        root=st.from_regex(r"[\w /.-]+", fullmatch=True).map(Path),
        classes=class_names,
        channels=st.just(n),
        bit_depth=st.just(8 if eight else 16),
        img_scale=st.none() | sizes,
        crop=sizes,
        photometric=st.booleans() if n == 3 and eight else st.just(False),
        mean=st.tuples(*[reals] * n),
        std=st.tuples(*[positive] * n),
    )
    passes = draw(st.integers(1, 100))
    train = st.builds(
        TrainConfig,
        batch_size=st.just(passes * 4),
        device_batch_size=st.just(4),
        init_from=st.none() | words,
        precision=st.sampled_from(["fp32", "bf16"]),
    )
    return Experiment(
        name=draw(words),
        model=draw(
            st.builds(
                Tiny,
                num_classes=st.integers(1, 65535),
                in_channels=st.just(n),
                accumulation=st.booleans(),
                bit_scale=reals,
                backbone=st.builds(Backbone, st.lists(st.integers(), max_size=4).map(tuple), st.none() | words),
            )
        ),
        data=draw(data),
        optimizer=draw(
            st.builds(OptimizerConfig, betas=st.tuples(shares, shares), clip_norm=st.none() | positive, rules=rules)
        ),
        schedule=draw(
            st.builds(ScheduleConfig, iterations=counts, kind=st.sampled_from(["poly", "step"]), power=positive)
        ),
        train=draw(train),
        evaluate=draw(
            st.builds(
                EvalConfig,
                img_scale=st.none() | sizes,
                steps=st.lists(counts, max_size=3).map(tuple),
                metrics=st.sampled_from([(), ("mIoU",), ("mDice", "mFscore")]),
            )
        ),
        seed=draw(st.integers()),
    )


@settings(suppress_health_check=[HealthCheck.too_slow])  # a command line of 70 words each
@given(experiments())
def test_every_experiment_can_be_written_as_overrides(wanted):
    overrides = [_override(path, value_at(wanted, path)) for path in options.settings(EXPERIMENT)]
    assert EXPERIMENT.with_overrides(overrides) == wanted


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(wanted=experiments())
def test_every_experiment_can_be_written_as_a_file(tmp_path_factory, wanted):
    path = tmp_path_factory.mktemp("written") / "my.py"  # a new path each time: compiled files go by path and second
    path.write_text(source(wanted), encoding="utf-8", newline="")
    assert load_experiment(str(path)) == wanted
    assert load_experiment(f"{path}:experiment") == wanted


METHOD = """
from dataclasses import dataclass
from segcore.config.schema import Experiment, ModelConfig

@dataclass(frozen=True)
class Net(ModelConfig):
    def build(self):
        raise NotImplementedError

def experiments():
    method = __name__.split(".")[0]
    return {f"{method}_{size}": lambda size=size: Experiment(size, Net()) for size in ("small", "large")}
"""


@pytest.fixture
def two_methods(tmp_path, monkeypatch):
    """Two installed method packages, `alpha_net` and `beta_net`, with two configurations each."""
    points = []
    for name in ("alpha_net", "beta_net"):
        package = tmp_path / name
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "configs.py").write_text(METHOD)
        published = (
            f"PUBLISHED = {{'{name}_large': Published({{'single scale': 50.5}}, 'https://example.org/{name}.pth')}}"
        )
        (package / "official.py").write_text(f"from segcore.config.schema import Published\n{published}\n")
        points.append(importlib.metadata.EntryPoint(name, name, "segcore.methods"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "segcore.methods" else [])
    yield
    for module in [module for module in sys.modules if module.startswith(("alpha_net", "beta_net"))]:
        del sys.modules[module]


@pytest.mark.usefixtures("two_methods")
def test_configurations_are_found_by_name_with_either_dash():
    assert list(registry.experiments()) == ["alpha_net_small", "alpha_net_large", "beta_net_small", "beta_net_large"]
    assert list(registry.experiments("beta_net")) == ["beta_net_small", "beta_net_large"]
    assert load_experiment("alpha_net_large") == load_experiment("alpha-net-large")
    assert load_experiment("beta_net_small").name == "small"


@pytest.mark.usefixtures("two_methods")
def test_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"no configuration 'alpha-net-smol'.*did you mean alpha_net_small\?"):
        load_experiment("alpha-net-smol")
    with pytest.raises(UserError, match=r"did you mean beta_net_small\?"):
        load_experiment("alpha_net_small", package="beta_net")
    with pytest.raises(UserError, match="no configuration 'x'; `segcore configs` lists all"):
        load_experiment("x")


@pytest.mark.usefixtures("two_methods")
def test_published_figures_belong_to_their_row():
    row = registry.published("beta-net-large")
    assert row is not None
    assert row.miou == {"single scale": 50.5}
    assert row.url == "https://example.org/beta_net.pth"
    assert registry.published("beta_net_small") is None


def test_without_methods_the_error_says_so(monkeypatch):
    monkeypatch.setattr(registry, "entry_points", lambda group: [])
    with pytest.raises(UserError, match="no method package is installed"):
        load_experiment("alpha_net_small")


CONFIG = """
from __future__ import annotations
from dataclasses import dataclass
from segcore.config.schema import Experiment, ModelConfig

@dataclass(frozen=True)
class Net(ModelConfig):
    width: int = 8
    def build(self):
        raise NotImplementedError

def wide():
    return Experiment("wide", Net(width=64))

def number():
    return 3
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "json.py"  # the name of a module that must not be replaced
    path.write_text(CONFIG)
    return path


def test_file_configuration_and_its_own_dataclass(config):
    import json

    wide = load_experiment(f"{config}:wide")
    assert (wide.name, wide.model.width) == ("wide", 64)
    assert wide.with_overrides(["model.width=32"]).model == dataclasses.replace(wide.model, width=32)
    assert sys.modules["json"] is json


def test_file_with_one_function_needs_no_name(tmp_path):
    path = tmp_path / "my.py"
    path.write_text(
        "import segcore.config.registry as s\nfrom json import dumps\ndef only():\n    return s.load_experiment\n"
    )
    with pytest.raises(UserError, match="only returned function, not an Experiment"):
        load_experiment(str(path))


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("json.py:narrow", "name the configuration as .*json.py:FUNCTION with FUNCTION one of .*wide, number"),
        ("json.py", "FUNCTION one of .*wide, number"),
        ("json.py:number", "json.py:number: number returned int, not an Experiment"),
        ("absent.py:wide", "absent.py: no such configuration file"),
        ("empty.py", "empty.py: name the configuration as a function that the file defines"),
        ("theirs.py", "theirs.py: is a configuration of MMSegmentation; `segcore import-config` makes one of ours"),
    ],
)
def test_wrong_file_is_named_with_the_remedy(config, spec, text):
    (config.parent / "empty.py").touch()
    (config.parent / "theirs.py").write_text("_base_ = ['x.py']\nmodel = dict(type='EncoderDecoder')\n")
    with pytest.raises(UserError, match=text):
        load_experiment(str(config.parent / spec))


@pytest.mark.parametrize(
    "override",
    ["data.workers=-1", "evaluate.steps=3 -1", "evaluate.img_ratios=", "evaluate.img_ratios=1 0", "data.std=1 0 1",
     "schedule.step=0", "schedule.warmup_iterations=-1", "model.num_classes=0", "train.evaluate_every=-1"],
)  # fmt: skip
def test_values_that_no_run_can_use_are_refused(override):
    with pytest.raises(UserError):
        load_experiment("ddp_resnet18_toy").with_overrides([override])


def test_16_bit_images_need_their_own_mean():
    exp = load_experiment("ddp_resnet18_toy")
    with pytest.raises(UserError, match="8-bit"):
        exp.with_overrides(["data.bit_depth=16", "data.photometric=False"])


def test_a_broken_configuration_file_is_one_line(tmp_path):
    (tmp_path / "mine.py").write_text("x = 1\nimport nothing_of_that_name\n")
    with pytest.raises(UserError, match=r"mine.py: cannot be run, line 2: ModuleNotFoundError"):
        load_experiment(str(tmp_path / "mine.py"))
    (tmp_path / "typo.py").write_text("def f(:\n")
    with pytest.raises(UserError, match=r"typo.py: cannot be run, line 1: SyntaxError"):
        load_experiment(str(tmp_path / "typo.py"))


def test_a_configuration_function_that_raises_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from segcore.errors import UserError\n"
        "def half(x):\n    return 1 / x\n"
        "def divides():\n    return half(\n        0)\n"
        "def refuses():\n    raise UserError('set ROOT first')\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^mine.py: cannot be run, line 3: ZeroDivisionError: division by zero$"):
        load_experiment("mine.py:divides")
    with pytest.raises(UserError, match=r"^mine.py: cannot be run, line 8: set ROOT first$"):
        load_experiment("mine.py:refuses")


def test_a_record_of_an_earlier_version_has_the_defaults_of_newer_settings(tmp_path):
    exp = load_experiment("ddrnet_23_slim_toy")
    stored = settings_of(exp)
    for name in ("weights", "label_smoothing", "focal_gamma", "focal_alpha"):
        del stored["loss"][name]
    assert stored["loss"]["kind"] == "ohem"
    path = tmp_path / "experiment.json"
    path.write_text(json.dumps({"experiment": stored}))
    assert load_experiment(tmp_path) == exp
    unread = stored["data"] | {"classes": ["road", "sky"], "val_share": 0.5}  # which no version read of the toy set
    path.write_text(json.dumps({"experiment": stored | {"data": unread}}))
    assert load_experiment(tmp_path) == exp
    path.write_text(json.dumps({"experiment": stored | {"gone": 1}}))
    with pytest.raises(UserError, match="gone is unknown, as in no run of this version"):
        load_experiment(tmp_path)
    with pytest.raises(VersionError, match="key is missing"):
        from_plain(ParamRule, {"lr_mult": 1.0})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((section, [1]) for section in ("data", "model", "train", "evaluate", "loss", "optimizer")),
        ("data", None),
        ("train", "\x1b[31m"),
        *(("model.num_classes", value) for value in (10**12, 65536, -1, [1], {"a": 1})),
        ("model.in_channels", 10**12),
        ("data.channels", 65536),
        ("data.dataset", ["folder"]),
        ("data.mean", {"a": 1}),
        ("optimizer.rules", [[1]]),
        ("name", ["a"]),
    ],
)
def test_hostile_settings_of_a_run_end_in_one_line(tmp_path, name, value):
    stored = section = settings_of(load_experiment("ddrnet_23_slim_toy"))
    *path, last = name.split(".")
    for key in path:
        section = section[key]
    section[last] = value
    (tmp_path / "experiment.json").write_text(json.dumps({"experiment": stored}))
    with pytest.raises(UserError) as error:
        load_experiment(tmp_path)
    assert str(error.value).isprintable()


def test_a_whole_number_that_no_float_holds_is_refused():
    with pytest.raises(UserError, match=r"optimizer\.lr is 1000"):
        OptimizerConfig(lr=10**400)


@pytest.mark.parametrize("kind", ["lovasz", ("cross_entropy", "dice")])
def test_one_loss_or_several_are_written_and_stored_alike(tmp_path, kind):
    words = [kind] if isinstance(kind, str) else kind
    exp = load_experiment("ddrnet_23_slim_toy").with_overrides([f"loss.kind={' '.join(words)}", "loss.focal_gamma=1"])
    assert (exp.loss.kind, exp.loss.kinds) == (kind, tuple(words))
    (tmp_path / "my.py").write_text(source(exp))
    (tmp_path / "experiment.json").write_text(json.dumps({"experiment": settings_of(exp)}))
    assert load_experiment(tmp_path / "my.py") == load_experiment(tmp_path) == exp
