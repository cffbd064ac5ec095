"""Exported models in ONNX Runtime and OpenVINO: they answer as the model does, and what is not ours is refused."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import segcore
from segcore.cli.main import main
from segcore.config.exported import read_exported
from segcore.config.schema import DataConfig, EvalConfig, Experiment, ModelConfig
from segcore.data.images import read_image
from segcore.data.layouts import open_dataset
from segcore.demo.toy import generate
from segcore.deploy import export, quantize
from segcore.deploy.runtimes import load_exported, predictor_of
from segcore.errors import UserError
from segcore.evaluation.evaluate import evaluate
from segcore.evaluation.predictor import Predictor
from segcore.testing.tiny import Tiny
from segcore.web import answers

onnx = pytest.importorskip("onnx")
for name in ("onnxscript", "onnxruntime"):
    pytest.importorskip(name)
needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")


class Half(Tiny):
    """Two convolutions, the second at half the size; images are padded."""

    size_divisor = pad_to = 4
    min_size = 4

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(19, nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 19, 1)))


class HalfConfig(ModelConfig):
    def build(self):
        return Half().eval()


@pytest.fixture(scope="module")
def exp(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    generate(root, train=2, val=2, height=32, width=64)
    return Experiment("half", HalfConfig(), DataConfig("toy", root, workers=0), evaluate=EvalConfig())


@pytest.fixture(scope="module")
def files(exp, tmp_path_factory):
    """Exported files by what they are; each is made once."""
    folder, made = tmp_path_factory.mktemp("files"), {}
    kinds = {
        "dynamic": {"dynamic": True}, "fixed": {"batch": 2}, "classes": {"classes": True},
        "normalize": {"normalize": True, "classes": True, "dynamic": True},
    }  # fmt: skip

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = folder / f"{kind}.onnx"
            export.export(exp.model.build(), exp, made[kind], export.Settings(32, 64, **kinds[kind]))
        return made[kind]

    return make


def image(height, width):
    return np.random.RandomState(0).randint(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("provider", ["cpu", pytest.param("openvino", marks=needs_openvino)])
def test_the_same_evaluation_as_of_the_model(exp, files, provider):
    dataset = open_dataset(exp.data, "val")
    expected = evaluate(Predictor.of(exp.model.build(), exp), dataset)
    seg = segcore.load_model(files("fixed"), provider=provider, device="cpu")
    assert seg.experiment.data == exp.data
    found = evaluate(seg.predictor, dataset)
    assert torch.equal(found.confusion["final"], expected.confusion["final"])
    assert found.to_json() == expected.to_json()


def test_images_of_any_size_are_padded_as_by_the_model(exp, files):
    seg = segcore.load_model(str(files("dynamic")), device="cpu")
    own = Predictor.of(exp.model.build(), exp)
    for height, width in ((31, 42), (8, 64)):
        [expected] = own.probabilities([image(height, width)], [0])
        result = seg(image(height, width), probabilities=True)
        np.testing.assert_allclose(result.probabilities, expected["final"], atol=1e-5)
    with pytest.raises(UserError, match="at least 4"):
        seg(image(3, 64))


def test_windows_of_a_file_of_one_size(exp, files):
    seg = segcore.load_model(files("fixed"), device="cpu")
    with pytest.raises(UserError, match=r"takes images of 32x64 pixels .*, not 40x100; export with --size 40x100"):
        seg(image(40, 100))
    slide = {"mode": "slide", "crop": (32, 64), "stride": (20, 40), "flip": True}
    [expected] = Predictor.of(exp.model.build(), exp).using(**slide).probabilities([image(40, 100)], [0])
    [found] = seg.predictor.using(**slide).probabilities([image(40, 100)], [0])
    torch.testing.assert_close(found["final"], expected["final"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["classes", "normalize"])
def test_a_file_that_answers_with_classes_alone(exp, files, kind):
    dataset = open_dataset(exp.data, "val")
    expected = evaluate(Predictor.of(exp.model.build(), exp), dataset)
    seg = segcore.load_model(files(kind), device="cpu")
    assert torch.equal(evaluate(seg.predictor, dataset).confusion["final"], expected.confusion["final"])
    result = seg(image(32, 64))
    assert result.classes.dtype == np.uint8
    for asked in (
        lambda: result.confidence,
        lambda: seg(image(32, 64), probabilities=True),
        lambda: seg.predictor.probabilities([image(32, 64)], [0]),
        lambda: seg.predictor.using(flip=True),
        lambda: evaluate(seg.predictor, dataset, calibration=True),
        lambda: list(seg.blocks((32, 64), lambda box: image(32, 64), [])),
    ):
        with pytest.raises(UserError, match=r"classes alone, without probabilities; export without --classes"):
            asked()


def test_the_page_offers_the_files_that_there_are(files, tmp_path):
    seg = segcore.load_model(files("classes"), device="cpu")
    written = answers.files(answers.answer(seg, image(32, 64)), tmp_path)
    assert [path.name for path in written] == ["mask.png", "overlay.png"]


def test_images_as_they_are_decoded(exp, files):
    """The input of --normalize is (N, H, W, C) uint8; the answer is the model's for normalized images."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(files("normalize")))
    [sample] = open_dataset(exp.data, "val").samples[:1]
    picture = read_image(sample.image, 3, 8, 1 << 20)
    [classes] = session.run(["classes"], {"images": picture[None]})
    [expected] = Predictor.of(exp.model.build(), exp).classes([picture], [0])
    assert classes.dtype == np.uint8
    assert (classes[0] == expected["final"].numpy()).mean() > 0.999


