"""Our models inside real MMSegmentation, 0.30 or 1.x, whichever the environment has (nox -s openmmlab)."""

import copy
import importlib
import itertools
import json
import pickle
import re
import runpy
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from segcore.checkpoints.foreign import read_state
from segcore.checkpoints.load import load_weights
from segcore.cli.main import main
from segcore.config.registry import experiments, load_experiment
from segcore.config.schema import DataConfig
from segcore.data.images import read_image
from segcore.data.layouts import palette_of
from segcore.demo.toy import generate
from segcore.errors import UserError
from segcore.evaluation.metrics import ConfusionMatrix
from segcore.evaluation.predictor import Predictor
from segcore.testing.openmmlab_config import config_text
from segcore.training.optimizer import build_optimizer

mmseg = pytest.importorskip("mmseg", reason="MMSegmentation is not installed")
pytestmark = [pytest.mark.openmmlab, pytest.mark.filterwarnings("ignore")]

from segcore.openmmlab import MODELS, ONE, ConfigDict, SegcoreOptimizer  # noqa: E402

ROWS = {
    "ddp_resnet18_toy": ("ddp_seg.mmseg", ["model.width=32", "model.decoder_layers=1", "model.num_inference_steps=2"]),
    "ddps_segformer_b0_toy": ("ddps_seg.mmseg", ["model.width=16", "model.output_width=16"]),
    "ddps_segformer_b0_base_toy": ("ddps_seg.mmseg", []),
    "deeplabv3plus_m_v2_d8_512x1024_80k_cityscapes": ("ddps_seg.mmseg", []),
    "ddrnet_23_slim_toy": ("ddrnet_seg.mmseg", []),
    "setr_mla_dgmn2_nano_toy": ("dgmn2_seg.mmseg", []),
}
DDP, DDPS, SEGFORMER, DEEPLAB, DDRNET, DGMN2 = ROWS
SIDE = 64


def build(row, *overrides, **settings):
    torch.manual_seed(0)
    overrides = ["train.init_from=None", f"data.crop={SIDE} {SIDE}", *ROWS[row][1], *overrides]
    return MODELS.build({"type": "SegcoreModel", "experiment": row, "overrides": overrides, **settings})


def one_line(error):
    return "\n" not in str(error.value)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    generate(root, train=4, val=2, height=SIDE, width=2 * SIDE)
    return root


@pytest.fixture
def tool(tmp_path, monkeypatch, toy):
    """A function that runs one of MMSegmentation's own tools, in this process, on a row's config, or on config.py."""
    monkeypatch.chdir(tmp_path)
    # a description of the machine for the log, which takes seconds
    monkeypatch.setattr("mmengine.runner.runner.collect_env" if ONE else "mmseg.utils.collect_env", dict)
    if not ONE:  # whose default is the current GPU
        from mmcv.runner import IterBasedRunner

        monkeypatch.setattr(IterBasedRunner.resume, "__defaults__", (True, "cpu"))
    runs = itertools.count()

    def run(name, row, *args, extra="", overrides=()):
        if row:
            module, own = ROWS[row]
            text = config_text(ONE, module, row, ["train.init_from=None", *own, *overrides], toy)
            Path("config.py").write_text(text + extra)
        if ONE:  # one visualizer exists of each name
            named = f"visualizer.name={tmp_path.name}_{next(runs)}"
            args = (*args, *(() if "--cfg-options" in args else ("--cfg-options",)), named)
        monkeypatch.setattr(sys, "argv", [name, "config.py", *map(str, args)])
        runpy.run_path(str(Path(mmseg.__path__[0], ".mim", "tools", name)), run_name="__main__")

    return run


def evaluated(*args):
    return args if ONE else (*args, "--eval", "mIoU")


def batch(model, labels, names=("a.png", "b.png")):
    """Return what their loaders hand to `train_step` for random images with these labels (N, H, W)."""
    images = torch.randint(256, (len(labels), 3, *labels.shape[1:]), generator=torch.Generator().manual_seed(0))
    if not ONE:
        metas = [{"filename": name, "img_shape": (*labels.shape[1:], 3)} for name in names]
        normal = images.float() / 64 - 2
        return {"img": normal, "img_metas": metas, "gt_semantic_seg": labels[:, None]}
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    samples = []
    for name, label in zip(names, labels, strict=False):
        meta = {"img_path": name, "img_shape": label.shape, "ori_shape": label.shape, "reduce_zero_label": False}
        samples.append(SegDataSample(metainfo=meta, gt_sem_seg=PixelData(data=label[None])))
    return {"inputs": list(images.to(torch.uint8)), "data_samples": samples}


