"""Finding the weights that the user names, and loading them strictly."""

import argparse
import os
import sys
from collections import deque
from datetime import datetime
from pathlib import PurePosixPath
from types import ModuleType

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from segcore import UserError
from segcore.checkpoints import hub, load
from segcore.checkpoints import run_checkpoint as checkpoint
from segcore.checkpoints.other_classes import load_other_classes
from segcore.config.schema import ModelConfig, Published
from segcore.models.segmentor import LoadReport, Segmentor


class Tiny(Segmentor):
    """A whole segmentor in three layers; the published layout of `head.weight` is transposed."""

    def __init__(self, num_classes: int = 4, auxiliary: bool = False):
        super().__init__()
        self.num_classes = num_classes
        self.stem = nn.Conv2d(3, 8, 1)
        self.bn = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, num_classes)
        if auxiliary:
            self.auxiliary_head = nn.Conv2d(8, num_classes, 1)

    def logits(self, images, seeds=None):
        return self.head(self.bn(self.stem(images)).movedim(1, 3)).movedim(3, 1)

    def losses(self, images, labels, **options):
        return {"loss": nn.functional.cross_entropy(self(images), labels)}

    def key_map(self):
        new = {"stem": "backbone.conv1", "bn": "backbone.bn1", "head": "decode_head.conv_seg"}
        return {name: ".".join([new.get((p := name.split("."))[0], p[0]), *p[1:]]) for name in self.state_dict()}

    def convert(self, name, tensor):
        return tensor.T if name == "decode_head.conv_seg.weight" else tensor


class WithBackbone(Tiny):
    def load_backbone(self, state):
        self.received = dict(state)
        return LoadReport(len(state))


def official(model):
    names = model.key_map()
    return {names[name]: model.convert(names[name], tensor) for name, tensor in model.state_dict().items()}


@pytest.fixture
def model():
    torch.manual_seed(1)
    return Tiny()


@pytest.fixture
def same(model):
    """Return whether another model has exactly the weights of `model`."""
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return lambda other: all(torch.equal(tensor, wanted[name]) for name, tensor in other.state_dict().items())


# Loading into a model


def test_other_classes_on_two_axes_are_refused():
    class Pairwise(Tiny):
        def __init__(self, num_classes):
            super().__init__(num_classes)
            self.crf = nn.Linear(num_classes, num_classes)

    class Config(ModelConfig):
        def build(self):
            return Pairwise(self.num_classes)

    state = Pairwise(5).state_dict()
    with pytest.raises(UserError, match=r"crf\.weight has the classes on 2 axes"):
        load_other_classes(Pairwise(3), Config(3), lambda m: m.load_checkpoint(state), ("",) * 5, ("a", "b", "c"))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("names", ["own", "official"])
def test_own_and_published_names_are_distinguished(tmp_path, model, same, names, suffix):
    state = model.state_dict() if names == "own" else official(model)
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": state}, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    other = Tiny()
    report = load.load_weights(other, path)
    assert same(other)
    assert (report.loaded, report.mapped) == (len(state), 0 if names == "own" else len(state))


@pytest.mark.parametrize("names", ["own", "official"])
def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path, model, same, names):
    def state_of(other):
        return other.state_dict() if names == "own" else official(other)

    good = state_of(Tiny())
    conv = "stem.weight" if names == "own" else "backbone.conv1.weight"
    path = tmp_path / "w.pth"
    for state, words in (
        (state_of(Tiny(num_classes=7)), ["shapes differ", "(7, 8), not (4, 8)"]),
        ({name: tensor for name, tensor in good.items() if name != conv}, ["1 tensors missing", conv]),
        (good | {"extra.weight": torch.ones(1)}, ["1 unknown", "extra.weight"]),
        ({"some.thing": torch.ones(1)}, ["missing", "some.thing"]),
    ):
        torch.save(state, path)
        with pytest.raises(UserError) as error:
            load.load_weights(model, path)
        assert all(word in str(error.value) for word in (str(path), "Tiny", *words)), str(error.value)
        assert "\n" not in str(error.value)
        assert same(model)


def named(name):
    """Return a class of another program that pickle finds under `name`, with a method `mean`."""

    def mean(self):
        pass

    module, _, kind = name.rpartition(".")
    mean.__module__, mean.__qualname__ = module, f"{kind}.mean"
    return type(kind, (), {"__module__": module, "mean": mean})


