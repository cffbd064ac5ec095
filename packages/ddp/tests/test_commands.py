"""The commands on real files: train, resume, test, predict, configs; and their messages for bad input."""

import csv
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from segcore import load_experiment
from segcore.checkpoints.run_checkpoint import newest, read_model_state
from segcore.cli.main import main
from segcore.demo.toy import generate
from segcore.testing.commands import refused

CONFIG = "ddp_resnet18_toy"
SMALL = [
    "--device=cpu", "--model.width=32", "--model.decoder-layers=1", "--train.precision=fp32", "--data.workers=0",
    "--data.crop", "64", "128", "--data.img-scale", "128", "64", "--evaluate.img-scale", "128", "64",
]  # fmt: skip
CPU = "--device=cpu"
ITERATIONS = ["--schedule.iterations=3", "--train.save-every=1", "--train.evaluate-every=3", "--train.log-every=1"]
TRAIN = [*ITERATIONS, "--no-report"]


def small_toy(root):
    generate(root, train=3, val=2, height=64, width=128)
    return root


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return small_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory):
    """A finished training run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    main("ddp_seg", ["train", CONFIG, f"--data.root={toy}", f"--work-dir={folder}", *SMALL, *TRAIN])
    return folder


def test_train_writes_a_run(run):
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in log if line["mode"] == "train"] == [1, 2, 3]
    results = json.loads((run / "results.json").read_text())
    assert set(results["entries"]) == {"1", "3", "10"}
    assert json.loads((run / "experiment.json").read_text())["experiment"]["model"]["width"] == 32
    assert newest(run).name == "iter_3"


def test_an_interrupted_run_resumes_to_the_same_weights(run, toy, tmp_path):
    """The checkpoint after iteration 2 of 3 is in the middle of the second epoch: 3 images, 2 per iteration."""
    shutil.copytree(run, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "iter_3")
    assert newest(tmp_path / "cut").name == "iter_2"
    words = ["train", CONFIG, f"--data.root={toy}", f"--work-dir={tmp_path / 'cut'}", *SMALL, *TRAIN]
    main("ddp_seg", [*words, "--resume"])
    whole, resumed = read_model_state(newest(run)), read_model_state(newest(tmp_path / "cut"))
    assert newest(tmp_path / "cut").name == "iter_3"
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for other processes")
def test_interrupt_saves_and_says_how_to_resume(toy, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "ddp_seg", "train", CONFIG, f"--data.root={toy}", f"--work-dir={folder}", *SMALL]
    long = ["--schedule.iterations=100000", "--train.log-every=1", "--train.evaluate-every=0"]
    process = subprocess.Popen([*command, *long], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (
        (folder / "log.jsonl").exists() and '"mode": "train"' in (folder / "log.jsonl").read_text()
    ):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "--resume" in output
    assert "Traceback" not in output
    assert newest(folder) is not None


def test_test_prints_the_published_table(run, toy, tmp_path, capsys):
    main("ddp_seg", ["test", str(run), f"--data.root={toy}", f"--json={tmp_path / 'out.json'}", CPU,
                     "--evaluate.steps", "1", "2", "--evaluate.metrics", "mIoU", "mFscore"])  # fmt: skip
    text = capsys.readouterr().out
    assert "aAcc |" in text
    assert "per class results" in text
    assert "mFscore" in text
    data = json.loads((tmp_path / "out.json").read_text())
    assert list(data["entries"]) == ["1", "2"]
    assert data["images"] == 2


def test_predict_a_file_and_a_folder(run, toy, tmp_path):
    images = tmp_path / "in"
    (images / "below").mkdir(parents=True)
    image = np.random.RandomState(0).randint(0, 255, (70, 90, 3), np.uint8)
    cv2.imwrite(str(images / "a.png"), image)
    cv2.imwrite(str(images / "below" / "b.jpg"), image[:50])
    main("ddp_seg", ["predict", str(run), str(images), str(tmp_path / "out"), CPU])
    mask = Image.open(tmp_path / "out" / "a.png")
    assert mask.size == (90, 70)
    assert np.array(mask).max() < 19
    assert mask.getpalette()[:3] == [128, 64, 128]
    assert Image.open(tmp_path / "out" / "below" / "b_overlay.png").size == (90, 50)
    main("ddp_seg", ["predict", str(run), str(images / "a.png"), str(tmp_path / "one.png"), CPU])
    assert np.array_equal(np.array(Image.open(tmp_path / "one.png")), np.array(mask)), (
        "the answer depends on its neighbors"
    )


@pytest.mark.parametrize("path", [[], ["--evaluate.mode=slide", "--evaluate.crop", "64", "64", "--evaluate.stride",
                                       "40", "40", "--evaluate.flip=True"]], ids=["whole", "slide"])  # fmt: skip
def test_predict_uncertainty_and_steps(run, toy, tmp_path, path):
    image = str(first(toy, "leftImg8bit/val/*/*.png"))
    for name, options in (("plain", []), ("more", ["--uncertainty", "--steps"])):
        main("ddp_seg", ["predict", str(run), image, str(tmp_path / name / "a.png"), CPU, *path, *options])
    assert (tmp_path / "plain" / "a.png").read_bytes() == (tmp_path / "more" / "a.png").read_bytes()
    levels = np.array(Image.open(tmp_path / "more" / "a_uncertainty.png"))
    assert (levels.shape, levels.dtype) == ((64, 128), np.uint8)
    assert levels.max() > 128, "three iterations do not make a model sure"
    strip = Image.open(tmp_path / "more" / "a_steps.png")  # input, three steps, answer; captions may be wider
    assert strip.width >= 5 * 128 + 4 * 6


def test_early_exit_threshold(run, toy, tmp_path, capsys):
    """Every change is below 100 %, so every image exits after the second step with that step's output."""
    words = [str(run), f"--data.root={toy}", f"--json={tmp_path / 'out.json'}", CPU]
    table = ["--model.num-inference-steps=6", f"--per-image={tmp_path / 'images.csv'}"]
    main("ddp_seg", ["test", *words, "--evaluate.early-exit-threshold=100", *table])
    assert "until 100%: denoising took 2.00 steps on average" in capsys.readouterr().out
    data = json.loads((tmp_path / "out.json").read_text())
    assert (list(data["entries"]), data["steps_taken"]) == (["1", "3", "10", "until 100%"], 2)
    assert {row["steps"] for row in csv.DictReader((tmp_path / "images.csv").open())} == {"2.0"}
    image = str(first(toy, "leftImg8bit/val/*/*.png"))
    words = ["predict", str(run), image, str(tmp_path / "a.png"), CPU]
    main("ddp_seg", [*words, "--evaluate.early-exit-threshold=100"])
    assert "2.00 denoising steps on average" in capsys.readouterr().out
    assert "evaluate.early_exit_threshold is 0.0" in refused("ddp_seg", *words, "--evaluate.early-exit-threshold=0")


