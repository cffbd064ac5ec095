"""`export`: a model as an ONNX file or a `torch.export` program, checked against the model before it is written.

Either takes normalized `images` (N, C, H, W) float32 and returns `logits` (N, K, H, W) at the same size. With
`normalize`, `images` are (N, H, W, C) uint8, as files are decoded; with `classes`, the output is `classes` (N, H, W),
uint8 or int32 above 256 classes. JSON metadata (`describe`) describes its use: classes, mean and standard deviation of
the normalization, sizes, and the experiment. In an ONNX file it is the metadata entry `segcore`, in a program the extra
file `segcore.json`.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.experimental import _config

from segcore import files
from segcore.config import exported
from segcore.config.exported import ENTRY, Exported
from segcore.config.schema import DataConfig, Experiment
from segcore.config.user_code import is_reference
from segcore.data.layouts import palette_of, state_classes
from segcore.errors import UserError
from segcore.models.segmentor import Segmentor

MAX_DIFFERENCE = 1e-3
"""Maximum difference of a logit from the model's own, relative to the largest logit if that exceeds 1."""
MIN_AGREEMENT = 0.999
"""Minimum share of the pixels with the same class as the model's own."""
MAX_SIDE = 8192
"""Maximum image side that a dynamic export accepts, in pixels."""

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Settings:
    """Settings of an export."""

    height: int
    width: int
    batch: int = 1
    dynamic: bool = False
    """Any batch and any size whose sides are multiples of the model's `size_divisor`; otherwise only the given ones."""
    classes: bool = False
    """Return the classes instead of the logits."""
    normalize: bool = False
    """Take images (N, H, W, C) uint8 and normalize them."""


@dataclass(frozen=True)
class Check:
    """Comparison of the export with the model on random images of one shape."""

    shape: tuple[int, ...]
    difference: float | None
    """Largest difference of a logit from the model's own, relative to the largest logit if that exceeds 1; None for an
    export that returns classes."""
    agreement: float
    """Share of the pixels with the same class."""

    def __str__(self) -> str:
        logits = "" if self.difference is None else f"logits within {self.difference:.1e}, "
        return f"{'x'.join(map(str, self.shape))}: {logits}{self.agreement:.3%} same class"


class Deployed(nn.Module):
    """A network with what else the export does: the normalization in front, the choice of the classes behind."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, data: DataConfig, settings: Settings) -> None:
        super().__init__()
        self.network, self.settings = network, settings
        for name in ("mean", "std") if settings.normalize else ():
            self.register_buffer(name, torch.tensor(getattr(data, name)).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits or classes, see the module's docstring."""
        if self.settings.normalize:
            images = (images.permute(0, 3, 1, 2).float() - self.mean) / self.std
        logits: Tensor = self.network(images)
        if not self.settings.classes:
            return logits
        classes = logits[:, 0] > 0 if logits.shape[1] == 1 else logits.argmax(1)  # sigmoid above 0.5
        return classes.to(torch.uint8 if logits.shape[1] <= 256 else torch.int32)


def check_output(path: Path, *, int8: bool = False) -> None:
    """Raise UserError when `path` cannot be written, before anything is loaded or built."""
    if int8 and path.suffix != ".onnx":
        raise UserError(f"{path}: --int8 is for ONNX; name the file .onnx")
    if path.suffix not in (".onnx", ".pt2"):
        raise UserError(f"{path}: name the file .onnx (ONNX) or .pt2 (torch.export)")
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
    if path.suffix == ".onnx" and missing:
        raise UserError(f"{path}: ONNX needs {', '.join(missing)}; install segcore[export]")
    files.check_writable(path)


def check_settings(settings: Settings, model: Segmentor, exp: Experiment) -> None:
    """Raise UserError when `settings` are not for `model`, before it is exported."""
    if settings.batch < 1:
        raise UserError(f"--batch {settings.batch}: give at least 1")
    if settings.normalize and exp.data.bit_depth != 8:
        raise UserError(f"--normalize takes 8-bit images, but data.bit_depth is {exp.data.bit_depth}; leave it out")
    divisor = model.size_divisor
    if settings.dynamic and (settings.height % divisor or settings.width % divisor):
        raise UserError(
            f"--size {settings.height}x{settings.width}: with --dynamic both sides must be multiples of {divisor}"
        )
    model.check_size(torch.empty(1, 1, settings.height, settings.width, device="meta"))


def export(model: Segmentor, exp: Experiment, path: Path, settings: Settings) -> list[Check]:
    """Write `model`, on the CPU and in evaluation mode, to `path` (.onnx or .pt2) and return the results of the checks.

    With `dynamic` a larger image and another batch size are also checked. Raises UserError, and writes nothing, when
    the model cannot be exported like this or the export's output differs from the model's.
    """
    check_output(path)
    check_settings(settings, model, exp)
    # The exporter treats sizes of 1 as constants, so a dynamic export is traced with 2 images.
    example = _images(exp, max(settings.batch, 2) if settings.dynamic else settings.batch, settings)
    # A channels_last layout of the weights would add constraints on the sizes.
    model = model.to(memory_format=torch.contiguous_format)
    network = model.exportable(_normalized(example, exp, settings), dynamic=settings.dynamic)
    module = Deployed(network, exp.data, settings).eval()
    text = json.dumps(describe(model, exp, settings))
    try:
        # Without `backed_size_oblivious` a map that is one pixel high here would be fixed to that height.
        with quiet(), torch.no_grad(), _config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
            program = torch.export.export(module, (example,), dynamic_shapes=_dynamic_shapes(model, settings))
            with tempfile.TemporaryDirectory() as folder:
                beside = Path(folder) / path.name
                save = _save_onnx if path.suffix == ".onnx" else _save_program
                run = save(program, beside, text)
                checks = [_check(module, run, images) for images in _samples(model, exp, settings)]
                _refuse(checks, path)
                files.write(path, beside.read_bytes())
    except UserError:
        raise
    except Exception as error:  # the exporters raise arbitrary exceptions
        kind = "dynamic size" if settings.dynamic else "size"
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: {type(model).__name__} cannot be exported at this {kind} ({reason})") from error
    return checks


