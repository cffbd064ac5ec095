"""The examples about losses, backbones and methods of one's own run as they are written, on a few small images."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import segcore
from segcore.cli.main import main
from segcore.testing import contract

EXAMPLES = Path(__file__).parents[3] / "examples"
UNET = f"{EXAMPLES / 'unet.py'}:unet"


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Options for two iterations on generated images of 19 classes."""
    rng = np.random.RandomState(0)
    for split, count in (("train", 4), ("val", 2)):
        for i in range(count):
            for kind, high, shape in (("images", 256, (48, 70, 3)), ("masks", 19, (48, 70))):
                path = tmp_path / "data" / kind / split / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.randint(0, high, shape).astype(np.uint8)).save(path)
    words = ["--data.dataset", "folder", "--data.root", str(tmp_path / "data"), "--data.workers", "0"]
    words += ["--data.classes", *(f"class{k}" for k in range(19)), "--device", "cpu"]
    words += ["--data.crop", "64", "96", "--data.img-scale", "None", "--schedule.iterations", "2"]
    words += ["--train.batch-size", "2", "--train.device-batch-size", "2", "--train.precision", "fp32"]
    return [*words, "--schedule.warmup-iterations", "0", "--train.log-every", "1", "--evaluate.img-scale", "None"]


def test_a_method_of_one_s_own_trains_is_tested_and_predicts(small, tmp_path, capsys):
    run, photos, root = tmp_path / "run", tmp_path / "data" / "images" / "val", small.index("--data.root")
    main(None, ["train", UNET, *small, "--model.width", "8", "--train.evaluate-every", "2", "--work-dir", str(run)])
    assert "note:" not in capsys.readouterr().out, "the report has images: the file was named"
    model = ["--model.width", "8", "--evaluate.img-scale", "None"]
    data = ["--data.dataset", "folder", *small[small.index("--data.classes") : small.index("--data.crop")], *model]
    main(None, ["test", UNET, str(run), *data, *small[root : root + 2]])
    assert "mIoU" in capsys.readouterr().out
    main(None, ["predict", UNET, str(run), str(photos), str(tmp_path / "out"), *data])
    assert Image.open(tmp_path / "out" / "0.png").size == (70, 48)
    with pytest.raises(ValueError, match=r"its model UNetConfig is defined in a file of yours"):
        segcore.load_model(run)
    with pytest.raises(ValueError, match=r"iter_2: was trained with --model.width 8 .*; state the same"):
        segcore.load_model(UNET, run)


def test_the_method_is_a_segmentor():
    config = segcore.load_experiment(UNET).model
    torch.manual_seed(0)
    model = config.build()
    contract.check_forward(model)
    contract.check_seeds(model)
    contract.check_backward(model)
    contract.check_losses(model)
    contract.check_state_dict(config.build)


def test_another_loss(small, tmp_path, capsys):
    words = ["train", f"{EXAMPLES / 'losses.py'}:cross_entropy_and_dice", *small, "--train.init-from", "None"]
    main(None, [*words, "--work-dir", str(tmp_path / "run"), "--train.evaluate-every", "0"])
    words = ["loss.kind=cross_entropy dice", "loss.weights=1 0.5", "loss.label_smoothing=0.1"]
    published = segcore.load_experiment("ddrnet_23_slim_cityscapes")
    assert segcore.load_experiment(tmp_path / "run").loss == published.with_overrides(words).loss
    assert "aux.loss_ce" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("function", "more"),
    [
        ("ddp_mobilenet", ["--model.width", "32", "--model.decoder-layers", "1", "--model.heads", "4"]),
        ("deeplab_regnet", ["--model.condition-width", "32"]),
    ],
)
def test_another_backbone(function, more, small, tmp_path, capsys, monkeypatch):
    config = f"{EXAMPLES / 'backbones.py'}:{function}"
    tag = segcore.load_experiment(config).train.init_from
    assert timm.get_pretrained_cfg(tag).hf_hub_id, "timm offers these weights"
    save_file(timm.create_model(tag.partition(".")[0]).state_dict(), tmp_path / f"{tag}.safetensors")
    monkeypatch.setenv("SEGCORE_WEIGHTS", str(tmp_path))
    run = tmp_path / "run"
    main(None, ["train", config, *small, *more, "--work-dir", str(run), "--train.evaluate-every", "0", "--offline"])
    assert f"{tag}: backbone only: loaded" in capsys.readouterr().out
    image = Image.open(tmp_path / "data" / "images" / "val" / "0.png")
    assert segcore.load_model(run, device="cpu")(image).classes.shape == (48, 70)