def test_predict_skips_unreadable_images(run, tmp_path):
    images = tmp_path / "in"
    images.mkdir()
    cv2.imwrite(str(images / "good.png"), np.zeros((64, 64, 3), np.uint8))
    (images / "bad.png").write_bytes(b"")
    line = refused("ddp_seg", "predict", run, images, tmp_path / "out", CPU)
    assert str(images / "bad.png") in line
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "classes.json", "good.png", "good_overlay.png", "predict.json", "results.csv"
    ]  # fmt: skip


def test_predict_one_image_to_one_file(run, toy, tmp_path, capsys):
    image = str(first(toy, "leftImg8bit/val/*/*.png"))
    for name in ("mask.png", "overlay.jpg", "new/folder"):
        main("ddp_seg", ["predict", str(run), image, str(tmp_path / "out" / name), CPU])
        for line in capsys.readouterr().out.splitlines():
            assert Image.open(line).size == (128, 64)
    stem = image.rpartition("/")[2].removesuffix(".png")
    assert sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")) == [
        "mask.png", "mask_classes.json", "mask_overlay.png",
        "new/folder/classes.json", f"new/folder/{stem}.png", f"new/folder/{stem}_overlay.png",
        "overlay.jpg", "overlay.png", "overlay_classes.json",
    ]  # fmt: skip
    with Image.open(tmp_path / "out" / "overlay.jpg") as overlay:
        assert overlay.format == "JPEG"
    masks = [(tmp_path / "out" / name).read_bytes() for name in ("mask.png", "overlay.png")]
    assert masks[0] == masks[1]