def test_int8_is_written_if_it_loses_little(exp, files, tmp_path):
    dataset, images = open_dataset(exp.data, "val"), quantize.calibration_images(exp.data, None)
    path, how = tmp_path / "int8.onnx", (export.Settings(32, 64), images, dataset)
    _, loss = quantize.export_int8(exp.model.build(), exp, path, *how, max_drop=100)
    assert f"{loss.drop:.2f} points lost" in str(loss)
    graph = onnx.load(str(path)).graph
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in graph.node}
    found = evaluate(predictor_of(load_exported(path), read_exported(path)[0]), dataset)
    assert 100 * found.final["mIoU"] == pytest.approx(loss.int8)
    if importlib.util.find_spec("openvino"):
        with pytest.raises(UserError, match="does not run 8-bit files"):
            load_exported(path, "openvino")
    path.unlink()
    with pytest.raises(UserError, match=r"not written .* points lost\); --max-drop -100 allows no more"):
        quantize.export_int8(exp.model.build(), exp, path, *how, max_drop=-100)
    assert not path.exists()


class Residual(nn.Module):
    """What ONNX Runtime has to compute in 8 bits: a convolution without bias, ReLUs, a sum."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1, bias=False)

    def forward(self, images):
        """Return 8 maps."""
        x = self.first(images).relu()
        return (x + self.second(x)).relu()


def test_int8_computes_in_8_bits(exp, tmp_path):
    import onnxruntime

    model = Tiny(19, nn.Sequential(Residual(), nn.Conv2d(8, 19, 1))).eval()
    exact, small, run = (tmp_path / f"{name}.onnx" for name in ("exact", "small", "run"))
    export.export(model, exp, exact, export.Settings(32, 64))
    quantize.quantize(exact, small, quantize.calibration_images(exp.data, None))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(run), 3
    onnxruntime.InferenceSession(str(small), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(str(run)).graph.node]
    assert kinds.count("QLinearConv") == 3
    assert "QLinearAdd" in kinds
    assert not {"Conv", "FusedConv", "Add"} & {*kinds}


def test_the_images_of_a_calibration(exp, tmp_path):
    assert len(quantize.calibration_images(exp.data, None)) == 2
    with pytest.raises(UserError, match="no images there"):
        quantize.calibration_images(exp.data, tmp_path)
    (tmp_path / "file").touch()
    for name in ("none", "file"):
        with pytest.raises(UserError, match=f"{name}: no such folder; give a folder of images"):
            quantize.calibration_images(exp.data, tmp_path / name)


def test_errors_of_int8_name_the_file_that_was_asked_for(exp, tmp_path, monkeypatch):
    from onnxruntime import quantization

    def fail(*given, **how):
        raise RuntimeError("no\nranges")

    path, images = tmp_path / "a.onnx", quantize.calibration_images(exp.data, None)
    how = images, open_dataset(exp.data, "val")
    with pytest.raises(UserError, match=rf"^{path} takes images of 16x16 pixels"):
        quantize.export_int8(exp.model.build(), exp, path, export.Settings(16, 16), *how)
    monkeypatch.setattr(quantization, "quantize_static", fail)
    with pytest.raises(UserError, match=rf"^{path}: cannot be quantized \(no ranges\); export without --int8"):
        quantize.export_int8(exp.model.build(), exp, path, export.Settings(32, 64), *how)
    assert not path.exists()


def test_int8_of_classes(exp, tmp_path):
    images, dataset = quantize.calibration_images(exp.data, None), open_dataset(exp.data, "val")
    path, settings = tmp_path / "a.onnx", export.Settings(32, 64, classes=True)
    quantize.export_int8(exp.model.build(), exp, path, settings, images, dataset, max_drop=100)
    assert segcore.load_model(path, device="cpu")(image(32, 64)).classes.shape == (32, 64)


def test_what_a_file_does_itself_cannot_be_set(files):
    path, exp = files("normalize"), read_exported(files("normalize"))[0]
    for name, value in (("mean", (1.0, 1.0, 1.0)), ("std", (2.0, 2.0, 2.0)), ("bit_depth", 16)):
        with pytest.raises(UserError, match=rf"--data\.{name}: .* normalizes them itself; leave it out"):
            segcore.load_model(replace(exp, data=replace(exp.data, **{name: value})), path)


def test_an_exported_file_comes_alone(exp, files):
    with pytest.raises(UserError, match=r"classes\.onnx: .*fixed\.onnx is an exported model, which has its weights"):
        segcore.load_model(files("fixed"), files("classes"))
    with pytest.raises(UserError, match=r"is an exported model, .*; name it as the configuration, alone"):
        segcore.load_model(exp, files("fixed"))


def refused(capsys, *words):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(None, [str(word) for word in words])
    *report, line = capsys.readouterr().err.splitlines()
    assert len(report) <= 1, "at most what runs the file"
    assert end.value.code == 1
    return line


def test_commands(exp, files, tmp_path, capsys):
    path = files("fixed")
    main(None, ["test", str(path), "--device=cpu", "--no-report"])
    text = capsys.readouterr().out
    found = json.loads((path.parent / "fixed.test.json").read_text())
    expected = evaluate(Predictor.of(exp.model.build(), exp), open_dataset(exp.data, "val"))
    assert found["entries"] == json.loads(json.dumps(expected.to_json()["entries"]))
    assert "fixed.test.json" in text
    photos = exp.data.root / "leftImg8bit" / "val"
    main(None, ["predict", str(path), str(photos), str(tmp_path / "out"), "--device=cpu", "--data.workers=0"])
    assert len(list((tmp_path / "out").rglob("*_overlay.png"))) == 2
    assert "--provider nothing: not available here; use " in (
        said := refused(capsys, "test", path, "--provider", "nothing")
    )
    assert "azure" not in said
    assert "name its run for export" in refused(capsys, "export", path, "a.onnx")
    capsys.readouterr()
    main(None, ["bench", str(path), "--warmup=1", "--repeats=2"])
    text = capsys.readouterr().out
    assert "provider: cpu\n" in text
    assert "32x64     2  fp32 ONNX Runtime" in text
    for option in ("--device=cuda", "--compile=both", "--channels-last=yes"):
        assert f"{option.partition('=')[0]} is for models in PyTorch" in refused(capsys, "bench", path, option)
    assert "--batches 1 4: " in refused(capsys, "bench", path, "--batches", 1, 4)
    assert "--repeats is 0; it must be at least 1" in refused(capsys, "bench", path, "--repeats", 0)
    assert "--dtypes bf16: ONNX Runtime computes as the file says" in refused(capsys, "bench", path, "--dtypes", "bf16")
    classes = files("classes")
    main(None, ["test", str(classes), "--device=cpu"])
    assert "note: Without images: " in capsys.readouterr().out
    for option in ("--confidence", "--probabilities"):
        said = refused(capsys, "predict", classes, photos, tmp_path / "classes", option, "--device=cpu")
        assert "without probabilities; export without --classes" in said
        assert not (tmp_path / "classes").exists()


def test_classes_of_a_function_are_in_the_file(exp, tmp_path):
    own, path = tmp_path / "own.py", tmp_path / "own.onnx"
    own.write_text(
        "import numpy as np\nfrom segcore.data.pairs import from_pairs\n"
        "def open_split(data, split):\n"
        "    pair = np.zeros((32, 64, 3), np.uint8), np.zeros((32, 64), int)\n"
        "    return from_pairs([pair], [f'class {i}' for i in range(19)], [(i, 0, 0) for i in range(19)])\n"
    )
    exp = replace(exp, data=replace(exp.data, dataset=f"{own}:open_split"))
    export.export(exp.model.build(), exp, path, export.Settings(32, 64))
    own.unlink()
    seg = segcore.load_model(path, device="cpu")
    assert seg.class_names == tuple(f"class {i}" for i in range(19))
    assert seg.palette[:, 0].tolist() == list(range(19))
    assert seg(image(32, 64)).classes.shape == (32, 64)


def edited(path, to, change):
    """Write a copy of an exported file whose description, or whose graph, was changed."""
    model = onnx.load(str(path))
    about = json.loads(model.metadata_props[0].value)
    change(model, about)
    if about:
        model.metadata_props[0].value = json.dumps(about)
    to.write_bytes(model.SerializeToString())


HOSTILE = {
    "no entry": (
        lambda model, about: (about.clear(), model.ClearField("metadata_props")),
        "was not exported by segcore",
    ),
    "no experiment": (lambda model, about: about.pop("experiment"), "another version"),
    "earlier version": (lambda model, about: about.pop("exported"), "another version"),
    "no JSON": (lambda model, about: (about.clear(), setattr(model.metadata_props[0], "value", "{")), "damaged"),
    "size": (lambda model, about: about["exported"].update(size=[64, 64]), "not what its description says"),
    "size of text": (lambda model, about: about["exported"].update(size=["a", 64]), "exported.size"),
    "classes": (lambda model, about: about["exported"].update(num_classes=7), "not what its description says"),
    "channels": (lambda model, about: about["experiment"]["data"].update(channels=4), "data.mean"),
    "name": (lambda model, about: about["experiment"].update(name="../x"), "name is '../x'"),
    "type": (lambda model, about: about["exported"].update(normalize=True), "not what its description says"),
    "two outputs": (lambda model, about: model.graph.output.append(model.graph.output[0]), "not what its description"),
    "endless padding": (lambda model, about: about["exported"].update(pad_to=10**5), "exported.pad_to"),
    "other padding": (lambda model, about: about["exported"].update(pad_to=3), "exclude each other"),
    "divisor": (lambda model, about: about["exported"].update(size_divisor=10**9), "exported.size_divisor"),
    "least size": (lambda model, about: about["exported"].update(min_size=10**18), "exported.min_size"),
    "operator": (lambda model, about: setattr(model.graph.node[0], "op_type", "Nothing"), "cannot be loaded"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_files_that_are_not_ours_are_refused(files, tmp_path, capsys, kind):
    change, said = HOSTILE[kind]
    edited(files("fixed"), path := tmp_path / "a.onnx", change)
    line = refused(capsys, "test", path, "--device=cpu")
    assert line.startswith(f"error: {path}: ")
    assert said in line


def test_damaged_files_are_refused(files, tmp_path, capsys):
    whole, path = files("fixed").read_bytes(), tmp_path / "a.onnx"
    for content, said in (
        (whole[: len(whole) // 2], "damaged"),
        (b"", "not exported by segcore"),
        (b"\xff" * 9, "damaged"),
    ):
        path.write_bytes(content)
        assert said in refused(capsys, "test", path)
    assert "no such file" in refused(capsys, "predict", tmp_path / "none.onnx", "a.png", "out")


def outside(tensor):
    """Put a tensor's content into a file, which is there."""
    Path("weights.bin").write_bytes(tensor.raw_data)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    tensor.external_data.add(key="length", value=str(len(tensor.raw_data)))
    tensor.ClearField("raw_data")
    return tensor