def losses(model, data):
    return model(**model.data_preprocessor(data, True), mode="loss") if ONE else model(**data)


def metas(*names, size=(SIDE, SIDE), **more):
    return [{"img_path": name, "ori_shape": size, "img_shape": size, "flip": False, **more} for name in names]


# Their tools


def predict_one(toy):
    """Predict one image with their function for it."""
    from mmseg import apis

    image = str(next(toy.glob("leftImg8bit/val/**/*.png")))
    if ONE:
        found = apis.inference_model(apis.init_model("config.py", "w.pth", "cpu"), image).pred_sem_seg.data[0]
    else:
        [found] = apis.inference_segmentor(apis.init_segmentor("config.py", "w.pth", "cpu"), image)
    assert tuple(found.shape) == (SIDE, 2 * SIDE)


def test_their_other_ways_to_test(tool, tmp_path, toy):
    classes, palette = palette_of(DataConfig("cityscapes"))
    meta = {"CLASSES": classes, "PALETTE": palette.tolist()}
    torch.save({"state_dict": build(DDPS).state_dict(), "meta": meta}, "w.pth")
    slide = ("model.test_cfg.mode=slide", f"model.test_cfg.crop_size=({SIDE},{SIDE})", "model.test_cfg.stride=(40,40)")
    tool("test.py", DDPS, "w.pth", *evaluated("--cfg-options", *slide))
    tool("test.py", DDPS, "w.pth", *evaluated("--tta" if ONE else "--aug-test"))
    tool("test.py", DDPS, "w.pth", "--show-dir", "shown")
    assert len(list(tmp_path.glob("shown/**/*.png"))) == 2
    predict_one(toy)
    if ONE:  # 0.30 does not write the palette of Cityscapes with the Pillow of today
        form = "test_evaluator.format_only=True", "test_evaluator.output_dir=out"
        tool("test.py", DDPS, "w.pth", "--cfg-options", *form)
        assert len(list(tmp_path.glob("out/*.png"))) == 2


def test_resume_and_start_weights(tool, tmp_path):
    start = build(SEGFORMER)
    torch.save({"state_dict": start.state_dict(), "loss": np.float64(0.5)}, "start.pth")  # a scalar as published ones
    zero_lr = ["optimizer.lr=0"]
    for number, given in enumerate(("load_from='start.pth'", "model.update(init_cfg=dict(type='Pretrained', "
                                    "checkpoint='start.pth'))")):  # fmt: skip
        tool("train.py", SEGFORMER, "--work-dir", f"work{number}", extra=f"\n{given}\n", overrides=zero_lr)
        found = read_state(Path(f"work{number}/iter_2.pth"))
        for name, parameter in start.net.named_parameters():
            name = start.net.key_map()[name]
            assert torch.allclose(found[name], parameter, atol=1e-3), name
    longer = "train_cfg.max_iters=3" if ONE else "runner.max_iters=3"
    again = ("--resume",) if ONE else ("--resume-from", "work0/iter_2.pth")
    save = "default_hooks.checkpoint.interval=1" if ONE else "checkpoint_config.interval=1"
    tool("train.py", SEGFORMER, "--work-dir", "work0", *again, "--cfg-options", longer, save)
    assert Path("work0/iter_3.pth").exists()
    assert not Path("work0/iter_1.pth").exists()


def test_their_loader_runs_nothing_that_is_in_a_file(tmp_path):
    """Not even onedl's, which by itself reads again, unsafely, what torch refuses."""
    if ONE:
        from mmengine.runner import CheckpointLoader
    else:
        from mmcv.runner import CheckpointLoader

    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"state_dict": {}, "meta": Hostile()}, tmp_path / "w.pth")
    with pytest.raises(pickle.UnpicklingError):
        CheckpointLoader.load_checkpoint(str(tmp_path / "w.pth"))
    assert not (tmp_path / "ran").exists()