NAMES = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "omegaconf.dictconfig.DictConfig",
    "lightning.fabric.utilities.data.AttributeDict",
    "yacs.config.CfgNode",
)
OTHERS = {
    "mmengine": lambda state, other: {"meta": {}, "state_dict": state, "message_hub": {"log_scalars": {"loss": other}}},
    "argparse": lambda state, _: {"model": state, "args": argparse.Namespace(lr=1, path=PurePosixPath("/x"))},
    "dates and sets": lambda state, _: {
        "net": state,
        "when": datetime(2024, 1, 1),
        "tags": {"a", "b"},
        "n": deque([1]),
    },
    "compiled": lambda state, _: {"state_dict": prefixed("_orig_mod.", state)},
    "compiled in parallel": lambda state, _: {"state_dict": prefixed("module._orig_mod.", state)},
    "compiled in part": lambda state, _: {name.replace(".", "._orig_mod.", 1): t for name, t in state.items()},
    "lightning": lambda state, other: {"state_dict": prefixed("model.", state), "hyper_parameters": other},
    "a module in a module": lambda state, _: {"state_dict": prefixed("module.model.net.", state)},
    "model_state_dict": lambda state, _: {"model_state_dict": state, "epoch": 3},
    "network": lambda state, _: {"network": state},
    "params": lambda state, _: {"params": state},
    "an average only": lambda state, _: {"model": None, "ema": {"module": prefixed("module.", state)}},
    "another network beside": lambda state, _: {"model": {"teacher.weight": torch.ones(1)}, "state_dict_ema": state},
    "a state dict in a model": lambda state, _: {"model": {"state_dict": state, "epoch": 3}},
}


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("names", ["own", "official"])
@pytest.mark.parametrize("program", OTHERS)
def test_checkpoints_of_other_programs(tmp_path, monkeypatch, model, same, program, names, protocol):
    """Their classes exist here only while the file is written, so nothing in them can run when it is read."""
    path, objects = tmp_path / "w.pth", []
    state = model.state_dict() if names == "own" else official(model)
    with monkeypatch.context() as patch:
        for name in NAMES:
            parts = name.split(".")
            for end in range(1, len(parts)):
                patch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[end - 1]))
            patch.setattr(sys.modules[".".join(parts[:-1])], parts[-1], named(name), raising=False)
            objects.append(getattr(sys.modules[".".join(parts[:-1])], parts[-1])())
            objects[-1].__dict__ = {"lr": 0.1, "parent": objects[0], "statistics": type(objects[0]).mean}
        torch.save(OTHERS[program](state, objects), path, pickle_protocol=protocol)
    load.load_weights(other := Tiny(), path)
    assert same(other)


def test_the_trained_weights_are_preferred_to_their_average(tmp_path, model, same):
    torch.save({"state_dict_ema": Tiny().state_dict(), "state_dict": model.state_dict()}, tmp_path / "w.pth")
    load.load_weights(other := Tiny(), tmp_path / "w.pth")
    assert same(other)