def in_a_function(model, about):
    function = onnx.helper.make_function("mine", "F", [], ["a"], [], [])
    function.node.append(constant())
    model.functions.append(function)


def in_a_subgraph(model, about):
    branch = onnx.helper.make_graph([constant()], "branch", [], [])
    model.graph.node.append(onnx.helper.make_node("If", ["x"], ["y"], then_branch=branch))


def in_a_sparse_tensor(model, about):
    values, places = onnx.numpy_helper.from_array(np.ones(1)), onnx.numpy_helper.from_array(np.zeros(1, int))
    model.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, places, [2]))
    outside(model.graph.sparse_initializer[0].values)


def constant():
    return onnx.helper.make_node("Constant", [], ["a"], value=outside(onnx.numpy_helper.from_array(np.ones(1))))


@pytest.mark.parametrize(
    "change",
    [
        lambda model, about: outside(max(model.graph.initializer, key=lambda x: len(x.raw_data))),
        lambda model, about: model.graph.node.append(constant()),
        in_a_function,
        in_a_subgraph,
        in_a_sparse_tensor,
    ],
)
def test_weights_in_another_file_are_not_read(files, tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    edited(files("fixed"), path := tmp_path / "a.onnx", change)
    with pytest.raises(UserError, match=r"a\.onnx: its weights are in other files, which are not read"):
        segcore.load_model(path)


def test_a_provider_is_for_exported_files(tmp_path):
    with pytest.raises(UserError, match=r"--provider cpu is for exported models"):
        segcore.load_model(Experiment("half", HalfConfig(), DataConfig("toy")), tmp_path, provider="cpu")


def test_nothing_named_in_a_file_is_imported(files, tmp_path):
    """A data set that a function opens is text."""
    (tmp_path / "mine.py").write_text("raise SystemExit('imported')")
    reference = f"{tmp_path / 'mine.py'}:open_split"
    names = {"dataset": reference, "classes": [f"c{k}" for k in range(19)], "palette": ["102030"] * 19}
    edited(files("fixed"), path := tmp_path / "a.onnx", lambda model, about: about["experiment"]["data"].update(names))
    seg = segcore.load_model(path, device="cpu")
    assert seg(image(32, 64)).classes.shape == (32, 64)
    assert seg.class_names[0] == "c0"
    assert tuple(seg.palette[0]) == (16, 32, 48)
