"""`export --int8`: static quantization by ONNX Runtime, accepted by the mIoU that it costs.

Weights are int8 by output channel, maps uint8 by the smallest and largest values (MinMax) that the calibration images
give, in QDQ form. Resizes stay in float32: ONNX Runtime has none in 8 bits, and would turn maps back and forth.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segcore import files
from segcore.config.exported import ENTRY, read_exported
from segcore.config.schema import DataConfig, Experiment
from segcore.data.dataset import Dataset
from segcore.data.images import IMAGE_SUFFIXES, read_image
from segcore.data.layouts import open_dataset
from segcore.data.layouts.files import walk
from segcore.data.workers import worker_count
from segcore.deploy.export import Check, Settings, check_output, export, quiet
from segcore.deploy.runtimes import ExportedModel, load_exported, predictor_of
from segcore.errors import UserError
from segcore.evaluation.evaluate import evaluate
from segcore.models.segmentor import Segmentor

CALIBRATION = 64
"""Images that are used at most, evenly spread over those that there are."""


@dataclass(frozen=True)
class Loss:
    """What 8-bit integers cost: mIoU in percent on the validation set."""

    exact: float
    int8: float
    images: int

    @property
    def drop(self) -> float:
        """The points lost; negative if there are more."""
        return self.exact - self.int8

    def __str__(self) -> str:
        return (
            f"int8: {self.int8:.2f} mIoU on {self.images} images, exact {self.exact:.2f}: {self.drop:.2f} points lost"
        )


def calibration_images(data: DataConfig, folder: Path | None) -> list[Callable[[], np.ndarray]]:
    """Return what reads the calibration images: those of a folder, or the training images.

    Raises UserError when there are none.
    """
    if folder and not folder.is_dir():
        raise UserError(f"--calibrate {folder}: no such folder; give a folder of images like those to come")
    if folder is None:
        dataset = open_dataset(data, "train")
        return [lambda i=i: dataset.image(i) for i in _spread(len(dataset))]  # type: ignore[misc]
    found = sorted(path for path in walk(folder) if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise UserError(f"--calibrate {folder}: no images there; give a folder of images like those to come")
    how = data.channels, data.bit_depth, data.max_pixels
    return [lambda path=found[i]: read_image(path, *how) for i in _spread(len(found))]  # type: ignore[misc]


def _spread(count: int) -> list[int]:
    return np.linspace(0, count - 1, min(count, CALIBRATION)).round().astype(int).tolist()


def export_int8(
    model: Segmentor,
    exp: Experiment,
    path: Path,
    settings: Settings,
    images: list[Callable[[], np.ndarray]],
    dataset: Dataset,
    *,
    max_drop: float = 1.0,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Check], Loss]:
    """Write `model` in 8-bit integers to `path` (.onnx); return the checks of the exact export, and what they cost.

    `images` are for the calibration, `dataset` is the validation set. Raises UserError, and writes nothing, when more
    than `max_drop` points of mIoU are lost, or the model cannot be exported.
    """
    check_output(path, int8=True)
    with tempfile.TemporaryDirectory() as folder:
        exact, small = Path(folder) / "exact.onnx", Path(folder) / "int8.onnx"
        try:
            checks = export(model, exp, exact, settings)
            before, count = _miou(exact, dataset, on_progress)
            quantize(exact, small, images)
            loss = Loss(before, _miou(small, dataset, on_progress)[0], count)
        except UserError as error:  # about files that the user does not know
            raise UserError(str(error).replace(str(exact), str(path)).replace(str(small), str(path))) from error
        if not loss.drop <= max_drop:  # NaN, too
            raise UserError(f"{path}: not written ({loss}); --max-drop {max_drop:g} allows no more")
        files.write(path, small.read_bytes())
    return checks, loss


def _miou(path: Path, dataset: Dataset, on_progress: Callable[[int, int], None] | None) -> tuple[float, int]:
    """Return the mIoU of an exported file in percent, and the number of images."""
    exp, _ = read_exported(path)
    predictor = predictor_of(load_exported(path), exp)
    results = evaluate(
        predictor, dataset, seed=exp.seed, workers=worker_count(exp.data.workers), on_progress=on_progress
    )
    return 100 * results.final["mIoU"], results.images


def quantize(exact: Path, small: Path, images: list[Callable[[], np.ndarray]]) -> None:
    """Write the quantized form of the file `exact` to `small`, with its description. Raises UserError if it fails."""
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.registry import QDQRegistry
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = exact.with_name("prepared.onnx")
    try:
        with quiet():
            quant_pre_process(str(exact), str(prepared), skip_symbolic_shape=True)
            quantization.quantize_static(
                str(prepared), str(small), _Reader(_inputs(exact, images)), per_channel=True,
                quant_format=quantization.QuantFormat.QDQ, calibrate_method=quantization.CalibrationMethod.MinMax,
                # Of int8 maps ONNX Runtime computes every second convolution of DDRNet in float32.
                activation_type=quantization.QuantType.QUInt8, op_types_to_quantize=sorted({*QDQRegistry} - {"Resize"}),
            )  # fmt: skip
    except UserError:
        raise
    except Exception as error:  # the quantization raises arbitrary exceptions
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{exact}: cannot be quantized ({reason}); export without --int8") from error
    written = onnx.load(str(small))
    [text] = [entry.value for entry in onnx.load(str(exact)).metadata_props if entry.key == ENTRY]
    del written.metadata_props[:]
    written.metadata_props.add(key=ENTRY, value=text)
    onnx.save(written, str(small))


class _Reader:
    """The batches in the form that ONNX Runtime's calibration asks for."""

    def __init__(self, batches: Iterator[np.ndarray]) -> None:
        self.batches = batches

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next inputs of the graph by name, None at the end."""
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch}


def _inputs(path: Path, images: list[Callable[[], np.ndarray]]) -> Iterator[np.ndarray]:
    """Yield the arrays that the file is called with when it predicts images, windows by windows."""
    exp, about = read_exported(path)
    seen: list[np.ndarray] = []

    def run(array: np.ndarray) -> np.ndarray:
        seen.append(array)
        shape = about.output_shape(array.shape)
        return np.zeros(shape, np.float32 if about.output == "logits" else np.uint8)  # type: ignore[arg-type]

    predictor = predictor_of(ExportedModel(path, about, run, "the calibration"), exp)
    for read in images:
        predictor.classes([read()], [exp.seed])
        yield from seen
        seen.clear()
