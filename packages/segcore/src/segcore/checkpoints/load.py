"""Load weights into a model, strictly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from segcore.checkpoints.foreign import ACCEPTED, is_shared, read_state
from segcore.checkpoints.hub import official_file, timm_state
from segcore.checkpoints.hugging_face import PREFIX, hub_folder
from segcore.checkpoints.manifest import MANIFEST
from segcore.checkpoints.other_classes import fitting_count, load_other_classes, trained_classes
from segcore.checkpoints.run_checkpoint import best, newest
from segcore.config.schema import Experiment
from segcore.errors import UserError
from segcore.files import expanded, regular_file
from segcore.models.segmentor import LoadReport, Segmentor


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
    those of other classes, see `load_other_classes`. Raises ValueError when the weights are not found, cannot be
    downloaded, or do not fit the model.
    """
    found = find_init(init, exp.name if exp else "", offline=offline)
    with _or_random():
        state = read_state(found, _names(model)) if found else timm_state(init, offline=offline)
    path, source = found or Path(init), str(found or init)
    if not model.is_full_checkpoint(state):
        with _naming(source):
            part, report = model.load_pretrained(state)
        return f"{source}: {part}: {report}"

    def load(target: Segmentor) -> LoadReport:
        return _load(target, state, source)

    before = trained_classes(init, path, exp.name) if exp else None
    try:
        if exp is None or before in (None, tuple(classes)):
            return f"{source}: {load(model)}"
    except UserError:
        count = fitting_count(exp.model, state, load) if exp and not before else None
        if count is None:
            raise
        before = ("",) * count
    assert exp is not None
    assert before is not None
    return f"{source}: {load_other_classes(model, exp.model, load, before, classes)}"


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
