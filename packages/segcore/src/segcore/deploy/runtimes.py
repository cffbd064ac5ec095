"""Exported models in ONNX Runtime or OpenVINO, as a `Segmentor`: evaluation and prediction do not see the difference.

The file is untrusted: it is read as data, its inputs and outputs must be what its description says, and every answer
is checked. Nothing in it is executed but the operators of the runtime.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segcore.config.exported import Exported, read_exported
from segcore.config.schema import Experiment, LossConfig, Precision
from segcore.data.transforms import normalize, resize_image
from segcore.environment import computed_precision
from segcore.errors import UserError
from segcore.evaluation.predictor import Network, Predictor, view_sizes
from segcore.evaluation.scores import Scores
from segcore.models.segmentor import Segmentor

Run = Callable[[np.ndarray], np.ndarray]
"""Images as the file takes them -> its logits or classes."""
PRECISIONS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


class ExportedModel(Segmentor):
    """The network of an exported file. A file that answers with classes alone has no `logits`."""

    def __init__(self, path: Path, about: Exported, run: Run, title: str) -> None:
        """`title` says what runs it."""
        super().__init__()
        self.path, self.about, self.title, self._run = path, about, title, run
        self.num_classes, self.ignore_index = about.num_classes, about.ignore_index
        self.align_corners = about.align_corners
        self.min_size, self.pad_to, self.size_divisor = about.min_size, about.pad_to, about.size_divisor
        # It stands for the weights, and its device is that of everything behind the network.
        digest = torch.tensor(list(hashlib.sha256(path.read_bytes()).digest()), dtype=torch.uint8)
        self.sha256 = nn.Parameter(digest, requires_grad=False)

    def logits(self, images: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """Return logits (N, K, H, W) float32 at the images' size; `seeds` count for nothing, noise is in the file."""
        if self.about.output == "classes":
            raise self.without_probabilities()
        return self.answer(images)

    def answer(self, images: Tensor) -> Tensor:
        """Return what the file does, logits (N, K, H, W) or classes (N, H, W) int64, for padded images (N, C, H, W)."""
        about, array = self.about, images.float().cpu().numpy()
        if about.normalize:
            array = array.transpose(0, 2, 3, 1).astype(np.uint8)
        if about.dynamic:
            found = self._checked(array)
        else:
            count = len(array)
            array = np.pad(array, [(0, -count % about.batch), (0, 0), (0, 0), (0, 0)])
            found = np.concatenate([self._checked(part) for part in np.split(array, len(array) // about.batch)])[:count]
        tensor = torch.from_numpy(found).to(images.device)
        return tensor.long() if about.output == "classes" else tensor

    def _checked(self, images: np.ndarray) -> np.ndarray:
        try:
            found = np.asarray(self._run(np.ascontiguousarray(images)))
        except Exception as error:  # the runtimes raise arbitrary exceptions
            raise UserError(f"{self.path}: {self.title} failed ({_first(error)})") from None
        classes = self.about.output == "classes"
        fits = found.shape == self.about.output_shape(images.shape)
        if not fits or (classes and not 0 <= found.min() <= found.max() < self.num_classes):
            raise UserError(f"{self.path}: its answer is not what its description says; export the run again")
        return found

    def check_size(self, images: Any) -> None:
        """Raise UserError for images (N, C, H, W) of a size that the file does not take."""
        super().check_size(images)
        size = tuple(self.padded_size(images.shape[-2:]))
        if not self.about.dynamic and size != self.about.size:
            raise UserError(
                f"{self.path} takes images of {_by(self.about.size)} pixels (height x width), not {_by(size)}; export "
                f"with --size {_by(size)} or --dynamic, or set --evaluate.mode slide with its size as --evaluate.crop"
            )
        if self.about.dynamic and any(side % self.size_divisor for side in size):
            raise UserError(
                f"{self.path} takes images whose sides are multiples of {self.size_divisor}, not {_by(size)}; "
                f"export with --size {_by(size)}"
            )

    def without_probabilities(self) -> UserError:
        """Return the error for what a file that answers with classes alone cannot do."""
        return UserError(f"{self.path} answers with classes alone, without probabilities; export without --classes")

    def losses(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        seeds: Sequence[int] | None = None,
        draws: Mapping[str, Tensor] | None = None,
        loss: LossConfig = LossConfig(),  # noqa: B008  (frozen)
    ) -> dict[str, Tensor]:
        """Raise UserError."""
        raise UserError(f"{self.path}: an exported model cannot be trained; train the run that it was made of")


@dataclass(frozen=True)
class ClassPredictor(Predictor):
    """The predictor of a file that answers with classes alone: one view of whole images."""

    model: ExportedModel

    def __post_init__(self) -> None:
        super().__post_init__()
        settings = self.evaluate
        if self.ensemble or settings.mode != "whole" or settings.flip or len(settings.img_ratios) > 1:
            raise UserError(
                f"windows, flips, scales and ensembles take means, but {self.model.without_probabilities()}"
            )

    def _entries(
        self, images: Sequence[np.ndarray], seeds: Sequence[int], network: Network | None
    ) -> Iterator[tuple[str, Scores]]:
        """Yield the one entry; at another size than the file's, its classes are those of the nearest pixels."""
        size = (images[0].shape[0], images[0].shape[1])
        [(height, width, _)] = view_sizes(*size, self.evaluate)
        arrays = [normalize(resize_image(x, (height, width)), self.data.mean, self.data.std) for x in images]
        batch = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).to(self.device)
        self.model.check_size(batch)
        found = self.model.answer(self.model.pad(batch))[:, None, :height, :width]
        if (height, width) != size:
            found = F.interpolate(found.float(), size, mode="nearest-exact").long()
        yield "final", Scores(found, size, size, refusal=self.model.without_probabilities())


def load_exported(path: Path, provider: str | None = None, precision: Precision = "fp32") -> ExportedModel:
    """Return the network of an exported ONNX file.

    `provider` is `openvino`, or one of ONNX Runtime's such as `cpu` (None), `cuda`, `tensorrt`. `precision` is that of
    OpenVINO; ONNX Runtime computes as the file says. Raises UserError in one line for a file or provider that cannot be
    used.
    """
    # Weights in other files are refused there: even for bytes, the runtimes read them below the working directory.
    _, about = read_exported(path)
    data = path.read_bytes()
    name = (provider or "cpu").lower()
    try:
        run, title = _openvino(data, precision) if name == "openvino" else _onnxruntime(data, name)
    except ImportError as error:
        extra = "openvino" if name == "openvino" else "export"
        raise UserError(f"{path}: needs {error.name}; install segcore[{extra}]") from None
    except UserError:
        raise
    except Exception as error:  # the runtimes raise arbitrary exceptions
        raise UserError(f"{path}: cannot be loaded with --provider {name} ({_first(error)})") from None
    return ExportedModel(path, about, run, title)


def _onnxruntime(data: bytes, provider: str) -> tuple[Run, str]:
    import onnxruntime

    available = {x.removesuffix("ExecutionProvider").lower(): x for x in onnxruntime.get_available_providers()}
    available.pop("azure", None)  # sends images elsewhere, and runs no such file
    if provider not in available:
        raise UserError(f"--provider {provider}: not available here; use {', '.join(available)} or openvino")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    wanted = dict.fromkeys([available[provider], "CPUExecutionProvider"])
    session = onnxruntime.InferenceSession(data, options, providers=list(wanted))
    if session.get_providers()[0] != available[provider]:  # it falls back to the CPU with a warning
        raise UserError(f"--provider {provider}: does not start here; see whether its libraries are installed")
    return lambda images: session.run(None, {"images": images})[0], f"ONNX Runtime, {provider}"


def _openvino(data: bytes, precision: Precision) -> tuple[Run, str]:
    import openvino

    if b"QuantizeLinear" in data:  # compiling a quantized DDRNet ends the process (2026.4)
        raise UserError("--provider openvino does not run 8-bit files; leave it out, or export without --int8")
    precision = computed_precision(precision, torch.device("cpu"))
    core = openvino.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": PRECISIONS[precision],  # its own choice would be bf16 where the CPU has that
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(core.read_model(data), "CPU", settings)
    return lambda images: compiled([images], share_outputs=False)[0], f"OpenVINO, {precision}"


def predictor_of(model: ExportedModel, exp: Experiment, ensemble: Sequence[Segmentor] = ()) -> Predictor:
    """Return the predictor of an exported model.

    Raises UserError for another normalization or bit depth where the file normalizes, and for what needs probabilities.
    """
    neutral = {"mean": (0.0,) * exp.data.channels, "std": (1.0,) * exp.data.channels, "bit_depth": 8}
    changed = [name for name, value in neutral.items() if getattr(exp.data, name) != value]
    if model.about.normalize and changed:
        raise UserError(
            f"--data.{changed[0]}: {model.path} takes 8-bit images and normalizes them itself; leave it out, or export "
            "without --normalize"
        )
    kind = ClassPredictor if model.about.output == "classes" else Predictor
    return kind.of(model, exp, ensemble)


def require_probabilities(predictor: Predictor) -> None:
    """Raise UserError for the predictor of a file that answers with classes alone."""
    if isinstance(predictor, ClassPredictor):
        raise predictor.model.without_probabilities()


def precision_of(exp: Experiment) -> Precision:
    """Return the precision of the forward pass that an experiment asks for."""
    return exp.evaluate.precision or exp.train.precision


def _by(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def _first(error: Exception) -> str:
    """Return the beginning of a message in one line."""
    return " ".join(str(error).split())[:160]
