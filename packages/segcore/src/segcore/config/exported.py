"""What an exported model's file says about itself: the experiment, and how its network is to be called.

It is read as data: nothing is imported for it, and no method has to be installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from segcore.config.fields import MOST_CHANNELS, Section, setting
from segcore.config.record import VersionError, from_plain
from segcore.config.record import describe as record_of
from segcore.config.schema import Experiment, ModelConfig
from segcore.errors import UserError
from segcore.files import MAX_JSON, parse_json, reading, regular_file

ENTRY = "segcore"
"""The key of the description in the metadata of an ONNX file."""


@dataclass(frozen=True)
class ExportedConfig(ModelConfig):
    """The model of an exported file, whose settings were those of its export."""

    def build(self) -> Any:
        raise UserError("an exported model is run from its file; name the run or the configuration that it was made of")


@dataclass(frozen=True)
class Exported(Section):
    """How the network of an exported file is called."""

    section: ClassVar[str] = "exported"

    num_classes: int = setting(1, least=1, most=MOST_CHANNELS)
    ignore_index: int = setting(255, least=0)
    output: Literal["logits", "classes"] = "logits"
    """logits (N, K, H, W) float32; or classes (N, H, W), uint8 or int32 above 256 classes."""
    normalize: bool = False
    """Whether it takes images (N, H, W, C) uint8 and normalizes them; otherwise normalized (N, C, H, W) float32."""
    size: tuple[int, int] = setting((1, 1), least=1)
    """(height, width) of the images, unless `dynamic`."""
    batch: int = setting(1, least=1)
    """Images per call, unless `dynamic`."""
    dynamic: bool = False
    size_divisor: int = setting(1, least=1, most=1024)
    """With `dynamic`, sides are multiples of it."""
    pad_to: int = setting(1, least=1, most=1024)
    """With `dynamic`, other images are padded to multiples of it, as the model itself does; 1: it does not."""
    min_size: int = setting(1, least=1, most=8192)
    align_corners: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size_divisor % self.pad_to and self.pad_to % self.size_divisor:  # no image would fit
            raise UserError(f"exported.size_divisor {self.size_divisor} and pad_to {self.pad_to} exclude each other")

    def input_shape(self, channels: int) -> tuple[int | None, ...]:
        """Return the shape of the input; None stands for any number."""
        batch, height, width = (None, None, None) if self.dynamic else (self.batch, *self.size)
        return (batch, height, width, channels) if self.normalize else (batch, channels, height, width)

    def output_shape(self, images: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Return the shape of the output for that of the input."""
        height, width = images[1:3] if self.normalize else images[2:]
        return (images[0], height, width) if self.output == "classes" else (images[0], self.num_classes, height, width)


def describe(exp: Experiment, exported: Exported) -> dict[str, Any]:
    """Return what the file says beside the classes and the normalization: how to call it, and a run's record."""
    return {"exported": asdict(exported), **record_of(exp)}


def read_exported(path: Path) -> tuple[Experiment, Exported]:
    """Return the experiment that travels in an exported ONNX file, and how its network is called.

    Raises UserError in one line for a file that is missing, damaged, not exported by segcore, has weights in other
    files, or whose inputs and outputs are others than it says.
    """
    try:
        import onnx
    except ImportError:
        raise UserError(f"{path}: reading it needs onnx and a runtime; install segcore[export]") from None
    try:
        with reading(path):
            regular_file(path)
            proto = onnx.load_model_from_string(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file") from None
    except UserError:
        raise
    except Exception:  # protobuf's, by version
        raise UserError(f"{path}: damaged, or no ONNX file; export the run again") from None
    text = next((entry.value for entry in proto.metadata_props if entry.key == ENTRY), None)
    if any(getattr(part, "data_location", 0) or getattr(part, "external_data", ()) for part in _parts(proto)):
        raise UserError(f"{path}: its weights are in other files, which are not read; export the run again")
    if text is None:
        raise UserError(f"{path}: was not exported by segcore (it has no entry {ENTRY!r}); export a run of yours")
    try:
        stored = parse_json(text, MAX_JSON)
        exp, exported = _experiment(stored), from_plain(Exported, stored["exported"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{path}: its description is damaged or of another version ({reason[:150]}); export the run again"
        ) from None
    types = onnx.TensorProto
    taken = types.UINT8 if exported.normalize else types.FLOAT
    given = types.FLOAT if exported.output == "logits" else types.UINT8 if exported.num_classes <= 256 else types.INT32
    shape = exported.input_shape(exp.data.channels)
    expected = [("images", taken, shape)], [(exported.output, given, exported.output_shape(shape))]
    if (_tensors(proto.graph.input), _tensors(proto.graph.output)) != expected:
        raise UserError(f"{path}: its inputs and outputs are not what its description says; export the run again")
    return exp, exported


def _experiment(stored: dict[str, Any]) -> Experiment:
    """Return the experiment of a description; its model is the file itself."""
    settings, exported = dict(stored["experiment"]), stored["exported"]
    data = dict(settings["data"])
    if exported["normalize"]:  # by the network, so that nothing is left to do
        data |= {"mean": [0.0 for _ in data["mean"]], "std": [1.0 for _ in data["mean"]]}
    name = settings["name"]
    if not isinstance(name, str) or Path(name).name != name or name in ("", "..") or not name.isprintable():
        raise VersionError(f"name is {name!r}")
    model = ExportedConfig(exported["num_classes"], data["channels"])
    exp = cast(Experiment, from_plain(Experiment, {**settings, "data": data, "model": model}))
    # Its denoising steps are in the network: none can be asked for.
    evaluate = replace(exp.evaluate, steps=(), early_exit_threshold=None, ensemble_steps=False)
    return replace(exp, evaluate=evaluate)


def _parts(message: Any) -> Iterator[Any]:
    """Yield a protobuf message and, at any depth, all that it holds: tensors are in nodes, subgraphs and functions."""
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from _parts(part)


def _tensors(values: Any) -> list[tuple[str, int, tuple[int | None, ...]]]:
    """Return name, type and shape of a graph's inputs or outputs; None stands for any size."""

    def shape(kind: Any) -> tuple[int | None, ...]:
        return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim)

    return [(x.name, x.type.tensor_type.elem_type, shape(x.type.tensor_type)) for x in values]
