"""`convert`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from segcore.config.options import Flag
from segcore.errors import UserError
from segcore.files import replacing, umask_permissions

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Convert:
    """Write the weights of a file as safetensors, or as .pth for MMSegmentation; nothing in it is executed."""

    input: str = field(kw_only=True)
    """A weights file, a run folder (its best checkpoint), a checkpoint folder, official:CONFIG or hub:USER/REPO."""
    output: Path = field(kw_only=True)
    """The file to write: .safetensors, or .pth with the tensors as `state_dict`, as MMSegmentation reads it."""
    published_names: str | None = None
    """CONFIG of the weights (of a run, its folder): write them under the names that the original programs load.
    Otherwise tensors keep the names that they have."""
    offline: Flag = False
    """Never use the network; an error says which file belongs where."""

    def run(self, package: str | None) -> None:
        from segcore.checkpoints.foreign import read_state
        from segcore.checkpoints.load import find_weights, load_weights
        from segcore.config.registry import find_experiment

        if self.output.suffix not in (".safetensors", ".pth"):
            raise UserError(f"{self.output}: weights are written as .safetensors or .pth; choose such a name")
        exp = find_experiment(self.published_names, package)[0] if self.published_names else None
        path = find_weights(self.input, exp.name if exp else "", offline=self.offline)
        target = Path(os.path.realpath(self.output))
        if Path(os.path.realpath(path)) in (target, target.parent):  # a file, or the folder of a checkpoint
            raise UserError(f"{self.output}: would overwrite the weights that are read; choose another name")
        if exp is None:
            state = read_state(path)
        else:
            model = exp.model.build()
            print(f"{path}: {load_weights(model, path)}")
            state = model.official_state()
        write(self.output, state)
        print(f"{self.output}: {len(state)} tensors, {self.output.stat().st_size / 2**20:.1f} MiB")


def write(path: Path, state: dict[str, Tensor]) -> None:
    """Write tensors in the format that the name of the file says, whole or not at all; they may share memory."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    with replacing(path) as temporary:
        try:
            if path.suffix == ".pth":
                torch.save({"state_dict": tensors}, temporary)
            else:
                save_file(tensors, temporary, {"format": "pt"})
        except (SafetensorError, RuntimeError) as error:  # torch's, which a full disk raises
            raise OSError(error) from None
        umask_permissions(temporary)
