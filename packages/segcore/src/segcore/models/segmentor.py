"""The contract between a method and the rest of segcore: training, evaluation, prediction and export see only this.

`segcore.models.stepwise` extends it for methods that denoise in steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segcore.config.schema import LossConfig
from segcore.data.labels import ignored_label
from segcore.errors import UserError
from segcore.models.layers import residual_blocks
from segcore.models.layers import resize as resize_bilinear


@dataclass(frozen=True)
class LoadReport:
    """How the tensors of a checkpoint were used. Names are the checkpoint's own."""

    loaded: int
    """Tensors that set a parameter or buffer of the model."""
    dropped: tuple[str, ...] = ()
    """Tensors of a part that this model omits on purpose, such as an auxiliary head for training."""
    ignored: tuple[str, ...] = ()
    """Buffers that the model computes itself."""
    mapped: int = 0
    """Loaded tensors that have a different name in this model."""
    source: str = ""
    """The naming scheme of the checkpoint, if a method knows several."""

    def __str__(self) -> str:
        source = f"{self.source} weights: " if self.source else ""
        text = f"{source}loaded {self.loaded} tensors ({self.mapped} under other names)"
        if self.dropped:
            text += f", dropped {len(self.dropped)} of {', '.join(sorted({n.split('.')[0] for n in self.dropped}))}"
        return text + (f", ignored {len(self.ignored)} recomputable buffers" if self.ignored else "")


