"""Load weights into a model, strictly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from segcore.checkpoints.foreign import ACCEPTED, is_shared, read_state
from segcore.checkpoints.hub import official_file, timm_state
from segcore.checkpoints.hugging_face import PREFIX, hub_folder
from segcore.checkpoints.manifest import MANIFEST
from segcore.checkpoints.other_classes import fitting_count, load_other_classes, trained_classes
from segcore.checkpoints.run_checkpoint import best, newest
from segcore.config.schema import Experiment, ModelConfig
from segcore.errors import UserError
from segcore.files import expanded, regular_file
from segcore.models.segmentor import LoadReport, Segmentor

RGB = 3


def load_weights(model: Segmentor, path: Path) -> LoadReport:
    """Load a checkpoint of the whole model and report what was loaded.

    Tensor names distinguish our own checkpoints from published ones. Strict: raises ValueError, and changes
    nothing, unless every tensor is used and every parameter is set (see `Segmentor.load_official`).
    """
    return _load(model, read_state(path, _names(model)), path)


def load_init(
    model: Segmentor,
    init: str,
    *,
    exp: Experiment | None = None,
    classes: Sequence[str] = (),
    offline: bool = False,
) -> str:
    """Load the start weights that `train.init_from` names and return a one-line report.

    `init` is a file, checkpoint folder or work_dir, `official`, `official:CONFIG`, `hub:USER/REPO`, or a timm tag. A
    file with weights of the backbone alone (timm's names, or `backbone.*` as in OpenMMLab's ImageNet files) goes to
    `model.load_pretrained`. With the experiment that `model` was built from and its class names, the weights may be
    those of other classes, see `load_other_classes`, and those of RGB images where `model` takes other channels, see
    `adapt_channels`. Raises ValueError when the weights are not found, cannot be downloaded, or do not fit the model.
    """
    found = find_init(init, exp.name if exp else "", offline=offline)
    with _or_random():
        state = read_state(found, _names(model)) if found else timm_state(init, offline=offline)
    before = trained_classes(init, found or Path(init), exp.name) if exp else None
    fill = partial(_fill, state=state, source=str(found or init), before=before, classes=tuple(classes))
    try:
        return fill(model, exp.model if exp else None)
    except UserError:
        if exp is None or exp.model.in_channels == RGB:
            raise
        config = replace(exp.model, in_channels=RGB)
        of_rgb = config.build()
        with contextlib.suppress(UserError):  # the error that counts is that of the model as it is
            return f"{fill(of_rgb, config)}; {adapt_channels(of_rgb, model)}"
        raise


def _fill(
    model: Segmentor,
    config: ModelConfig | None,
    *,
    state: Mapping[str, Tensor],
    source: str,
    before: tuple[str, ...] | None,
    classes: tuple[str, ...],
) -> str:
    """Load the start weights `state`, of the classes `before`, into the model of `config`; see `load_init`."""
    if not model.is_full_checkpoint(state):
        with _naming(source):
            part, report = model.load_pretrained(state)
        return f"{source}: {part}: {report}"

    def load(target: Segmentor) -> LoadReport:
        return _load(target, state, source)

    try:
        if config is None or before in (None, classes):
            return f"{source}: {load(model)}"
    except UserError:
        count = fitting_count(config, state, load) if config and not before else None
        if count is None:
            raise
        before = ("",) * count
    assert config is not None
    assert before is not None
    return f"{source}: {load_other_classes(model, config, load, before, classes)}"


def adapt_channels(source: Segmentor, model: Segmentor) -> str:
    """Copy the weights of a model of RGB images into the same model of images with other channels; report it.

    The first convolutions repeat the filters of R, G and B, scaled by 3 / channels; for one channel they are added up
    (timm's `adapt_input_conv`). Raises UserError for other inputs, such as those of space-to-depth stems.
    """
    from timm.models import adapt_input_conv

    state, channels = source.state_dict(), 0
    for name, own in model.state_dict().items():
        theirs = state[name]
        if theirs.shape != own.shape:
            if theirs.ndim != 4 or theirs.shape[1] != 3:
                raise UserError(f"{name} takes {theirs.shape[1]} channels, not R, G and B, and cannot be adapted")
            channels = own.shape[1]
            theirs = adapt_input_conv(channels, theirs)
        own.copy_(theirs)
    return f"filters of RGB adapted to {channels} channels"


def find_init(init: str, experiment_name: str, *, offline: bool = False) -> Path | None:
    """Return the file or folder of the start weights that `train.init_from` names; None for a timm tag.

    Other arguments, downloads and errors as in `find_weights`.
    """
    import timm  # takes seconds, and only start weights need it

    if ":" not in init and timm.is_model(init) and not expanded(init).exists():
        return None
    with _or_random():
        return find_weights(init, experiment_name, offline=offline)


@contextlib.contextmanager
def _or_random() -> Iterator[None]:
    """Complete messages about start weights with what can be done without them."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}; --train.init-from None starts from random weights") from None


def find_weights(checkpoint: str, experiment_name: str, *, offline: bool = False) -> Path:
    """Return the file or checkpoint folder that `checkpoint` names, downloading it if it is a published one.

    `official` means the published file of `experiment_name`, `official:CONFIG` that of row CONFIG; for `hub:USER/REPO`
    see `hub_folder`. The path of a file, or of a checkpoint's or pushed folder, is returned unchanged; a work_dir
    yields its best, else its newest checkpoint. Raises ValueError when none of these exists.
    """
    if checkpoint == "official" or checkpoint.startswith("official:"):
        return official_file(checkpoint.partition(":")[2] or experiment_name, offline=offline)
    if checkpoint.startswith(PREFIX):
        return hub_folder(checkpoint, offline=offline)
    try:
        path = expanded(checkpoint)
        is_run = (path / "checkpoints").is_dir()
    except OSError as error:  # a folder that may not be read, a name that is too long
        raise UserError(f"{checkpoint:.200}: no such file or folder ({error!s:.200}); {ACCEPTED}") from None
    if is_run:
        found = best(path) or newest(path)
        if found is None:
            raise UserError(f"{path}: this work_dir holds no complete checkpoint; train first, or {ACCEPTED}")
        return found
    if not path.exists():
        raise UserError(f"{checkpoint}: no such file or folder (looked at {path.absolute()}); {ACCEPTED}")
    if not path.is_dir():
        regular_file(path)
    elif not (path / MANIFEST).exists() and not is_shared(path):
        raise UserError(f"{path}: neither a checkpoint folder (no {MANIFEST}) nor a work_dir; {ACCEPTED}")
    return path


@contextlib.contextmanager
def _naming(source: object) -> Iterator[None]:
    """Prefix a model's messages about its tensors with the source."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _names(model: Segmentor) -> set[str]:
    """Return the model's own and published names of tensors."""
    return {*model.state_dict(), *model.key_map().values()}


def _load(model: Segmentor, state: Mapping[str, Tensor], source: object) -> LoadReport:
    own = sum(name in state for name in model.state_dict())
    official = sum(name in state for name in model.key_map().values())
    with _naming(source):
        return model.load_checkpoint(state) if own and own >= official else model.load_official(state)
