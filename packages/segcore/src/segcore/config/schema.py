"""The typed description of a run: frozen dataclasses of plain data. Nothing here imports torch.

Defaults are neutral: nothing is augmented, decayed, warmed up, clipped or averaged unless a configuration says so.
"""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from segcore.config.data import DataConfig as DataConfig
from segcore.config.fields import INPUT, MOST_CHANNELS, Section, setting
from segcore.config.label_rows import with_class_count
from segcore.config.loss import LossConfig as LossConfig
from segcore.config.options import change, read_overrides
from segcore.config.user_code import check_reference
from segcore.errors import UserError

if TYPE_CHECKING:
    from segcore.models.segmentor import Segmentor

Precision = Literal["auto", "fp32", "bf16", "fp16"]
NoiseDevice = Literal["model", "cpu"]


@dataclass(frozen=True)
class ModelConfig(Section, ABC):
    """What every method's model dataclass has. Each method adds its own fields and `build`."""

    section: ClassVar[str] = "model"
    stepwise: ClassVar[bool] = False
    """Whether the model answers in steps, as diffusion models do: commands then offer what only these can do."""

    num_classes: int = setting(19, least=1, most=MOST_CHANNELS, stated=True, commands=INPUT)
    """Number of classes K; labels are 0..K-1."""
    in_channels: int = setting(3, least=1, most=MOST_CHANNELS, commands=INPUT)
    """Channels of the images; must equal `data.channels`."""

    @abstractmethod
    def build(self) -> Segmentor:
        """Return the model with random weights; downloads nothing."""

    def arguments(self) -> dict[str, Any]:
        """Return the fields by name: the keyword arguments of the model."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}


@dataclass(frozen=True)
class ParamRule(Section):
    """Optimizer settings of every parameter whose published name contains `key`.

    The longest key that matches wins, equal lengths in alphabetical order; then no other rule applies.
    """

    section: ClassVar[str] = "optimizer.rules"
    commands: ClassVar[tuple[str, ...]] = ()

    key: str
    """Part of the parameter names that the rule is for."""
    lr_mult: float = setting(1.0, least=0)
    """Factor of the learning rate."""
    decay_mult: float = setting(1.0, least=0)
    """Factor of the weight decay."""


@dataclass(frozen=True)
class OptimizerConfig(Section):
    """The optimizer."""

    section: ClassVar[str] = "optimizer"
    commands: ClassVar[tuple[str, ...]] = ()

    kind: Literal["adamw", "sgd"] = setting("adamw", stated=True)
    """AdamW, or SGD with momentum."""
    lr: float = setting(1e-3, least=0, stated=True)
    """Base learning rate at the stated global batch."""
    weight_decay: float = setting(0.0, least=0, stated=True)
    """Weight decay: decoupled with AdamW, added to the gradients with SGD."""
    betas: tuple[float, float] = setting((0.9, 0.999), least=0, below=1)
    """AdamW only."""
    momentum: float = setting(0.0, least=0, below=1)
    """SGD only."""
    clip_norm: float | None = setting(None, above=0)
    """Clip the gradients' total L2 norm to this; None: no clipping."""
    rules: tuple[ParamRule, ...] = ()
    """Per-parameter multipliers, matched against published parameter names."""
    lr_mult: tuple[tuple[str, float], ...] = setting((), above=0)
    """PREFIX FACTOR …: factors of the learning rate, on top of those of `rules`; prefixes as for `train.freeze`, of
    which the longest counts."""


@dataclass(frozen=True)
class ScheduleConfig(Section):
    """Length of the run, and the learning rate over iterations: poly or cosine decay, or steps, after a warm-up."""

    section: ClassVar[str] = "schedule"
    commands: ClassVar[tuple[str, ...]] = ()

    iterations: int = setting(10_000, least=1, stated=True)
    """Optimizer steps of the whole run."""
    kind: Literal["poly", "cosine", "step"] = setting("poly", stated=True)
    """How the learning rate falls after the warm-up."""
    power: float = setting(1.0, least=0)
    """poly only: lr = (base - min) * (1 - i / iterations) ^ power + min. 1: linear decay; 0: a constant rate."""
    step: int = setting(10_000, least=1)
    """step only: multiply by gamma after every `step` iterations."""
    gamma: float = setting(0.1, above=0)
    """step only: the factor."""
    min_lr: float = setting(0.0, least=0)
    """Lowest learning rate: where poly and cosine (half a period) end, and what step never goes below."""
    warmup_iterations: int = setting(0, least=0, stated=True)
    """Iterations of the warm-up; 0: none."""
    warmup_ratio: float = setting(0.1, least=0, most=1)
    """The warm-up starts at this fraction of the rate that it leads to, of what is above `min_lr` if it is linear."""
    warmup: Literal["scheduled", "linear", "constant"] = "linear"
    """scheduled: linearly to the schedule's rate, which decays from iteration 0, as in MMSegmentation; linear: to the
    base rate, then decay; constant: at the fraction of the base rate, then decay."""
    epochs: int | None = setting(None, least=1)
    """Passes over the training images: replaces `iterations` by epochs * images / `train.batch_size`, rounded up. The
    warm-up stays in iterations. None: `iterations` counts."""


