"""The command `configs`: the list with figures and sizes, a configuration in full; and the page of all of them."""

import json
import re
from pathlib import Path

import pytest
import torch

from segcore.cli.main import main
from segcore.config import model_zoo
from segcore.config.registry import experiments, load_experiment
from segcore.config.source import source

ROWS = {row.name: row for row in model_zoo.rows()}
PUBLISHED = [name for name, row in ROWS.items() if row.published]
DDP = "ddp_convnext_t_4x4_512x1024_160k_cityscapes"


def printed(capsys, *words):
    """Return what `configs` prints."""
    main(None, ["configs", *words])
    return capsys.readouterr().out


def refused(capsys, *words):
    with pytest.raises(SystemExit) as caught:
        main(None, ["configs", *words])
    assert caught.value.code
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


def test_page_is_current():
    page = (Path(__file__).parents[3] / "docs" / "model_zoo.md").read_text(encoding="utf-8")
    assert page == model_zoo.as_markdown(list(ROWS.values())), "python -m segcore.config.model_zoo > docs/model_zoo.md"
    assert page.count("\n| `") == len(PUBLISHED) + 6 + 3 + 4, "and the start weights"
    assert len(PUBLISHED) == 14 + 12 + 1 + 19 + 6 + 16


@pytest.mark.parametrize("method", sorted({row.method for row in ROWS.values()}))
def test_stored_parameters_are_those_of_the_models(method):
    counts = {}
    for row in ROWS.values():
        if row.method == method:
            with torch.device("meta"):
                counts[row.name] = sum(p.numel() for p in load_experiment(row.name).model.build().parameters())
    assert counts == {row.name: row.parameters for row in ROWS.values() if row.method == method}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_row_says_what_matters(name):
    exp = load_experiment(name)
    text = re.sub(r",?\s*\)", ")", re.sub(r"\s+", " ", source(exp)).replace("( ", "("))
    text = re.sub(r"(?<==)[\d_]+", lambda digits: digits[0].replace("_", ""), text)
    sections = {
        word: text[text.index(f"{word}Config(") :]
        for word in ("Data", "Optimizer", "Schedule", "Loss", "Train", "Eval")
    }
    for section, wanted in {
        "Data": ("img_scale", "ratio_range", "crop", "flip"),
        "Optimizer": ("kind", "lr", "weight_decay"),
        "Schedule": ("iterations", "kind", "warmup_iterations"),
        "Loss": ("kind",),
        "Train": ("batch_size", "device_batch_size", "init_from", "evaluate_every"),
        "Eval": ("mode",),
    }.items():
        part = getattr(exp, {"Eval": "evaluate"}.get(section, section.lower()))
        for field in wanted:
            value = (
                str(getattr(part, field)) if not isinstance(getattr(part, field), str) else f'"{getattr(part, field)}"'
            )
            assert re.search(rf"\b{field}={re.escape(value)}[,)]", sections[section]), (section, field)
    assert re.search(rf"num_classes={exp.model.num_classes}[,)]", text)


def test_list_shows_sizes_figures_and_weights(capsys):
    lines = printed(capsys).splitlines()
    assert len(lines) == 1 + len(experiments())
    [line] = [line for line in lines if line.startswith(f"{DDP} ")]
    for part in ("39.9 M", "512x1024", "160000", "82.60 single scale", "83.15 multi scale", "official"):
        assert part in line
    found = {row["name"]: row for row in json.loads(printed(capsys, "--json"))}
    assert set(found) == {row.name for row in ROWS.values()}
    assert found[DDP]["published"]["miou"] == {"single scale": 82.6, "multi scale": 83.15}
    assert (found[DDP]["parameters"], found[DDP]["crop"], found[DDP]["iterations"]) == (
        39_866_638,
        [512, 1024],
        160_000,
    )


def test_a_word_filters_the_list(capsys):
    names = [line.split()[0] for line in printed(capsys, "Swin-T").splitlines()[1:]]
    assert names == ["ddp_swin_t_4x4_512x1024_160k_cityscapes", "ddp_swin_t_2x8_512x512_160k_ade20k"]
    assert "no configuration has 'ddp_resnt18_toy' in its name (did you mean ddp_resnet18_toy?)" in refused(
        capsys, "ddp_resnt18_toy"
    )


def test_a_configuration_is_shown_as_resolved(capsys):
    text = printed(capsys, DDP, "--model.num-inference-steps", "10", "--optimizer.lr=0.001")
    assert "num_inference_steps=10" in text
    assert "lr=0.001" in text
    stored = json.loads(printed(capsys, DDP.replace("_", "-"), "--seed", "7", "--json"))
    assert (stored["seed"], stored["schedule"]["iterations"]) == (7, 160_000)
    assert "--optimizer.kind adam" in refused(capsys, DDP, "--optimizer.kind", "adam")


@pytest.mark.parametrize("name", ["ddrnet_23_slim_cityscapes_pyradd", "ddps_segformer_b0_toy", DDP])
def test_a_written_file_builds_the_same_and_explains_itself(tmp_path, capsys, name):
    path = tmp_path / "my.py"
    printed(capsys, name, "--seed", "3", "--write", str(path))
    exp = load_experiment(str(path))
    assert exp == load_experiment(name).with_overrides(["seed=3"])
    text = path.read_text()
    assert "# Base learning rate at the stated global batch\n" in text
    assert max(map(len, text.splitlines())) <= 120
    assert printed(capsys, str(path)) == source(exp)
    assert "exists already" in refused(capsys, name, "--write", str(path))
    assert "which configuration?" in refused(capsys, "--write", str(tmp_path / "other.py"))
