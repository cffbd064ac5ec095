"""Checks of start weights that are those of other classes, or of other channels, for every method."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from pathlib import Path

import torch

from segcore.checkpoints.load import find_weights, load_init, load_weights
from segcore.checkpoints.run_checkpoint import folder_of, save
from segcore.config.record import describe
from segcore.config.schema import DataConfig, Experiment, ModelConfig
from segcore.testing.contract import images, refusal


def check_other_classes(config: ModelConfig, folder: Path) -> None:
    """Start weights of five classes, in a file or a run, start a model of three; those with the same name are kept."""
    before, after = ("a", "b", "c", "d", "e"), ("D", "new", "b")
    source = dataclasses.replace(config, num_classes=5).build()
    data = DataConfig(dataset="folder", classes=after)
    exp = Experiment("mine", dataclasses.replace(config, num_classes=3), data)
    record = describe(dataclasses.replace(exp, data=dataclasses.replace(data, classes=before)))
    checkpoint = folder_of(folder, 1)
    save(checkpoint, source.state_dict(), {}, record)
    file = folder / "weights.pth"
    torch.save({source.key_map()[name]: tensor for name, tensor in source.state_dict().items()}, file)
    for init, rows in ((folder, (3, None, 1)), (file, (None, None, None))):
        model = exp.model.build()
        fresh, given = (copy.deepcopy(net.state_dict()) for net in (model, source))
        report = load_init(model, str(init), exp=exp, classes=after)
        kept = sum(row is not None for row in rows)
        assert f"classifier: {'D, b' if kept else 'none'} kept, {3 - kept} of 3 classes new" in report
        assert "shapes differ" in refusal(partial(load_weights, model, find_weights(str(init), "")))
        different, buffers = 0, dict(model.named_buffers())
        for name, tensor in model.state_dict().items():
            if tensor.shape == given[name].shape:
                computed = name in buffers and not torch.equal(fresh[name], given[name])  # from the number of classes
                assert torch.equal(tensor, (fresh if computed else given)[name]), name
                continue
            different += 1
            for i, row in enumerate(rows):
                assert torch.equal(tensor[i], fresh[name][i] if row is None else given[name][row]), name
            assert torch.equal(tensor[3:], given[name][5:]), f"{name}: rows that are no class"
        assert different, "no tensor depends on the classes"


def check_other_channels(config: ModelConfig, folder: Path) -> None:
    """Start weights of a model of RGB images start one of other channels; gray images give the same in both."""
    source = dataclasses.replace(config, in_channels=3).build().eval()
    file = folder / "weights.pth"
    torch.save({source.key_map()[name]: tensor for name, tensor in source.state_dict().items()}, file)
    gray = images(1, channels=1)
    for channels in (6, 1):
        data = DataConfig("folder", channels=channels, mean=(0.0,) * channels, std=(1.0,) * channels)
        exp = Experiment("mine", dataclasses.replace(config, in_channels=channels), data)
        model = exp.model.build().eval()
        assert load_init(model, str(file), exp=exp).endswith(f"; filters of RGB adapted to {channels} channels")
        found, expected = (net(gray.repeat(1, count, 1, 1)) for net, count in ((model, channels), (source, 3)))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