def describe(model: Segmentor, exp: Experiment, settings: Settings) -> dict[str, Any]:
    """Return the metadata of the export."""
    if is_reference(exp.data.dataset):  # whose function is not called for the file
        exp = replace(exp, data=state_classes(exp.data))
    classes, _ = palette_of(exp.data)
    own = settings.dynamic and not settings.normalize  # only then the mean color, which pads the images, is 0
    how = Exported(
        model.num_classes, model.ignore_index, "classes" if settings.classes else "logits", settings.normalize,
        (settings.height, settings.width), settings.batch, settings.dynamic, model.size_divisor,
        model.pad_to if own else 1, model.min_size, model.align_corners,
    )  # fmt: skip
    return {
        "name": exp.name,
        "classes": list(classes),
        "mean": list(exp.data.mean),
        "std": list(exp.data.std),
        "channels": exp.data.channels,
        "bit_depth": exp.data.bit_depth,
        "size": [settings.height, settings.width],
        "batch": settings.batch,
        "dynamic": settings.dynamic,
        "size_divisor": model.size_divisor if settings.dynamic else None,
        "evaluate_scale": exp.evaluate.img_scale,
        "align_corners": model.align_corners,
        **exported.describe(exp, how),
    }


def _dynamic_shapes(model: Segmentor, settings: Settings) -> Any:
    if not settings.dynamic:
        return None
    divisor = model.size_divisor
    least = -(-model.min_size // divisor)
    height, width = (divisor * torch.export.Dim(name, min=least, max=MAX_SIDE // divisor) for name in ("h", "w"))
    first = 1 if settings.normalize else 2
    return ({0: torch.export.Dim("batch", min=1, max=256), first: height, first + 1: width},)


def _images(exp: Experiment, batch: int, settings: Settings, grow: int = 0) -> Tensor:
    """Return random inputs of the export."""
    channels, size = exp.model.in_channels, (settings.height + grow, settings.width + grow)
    draws = torch.Generator().manual_seed(batch)
    if settings.normalize:
        return torch.randint(256, (batch, *size, channels), dtype=torch.uint8, generator=draws)
    return torch.randn((batch, channels, *size), generator=draws)


def _normalized(images: Tensor, exp: Experiment, settings: Settings) -> Tensor:
    """Return random images of the shape that the network itself takes."""
    return _images(exp, len(images), replace(settings, normalize=False))


def _samples(model: Segmentor, exp: Experiment, settings: Settings) -> Iterator[Tensor]:
    """Yield the inputs of the checks."""
    yield _images(exp, settings.batch, settings)
    if settings.dynamic:
        yield _images(exp, settings.batch + 1, settings, grow=model.size_divisor)


def _save_onnx(program: torch.export.ExportedProgram, path: Path, text: str) -> Forward:
    """Write the ONNX file and return a function that runs it in ONNX Runtime."""
    import onnxruntime
    from onnx_ir.passes.common import NameFixPass
    from onnxscript import optimizer

    output = json.loads(text)["exported"]["output"]
    written = torch.onnx.export(
        program, dynamo=True, input_names=["images"], output_names=[output], verbose=False, external_data=False,
        optimize=False,
    )  # fmt: skip
    assert written is not None
    # Nothing else of `optimize`, which changes answers: it takes products of square maps apart along the wrong axis,
    # and resizes constants to one row less. The runtimes optimize the graph when they load it.
    optimizer.inline(written.model)
    NameFixPass()(written.model)  # a buffer and an operator's result may have one name
    written.model.metadata_props[ENTRY] = text
    written.save(str(path))
    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), quiet, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(np.asarray(session.run(None, {"images": images.numpy()})[0]))


def _save_program(program: torch.export.ExportedProgram, path: Path, text: str) -> Forward:
    """Write the program and return it as loaded from the file."""
    torch.export.save(program, path, extra_files={f"{ENTRY}.json": text})
    return torch.export.load(path).module()


def _check(module: nn.Module, run: Forward, images: Tensor) -> Check:
    expected, found = module(images), run(images)
    if expected.ndim == 3:  # classes
        return Check(tuple(images.shape), None, (expected == found).double().mean().item())
    same = (expected.argmax(1) == found.argmax(1)).double().mean().item()
    scale = expected.abs().max().clamp(min=1)
    return Check(tuple(images.shape), ((expected - found).abs().max() / scale).item(), same)


def _refuse(checks: list[Check], path: Path) -> None:
    """Raise UserError for the first check that fails; NaN also fails."""
    for check in checks:
        if not ((check.difference or 0) <= MAX_DIFFERENCE and check.agreement >= MIN_AGREEMENT):
            raise UserError(
                f"{path}: not written, its outputs differ from the model's ({check}; allowed are {MAX_DIFFERENCE} and "
                f"{MIN_AGREEMENT:.1%}); report this with the versions that `env` prints"
            )


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the exporters' warnings about their own internals."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
