"""What test_docs.py puts in the place of our programs: they take little time, and published weights are random ones.

`python docs_program.py ddp-seg WORDS` runs a command, `python docs_program.py -c CODE` Python.
"""

import sys
from pathlib import Path

import torch

from segcore.checkpoints import hub
from segcore.cli.main import main
from segcore.config.registry import experiments, load_experiment, published
from segcore.demo import run as demo
from segcore.demo import toy

BRIEF = (
    *("data.img_scale=128 64", "data.crop=64 64", "evaluate.img_scale=128 64", "data.workers=0"),
    *("schedule.epochs=None", "schedule.iterations=2", "schedule.warmup_iterations=1"),
    *("train.batch_size=2", "train.device_batch_size=2", "train.evaluate_every=2", "train.log_every=1"),
)
"""Overrides with which a training takes seconds."""
OPTIONS = [word for name, value in (each.split("=") for each in BRIEF) for word in (f"--{name}", *value.split())]
SMALL = {"train": OPTIONS, "demo": OPTIONS, "export": ["--max-drop=100"]}
"""What follows the words of a command, by its name."""


def random_file(url: str, *, offline: bool = False, sha256: str | None = None, name: str | None = None) -> Path:
    """Take the place of `hub.fetch`: write random weights of the shapes that the file at an address has."""
    path = hub.weights_dir() / (name or url.rpartition("/")[2])
    if path.exists():
        return path
    path.parent.mkdir(exist_ok=True)
    row = next((row for row in experiments() if (found := published(row)) and found.url == url), None)
    if row:
        model = load_experiment(row).model.build()
        names = model.key_map()
        torch.save({names.get(key, key): tensor for key, tensor in model.state_dict().items()}, path)
    else:  # timm's: hf-hub's address of TAG, and TAG.safetensors
        import timm
        from safetensors.torch import save_file

        save_file(timm.create_model(path.stem).state_dict(), path)
    return path


def run(program: str, words: list[str]) -> None:
    """Run a command, on the CPU with one process unless the words say `--device` themselves."""
    package = None if program == "segcore" else program.replace("-", "_")
    command = words[0]
    more = list(SMALL.get(command, []))
    if command in ("train", "test", "predict", "demo", "bench") and "--device" not in words:
        more += ["--device=cpu"] + ["--gpus=None"] * ("--gpus" in words)
    if command == "train" and "--train.init-from" not in words:
        more += ["--train.init-from=None"]
    if command == "train" and "--gpus" in words:
        more.append("--train.batch-size=4")  # two images for each of two processes: DDRNet's batch norm needs them
    if command in ("test", "predict") and not Path(words[1]).exists():
        more += ["--evaluate.img-scale", "128", "64"] + ["--data.workers=0"] * (command == "test")
    if command == "export" and "--int8" not in words:
        more.remove("--max-drop=100")
    if command == "demo":
        folder = words[words.index("--work-dir") + 1] if "--work-dir" in words else None
        for row in experiments(package):
            exp = load_experiment(row)
            if exp.data.dataset == "toy":
                scenes = Path(folder or f"runs/demo/{exp.name}", "scenes")
                toy.generate(scenes, train=4, val=2, height=64, width=128)
        base_of = demo.base_experiment
        demo.base_experiment = lambda exp: (base := base_of(exp)) and base.with_overrides(BRIEF)
    main(package, [*words, *more])


if __name__ == "__main__":
    hub.fetch = random_file
    if sys.argv[1] == "-c":
        exec(compile(sys.argv[2], "block", "exec"), {"__name__": "block"})
    else:
        run(sys.argv[1], sys.argv[2:])
