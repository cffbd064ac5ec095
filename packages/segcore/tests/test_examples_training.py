"""The examples about training run as they are written, but on a few small images and from a file of random weights."""

import json
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors.torch import save_file

from segcore.checkpoints import run_checkpoint as checkpoint
from segcore.cli.main import main
from segcore.config.registry import load_experiment

EXAMPLES = Path(__file__).parents[3] / "examples"


def test_small_gpu(tmp_path: Path, capsys) -> None:
    rng = np.random.RandomState(0)
    for split, count in (("train", 5), ("val", 2)):
        for i in range(count):
            for kind, high, shape in (("images", 255, (64, 96, 3)), ("masks", 2, (64, 96))):
                path = tmp_path / "data" / kind / split / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), rng.randint(0, high, shape).astype(np.uint8))
    torch.manual_seed(0)
    model = load_experiment("ddrnet_23_slim_cityscapes").model.build()
    start = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("backbone.")}
    save_file({model.key_map()[name]: tensor for name, tensor in start.items()}, tmp_path / "imagenet.safetensors")
    small = ["--data.root", str(tmp_path / "data"), "--data.crop", "64", "64", "--data.workers", "0"]
    small += ["--train.init-from", str(tmp_path / "imagenet.safetensors"), "--schedule.epochs", "2", "--device", "cpu"]
    small += ["--train.precision", "fp32"]  # bf16 is slow on many a CPU
    main(None, ["train", f"{EXAMPLES / 'small_gpu.py'}:small_gpu", *small, "--work-dir", str(tmp_path / "run")])
    shown = capsys.readouterr().out
    assert (
        "schedule.epochs 2: 2 iterations (5 images, train.batch_size 8) in place of schedule.iterations 10000, "
        "all of them within the 100 of the warm-up\n" in shown
    )
    assert "frozen: backbone.conv1, backbone.layer1, backbone.layer2 (0.179 M of 5.73 M parameters)\n" in shown
    assert json.loads((tmp_path / "run/results.json").read_text())["images"] == 2
    trained = checkpoint.load(checkpoint.folder_of(tmp_path / "run", 2)).model
    fixed = {name for name, tensor in start.items() if torch.equal(tensor, trained[name])}
    assert fixed == {
        name for name in start if name.startswith(("backbone.conv1", "backbone.layer1", "backbone.layer2"))
    }