@dataclass(frozen=True)
class TrainConfig(Section):
    """The training loop."""

    section: ClassVar[str] = "train"
    commands: ClassVar[tuple[str, ...]] = ()

    batch_size: int = setting(8, least=1, stated=True)
    """Images per optimizer step, over all devices."""
    device_batch_size: int = setting(8, least=1, stated=True)
    """Images per forward pass on one device; gradients are accumulated up to `batch_size`. Lower it when memory is
    short."""
    init_from: str | None = None
    """Start weights: `official` (the published ones of this configuration), `official:CONFIG`, a run or checkpoint, a
    file, `hub:USER/REPO`, or for the encoder a tag of timm (`convnext_tiny.fb_in1k`); None: random."""
    precision: Precision = "fp32"
    """Precision of the forward pass (autocast); weights and optimizer stay in float32. auto: bf16 where the device has
    instructions for it, else fp32. bf16 is several times slower than fp32 on a CPU without."""
    channels_last: bool = False
    """Memory layout of images and convolutions; often faster with bf16 and fp16."""
    compile: bool = False
    """Compile the training step with torch.compile: minutes at the start, then faster, on a GPU above all."""
    ema: float | None = setting(None, least=0, below=1)
    """Decay, 0..1, of an average of the weights over the iterations: what is evaluated and saved then. None: off."""
    ema_every: int = setting(1, least=1)
    """Iterations between two updates of that average."""
    freeze: tuple[str, ...] = ()
    """PREFIX …: parts of the model that keep their weights, with batch norm and dropout in evaluation mode: all whose
    own or published name begins with the prefix, in whole words between dots: `backbone`, `backbone.layer1`."""
    checkpoint_activations: bool = False
    """Keep only the inputs of the model's blocks and compute the rest again in the backward pass: less memory, more
    time, the same gradients."""
    timeout: float = setting(600.0, above=0)
    """Timeout in seconds of distributed communication; the run ends if a process does not respond in time."""
    log: tuple[str, ...] = ()
    """Trackers beside log.jsonl and TensorBoard: `wandb` (Weights & Biases, the extra `wandb`), or `file.py:sink`, a
    function or class of yours for any other (docs/watching_a_run.md)."""
    log_every: int = setting(50, least=1)
    """Iterations between lines of the log."""
    evaluate_every: int = setting(1000, least=0)
    """Iterations between evaluations on the validation set; 0: never."""
    patience: int | None = setting(None, least=1)
    """End the run after this number of evaluations in a row without a better mIoU. None: never."""
    save_every: int = setting(1000, least=1)
    """Iterations between checkpoints; the last iteration is always saved."""
    keep_last: int = setting(2, least=1)
    """Newest checkpoints to keep; the best one is kept as well."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.log:
            check_reference("train.log", name, ("wandb",))
        if self.patience and not self.evaluate_every:
            raise UserError("train.patience counts evaluations, but train.evaluate_every is 0; set it to iterations")
        if self.checkpoint_activations and self.compile:
            raise UserError("train.checkpoint_activations does not work with train.compile; set one of them to False")


@dataclass(frozen=True)
class EvalConfig(Section):
    """Inference on whole images and the metrics."""

    section: ClassVar[str] = "evaluate"
    commands: ClassVar[tuple[str, ...]] = ("test", "predict", "web")

    img_scale: tuple[int, int] | None = setting(None, least=1)
    """Images are resized to fit (long side, short side), keeping their ratio; None: their own size."""
    mode: Literal["whole", "slide"] = setting("whole", stated=True)
    """The whole image in one pass, or windows that overlap, which needs less memory."""
    crop: tuple[int, int] = setting((512, 512), least=1)
    """slide only: window (height, width)."""
    stride: tuple[int, int] = setting((341, 341), least=1)
    """slide only: window stride (vertical, horizontal), at most the window."""
    img_ratios: tuple[float, ...] = setting((1.0,), above=0, nonempty=True)
    """Scales of multi-scale testing; probabilities are averaged."""
    flip: bool = False
    """Add the horizontally flipped view of every scale."""
    batch_size: int = setting(1, least=1, commands=("test", "predict", "verify"))
    """Images per forward pass, where sizes are equal."""
    precision: Precision | None = None
    """Precision of the forward pass (autocast); None: as trained, `train.precision`."""
    channels_last: bool | None = None
    """Memory layout of images and convolutions; None: as trained, `train.channels_last`."""
    steps: tuple[int, ...] = setting((), least=0, stepwise=True)
    """What to report of the sampling, one column each. DDP: numbers of denoising steps, a run of its own each, in place
    of `model.num_inference_steps`. DDPS: timesteps of the one run that `model.num_inference_steps` configures. Empty:
    the configured answer; so do `predict` and `web` without `ensemble_steps`. Models without steps ignore it."""
    early_exit_threshold: float | None = setting(None, above=0, most=100, stepwise=True)
    """A further entry that ends an image's denoising once a step changes fewer than this percentage of its pixels."""
    ensemble_steps: bool = setting(False, stepwise=True)
    """Answer every entry of `steps` with the mean of its probabilities and those of the entries before."""
    noise_device: NoiseDevice = setting("model", commands=("test", "predict", "train"), stepwise=True)
    """Where the model's noise is drawn, in training too. model: on its device, which differs by its kind; cpu: the same
    numbers on every device, more slowly."""
    metrics: tuple[Literal["mIoU", "mDice", "mFscore", "mBIoU"], ...] = setting(("mIoU",), commands=("test",))
    """What the tables show per class: IoU, Dice, F-score with precision and recall, or the IoU of boundaries."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "slide" and (self.stride[0] > self.crop[0] or self.stride[1] > self.crop[1]):
            raise UserError(
                f"evaluate.stride is {self.stride}; it must be at most evaluate.crop {self.crop}, or gaps are left"
            )
        if self.ensemble_steps and self.early_exit_threshold is not None:
            raise UserError(
                "evaluate.ensemble_steps adds up the entries of evaluate.steps; leave out early_exit_threshold"
            )


def multi_scale(evaluate: EvalConfig) -> EvalConfig:
    """Return the published multi-scale setting: six scales, each also flipped."""
    return dataclasses.replace(evaluate, img_ratios=(0.5, 0.75, 1.0, 1.25, 1.5, 1.75), flip=True)


@dataclass(frozen=True)
class Experiment(Section):
    """One run: the model, the data, the recipe. Published rows are functions that return one."""

    commands: ClassVar[tuple[str, ...]] = (*INPUT, "verify")

    name: str = field(metadata={"commands": ()})
    """Name of the configuration: the default --work-dir, published figures and weights follow from it."""
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvalConfig = field(default_factory=EvalConfig)
    seed: int = setting(0, commands=("test", "predict", "check"))
    """Every random draw of the run follows from it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.in_channels != self.data.channels:
            raise UserError(
                f"model.in_channels is {self.model.in_channels} but data.channels is {self.data.channels}; "
                "set both alike"
            )

    def with_overrides(self, overrides: Sequence[str]) -> Experiment:
        """Return a copy with `"model.num_inference_steps=10"`-style changes; tuples are written `"data.crop=256 512"`.

        Raises ValueError, naming the field and the nearest known one, on a wrong name or value.
        """
        changed: Experiment = change(self, with_class_count(self, read_overrides(self, overrides)))
        return changed


HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.\w+$")
"""The start of the SHA-256, which PyTorch's and OpenMMLab's files have in their names."""


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
    """The folder of the Hugging Face hub with the weights, when the file's own address is not known."""
    sha256: str | None = None
    """Hash of the weights file in hexadecimal, or its start, if it is stated elsewhere than in the file's name."""
    log: str | None = None
    """Address of the training log; None: none is known."""

    @property
    def stated_sha256(self) -> str:
        """The SHA-256 of the weights file in hexadecimal as far as it is stated anywhere, or nothing."""
        found = HASH_IN_NAME.search(self.url or "")
        return self.sha256 or (found[1] if found else "")

    @property
    def weights(self) -> str:
        """How the weights are offered, in a word: `official`, or nothing."""
        return "official" if self.url or self.page else ""