def test_averages_of_their_ema_hook(tool, tmp_path):
    hook = "\ncustom_hooks = [dict(type='EMAHook')]\n"
    tool("train.py", DDRNET, "--work-dir", "work", extra=hook)
    ours = load_experiment(DDRNET).model.build()
    load_weights(ours, Path("work/iter_2.pth"))
    for extra in ("", hook):
        tool("test.py", DDRNET, "work/iter_2.pth", *evaluated(), extra=extra)
    again = ("--resume",) if ONE else ("--cfg-options", "custom_hooks.0.resume_from=work/iter_2.pth")
    tool("train.py", DDRNET, "--work-dir", "work", *again, extra=hook)
    stored = torch.load("work/iter_2.pth", weights_only=True)
    averages = stored["ema_state_dict"] if ONE else [n for n in stored["state_dict"] if n.startswith("ema_")]
    assert len(averages) >= len(list(ours.parameters()))


def test_cfg_options_are_our_overrides(tool):
    torch.save({"state_dict": build(DDP).state_dict()}, "w.pth")
    option = "model.overrides=[model.width=32,model.decoder_layers=1,model.num_inference_steps={}]"
    tool("test.py", DDP, "w.pth", *evaluated("--cfg-options", option.format(1)))
    for wrong in (option.format("many"), "model.overrides=[model.no_such=1]", "model.no_such=1"):
        with pytest.raises(UserError, match=r"num.inference.steps|no_such") as error:
            tool("test.py", DDP, "w.pth", *evaluated("--cfg-options", wrong))
        assert one_line(error)


# The same numbers


def probabilities(model, path, size):
    """Return the answer of their inference for an image file."""
    image = torch.from_numpy(read_image(path)).permute(2, 0, 1)[None].float()
    data = model.experiment.data
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    meta = metas(str(path), size=size)
    with torch.no_grad():
        logits = model.inference((image - mean) / std, meta, *(() if ONE else (True,)))
    return (logits.softmax(1) if ONE else logits)[0]


@pytest.mark.parametrize("mode", ["whole", "slide"])
@pytest.mark.parametrize("row", [DDRNET, SEGFORMER, DGMN2])
def test_probabilities_are_those_of_our_predictor(row, mode, toy):
    plain = "evaluate.precision=fp32", "evaluate.channels_last=False"
    windows = f"evaluate.mode={mode}", f"evaluate.crop={SIDE} {SIDE}", "evaluate.stride=40 40"
    model = build(row, *windows, "evaluate.img_scale=None", *plain).eval()
    assert model.test_cfg.mode == mode
    path = next(toy.glob("leftImg8bit/val/**/*.png"))
    image = read_image(path)
    [ours] = Predictor.of(model.net, model.experiment).probabilities([image], [0])
    [mean] = ours.values()
    # The predictor resizes rows and columns one after the other.
    torch.testing.assert_close(probabilities(model, path, image.shape[:2]), mean, atol=2e-6, rtol=0)


