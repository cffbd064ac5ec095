"""Print segcore's Python API, written from the code: `python scripts/python_api.py > docs/python_api.md`."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from segcore.config.options import help_texts

INTRO = """\
# Python API

What may be imported and stays. Shapes: N images, C channels, K classes, H and W pixels. Whatever a user can cause
raises `segcore.UserError`, a `ValueError`, in one line. `import segcore` imports no torch.

This page is written by `python scripts/python_api.py > docs/python_api.md`; a test compares it with the code.
"""
SECTIONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Models and results", "", (
        "segcore.load_model", "segcore.LoadedModel", "segcore.Result",
    )),
    ("Configurations", "", (
        "segcore.load_experiment", "segcore.experiments", "segcore.Experiment",
    )),
    ("Sections of a configuration", "Frozen dataclasses: `dataclasses.replace` changes a copy. Values are checked.", (
        "segcore.config.schema.ModelConfig", "segcore.config.schema.DataConfig",
        "segcore.config.schema.OptimizerConfig", "segcore.config.schema.ParamRule",
        "segcore.config.schema.ScheduleConfig", "segcore.config.schema.LossConfig",
        "segcore.config.schema.TrainConfig", "segcore.config.schema.EvalConfig",
    )),
    ("Methods", "A method of your own is a subclass; see [Extending](extending.md#a-method-of-your-own).", (
        "segcore.Segmentor", "segcore.models.segmentor.LoadReport", "segcore.models.stepwise.StepwiseSegmentor",
    )),
    ("Losses", "See [Extending](extending.md#losses). The last six are what `loss.kind` names.", (
        "segcore.models.losses.head_losses", "segcore.models.losses.segmentation_loss",
        "segcore.models.losses.pixel_accuracy", "segcore.models.losses.cross_entropy",
        "segcore.models.losses.ohem_cross_entropy", "segcore.models.losses.ohem_pyradd",
        "segcore.models.losses.focal", "segcore.models.losses.dice", "segcore.models.losses.lovasz_softmax",
    )),
    ("Backbones", "See [Extending](extending.md#backbones).", (
        "segcore.models.backbones.build_backbone", "segcore.models.backbones.Backbone",
    )),
    ("Data sets", "`data.dataset my.py:open_split` returns one of these, see [Extending](extending.md#data-sets).", (
        "segcore.data.dataset.Dataset", "segcore.data.pairs.from_pairs", "segcore.data.labels.label_lut",
    )),
    ("Augmentation", "`data.augment my.py:f` names a function `f(image, mask, rng) -> (image, mask)`: arrays (H, W, C) "
     "and (H, W), and the sample's `numpy.random.RandomState`. See [Extending](extending.md#augmentation).", ()),
    ("Metrics", "", (
        "segcore.evaluation.metrics.ConfusionMatrix", "segcore.evaluation.metrics.BoundaryIoU",
    )),
    ("Web page", "With `segcore[web]`, `segcore.web.page.build(seg)` returns the page and `launch(page)` shows it: "
     "[A model in the browser](web.md).", ()),
    ("Operators", "They run on any device, compile and export. `segcore.ops.compat` has them with the interfaces of "
     "Deformable DETR, mmcv and torchvision, which stay as those are: [Operators](operators.md).", (
        "segcore.ops.ms_deform_attn", "segcore.ops.deform_conv2d", "segcore.ops.deform_unfold",
        "segcore.ops.deform_local_attn",
    )),
)  # fmt: skip


def find(name: str) -> Any:
    """Return the object of a dotted name."""
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)


def signature(name: str, value: Any) -> str:
    """Return `name(parameters) -> result`, on one line where it fits."""
    found = inspect.signature(value)
    texts, marked = list[str](), False
    for item in found.parameters.values():
        if item.kind is item.KEYWORD_ONLY and not marked:
            marked = True
            texts.append("*")
        if item.name != "self":
            kind = "" if item.annotation is item.empty else f": {item.annotation}"
            texts.append(item.name + kind + ("" if item.default is item.empty else f" = {literal(item.default)}"))
    returns = "" if isinstance(value, type) else f" -> {found.return_annotation}"
    line = f"{name}({', '.join(texts)}){returns}"
    return line if len(line) <= 100 else f"{name}(\n" + "".join(f"    {text},\n" for text in texts) + f"){returns}"


def literal(value: Any) -> str:
    """Return a default value as it is written in code, on any system."""
    if isinstance(value, Path):
        return f"Path({value.as_posix()!r})"
    return f"{type(value).__name__}()" if dataclasses.is_dataclass(value) else repr(value)


def about(value: Any) -> str:
    """Return the first paragraph of a docstring."""
    return " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())


def text(value: Any) -> Iterator[str]:
    """Yield the paragraphs of a docstring; what stands under `Args:` or `Attributes:` becomes a list."""
    for paragraph in (inspect.getdoc(value) or "").split("\n\n"):
        head, *lines = paragraph.splitlines()
        if head in ("Args:", "Attributes:"):
            items = re.split(r"\n    (?=\w+: )", "\n" + "\n".join(lines))[1:]
            names_and_notes = (" ".join(item.split()).split(": ", 1) for item in items)
            yield "\n".join(f"- `{name}`: {note}" for name, note in names_and_notes)
        else:
            yield " ".join(paragraph.split())


def members(value: type) -> Iterator[str]:
    """Yield a list entry for every public method and property of a class, in the order of its source."""
    for name, member in vars(value).items():
        if name.startswith("_") and name != "__call__":
            continue
        if isinstance(member, property | cached_property):
            yield f"- `{name}`: {about(member)}"
        elif inspect.isfunction(member) and about(member):
            code = signature(name, member)
            if "\n" in code:
                block = "\n".join(f"  {line}" for line in ("```python", *code.splitlines(), "```"))
                yield f"- `{name}`: {about(member)}\n{block}"
            else:
                yield f"- `{code}`: {about(member)}"


def fields(value: type) -> Iterator[str]:
    """Yield the lines of a table of a dataclass's fields."""
    yield from ("| field | type | default | |", "|---|---|---|---|")
    texts = help_texts(value)
    for item in dataclasses.fields(value):
        default = "" if item.default is dataclasses.MISSING else f"`{literal(item.default)}`"
        kind = str(item.type).replace("|", "\\|")
        yield f"| `{item.name}` | `{kind}` | {default} | {texts.get(item.name, '').replace('|', chr(92) + '|')} |"


def entry(name: str) -> Iterator[str]:
    """Yield the paragraphs about an object."""
    value = find(name)
    if dataclasses.is_dataclass(value) and isinstance(value, type):
        yield from (f"### `{name}`", *text(value), "\n".join(fields(value)))
    elif inspect.isabstract(value):
        yield from (f"### `{name}`", *text(value))
    else:
        yield from (f"### `{name}`", f"```python\n{signature(name.rpartition('.')[2], value)}\n```", *text(value))
    if name.startswith("segcore.ops."):  # the module states the shapes
        yield f"```text\n{inspect.getdoc(inspect.getmodule(value))}\n```"
    if isinstance(value, type) and (listed := "\n".join(members(value))):
        yield listed


def page() -> str:
    """Return the page."""
    paragraphs = [INTRO.rstrip()]
    for title, note, names in SECTIONS:
        paragraphs += [f"## {title}", *([note] if note else [])]
        for name in names:
            paragraphs += entry(name)
    return "\n\n".join(paragraphs) + "\n"


if __name__ == "__main__":
    print(page(), end="")
