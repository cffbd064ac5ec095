"""The typed description of a run: frozen dataclasses of plain data. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from segcore.config.options import override
from segcore.errors import UserError

if TYPE_CHECKING:
    from segcore.models.segmentor import Segmentor

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class ModelConfig(ABC):
    """What every method's model dataclass has. Each method adds its own fields and `build`."""

    num_classes: int = 19
    """Number of classes K; labels are 0..K-1."""
    in_channels: int = 3
    """Channels of the images; must equal `data.channels`."""

    @abstractmethod
    def build(self) -> Segmentor:
        """Return the model with random weights; downloads nothing."""


@dataclass(frozen=True)
class DataConfig:
    """Where the images are and what training does to them."""

    dataset: Literal["cityscapes", "ade20k", "folder", "toy"] = "toy"
    """Layout of the files. `toy` generates street scenes in the Cityscapes layout when the folder is not there yet."""
    root: Path = Path("data/toy")
    """Folder of the dataset."""
    train_images: str = "images/train/*"
    """`folder` only: glob of the training images, relative to the root."""
    train_masks: str = "masks/train/*"
    """`folder` only: glob of the training masks, paired with the images by file stem."""
    val_images: str = "images/val/*"
    """`folder` only: glob of the validation images."""
    val_masks: str = "masks/val/*"
    """`folder` only: glob of the validation masks."""
    classes: tuple[str, ...] = ()
    """`folder` only: class names in the order of the mask values 0, 1, 2 …; 255 is ignored."""
    add_background_class: bool = False
    """Put a class `background` in front (label 0, which is then the ignored one) and move the others up by one."""
    channels: int = 3
    """Channels per image: 1 gray, 3 RGB, more for multi-band files."""
    bit_depth: Literal[8, 16] = 8
    """Bits per channel of the files. Images keep this range (0..255 or 0..65535) until they are normalized."""
    img_scale: tuple[int, int] | None = (2048, 1024)
    """Base size (long side, short side) that the random ratio multiplies; None: each image's own size."""
    ratio_range: tuple[float, float] = (0.5, 2.0)
    """The ratio is drawn uniformly from this range."""
    crop: tuple[int, int] = (512, 1024)
    """Training crop (height, width)."""
    cat_max_ratio: float = 0.75
    """A crop in which one class fills this share or more is drawn again, up to 10 times; 1 accepts every crop."""
    flip: float = 0.5
    """Probability of the horizontal flip."""
    photometric: bool = True
    """Photometric distortion (brightness, contrast, saturation, hue); 8-bit RGB only."""
    blur: float = 0.0
    """Probability of a Gaussian blur, whose standard deviation is drawn from 0 to 1 pixels."""
    mean: tuple[float, ...] = (123.675, 116.28, 103.53)
    """Mean per channel, RGB, in units of the file (0..255, or 0..65535 with 16 bits)."""
    std: tuple[float, ...] = (58.395, 57.12, 57.375)
    """Standard deviation per channel, likewise."""
    workers: int = 4
    """Processes per device that read and transform images; 0: none beside the main one. Samples do not depend on it."""
    on_error: Literal["stop", "skip"] = "stop"
    """A file that cannot be read ends the run, or is skipped (training takes the next sample), reported and counted."""


@dataclass(frozen=True)
class ParamRule:
    """Optimizer settings of every parameter whose published name contains `key`.

    The longest key that matches wins, equal lengths in alphabetical order; then no other rule applies.
    """

    key: str
    """Part of the parameter names that the rule is for."""
    lr_mult: float = 1.0
    """Factor of the learning rate."""
    decay_mult: float = 1.0
    """Factor of the weight decay."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer."""

    kind: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum."""
    lr: float = 6e-5
    """Base learning rate at the stated global batch."""
    weight_decay: float = 0.01
    """Weight decay: decoupled with AdamW, added to the gradients with SGD."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW only."""
    momentum: float = 0.9
    """SGD only."""
    clip_norm: float | None = None
    """Clip the gradients' total L2 norm to this; None: no clipping."""
    rules: tuple[ParamRule, ...] = ()
    """Per-parameter multipliers, matched against published parameter names."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over iterations: poly decay or steps, after a linear warm-up."""

    iterations: int = 160_000
    """Optimizer steps of the whole run."""
    kind: Literal["poly", "step"] = "poly"
    """How the learning rate falls after the warm-up."""
    power: float = 1.0
    """poly only: lr = (base - min) * (1 - i / iterations) ^ power + min."""
    step: int = 20_000
    """step only: multiply by gamma after every `step` iterations."""
    gamma: float = 0.5
    """step only: the factor."""
    min_lr: float = 0.0
    """Lowest learning rate: where poly ends, and what step never goes below."""
    warmup_iterations: int = 1500
    """Iterations of the warm-up; 0: none."""
    warmup_ratio: float = 1e-6
    """The warm-up starts at this fraction of the rate that it leads to."""
    warmup: Literal["scheduled", "linear", "constant"] = "scheduled"
    """scheduled: linearly to the schedule's rate, which decays from iteration 0, as in MMSegmentation; linear: to the
    base rate, then decay; constant: at the fraction of the base rate, then decay."""