def test_names_that_would_become_one_are_kept(tmp_path, model):
    state = model.state_dict()
    torch.save({**state, **prefixed("module.", state)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"8 unknown.*module\.stem"):
        load.load_weights(Tiny(), tmp_path / "w.pth")


def test_recomputable_buffers_and_the_auxiliary_head_may_be_absent_here(tmp_path, model, same):
    torch.manual_seed(2)
    source = Tiny(auxiliary=True)
    source.load_state_dict(model.state_dict(), strict=False)
    path, other = tmp_path / "w.pth", Tiny()
    for state in (source.state_dict(), official(source)):
        state = {name: tensor for name, tensor in state.items() if "num_batches" not in name}
        torch.save(state | {"x.relative_position_index": torch.ones(1)}, path)
        report = load.load_weights(other, path)
        assert same(other)
        assert set(report.dropped) == {"auxiliary_head.weight", "auxiliary_head.bias"}
        assert report.ignored == ("x.relative_position_index",)


# Finding the checkpoints that the user names


@pytest.fixture
def rows(server, monkeypatch):
    """Two published rows, one without weights."""
    found = {"row_a": Published({}, f"{server.url}/w.pth"), "row_b": Published({})}
    monkeypatch.setattr(hub, "published", found.get)


def test_official_weights_are_fetched(rows, weights_folder, server):
    for wanted, experiment in (("official", "row_a"), ("official:row_a", "row_b")):
        path = load.find_weights(wanted, experiment)
        assert path == weights_folder / "w.pth"
        assert path.read_bytes() == server.files["/w.pth"]


def test_rows_without_weights_say_so(rows):
    with pytest.raises(UserError, match="authors of row_b offer no weights"):
        load.find_weights("official:row_b", "row_a")
    with pytest.raises(UserError, match="'row_c' is not a published configuration"):
        load.find_weights("official", "row_c")


def test_a_path_is_returned_and_a_wrong_one_is_explained(tmp_path):
    path = tmp_path / "w.pth"
    path.touch()
    assert load.find_weights(str(path), "row_a") == path
    with pytest.raises(UserError, match=r"no such file or folder.*work_dir.*official:CONFIG"):
        load.find_weights(str(tmp_path / "gone.pth"), "row_a")
    os.mkfifo(tmp_path / "fifo.pth")
    with pytest.raises(UserError, match=r"fifo\.pth: is not a regular file \(a FIFO\)"):
        load.find_weights(str(tmp_path / "fifo.pth"), "row_a")


def test_a_work_dir_yields_its_best_else_its_newest_checkpoint(tmp_path, model, same):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no complete checkpoint"):
        load.find_weights(str(tmp_path), "row_a")
    for iteration in (1, 2, 3):
        state = (model if iteration == 2 else Tiny()).state_dict()
        checkpoint.save(checkpoint.folder_of(tmp_path, iteration), state, {}, {})
    assert load.find_weights(str(tmp_path), "row_a").name == "iter_3"
    checkpoint.mark_best(tmp_path, 2, 0.5)
    best = load.find_weights(str(tmp_path), "row_a")
    assert best.name == "iter_2"
    assert load.find_weights(str(best), "row_a") == best
    other = Tiny()
    assert load.load_weights(other, best).loaded == 9
    assert same(other)
    assert load.load_init(other, str(tmp_path)).startswith(f"{best}: loaded 9")
    (best / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="iter_3 instead") as error:
        load.load_weights(other, best)
    assert str(best) in str(error.value)


# Start weights


def test_start_weights_from_a_whole_checkpoint(tmp_path, model, same, server, rows):
    path, other = tmp_path / "w.pth", Tiny()
    torch.save({"state_dict": official(model)}, path)
    assert load.load_init(other, str(path)) == f"{path}: loaded 9 tensors (9 under other names)"
    assert same(other)
    server.files["/w.pth"] = path.read_bytes()
    load.load_init(other := Tiny(), "official:row_a")
    assert same(other)


def test_start_weights_from_an_imagenet_checkpoint(tmp_path):
    path, model = tmp_path / "w.pth", WithBackbone()
    state = {name: t for name, t in official(model).items() if name.startswith("backbone.")}
    torch.save({"state_dict": state | {"head.fc.weight": torch.ones(2, 2)}}, path)
    assert "loaded 7 tensors (0 under other names), dropped 1 of head" in load.load_init(model, str(path))
    assert model.received.keys() == state.keys()
    with pytest.raises(UserError, match=r"w\.pth: Tiny has no backbone loader"):
        load.load_init(Tiny(), str(path))


TAG = "mobilenetv3_small_050.lamb_in1k"  # the smallest one in every supported timm


def test_a_stem_that_is_not_of_rgb_is_not_adapted():
    """Of networks that fold pixels into channels, such as TResNet."""
    with torch.no_grad(), pytest.raises(UserError, match="weight takes 48 channels, not R, G and B"):
        load.adapt_channels(torch.nn.Conv2d(48, 4, 3), torch.nn.Conv2d(64, 4, 3))


def test_start_weights_from_timm(tmp_path, weights_folder, server, monkeypatch):
    source = timm.create_model("mobilenetv3_small_050").state_dict()
    save_file(source, tmp_path / "served")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    with pytest.raises(UserError, match=rf"{TAG}.safetensors: missing") as error:
        load.load_init(WithBackbone(), TAG, offline=True)
    address = f"/timm/{TAG}/resolve/main/model.safetensors"
    assert f"download {server.url}{address} and put the file at {weights_folder / TAG}.safetensors" in str(error.value)
    server.files[address] = (tmp_path / "served").read_bytes()
    for offline in (False, True):
        report = load.load_init(model := WithBackbone(), TAG, offline=offline)
        assert report.startswith(f"{TAG}: backbone only: loaded {len(source)} tensors")
        assert model.received.keys() == source.keys()
        assert all(torch.equal(model.received[name], source[name]) for name in source)
    del source["classifier.bias"]
    save_file(source, weights_folder / f"{TAG}.safetensors")
    (weights_folder / f"{TAG}.safetensors.sha256").unlink()
    with pytest.raises(UserError, match=r"does not fit.*classifier\.bias.*delete it"):
        load.load_init(WithBackbone(), TAG)


@pytest.mark.parametrize(
    ("init", "words"),
    [
        ("convnext_tiny.nope", "Invalid pretrained tag"),
        ("test_convnet", "no such file or folder"),
        ("official", "not a published configuration"),
    ],
)
def test_start_weights_that_do_not_exist(init, words):
    with pytest.raises(UserError, match=words):
        load.load_init(WithBackbone(), init)
