"""`convert`: what can be read becomes safetensors or .pth, under the names it has or under the published ones."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import segcore
from segcore.checkpoints import run_checkpoint
from segcore.cli.main import main
from segcore.config.registry import experiments

TOY = [name for name in experiments() if name.endswith("_toy")]


def convert(*words):
    main(None, ["convert", *map(str, words)])


def refused(capsys, *words):
    with pytest.raises(SystemExit) as end:
        convert(*words)
    assert end.value.code
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_names_and_numbers_stay(tmp_path, capsys):
    shared = torch.arange(6.0).reshape(2, 3)
    state = {"a.weight": shared, "b.weight": shared.T, "c.bias": shared[0].half(), "n": torch.tensor(3)}
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "in.pth")
    convert(tmp_path / "in.pth", tmp_path / "new/out.safetensors")
    assert "out.safetensors: 4 tensors" in capsys.readouterr().out
    found = load_file(tmp_path / "new/out.safetensors")
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    with safe_open(tmp_path / "new/out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}, "HuggingFace's loaders require it"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.safetensors"]
    assert (tmp_path / "new/out.safetensors").stat().st_mode == (tmp_path / "in.pth").stat().st_mode, "not private"


@pytest.mark.parametrize("name", TOY)
def test_published_names_are_those_that_the_originals_load(tmp_path, capsys, name):
    """From a checkpoint of ours, and once more from what was written."""
    torch.manual_seed(0)
    config = segcore.load_experiment(name).model
    state = config.build().state_dict()
    run_checkpoint.save(tmp_path / "iter_1", state, {}, {})
    other = config.build()
    for source, target in (("iter_1", "first.safetensors"), ("first.safetensors", "second.safetensors")):
        convert(tmp_path / source, tmp_path / target, "--published-names", name)
        published = load_file(tmp_path / target)
        assert set(published) == set(other.key_map().values())
        other.load_official(published)
        assert all(torch.equal(tensor, state[key]) for key, tensor in other.state_dict().items())


def test_a_pth_is_as_mmsegmentation_reads_it(tmp_path, capsys):
    model = segcore.load_experiment(TOY[0]).model.build()
    run_checkpoint.save(tmp_path / "iter_1", model.state_dict(), {}, {})
    convert(tmp_path / "iter_1", tmp_path / "out.pth", "--published-names", TOY[0])
    assert f"out.pth: {len(model.key_map())} tensors" in capsys.readouterr().out
    (name, found), *more = torch.load(tmp_path / "out.pth", weights_only=True).items()
    assert (name, more) == ("state_dict", [])
    assert found.keys() == set(model.key_map().values())
    assert all(torch.equal(tensor, found[name]) for name, tensor in model.official_state().items())


@pytest.mark.parametrize("name", ["out.safetensors", "out.pth"])
def test_a_disk_that_is_full_leaves_nothing(tmp_path, capsys, name):
    run_checkpoint.save(tmp_path / "iter_1", {"a": torch.ones(2)}, {}, {})
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))
    try:
        assert f"{name}: cannot be written" in refused(capsys, tmp_path / "iter_1", tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["iter_1"]


def test_what_is_refused(tmp_path, capsys):
    folder = tmp_path / "iter_1"
    run_checkpoint.save(folder, {"a": torch.ones(2)}, {}, {})
    before = {path: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "link.safetensors").symlink_to(folder / "model.safetensors")
    assert "INPUT OUTPUT first" in refused(capsys, folder)
    assert "written as .safetensors" in refused(capsys, folder, tmp_path / "out.pt")
    for target in (folder / "new.safetensors", tmp_path / "link.safetensors"):
        assert "would overwrite the weights" in refused(capsys, folder, target)
    link = tmp_path / "link.safetensors"
    assert "would overwrite the weights" in refused(capsys, link, folder / "model.safetensors")
    assert "does not fit" in refused(capsys, folder, tmp_path / "out.safetensors", "--published-names", TOY[0])
    (tmp_path / "file").touch()
    for name in ("out.safetensors", "out.pth"):
        assert "cannot be written" in refused(capsys, folder, tmp_path / "file" / name)
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    assert not (tmp_path / "out.safetensors").exists()