@dataclass(frozen=True)
class LossConfig:
    """The training loss of the main head; methods say how an auxiliary head is weighted."""

    kind: Literal["cross_entropy", "ohem", "ohem_pyradd"] = "cross_entropy"
    """Cross entropy over all pixels, or over hard ones only (online hard example mining), as in MMSegmentation or in
    pyradd/DDRNet-pytorch."""
    class_weight: tuple[float, ...] | Literal["auto"] | None = None
    """Weight of each class in the cross entropy, a number per class. auto: the rarer, the heavier: 1 / ln(1.02 + share
    of the training labels' pixels), scaled so that the loss keeps its size."""
    ohem_threshold: float = 0.9
    """ohem only: pixels whose true class has a lower probability are hard."""
    ohem_min_kept: int = 131_072
    """ohem only: lower bound of the hard pixels of a forward pass on one device."""
    avg_non_ignore: bool = False
    """cross_entropy only: divide by the number of labeled pixels; the published systems divide by that of all."""


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    batch_size: int = 16
    """Images per optimizer step, over all devices."""
    device_batch_size: int = 4
    """Images per forward pass on one device; gradients are accumulated up to `batch`. Lower it when memory is short."""
    init_from: str | None = None
    """Start weights: a timm tag (`convnext_tiny.fb_in1k`), a file or checkpoint, or `official:CONFIG`; None: random."""
    precision: Precision = "fp32"
    """Precision of the forward pass (autocast); weights and optimizer stay in float32."""
    channels_last: bool = False
    """Memory layout of images and convolutions; often faster with bf16 and fp16."""
    compile: bool = False
    """Compile the training step with torch.compile: minutes at the start, then faster, on a GPU above all."""
    ema: float | None = None
    """Decay, 0..1, of an average of the weights over the iterations: what is evaluated and saved then. None: off."""
    ema_every: int = 1
    """Iterations between two updates of that average."""
    timeout: float = 600.0
    """Seconds after which a process of several that the others wait for ends the run."""
    log_every: int = 50
    """Iterations between lines of the log."""
    evaluate_every: int = 16_000
    """Iterations between evaluations on the validation set; 0: never."""
    save_every: int = 16_000
    """Iterations between checkpoints; the last iteration is always saved."""
    keep_last: int = 2
    """Newest checkpoints to keep, besides the best one."""


@dataclass(frozen=True)
class EvalConfig:
    """Inference on whole images and the metrics."""

    img_scale: tuple[int, int] | None = (2048, 1024)
    """Images are resized to fit (long side, short side), keeping their ratio; None: their own size."""
    mode: Literal["whole", "slide"] = "whole"
    """The whole image in one pass, or windows that overlap, which needs less memory."""
    crop: tuple[int, int] = (512, 1024)
    """slide only: window (height, width)."""
    stride: tuple[int, int] = (341, 683)
    """slide only: window stride (vertical, horizontal)."""
    img_ratios: tuple[float, ...] = (1.0,)
    """Scales of multi-scale testing; probabilities are averaged."""
    flip: bool = False
    """Add the horizontally flipped view of every scale."""
    batch_size: int = 1
    """Images per forward pass, where sizes are equal."""
    steps: tuple[int, ...] = ()
    """What to report of the sampling, one column each: DDP's numbers of steps, DDPS's timesteps. Empty: the configured
    answer. Methods without steps ignore it."""
    early_exit_threshold: float | None = None
    """A further entry that ends an image's denoising once a step changes fewer than this percentage of its pixels."""
    ensemble_steps: bool = False
    """Answer every entry of `steps` with the mean of its probabilities and those of the entries before."""
    precision: Precision | None = None
    """Precision of the forward pass (autocast); None: as trained."""
    channels_last: bool | None = None
    """Memory layout of images and convolutions; None: as trained."""
    metrics: tuple[Literal["mIoU", "mDice", "mFscore", "mBIoU"], ...] = ("mIoU",)
    """What the tables show per class: IoU, Dice, F-score with precision and recall, or the IoU of boundaries."""


def multi_scale(evaluate: EvalConfig) -> EvalConfig:
    """Return the published multi-scale setting: six scales, each also flipped."""
    return dataclasses.replace(evaluate, img_ratios=(0.5, 0.75, 1.0, 1.25, 1.5, 1.75), flip=True)


