"""The contract between a method and everything else: training, evaluation, prediction and export see only this."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from segcore.errors import UserError


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors of a checkpoint. Names are the checkpoint's own."""

    loaded: int
    """Tensors that set a parameter or buffer of the model."""
    dropped: tuple[str, ...] = ()
    """Tensors of a part that this model does not have on purpose, such as an auxiliary head for training."""
    ignored: tuple[str, ...] = ()
    """Buffers that the model computes itself."""
    mapped: int = 0
    """Loaded tensors whose name differs here."""
    source: str = ""
    """Whose names the checkpoint has, where a method knows several."""

    def __str__(self) -> str:
        source = f"{self.source} weights: " if self.source else ""
        text = f"{source}loaded {self.loaded} tensors ({self.mapped} under other names)"
        if self.dropped:
            text += f", dropped {len(self.dropped)} of {', '.join(sorted({n.split('.')[0] for n in self.dropped}))}"
        return text + (f", ignored {len(self.ignored)} recomputable buffers" if self.ignored else "")


class Segmentor(nn.Module, ABC):
    """A segmentation model.

    Attributes:
        num_classes: number of classes K.
        ignore_index: label value that takes no part in loss and metric.
        align_corners: convention of the second resize, from the network's input size to the original image's.
        min_size: shortest image side in pixels; smaller images raise ValueError.
        size_divisor: an export for any size takes images whose sides are multiples of it.
        auxiliary_names: how the names of an auxiliary head begin, here and in published checkpoints.
        step_unit: what the numbers are that entries of `predict_steps` are named by: the "steps" taken, or the
            "timestep" that was reached; "" without such entries.
        diffusion: whether inference denoises from random noise; if not, `denoising_trajectory` is empty and
            `log_mean_probs` and `early_exit` raise UserError.
        class_weight: (K,) float32, what `losses` weighs the cross entropy of each class with; None: all alike. The
            training loop sets it from `loss.class_weight`; it is no part of the state dict.

    Randomness: `seeds` holds one integer per image, and all noise of an image is drawn from its own seed on the CPU. An
    image's answer therefore does not depend on its batch, the device or the process. None means seed 0 for every image.
    """

    num_classes: int
    ignore_index: int = 255
    align_corners: bool = False
    min_size: int = 1
    size_divisor: int = 32
    auxiliary_names: tuple[str, ...] = ("auxiliary_head.",)
    step_unit: str = ""
    diffusion: bool = False
    class_weight: Tensor | None = None

    @abstractmethod
    def predict_steps(
        self, images: Tensor, steps: Sequence[int] | None = None, seeds: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Return logits (N, K, H, W) per step entry for normalized images (N, C, H, W), at the images' size.

        With `steps` None the last entry is the configured answer. Methods without sampling steps have one entry,
        "final".
        """

    @property
    def default_step(self) -> str:
        """The entry of `predict_steps` that is the configured answer."""
        return "final"

    def check_steps(self, steps: Sequence[int]) -> None:
        """Raise UserError unless the model can answer the steps of `evaluate.steps`; empty means as configured."""

    def denoising_trajectory(self, images: Tensor, seeds: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Return logits (N, K, H, W) after every denoising step of the configured run; none without such steps."""
        return {}

    def log_mean_probs(self, images: Tensor, seeds: Sequence[int] | None = None, starts: int = 4) -> Tensor:
        """Return log class probabilities (N, K, H, W): of the mean over `starts` draws of the noise and the steps."""
        raise self.no_diffusion()

    def early_exit(
        self, images: Tensor, percent: float, seeds: Sequence[int] | None = None
    ) -> tuple[Tensor, list[int]]:
        """Return logits (N, K, H, W) and, per image, how many denoising steps were taken for them.

        The configured run, but an image is done after the step that changes fewer than `percent` % of its pixels.
        """
        raise self.no_diffusion()

    def refine_mask(self, images: Tensor, masks: Tensor, seeds: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Return the logits (N, K, H, W) after every step of a run that starts from label maps (N, H', W') int64."""
        raise UserError(f"{type(self).__name__} does not denoise label maps; leave out --start-mask")

    def no_diffusion(self) -> UserError:
        """Return the error for what only a diffusion model can do."""
        name = type(self).__name__
        return UserError(f"{name} is no diffusion model; leave out --uncertainty, --steps and early_exit_threshold")

    def exportable(self, images: Tensor, *, dynamic: bool) -> nn.Module:
        """Return what `export` writes: a module that maps images of this shape, or with `dynamic` of any, to logits.

        A method that draws noise fixes it as for seed 0 and raises UserError where that needs a fixed shape.
        """
        return self

    @abstractmethod
    def losses(
        self,
        images: Tensor,
        labels: Tensor,
        seeds: Sequence[int] | None = None,
        draws: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return scalars by name for images (N, C, H, W) and labels (N, H, W) int64; "loss" is the one to step on.

        `draws` hands in every random tensor of the step under the method's names, instead of drawing from `seeds`.
        """

    @abstractmethod
    def key_map(self) -> dict[str, str]:
        """Return the published name of every entry of `state_dict()`. Optimizer rules are matched against these."""

    def forward(self, images: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """Return logits (N, K, H, W) for normalized images (N, C, H, W), at the images' size."""
        return list(self.predict_steps(images, seeds=seeds).values())[-1]

    def convert(self, name: str, tensor: Tensor) -> Tensor:
        """Return a published tensor in this model's layout; `name` is the published name."""
        return tensor

    def load_official(self, state: Mapping[str, Tensor]) -> LoadReport:
        """Load a published checkpoint's tensors, given under their published names, and report what was used.

        Strict: raises ValueError naming tensors that are missing, unknown or of another shape, and changes nothing
        then. Only buffers that the model computes itself may be absent or are ignored, and the published auxiliary head
        is dropped when this model has none.
        """
        return self._load(state, self.key_map(), self.convert)

    def load_checkpoint(self, state: Mapping[str, Tensor]) -> LoadReport:
        """Load tensors under the names of this model's own `state_dict()`, as strictly as `load_official`."""
        return self._load(state, {name: name for name in self.state_dict()}, lambda _, tensor: tensor)

    def load_backbone(self, state: Mapping[str, Tensor]) -> LoadReport:
        """Load the backbone alone, from a timm state dict or from official names `backbone.*`.

        A method that starts from ImageNet weights overrides this; the default raises ValueError.
        """
        raise UserError(f"{type(self).__name__} has no backbone loader; give a checkpoint of the whole model instead")

    def load_pretrained(self, state: Mapping[str, Tensor]) -> tuple[str, LoadReport]:
        """Load start weights that are not those of a whole model; return which part they are of, and the report.

        Here that is the backbone; what is beside `backbone.*`, an ImageNet classifier, is dropped.
        """
        backbone = {name: tensor for name, tensor in state.items() if name.startswith("backbone.")} or state
        report = self.load_backbone(backbone)
        rest = tuple(name for name in state if name not in backbone)
        return "backbone only", replace(report, dropped=report.dropped + rest)

    def is_full_checkpoint(self, state: Mapping[str, Tensor]) -> bool:
        """Return whether start weights `state` are those of a whole model, not of a backbone alone."""
        known = {*self.state_dict(), *self.key_map().values()}
        return any(name in known and not name.startswith("backbone.") for name in state)

    def _load(
        self, state: Mapping[str, Tensor], names: Mapping[str, str], convert: Callable[[str, Tensor], Tensor]
    ) -> LoadReport:
        """Load `state`, whose names `names` gives for every entry of `state_dict()`; strict."""
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
    """Return the first few of `names` in brackets, nothing for none."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f" ({', '.join(names[:3])}{more})" if names else ""