class Segmentor(nn.Module, ABC):
    """A segmentation model; one that denoises in steps is a `StepwiseSegmentor`.

    A method writes `logits`, `losses` and, if it has published weights, `key_map`.

    Attributes:
        num_classes: number of classes K.
        ignore_index: label value excluded from loss and metrics: 255, or 65535 above 255 classes.
        align_corners: convention for resizing from the network's resolution to the input's and the image's.
        min_size: shortest image side in pixels; smaller images raise ValueError.
        pad_to: images are padded at the right and bottom with zeros (the mean color) to multiples of it.
        size_divisor: a dynamic export accepts images whose sides are multiples of it.
        auxiliary_names: prefixes of an auxiliary head's names, here and in published checkpoints.

    Randomness: `seeds` holds one integer per image, and all noise of an image is drawn from its own seed, so an image's
    prediction does not depend on its batch or the process. None means seed 0 for every image.
    """

    num_classes: int
    _ignore_index: int | None = None
    align_corners: bool = False
    min_size: int = 1
    pad_to: int = 1
    size_divisor: int = 32
    auxiliary_names: tuple[str, ...] = ("auxiliary_head.",)

    @property
    def ignore_index(self) -> int:
        return self._ignore_index if self._ignore_index is not None else ignored_label(self.num_classes)

    @ignore_index.setter
    def ignore_index(self, label: int) -> None:
        self._ignore_index = label

    @abstractmethod
    def logits(self, images: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """Return logits (N, K, h, w) at the network's own resolution, for padded images (N, C, H, W)."""

    @abstractmethod
    def losses(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        seeds: Sequence[int] | None = None,
        draws: Mapping[str, Tensor] | None = None,
        loss: LossConfig = LossConfig(),  # noqa: B008  (frozen)
    ) -> dict[str, Tensor]:
        """Return scalars by name for images (N, C, H, W) and labels (N, H, W) int64; "loss" is the one to minimize.

        `draws` holds every random tensor of the step under the method's names and replaces drawing from `seeds`. `loss`
        selects the loss; its class weights are numbers. Raises UserError for a loss that the method does not support.
        """

    def forward(self, images: Tensor, seeds: Sequence[int] | None = None, *, resize: bool = True) -> Tensor:
        """Return logits (N, K, H, W) for normalized images (N, C, H, W), at the images' size.

        With `resize` False they are (N, K, h, w) at the network's own resolution, of the padded images.
        """
        self.check_size(images)
        logits = self.logits(self.pad(images), seeds)
        return self.resize_to_input(logits, images.shape[-2:]) if resize else logits

    def pad(self, images: Tensor) -> Tensor:
        """Return images (N, C, H, W) padded to multiples of `pad_to`."""
        below, right = (-side % self.pad_to for side in images.shape[-2:])
        return F.pad(images, (0, right, 0, below)) if below or right else images

    def resize_to_input(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        """Return logits (N, K, H, W) at the input's size (height, width), given logits at the network's resolution.

        All outputs at the input's size, including those of `forward`, go through here.
        """
        full = resize_bilinear(self.shown(logits), self.padded_size(size), align_corners=self.align_corners)
        return full[..., : size[0], : size[1]] if self.pad_to > 1 else full

    def padded_size(self, size: Sequence[int]) -> list[int]:
        """Return the size (height, width) of images of this size after `pad`."""
        return [side + -side % self.pad_to for side in size]

    def shown(self, logits: Tensor) -> Tensor:
        """Return the logits at the network's resolution that are resized to the image: by default as they are."""
        return logits

    def fuse(self) -> Segmentor:
        """Return a faster, equivalent copy for inference; a model without such a form returns itself."""
        return self

    def exportable(self, images: Tensor, *, dynamic: bool) -> nn.Module:
        """Return the module to export: it maps images of this shape, or with `dynamic` of any shape, to logits."""
        return self

    def recomputed_blocks(self) -> list[nn.Module]:
        """Return the modules that `train.checkpoint_activations` runs again in the backward pass.

        They are called as modules and do not change their inputs. By default the residual blocks of backbones.
        """
        return residual_blocks(self)

    def key_map(self) -> dict[str, str]:
        """Return the published name of every entry of `state_dict()`. Optimizer rules are matched against these."""
        return {name: name for name in self.state_dict()}

    def convert(self, name: str, tensor: Tensor) -> Tensor:
        """Return a published tensor in this model's layout, of the same shape; `name` is the published name."""
        return tensor

    def publish(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor of this model in the published layout, the inverse of `convert`; itself if they are equal."""
        probe = torch.empty(tensor.shape, device="meta")
        if self.convert(name, probe) is probe:
            return tensor
        order = self.convert(name, torch.arange(tensor.numel()).reshape(tensor.shape)).to(tensor.device)
        return torch.empty_like(tensor).flatten().scatter_(0, order.flatten(), tensor.flatten()).reshape(tensor.shape)

    def official_state(self) -> dict[str, Tensor]:
        """Return the tensors under their published names and in the published layout; `load_official` takes them."""
        names = self.key_map()
        return {names[name]: self.publish(names[name], tensor) for name, tensor in self.state_dict().items()}

    def load_official(self, state: Mapping[str, Tensor]) -> LoadReport:
        """Load a published checkpoint's tensors, given under their published names, and report which were used.

        Strict: raises ValueError and changes nothing if tensors are missing, unknown or of another shape; the error
        names them. Only buffers that the model computes itself may be absent or are ignored, and the published
        auxiliary head is dropped when this model has none.
        """
        return self._load(state, self.key_map(), self.convert)

    def load_checkpoint(self, state: Mapping[str, Tensor]) -> LoadReport:
        """Load tensors under the names of this model's own `state_dict()`, as strictly as `load_official`."""
        return self._load(state, {name: name for name in self.state_dict()}, lambda _, tensor: tensor)

    def load_backbone(self, state: Mapping[str, Tensor]) -> LoadReport:
        """Load the backbone alone, from a timm state dict or from official names `backbone.*`.

        Optional: the default raises ValueError.
        """
        raise UserError(f"{type(self).__name__} has no backbone loader; give a checkpoint of the whole model instead")

    def load_pretrained(self, state: Mapping[str, Tensor]) -> tuple[str, LoadReport]:
        """Load initial weights that cover a part of the model; return the name of that part and the report.

        By default the part is the backbone; tensors outside `backbone.*`, an ImageNet classifier, are dropped.
        """
        backbone = {name: tensor for name, tensor in state.items() if name.startswith("backbone.")} or state
        report = self.load_backbone(backbone)
        rest = tuple(name for name in state if name not in backbone)
        return "backbone only", replace(report, dropped=report.dropped + rest)

    def is_full_checkpoint(self, state: Mapping[str, Tensor]) -> bool:
        """Return whether the initial weights `state` cover a whole model, not only a backbone.

        A classifier in a backbone's file may have the name of one of ours, so the backbone's names must be there, too.
        """

        def parts(names: Iterable[str]) -> set[bool]:
            return {name.startswith("backbone.") for name in names}

        known = self.state_dict().keys(), self.key_map().values()
        return any(parts(name for name in names if name in state) == parts(names) for names in known)

    def _load(
        self, state: Mapping[str, Tensor], names: Mapping[str, str], convert: Callable[[str, Tensor], Tensor]
    ) -> LoadReport:
        """Load `state`; `names` gives its name for every entry of `state_dict()`. Strict."""
        own = self.state_dict()
        ours = {official: name for name, official in names.items()}
        has_auxiliary = any(name.startswith(self.auxiliary_names) for name in ours)
        dropped = tuple(n for n in state if n.startswith(self.auxiliary_names) and n not in ours and not has_auxiliary)
        ignored = tuple(n for n in state if n.endswith(RECOMPUTABLE) and n not in ours)
        unknown = [n for n in state if n not in ours and n not in dropped and n not in ignored]
        missing = [n for n in ours if n not in state and not n.endswith(RECOMPUTABLE)]
        if unknown or missing:
            raise UserError(
                f"the checkpoint does not fit {type(self).__name__}: {len(missing)} tensors missing{_some(missing)}, "
                f"{len(unknown)} unknown{_some(unknown)}; name the configuration that it was trained with"
            )
        new = {ours[n]: convert(n, tensor) for n, tensor in state.items() if n in ours}
        wrong = [
            f"{names[n]} is {tuple(t.shape)}, not {tuple(own[n].shape)}"
            for n, t in new.items()
            if t.shape != own[n].shape
        ]
        if wrong:
            raise UserError(
                f"the checkpoint does not fit {type(self).__name__}: {len(wrong)} shapes differ{_some(wrong)}; "
                "name the configuration that it was trained with"
            )
        self.load_state_dict(new, strict=False)
        return LoadReport(len(new), dropped, ignored, sum(names[n] != n for n in new))

    def check_size(self, images: Any) -> None:
        """Raise ValueError when images (N, C, H, W) are smaller than `min_size`."""
        if min(images.shape[-2:]) < self.min_size:
            raise UserError(
                f"an image of {images.shape[-2]}x{images.shape[-1]} pixels is too small: "
                f"{type(self).__name__} needs at least {self.min_size} on each side"
            )


RECOMPUTABLE = ("num_batches_tracked", "relative_position_index")


def _some(names: Sequence[str]) -> str:
    """Return the first few of `names` in brackets; empty if there are none."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f" ({', '.join(names[:3])}{more})" if names else ""