@dataclass(frozen=True)
class Experiment:
    """One run: the model, the data, the recipe. Published rows are functions that return one."""

    name: str
    """Name of the configuration: the default --work-dir, published figures and weights follow from it."""
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvalConfig = field(default_factory=EvalConfig)
    seed: int = 0
    """Every random draw of the run follows from it."""

    def __post_init__(self) -> None:
        data, train = self.data, self.train
        for wanted, holds, names in _BOUNDS:
            for name in names:
                given = operator.attrgetter(name)(self)
                for value in given if isinstance(given, tuple) else (given,):
                    if not (value is None or isinstance(value, str) or holds(value)):
                        raise UserError(f"{name} is {value}; it must be {wanted}")
        if not self.evaluate.img_ratios:
            raise UserError("evaluate.img_ratios is empty; give at least one, such as 1")
        if data.ratio_range[0] > data.ratio_range[1]:
            low, high = data.ratio_range
            raise UserError(f"data.ratio_range is {low} to {high}; give the smaller ratio first")
        if self.model.in_channels != data.channels:
            raise UserError(
                f"model.in_channels is {self.model.in_channels} but data.channels is {data.channels}; set both alike"
            )
        if not len(data.mean) == len(data.std) == data.channels:
            raise UserError(
                f"data.mean and data.std have {len(data.mean)} and {len(data.std)} values "
                f"for {data.channels} channels; give one value per channel"
            )
        if data.photometric and (data.channels != 3 or data.bit_depth != 8):
            raise UserError("data.photometric works on 8-bit RGB images; set data.photometric to False")
        if data.bit_depth == 16 and data.mean == DataConfig.mean:
            raise UserError("data.mean and data.std are those of 8-bit images; give those of your 16-bit images")
        if train.device_batch_size < train.batch_size and train.batch_size % train.device_batch_size:
            raise UserError(
                f"train.batch_size {train.batch_size} does not divide into passes of train.device_batch_size "
                f"{train.device_batch_size}"
            )
        if isinstance(weight := self.loss.class_weight, tuple) and len(weight) != self.model.num_classes:
            raise UserError(
                f"loss.class_weight has {len(weight)} values for {self.model.num_classes} classes; "
                "give one per class, or auto"
            )
        if self.evaluate.ensemble_steps and self.evaluate.early_exit_threshold is not None:
            raise UserError(
                "evaluate.ensemble_steps adds up the entries of evaluate.steps; leave out early_exit_threshold"
            )

    def with_overrides(self, overrides: Sequence[str]) -> Experiment:
        """Return a copy with `"model.num_inference_steps=10"`-style changes; tuples are written `"data.crop=256 512"`.

        Raises ValueError, naming the field and the nearest known one, on a wrong name or value.
        """
        changed: Experiment = override(self, overrides)
        return changed


_COUNTS = (
    *("model.num_classes", "data.channels", "data.img_scale", "data.crop", "schedule.iterations", "schedule.step"),
    *(
        "train.batch_size",
        "train.device_batch_size",
        "train.ema_every",
        "train.log_every",
        "train.save_every",
        "train.keep_last",
        "loss.ohem_min_kept",
    ),
    *("evaluate.img_scale", "evaluate.crop", "evaluate.stride", "evaluate.batch_size"),
)
_BOUNDS: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    ("at least 1", lambda v: v >= 1, _COUNTS),
    (
        "at least 0",
        lambda v: v >= 0,
        ("data.workers", "schedule.warmup_iterations", "train.evaluate_every", "evaluate.steps"),
    ),
    ("from 0 to 1", lambda v: 0 <= v <= 1, ("data.flip", "data.blur")),
    ("above 0 and at most 100", lambda v: 0 < v <= 100, ("evaluate.early_exit_threshold",)),
    ("at least 0 and below 1", lambda v: 0 <= v < 1, ("train.ema",)),
    ("above 0 and at most 1", lambda v: 0 < v <= 1, ("loss.ohem_threshold",)),
    ("finite", math.isfinite, ("data.mean",)),
    (
        "above 0 and finite",
        lambda v: 0 < v < math.inf,
        ("data.std", "data.ratio_range", "loss.class_weight", "train.timeout", "evaluate.img_ratios"),
    ),
)
"""What a value must be, the test of it, and its settings: every value of each, where one is given."""


@dataclass(frozen=True)
class Published:
    """What the authors publish for a row: figures and weights."""

    miou: dict[str, float]
    """Condition -> mIoU in percent, for example {"single scale": 82.60, "multi scale": 83.15}."""
    url: str | None = None
    """Where the weights are hosted; None: the authors offer none."""
    note: str = ""
    """What else the list of configurations says."""
    file: str | None = None
    """Local name of the weights file; None: the last part of the URL."""
    page: str | None = None
    """Where to find the weights by hand, when the file's own address is not known."""