@pytest.mark.parametrize("row", [DDP, DDPS])
def test_noise_depends_on_the_file_the_view_and_the_window_alone(row, monkeypatch):
    model = build(row).eval()
    images = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    images[1] = images[0]
    rescale = () if ONE else (True,)
    with torch.no_grad():
        both = model.inference(images, metas("/data/a.png", "/data/b.png"), *rescale)
        alone = model.inference(images[1:], metas("b.png"), *rescale)
        flipped = model._view_seeds(images, metas("a.png", "b.png", flip=True, flip_direction="horizontal"))
    torch.testing.assert_close(both[1], alone[0], atol=1e-5, rtol=0)
    assert not torch.allclose(both[0], both[1], atol=1e-4)
    drawn = []
    monkeypatch.setattr(
        type(model.net), "forward",
        lambda _, images, seeds: drawn.append(seeds) or images.new_zeros(len(images), 20, *images.shape[-2:]),
    )  # fmt: skip
    model.out_channels = 20
    model.test_cfg.update(mode="slide", crop_size=(SIDE // 2, SIDE), stride=(SIDE // 2, SIDE))
    model.inference(images, metas("a.png", "b.png"), *rescale)
    assert len(drawn) == 2
    assert len({*drawn[0], *drawn[1], *flipped}) == 6


def test_background_in_front_is_a_miss_in_their_metric_as_in_ours(monkeypatch):
    model = build(DDPS).eval()
    assert model.num_classes == 19
    assert model.own_labels(torch.tensor([[[0, 18, 255]]])).tolist() == [[[1, 19, 0]]]
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(20, (1, SIDE, SIDE), generator=generator)
    labels[labels == 19] = 255
    logits = torch.randn(1, 20, SIDE, SIDE, generator=generator)
    monkeypatch.setattr(type(model.net), "forward", lambda *_: logits)
    images = torch.zeros(1, 3, SIDE, SIDE)
    if ONE:
        from mmseg.evaluation import IoUMetric

        data = batch(model, labels)["data_samples"]
        predicted = model.predict(images, data)[0].pred_sem_seg.data[0]
        metric = IoUMetric(iou_metrics=["mIoU", "mFscore"])
        areas = [metric.intersect_and_union(predicted, labels[0], 19, 255)]
        table = metric.total_area_to_metrics(*map(sum, zip(*areas, strict=True)), ["mIoU"])
    else:
        from mmseg.core.evaluation.metrics import eval_metrics

        predicted = torch.from_numpy(model.simple_test(images, metas("a.png"))[0])
        table = eval_metrics([predicted.numpy()], [labels[0].numpy()], 19, 255)
    ours = ConfusionMatrix(20, ignore_index=0)
    ours.update(logits.argmax(1)[0], model.own_labels(labels)[0])
    expected = ours.compute()
    assert (predicted == 255).any()
    np.testing.assert_allclose(table["IoU"], np.asarray(expected["IoU"])[1:], atol=1e-7)
    np.testing.assert_allclose(table["aAcc"], float(expected["aAcc"]), atol=1e-7)


METRICS = ["mIoU", "mDice", "mFscore"]
PUBLISHED = ("segformer_mit-b0_8x1_1024x1024_160k_cityscapes", "segformer_mit-b0_8xb1-160k_cityscapes-1024x1024")[ONE]
SMALLER = {"2048": "128", "1024": "64", "768": "40", "160000": "4", "16000": "4", "1500": "1", "0.00006": "0.001"}
"""Numbers of the published config, and those for images of 64 x 128 pixels and a run of 4 iterations."""
HERE = f"_base_ = '{PUBLISHED}/{PUBLISHED}.py'\n" + (
    """
model = dict(backbone=dict(init_cfg=None), decode_head=dict(norm_cfg=dict(type="BN")))
train_dataloader = dict(num_workers=0, persistent_workers=False)
val_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = dict(num_workers=0, persistent_workers=False)
"""
    if ONE
    else """
model = dict(backbone=dict(init_cfg=None), decode_head=dict(norm_cfg=dict(type="BN")))
data = dict(workers_per_gpu=0, persistent_workers=False)
"""
)
"""What the published config changes to run on this machine: no download, batch norm for a CPU, no processes."""


def published(toy):
    """Write the published config for smaller images and a shorter run, and config.py, which uses it here."""
    source = Path(mmseg.__path__[0], ".mim", "configs")
    for file in (*source.glob("_base_/*/*.py"), *source.glob("_base_/*.py"), source / "segformer" / f"{PUBLISHED}.py"):
        text = file.read_text().replace("data/cityscapes/", f"{toy}/")
        for old, new in SMALLER.items():
            text = re.sub(rf"\b{re.escape(old)}\b", new, text)
        target = Path("_base_", file.relative_to(source / "_base_")) if "_base_" in file.parts else None
        target = target or Path(PUBLISHED, file.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    Path("config.py").write_text(HERE)
    main(None, ["import-config", f"{PUBLISHED}/{PUBLISHED}.py", "--write", "ours.py"])


@pytest.fixture
def their_tables(monkeypatch):
    """What their metric says about a data set, before it is rounded, and the areas (K,) of the labels' classes."""
    if ONE:
        from mmseg.evaluation import IoUMetric as owner  # noqa: N813
    else:
        from mmseg.core.evaluation import metrics as owner
    found, compute = [], owner.total_area_to_metrics

    def record(*areas_and_more, **settings):
        values = compute(*areas_and_more, **settings)
        found.append((dict(values), np.asarray(areas_and_more[3])))  # they take values out
        return values

    monkeypatch.setattr(owner, "total_area_to_metrics", staticmethod(record) if ONE else record)
    return found


@pytest.mark.parametrize("row", ["published", DDRNET, DGMN2])
def test_a_trained_result_has_the_same_table_in_both(row, tool, their_tables, toy):
    """Trained and tested by their tools, and tested by ours: a published model of theirs, and our models in theirs."""
    if row == "published":
        published(toy)
        row, ours = None, ["ours.py:experiment"]
    else:
        ours = [row, *(f"--{override}" for override in ROWS[row][1]), "--evaluate.img-scale=128 64"]
    tool("train.py", row, "--work-dir", "work", *(("--cfg-options", "randomness.seed=0") if ONE else ("--seed", "0")))
    [file] = Path("work").glob("iter_*.pth")
    metrics = ("--cfg-options", f"test_evaluator.iou_metrics=[{','.join(METRICS)}]") if ONE else ("--eval", *METRICS)
    their_tables.clear()
    tool("test.py", row, file, *metrics)
    [(theirs, areas)] = their_tables
    plain = "--evaluate.precision=fp32", "--evaluate.channels-last=False", "--device=cpu", "--no-report"
    main(None, ["test", *ours, str(file), f"--data.root={toy}", "--json=ours.json", *plain])
    [found] = json.loads(Path("ours.json").read_text())["entries"].values()
    assert {"aAcc", "IoU", "Acc", "Dice", "Fscore", "Precision", "Recall"} == set(theirs)
    pixels = (
        0 if row else 2
    )  # how many may differ: of another program, rounding decides where two classes are as likely
    if pixels:
        theirs.pop("Precision")  # of a class that is predicted in two pixels, it may be anything
    for name, values in theirs.items():
        values, whole = np.asarray(values, float), areas.sum() if name == "aAcc" else areas
        limit = 1e-7 + 2 * pixels / np.maximum(whole, 1)
        difference = np.abs(np.array(found[name], float) - values)
        assert (np.isnan(difference) == np.isnan(values)).all(), name
        assert not (difference > limit).any(), name
        if name != "aAcc":
            assert abs(found[f"m{name}"] - np.nanmean(values)) <= np.mean(limit)
    assert np.nanmax(theirs["IoU"]) > 0.01


RULED = [name for name, row in experiments().items() if row().optimizer.rules]


@pytest.mark.parametrize("row", ["segformer_mit_b0_512x512_160k_ade20k", "ddp_swin_t_4x4_512x1024_160k_cityscapes"])
def test_parameter_groups_are_those_of_paramwise_cfg(row):
    """Their constructor gets modules that have the published names; ours the model that they build."""
    assert row in RULED
    model = MODELS.build({"type": "SegcoreModel", "experiment": row, "overrides": ["train.init_from=None"]})
    own = model.experiment.optimizer
    published, names = nn.Module(), {}
    for name, parameter in model.net.named_parameters():
        *path, last = model.net.key_map()[name].split(".")
        module = published
        for part in path:
            module = module._modules.setdefault(part, nn.Module())
        module.register_parameter(last, parameter)
        names[parameter] = name
    keys = {rule.key: {"lr_mult": rule.lr_mult, "decay_mult": rule.decay_mult} for rule in own.rules}
    paramwise = {"custom_keys": keys}
    settings = {"type": "AdamW", "lr": own.lr, "weight_decay": own.weight_decay, "betas": own.betas}
    if ONE:
        from mmengine.optim import DefaultOptimWrapperConstructor as Default

        theirs = Default({"type": "OptimWrapper", "optimizer": settings}, paramwise)(published).optimizer
    else:
        from mmcv.runner import DefaultOptimizerConstructor as Default

        theirs = Default(settings, paramwise)(published)

    def table(optimizer):
        return {names[p]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}

    assert len({*table(theirs).values()}) > 1
    for given in ({}, {"optimizer": settings}):  # from the experiment, or stated as in the published config
        config = {"optim_wrapper_cfg": given} if ONE else {"optimizer_cfg": given.get("optimizer")}
        made = SegcoreOptimizer(paramwise_cfg=paramwise if given else None, **config)(model)
        assert table(made.optimizer if ONE else made) == table(theirs)


def test_gradients_accumulate_as_in_ours():
    model = build(SEGFORMER, "model.dropout=0")
    labels = torch.randint(19, (2, SIDE, SIDE), generator=torch.Generator().manual_seed(1))
    other = copy.deepcopy(model)
    data = [batch(model, labels, ("a.png", "b.png")), batch(model, labels.flip(0), ("c.png", "d.png"))]
    optimizer = build_optimizer(other.net, other.experiment.optimizer)
    torch.manual_seed(3)
    for part in data:
        (losses(other.train(), copy.deepcopy(part))["loss"] / 2).backward()
    optimizer.step()
    torch.manual_seed(3)
    if ONE:
        wrapper = SegcoreOptimizer(optim_wrapper_cfg={"type": "OptimWrapper", "accumulative_counts": 2})(model)
        wrapper.initialize_count_status(model, 0, 2)
        for part in data:
            model.train().train_step(part, wrapper)
    else:
        from mmcv.runner import IterBasedRunner
        from mmseg.utils import get_root_logger

        made = SegcoreOptimizer()(model)
        runner = IterBasedRunner(model, optimizer=made, logger=get_root_logger(), max_iters=2, meta={})
        runner.register_training_hooks(None, {"type": "GradientCumulativeOptimizerHook", "cumulative_iters": 2})
        loader = torch.utils.data.DataLoader(data, batch_size=None)
        runner.run([loader], [("train", 1)])
    for name, parameter in model.net.named_parameters():
        torch.testing.assert_close(parameter, other.net.get_parameter(name), atol=1e-6, rtol=1e-5)


# Other programs around the model


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_their_distributed_wrapper(group, tmp_path):
    model = build(DDP)
    labels = torch.randint(19, (2, SIDE, SIDE), generator=torch.Generator().manual_seed(1))
    if ONE:
        from mmengine.model import MMDistributedDataParallel as Parallel
        from mmengine.runner.checkpoint import get_state_dict
    else:
        from mmcv.parallel import MMDistributedDataParallel as Parallel
        from mmcv.runner.checkpoint import get_state_dict
    before = copy.deepcopy(model.net.state_dict())
    wrapped = Parallel(model)
    made = SegcoreOptimizer()(wrapped)
    if ONE:
        logged = wrapped.train_step(batch(model, labels), made)
    else:
        outputs = wrapped.train_step(batch(model, labels), made)
        outputs["loss"].backward()
        made.step()
        logged = outputs["log_vars"]
    assert float(logged["loss"]) == pytest.approx(float(logged["decode.ce"]) + float(logged["aux.ce"]), rel=1e-5)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.net.state_dict().items())
    assert list(get_state_dict(wrapped)) == list(model.net.official_state())


def fully_sharded(model, tmp_path):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def deep_speed(model, tmp_path):
    scope = {"__name__": "deepspeed.runtime.engine", "model": model}  # stands for an engine, which calls the model
    exec("def engine(**data): return model(**data)", scope)
    return scope["engine"]


def activations(model, tmp_path):
    if ONE:
        from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing

        turn_on_activation_checkpointing(model, ["net.backbone"])
    else:
        from torch.utils.checkpoint import checkpoint

        model.net.backbone.forward = partial(checkpoint, model.net.backbone.forward, use_reentrant=False)
    return model


def norms_with_activations(model, tmp_path):
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


@pytest.mark.parametrize(
    ("wrap", "row", "words"),
    [
        (fully_sharded, SEGFORMER, "DistributedDataParallel"),
        (deep_speed, SEGFORMER, "DistributedDataParallel"),
        (activations, SEGFORMER, r"train\.checkpoint_activations=True"),
        (norms_with_activations, DEEPLAB, "sync_bn"),
    ],
)
def test_programs_that_take_the_model_apart_are_refused(wrap, row, words, group, tmp_path):
    model = build(row)
    labels = torch.zeros(2, SIDE, SIDE, dtype=torch.long)
    data = batch(model, labels)
    data = {**model.data_preprocessor(data, True), "mode": "loss"} if ONE else data
    with pytest.raises(UserError, match=words) as error:
        wrap(model, tmp_path)(**data)
    assert one_line(error)


def test_our_activation_checkpointing_and_frozen_parts():
    model = build(SEGFORMER, "train.checkpoint_activations=True", "train.freeze=backbone")
    model.train()
    assert not model.net.backbone.training
    assert model.net.head.training
    labels = torch.zeros(2, SIDE, SIDE, dtype=torch.long)
    plain = build(SEGFORMER, "train.freeze=backbone").train()
    found = []
    for each in (model, plain):
        torch.manual_seed(0)
        losses(each, batch(each, labels))["loss"].backward()
        found.append([p.grad for p in each.net.parameters()])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


# Refusals

CONTRADICTIONS = {
    "num_classes": ({"num_classes": 21}, "19"),
    "align_corners": ({"align_corners": True}, "False"),
    "ignore_index": ({"ignore_index": 0}, "255"),
    "reduce_zero_label": ({"reduce_zero_label": True}, "False"),
    "pretrained": ({"pretrained": "a.pth"}, "init_from"),
}
if ONE:
    padded = {"type": "mmseg.SegDataPreProcessor", "seg_pad_val": 0}  # with its scope, which only a Runner sets
    CONTRADICTIONS["seg_pad_val"] = ({"data_preprocessor": padded}, "255")


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_contradicting_config_is_refused(name):
    settings, word = CONTRADICTIONS[name]
    with pytest.raises(UserError, match=rf"{name}.*{word}") as error:
        build(SEGFORMER, **settings)
    assert one_line(error)


def test_a_contradicting_data_set_is_refused():
    model = build(DDPS)
    wrong = batch(model, torch.full((2, SIDE, SIDE), 19))
    with pytest.raises(UserError, match=r"value 19; .* takes 0 to 18 and 255") as error:
        losses(model, wrong)
    assert one_line(error)
    if ONE:
        with pytest.raises(UserError, match="value 19;"):
            model.val_step(wrong)
        data = batch(model, torch.zeros(2, SIDE, SIDE, dtype=torch.long))
        for sample in data["data_samples"]:
            sample.set_metainfo({"reduce_zero_label": True})
        with pytest.raises(UserError, match="reduce_zero_label of the data set is True"):
            losses(model, data)
    else:
        model.CLASSES = ("class",) * 19
        with pytest.raises(UserError, match="CLASSES is 150"):
            model.CLASSES = ("class",) * 150


def test_other_settings_are_refused():
    with pytest.raises(UserError, match=r"loss\.class_weight is auto"):
        build(SEGFORMER, "loss.class_weight=auto_sqrt")
    model = build(SEGFORMER)
    for optimizer, paramwise in (
        ({"type": "Adam"}, {}),
        ({"type": "AdamW", "amsgrad": True}, {}),
        ({}, {"norm_decay_mult": 0.0}),
        ({}, {"custom_keys": {"head": {"momentum": 0.1}}}),
    ):
        config = {"optim_wrapper_cfg": {"optimizer": optimizer}} if ONE else {"optimizer_cfg": optimizer}
        with pytest.raises(UserError, match=r"knows no .*(adam|amsgrad|norm_decay_mult|momentum)") as error:
            SegcoreOptimizer(paramwise_cfg=paramwise, **config)(model)
        assert one_line(error)


def test_weights_load_strictly():
    model = build(DDRNET)
    state = model.state_dict()
    first = next(iter(state))
    for wrong in ({**state, "more": torch.ones(1)}, {n: t for n, t in state.items() if n != first},
                  {**state, first: torch.ones(3)}):  # fmt: skip
        with pytest.raises(UserError, match="does not fit"):
            model.load_state_dict(wrong, strict=False)
    averages = {"ema_net_stem": torch.ones(1)}
    assert not any(build(DDRNET).load_state_dict({**state, **averages}, strict=True))


def test_start_weights_of_the_experiment(tmp_path):
    start = build(SEGFORMER)
    torch.save(start.state_dict(), tmp_path / "start.pth")
    model = build(SEGFORMER, f"train.init_from={tmp_path / 'start.pth'}")
    nn.init.zeros_(next(model.net.parameters()))
    model.init_weights()
    assert all(torch.equal(tensor, start.net.state_dict()[name]) for name, tensor in model.net.state_dict().items())


def test_swin_has_the_published_layout():
    overrides = ["train.init_from=None"]
    row = "ddp_swin_t_4x4_512x1024_160k_cityscapes"
    model, other = (MODELS.build({"type": "SegcoreModel", "experiment": row, "overrides": overrides}) for _ in range(2))
    if ONE:
        from mmengine.model import ExponentialMovingAverage

        ExponentialMovingAverage(model).update_parameters(other)
        with pytest.raises(UserError, match="update_buffers=False") as error:
            ExponentialMovingAverage(model, update_buffers=True)
        assert one_line(error)
    state = model.state_dict()
    name = "backbone.stages.0.downsample.reduction.weight"
    assert not torch.equal(state[name], dict(model.net.named_parameters())[_own_name(model, name)])
    other.load_state_dict(state)
    assert all(torch.equal(t, other.net.state_dict()[n]) for n, t in model.net.state_dict().items())


def _own_name(model, published):
    return next(name for name, value in model.net.key_map().items() if value == published)


# Their own tests of segmentors, which the wheel of MMSegmentation brings


@pytest.fixture
def their_tests(monkeypatch):
    """A function that imports a module of their tests, where an EncoderDecoder is one of our models.

    Their images of 8 x 16 and 10 x 10 pixels, and windows of 3 x 3, are larger here, as ours must be.
    """
    pytest.importorskip("tests.test_models.test_segmentors", reason="the wheel of this MMSegmentation has no tests")
    if ONE:
        from mmengine.registry import DefaultScope

        monkeypatch.setattr(DefaultScope, "_instance_dict", DefaultScope._instance_dict.copy())

    def ours(**config):
        if config.get("type") == "EncoderDecoder":
            own = {"experiment": SEGFORMER, "overrides": ["train.init_from=None"], "test_cfg": config.get("test_cfg")}
            config = {"type": "SegcoreModel", **own, **PLAIN}
        if config.get("mode") == "slide":
            config |= {"crop_size": (SIDE, SIDE // 2), "stride": (SIDE, SIDE // 4)}
        return ConfigDict(config)

    def images(count, channels, height, width):
        return torch.randn(count, channels, 4 * height, 4 * width)

    def load(name):
        module = importlib.import_module(f"tests.test_models.test_segmentors.{name}")
        monkeypatch.setattr(module, "ConfigDict", ours, raising=False)
        if name == "test_seg_tta_model":
            monkeypatch.setattr(module, "torch", SimpleNamespace(randn=images, randint=torch.randint))
        utils = importlib.import_module("tests.test_models.test_segmentors.utils")
        monkeypatch.setattr(utils, "_demo_mm_inputs", partial(utils._demo_mm_inputs, (2, 3, SIDE, SIDE)))
        return module

    return load


PLAIN = {"data_preprocessor": {"type": "BaseDataPreprocessor"}} if ONE else {}  # their inputs are what it gives
THEIRS = [("test_encoder_decoder", "test_encoder_decoder")]
if ONE:
    THEIRS += [("test_encoder_decoder", "test_postprocess_result"), ("test_seg_tta_model", "test_encoder_decoder_tta")]


@pytest.mark.parametrize(("module", "name"), THEIRS)
def test_their_tests_of_segmentors_pass(module, name, their_tests):
    getattr(their_tests(module), name)()


@pytest.mark.parametrize("mode", ["whole", "slide"])
@pytest.mark.parametrize("row", ROWS)
def test_their_test_of_a_segmentor_passes(row, mode, their_tests):
    """The part that all of their tests share."""
    windows = {"mode": mode, "crop_size": (SIDE, SIDE // 2), "stride": (SIDE, SIDE // 4)}
    their_tests("utils")._segmentor_forward_train_test(build(row, test_cfg=windows, **PLAIN))


# What a CPU cannot do


@pytest.mark.gpu
@pytest.mark.parametrize("row", ROWS)
def test_mixed_precision(row):
    model = build(row).cuda()
    data = batch(model, torch.randint(19, (2, SIDE, SIDE)))
    if ONE:
        wrapper = SegcoreOptimizer(optim_wrapper_cfg={"type": "AmpOptimWrapper", "loss_scale": "dynamic"})(model)
        logged = model.train().train_step(data, wrapper)
    else:
        from mmcv.parallel import MMDataParallel
        from mmcv.runner import wrap_fp16_model

        wrap_fp16_model(model)
        logged = MMDataParallel(model, device_ids=[0]).train_step(data, SegcoreOptimizer()(model))["log_vars"]
    assert np.isfinite(float(logged["loss"]))


@pytest.mark.gpu
def test_their_synchronized_norms(group):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(build(DDRNET)).cuda()
    data = batch(model, torch.randint(19, (2, SIDE, SIDE)).cuda())
    if not ONE:
        data["img"] = data["img"].cuda()
    assert torch.isfinite(losses(model.train(), data)["loss"])