def test_a_checkpoint_with_other_settings_names_them(run, toy, tmp_path, capsys):
    words = ["test", CONFIG, run, f"--data.root={toy}", f"--json={tmp_path / 'out.json'}", CPU]
    line = refused("ddp_seg", *words, "--data.mean", "1", "2", "3")
    options = "--model.width 32 --model.decoder-layers 1 --data.mean 123.675 116.28 103.53"
    assert line == f"error: {newest(run)}: was trained with {options}; give this folder as CONFIG, without other values"
    other = "ddp_convnext_t_4x4_512x1024_160k_cityscapes"
    line = refused("ddp_seg", "predict", other, run, toy, tmp_path / "out", "--device=cpu")
    assert f"was trained with {CONFIG} --model.backbone resnet18" in line
    main("ddp_seg", ["test", *map(str, words[2:]), "--limit=1", "--model.num-inference-steps=2"])
    said = capsys.readouterr()
    assert f"{newest(run)} (the run's best, mIoU " in said.err
    assert f"note: {newest(run)} was trained with --model.num-inference-steps 3" in said.err
    assert "By number of denoising steps:" in said.out
    assert "Summary (10 steps; the model's configured 2 steps not evaluated):" in said.out


def test_a_finished_run_is_reported_and_not_repeated(run, toy, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    words = ["train", CONFIG, f"--data.root={toy}", f"--work-dir={tmp_path / 'run'}", *SMALL, *TRAIN, "--resume"]
    main("ddp_seg", words)
    said = capsys.readouterr().out
    assert "already finished; to train longer, raise schedule.iterations above 3" in said
    assert said.splitlines()[-1].startswith(f"{tmp_path / 'run'}: finished; best: iteration 3, mIoU ")
    line = refused("ddp_seg", *words, "--model.width=64")
    assert "; add --model.width 32, or choose another --work-dir" in line


def test_an_invalid_work_dir(toy, tmp_path):
    (tmp_path / "file").write_text("")
    words = ["train", CONFIG, f"--data.root={toy}", *SMALL, "--work-dir"]
    assert refused("ddp_seg", *words, tmp_path / "file").endswith("file: is a file; choose another --work-dir")
    line = refused("ddp_seg", *words, tmp_path / "file" / "run")
    assert f"{tmp_path / 'file' / 'run'}" in line
    assert "cannot be written (Not a directory)" in line
    line = refused("ddp_seg", "demo", "--work-dir", tmp_path / "file" / "demo", "--device=cpu")
    assert line.startswith(f"error: {tmp_path / 'file' / 'demo'}: cannot be written (Not a directory)")


def test_predict_palettes(run, tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((64, 64, 3), np.uint8))
    words = ["predict", str(run), str(tmp_path / "a.png"), str(tmp_path / "out"), CPU]
    (tmp_path / "colors.txt").write_text("\n".join(f"{k} 0 0" for k in range(19)))
    main("ddp_seg", [*words, f"--palette={tmp_path / 'colors.txt'}"])
    assert Image.open(tmp_path / "out" / "a.png").getpalette()[3:6] == [1, 0, 0]
    (tmp_path / "few.txt").write_text("1 2 3")
    assert "1 colors for 19 classes" in refused("ddp_seg", *words, f"--palette={tmp_path / 'few.txt'}")
    (tmp_path / "wrong.txt").write_text("1 2\n3 4 500")
    assert "wrong.txt" in refused("ddp_seg", *words, f"--palette={tmp_path / 'wrong.txt'}")


def test_configs_writes_a_file_that_builds_the_same(tmp_path):
    name = "ddp_swin_b_2x8_512x512_160k_ade20k"
    main("ddp_seg", ["configs", name, "--write", str(tmp_path / "my.py")])
    assert load_experiment(f"{tmp_path / 'my.py'}:experiment") == load_experiment(name)
    assert "exists already" in refused("ddp_seg", "configs", name, "--write", tmp_path / "my.py")
    assert "--json prints" in refused("ddp_seg", "configs", name, "--json", "--write", tmp_path / "b.py")


def test_wrong_configuration_names(tmp_path):
    assert f"did you mean {CONFIG}?" in refused("ddp_seg", "train", "ddp_resnet18_toi")
    assert "no such configuration file" in refused("ddp_seg", "train", tmp_path / "none.py")
    assert "needs a configuration" in refused("ddp_seg", "train", "--resume")


def test_wrong_flags_name_the_nearest(capsys):
    with pytest.raises(SystemExit) as end:
        main("ddp_seg", ["train", CONFIG, "--model.num-inference-step=10"])
    assert end.value.code == 2
    assert "--model.num-inference-steps" in capsys.readouterr().err


# Bad datasets: the change to the small toy set, and the text that the one line must contain.


def first(root, pattern):
    return sorted(root.glob(pattern))[0]


def empty_image(root):
    path = first(root, "leftImg8bit/train/*/*.png")
    path.write_bytes(b"")
    return path.name, "empty"


def corrupt_image(root):
    path = first(root, "leftImg8bit/train/*/*.png")
    path.write_bytes(path.read_bytes()[:200])
    return path.name, "cannot be read"


def other_size(root):
    path = first(root, "gtFine/train/*/*_labelTrainIds.png")
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(path)
    return path.name, "32x32"


def out_of_range(root):
    path = first(root, "gtFine/train/*/*_labelTrainIds.png")
    Image.fromarray(np.full((64, 128), 77, np.uint8)).save(path)
    return path.name, "77"


def missing_label(root):
    for kind in ("labelTrainIds", "labelIds"):  # either would suffice
        path = first(root, f"gtFine/train/*/*_{kind}.png")
        path.unlink()
    return path.name.split("_gtFine")[0], "label"


@pytest.mark.parametrize("damage", [empty_image, corrupt_image, other_size, out_of_range, missing_label])
def test_bad_data(toy, tmp_path, damage):
    root = tmp_path / "toy"
    shutil.copytree(toy, root)
    (root / "toy.json").unlink()
    named = damage(root)
    words = ["train", CONFIG, "--data.dataset=cityscapes", f"--data.root={root}", f"--work-dir={tmp_path / 'run'}"]
    line = refused("ddp_seg", *words, *SMALL, *TRAIN)
    assert all(part in line for part in named), line
    assert not list((tmp_path / "run").rglob("*.tmp")), "something is half-written"


def test_missing_folders(tmp_path, run):
    words = ["train", CONFIG, "--data.dataset=cityscapes", f"--data.root={tmp_path / 'none'}"]
    assert str(tmp_path / "none") in refused("ddp_seg", *words, *SMALL)
    assert str(tmp_path / "nothing") in refused("ddp_seg", "test", CONFIG, tmp_path / "nothing", CPU)
    assert "neither a checkpoint folder" in refused("ddp_seg", "test", CONFIG, tmp_path, CPU)
    assert "no such image" in refused("ddp_seg", "predict", run, tmp_path / "none", tmp_path / "out", CPU)
    assert not (tmp_path / "out").exists()


def test_all_ignored_images_train_to_a_finite_loss(toy, tmp_path):
    root = tmp_path / "toy"
    shutil.copytree(toy, root)
    labels = sorted(root.glob("gtFine/train/*/*_labelTrainIds.png"))
    for path in labels[1:]:  # training on nothing at all is refused
        Image.fromarray(np.full((64, 128), 255, np.uint8)).save(path)
    words = ["train", CONFIG, "--data.dataset=cityscapes", f"--data.root={root}", f"--work-dir={tmp_path / 'run'}"]
    main("ddp_seg", [*words, *SMALL, *TRAIN, "--train.evaluate-every=0"])
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(line["loss"] is not None for line in log if line["mode"] == "train")


def test_a_used_work_dir_is_not_overwritten(run, toy):
    before = sorted(p.name for p in run.rglob("*"))
    line = refused("ddp_seg", "train", CONFIG, f"--data.root={toy}", f"--work-dir={run}", *SMALL, *TRAIN)
    assert "--resume" in line
    assert sorted(p.name for p in run.rglob("*")) == before


class Executes:
    """Unpickling this without restrictions creates a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_wrong_and_damaged_checkpoints(run, toy, tmp_path):
    def test(checkpoint):
        return refused("ddp_seg", "test", CONFIG, checkpoint, f"--data.root={toy}", CPU)

    torch.save({"state_dict": {"something.else": torch.zeros(1)}}, tmp_path / "other.pth")
    assert "other.pth" in test(tmp_path / "other.pth")
    (tmp_path / "page.pth").write_text("<html>404</html>")
    assert "page.pth" in test(tmp_path / "page.pth")
    with (tmp_path / "evil.pth").open("wb") as file:
        pickle.dump({"state_dict": Executes(tmp_path / "executed")}, file)
    assert "evil.pth" in test(tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()
    damaged = tmp_path / "iter_3"
    shutil.copytree(newest(run), damaged)
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in test(damaged)
    (other := tmp_path / "without_record").mkdir()
    shutil.copy(newest(run) / "model.safetensors", other / "weights.safetensors")
    assert "does not fit" in test(other / "weights.safetensors")


def test_official_weights_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("SEGCORE_WEIGHTS", str(tmp_path))
    name = "ddp_convnext_t_4x4_512x1024_160k_cityscapes"
    line = refused("ddp_seg", "predict", name, "official", __file__, tmp_path / "out", "--offline", "--device=cpu")
    assert str(tmp_path / f"{name}.pth") in line
    assert f"https://huggingface.co/yfji/DDP-Weight/resolve/main/{name}.pth" in line
    line = refused(
        "ddp_seg", "predict", "ddp_swin_s_4x4_512x1024_160k_cityscapes", "official", __file__, tmp_path, "--offline"
    )
    assert "offer no" in line


def test_unknown_device(run, toy):
    assert "--device nonsense" in refused("ddp_seg", "test", run, f"--data.root={toy}", "--device=nonsense")


@pytest.mark.parametrize(("channels", "depth", "suffix"), [(1, 16, ".png"), (5, 8, ".npy")])
def test_custom_image_formats(tmp_path, channels, depth, suffix):
    """Gray 16-bit and five-band images in a user's own folders: trained, tested and predicted."""
    rng = np.random.RandomState(0)
    for split in ("train", "val"):
        (tmp_path / "images" / split).mkdir(parents=True)
        (tmp_path / "masks" / split).mkdir(parents=True)
        for i in range(2):
            image = rng.randint(0, 2**depth, (64, 128, channels)).astype(f"uint{depth}")
            path = tmp_path / "images" / split / f"{i}{suffix}"
            np.save(path, image) if suffix == ".npy" else cv2.imwrite(str(path), image)
            Image.fromarray(rng.randint(0, 3, (64, 128)).astype(np.uint8)).save(tmp_path / "masks" / split / f"{i}.png")
    kind = [
        "--data.dataset=folder", f"--data.root={tmp_path}", "--data.classes", "a", "b", "c", "--model.num-classes=3",
        f"--data.channels={channels}", f"--model.in-channels={channels}", f"--data.bit-depth={depth}",
        "--data.photometric=False", "--data.mean", *["100"] * channels, "--data.std", *["100"] * channels,
    ]  # fmt: skip
    main("ddp_seg", ["train", CONFIG, f"--work-dir={tmp_path / 'run'}", *SMALL, *TRAIN, *kind])
    source = str(tmp_path / "images" / "val")
    main("ddp_seg", ["predict", str(tmp_path / "run"), source, str(tmp_path / "out"), CPU])
    assert {"0.png", "0_overlay.png", "1.png", "1_overlay.png"} < {p.name for p in (tmp_path / "out").iterdir()}


def test_a_bad_validation_image_does_not_lose_the_training(toy, tmp_path):
    root, run = tmp_path / "toy", tmp_path / "run"
    shutil.copytree(toy, root)
    bad = first(root, "leftImg8bit/val/*/*.png")
    bad.write_bytes(bad.read_bytes()[:-40])  # its header is intact, so the check before training passes
    words = ["train", CONFIG, "--data.dataset=cityscapes", f"--data.root={root}", f"--work-dir={run}", *SMALL]
    line = refused("ddp_seg", *words, "--schedule.iterations=4", "--train.evaluate-every=3", "--train.save-every=100")
    assert bad.name in line
    assert newest(run).name == "iter_3"


def test_predict_ignores_the_steps_that_test_reports(run, toy, tmp_path):
    image = str(first(toy, "leftImg8bit/val/*/*.png"))
    answers = []
    for i, options in enumerate(
        (["--evaluate.steps", "1"], ["--evaluate.steps", "10"], ["--model.num-inference-steps=1"])
    ):
        main("ddp_seg", ["predict", str(run), image, str(tmp_path / f"{i}.png"), CPU, *options])
        answers.append(np.array(Image.open(tmp_path / f"{i}.png")))
    assert np.array_equal(answers[0], answers[1])
    assert not np.array_equal(answers[0], answers[2])
