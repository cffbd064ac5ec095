"""Our models as segmentors of MMSegmentation 0.30 (with mmcv 1.x) and 1.x (with mmengine); nothing here imports this.

    custom_imports = dict(imports=["ddp_seg.mmseg"], allow_failed_imports=False)
    model = dict(type="SegcoreModel", experiment="ddp_convnext_t_4x4_512x1024_160k_cityscapes",
                 overrides=["model.num_inference_steps=1"])
    optimizer = dict(constructor="SegcoreOptimizer")  # 1.x: optim_wrapper

Of the experiment count the model, the loss, the optimizer, `train.init_from`, `train.freeze` and
`train.checkpoint_activations`, and where the config says nothing, the normalization (1.x) and the windows of
`evaluate`. Data, schedule and loop are MMSegmentation's. Its checkpoints have the published names and layouts.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mmseg
import numpy as np
import torch
from mmseg.models import EncoderDecoder
from torch import Tensor, nn

from segcore.checkpoints.load import load_init
from segcore.config.registry import load_experiment
from segcore.config.schema import Experiment, LossConfig, OptimizerConfig, ParamRule
from segcore.data.labels import IGNORE, ignored_label
from segcore.data.layouts import palette_of
from segcore.errors import UserError
from segcore.seeds import file_seed, window_seed
from segcore.training.activations import checkpoint_activations
from segcore.training.class_weight import weights_are_of_row
from segcore.training.optimizer import build_optimizer
from segcore.training.parameters import freeze
from segcore.training.setup import build_network

ONE = not mmseg.__version__.startswith("0.")
if ONE:
    from mmengine.config import ConfigDict
    from mmengine.logging import HistoryBuffer, print_log
    from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
    from mmengine.runner import checkpoint
    from mmseg.registry import MODELS
else:
    from mmcv import ConfigDict
    from mmcv.utils import print_log
    from mmseg.core.builder import OPTIMIZER_BUILDERS as OPTIM_WRAPPER_CONSTRUCTORS
    from mmseg.models import SEGMENTORS as MODELS

FACTORS = {"lr_mult", "decay_mult"}
_SHARDED = ("torch.distributed.fsdp", "deepspeed", "colossalai")
"""Modules of programs that run parts of a model, which do not know the published names of parameters."""
_AVERAGES = "mmengine.model.averaged_model"
"""Where a state dict is asked for in order to change its tensors, with `update_buffers`."""


class _Published(EncoderDecoder):
    """What both lines share: the model, its weights under published names, labels and seeds."""

    def __init__(
        self,
        experiment: str,
        overrides: Sequence[str] | str = (),
        *,
        train_cfg: Any = None,
        test_cfg: Any = None,
        pretrained: None = None,
        init_cfg: Any = None,
        **stated: Any,
    ) -> None:
        overrides = [overrides] if isinstance(overrides, str) else list(overrides)
        exp = load_experiment(experiment).with_overrides(overrides)
        reading = {"data_preprocessor": stated.pop("data_preprocessor", None) or _preprocessor(exp)} if ONE else {}
        super(EncoderDecoder, self).__init__(init_cfg=init_cfg, **reading)  # its own would build a backbone and heads
        self.experiment, self.loss_config = exp, _loss(exp)
        self.net = build_network(exp, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        own = {"mode": exp.evaluate.mode, "crop_size": exp.evaluate.crop, "stride": exp.evaluate.stride}
        self.train_cfg, self.test_cfg = train_cfg, ConfigDict({**own, **(test_cfg or {})})
        self.has_background = self.net.ignore_index == 0  # DDPS; their labels do not count it
        self.out_channels = self.net.num_classes
        self.num_classes = self.out_channels - self.has_background
        self.ignore_index = IGNORE if self.has_background else self.net.ignore_index
        self.align_corners = self.net.align_corners
        self.reduce_zero_label = {"ade20k": True, "cityscapes": False, "toy": False}.get(exp.data.dataset)
        self.decode_head = SimpleNamespace(threshold=0.5, num_classes=self.num_classes)  # what their functions read
        self._check_stated(stated | ({"pretrained": pretrained} if pretrained else {}))
        if ONE:
            padding = getattr(self.data_preprocessor, "seg_pad_val", None)
            self._check("data_preprocessor.seg_pad_val", "ignore_index", padding)
        self.frozen = freeze(self.net, exp.train.freeze)
        if exp.train.checkpoint_activations:
            checkpoint_activations(self.net)
        self.kinds = _kinds(self.net)
        self.seeds: list[int] | None = None
        self.register_state_dict_post_hook(_publish)

    # Checks

    def _check(self, setting: str, name: str, value: Any) -> None:
        own = getattr(self, name)
        if value is not None and own is not None and value != own:
            raise UserError(
                f"{setting} is {value}, but the {name} of {self.experiment.name} is {own}; "
                "set it so, or choose another experiment"
            )

    def _check_stated(self, stated: Mapping[str, Any]) -> None:
        """Raise UserError for a setting of the config that contradicts the model or does not exist."""
        for name, value in stated.items():
            if name not in ("num_classes", "align_corners", "ignore_index", "reduce_zero_label"):
                raise UserError(
                    f"model.{name} is no setting of SegcoreModel; those of the experiment are overrides, such as "
                    'model.overrides="[model.num_inference_steps=1]" (start weights: train.init_from)'
                )
            self._check(f"model.{name}", name, value)

    def _check_wrapped(self) -> None:
        """Raise UserError, before the first pass, when a program has taken the network's modules apart."""
        if not self.kinds:
            return
        for frame, _ in traceback.walk_stack(None):
            module = frame.f_globals.get("__name__", "")
            if module.startswith(_SHARDED):
                raise UserError(f"SegcoreModel does not run in {module}; use DistributedDataParallel")
        for name, kind in _kinds(self.net).items():
            plain = self.kinds.get(name) in ((nn.BatchNorm1d, False), (nn.BatchNorm2d, False))
            if kind != self.kinds.get(name) and not (plain and issubclass(kind[0], nn.modules.batchnorm._BatchNorm)):
                raise UserError(
                    f"net.{name} was replaced or wrapped ({kind[0].__name__}); leave out sync_bn, which SegcoreModel "
                    "does by itself, and set overrides train.checkpoint_activations=True to checkpoint activations"
                )
        self.kinds = {}

    # Weights

    def init_weights(self) -> None:
        """Load `init_cfg`'s checkpoint, else the start weights of the experiment, if it has any."""
        super().init_weights()
        start = self.experiment.train.init_from
        if start and not self.init_cfg:
            classes, _ = palette_of(self.experiment.data)
            report = load_init(self.net, start, exp=self.experiment, classes=classes)
            print_log(report, logger="current" if ONE else "root")

    def _load_from_state_dict(self, state: MutableMapping[str, Tensor], prefix: str, *args: Any) -> None:
        """Load the tensors below `prefix`, which have their published names; as strict as `load_official`.

        They are replaced by those of the network's own names, which the caller then hands to its modules.
        """
        names = [name for name in state if name.startswith(prefix)]
        own = {f"{prefix}{name}" for name, _ in self.named_buffers(recurse=False)}  # the averages of mmcv's EMAHook
        given = {name: state.pop(name) for name in names if name not in own}
        self.net.load_official(
            {name.removeprefix(prefix): x for name, x in given.items() if not name.startswith(f"{prefix}ema_")}
        )
        state.update({f"{prefix}net.{name}": tensor for name, tensor in self.net.state_dict().items()})
        super()._load_from_state_dict(state, prefix, *args)

    # Training

    def train(self, mode: bool = True) -> _Published:
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def _losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the losses for labels (N, H, W) of theirs; only "loss" is so named, because they add up all others."""
        self._check_wrapped()
        seeds = torch.randint(1 << 32, (len(images),)).tolist()
        losses = self.net.losses(images, self.own_labels(labels), seeds=seeds, loss=self.loss_config)
        parts = {name.replace("loss_", ""): value.detach() for name, value in losses.items() if name != "loss"}
        return {"loss": losses["loss"], **parts}

    def own_labels(self, labels: Tensor) -> Tensor:
        """Return labels (N, H, W) int64 of the network for labels of theirs.

        Raises UserError for values that are neither a class nor the ignored one.
        """
        ignored = labels == self.ignore_index
        wrong = labels[~ignored & ((labels < 0) | (labels >= self.num_classes))]
        if len(wrong):
            reduce = "" if self.reduce_zero_label is None else f", reduce_zero_label={self.reduce_zero_label}"
            raise UserError(
                f"the labels have the value {int(wrong[0])}; {self.experiment.name} takes 0 to {self.num_classes - 1} "
                f"and {self.ignore_index} for ignored pixels: set num_classes of the data set{reduce}"
            )
        return torch.where(ignored, 0, labels + 1) if self.has_background else labels

    # Inference

    def inference(self, images: Tensor, metas: Sequence[Mapping[str, Any]], *args: Any) -> Tensor:
        """Return what `EncoderDecoder` does; an image's noise depends on its file name, the view and the window."""
        self.seeds, self.window = self._view_seeds(images, metas), 0
        try:
            return super().inference(images, metas, *args)
        finally:
            self.seeds = None

    def _view_seeds(self, images: Tensor, metas: Sequence[Mapping[str, Any]]) -> list[int]:
        height, width = images.shape[-2:]
        seeds = []
        for meta in metas:
            file = Path(str(meta.get("img_path") or meta.get("filename") or "")).name
            flip = str(meta.get("flip_direction")) if meta.get("flip") else ""
            seeds.append(file_seed(self.experiment.seed, f"{height}x{width} {flip}", file))
        return seeds

    def encode_decode(self, images: Tensor, metas: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return logits (N, K, H, W) of images or windows; the channel of a background class comes last.

        So their classes count from 0, and background, where it wins, is a class beyond those that they know.
        """
        self._check_wrapped()
        if self.seeds is None:
            seeds = self._view_seeds(images, metas)
        else:
            seeds = [window_seed(seed, 0, self.window) for seed in self.seeds]
            self.window += 1
        logits = self.net(images, seeds)
        return logits.roll(-1, 1) if self.has_background else logits

    def _forward(self, images: Tensor, _: Any = None) -> Tensor:
        return self.net(images)

    forward_dummy = _forward  # 0.30's name

    def _ignore_background(self, classes: Any) -> Any:
        """Set predicted background to the ignored label, in place: a miss in their metrics, as in ours."""
        if self.has_background:
            classes[classes == self.num_classes] = self.ignore_index
        return classes


if ONE:

    @MODELS.register_module()
    class SegcoreModel(_Published):
        """A segmentor of MMSegmentation 1.x; see the module."""

        def loss(self, inputs: Tensor, data_samples: Sequence[Any]) -> dict[str, Tensor]:
            self._check_samples(data_samples)
            return self._losses(inputs, torch.stack([sample.gt_sem_seg.data.squeeze(0) for sample in data_samples]))

        def predict(self, inputs: Tensor, data_samples: Sequence[Any] | None = None) -> Sequence[Any]:
            self._check_samples(data_samples or ())
            for sample in data_samples or ():
                if "gt_sem_seg" in sample:
                    self.own_labels(sample.gt_sem_seg.data)
            return super().predict(inputs, data_samples)

        def postprocess_result(self, *args: Any) -> Sequence[Any]:
            samples = super().postprocess_result(*args)
            for sample in samples:
                self._ignore_background(sample.pred_sem_seg.data)
            return samples

        def _check_samples(self, data_samples: Sequence[Any]) -> None:
            for sample in data_samples:
                self._check("reduce_zero_label of the data set", "reduce_zero_label", sample.get("reduce_zero_label"))
else:

    @MODELS.register_module()
    class SegcoreModel(_Published):  # type: ignore[no-redef]
        """A segmentor of MMSegmentation 0.30; see the module."""

        @property
        def CLASSES(self) -> Sequence[str] | None:  # noqa: N802  (their name)
            """The class names, which their tools set to those of the data set."""
            return self._classes

        @CLASSES.setter
        def CLASSES(self, classes: Sequence[str] | None) -> None:  # noqa: N802
            self._check("the number of CLASSES", "num_classes", len(classes) if classes else None)
            self._classes = classes

        _classes: Sequence[str] | None = None
        PALETTE = None

        def forward_train(self, img: Tensor, img_metas: Any, gt_semantic_seg: Tensor, **_: Any) -> dict[str, Tensor]:
            return self._losses(img, gt_semantic_seg.squeeze(1))

        def simple_test(self, *args: Any, **kwargs: Any) -> list[np.ndarray]:
            return [self._ignore_background(classes) for classes in super().simple_test(*args, **kwargs)]

        def aug_test(self, *args: Any, **kwargs: Any) -> list[np.ndarray]:
            return [self._ignore_background(classes) for classes in super().aug_test(*args, **kwargs)]


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class SegcoreOptimizer:
    """The optimizer constructor: the experiment's optimizer, with the config's values where it has any.

    `custom_keys` of `paramwise_cfg` are matched against the published names of the parameters, as in the published
    configs. Clipping is up to the config (`grad_clip`, `clip_grad`).
    """

    def __init__(self, optimizer_cfg: Any = None, paramwise_cfg: Any = None, *, optim_wrapper_cfg: Any = None) -> None:
        self.wrapper = dict(optim_wrapper_cfg or {})
        self.optimizer = dict((self.wrapper.pop("optimizer", None) if ONE else optimizer_cfg) or {})
        self.paramwise = dict(paramwise_cfg or {})

    def __call__(self, model: nn.Module) -> Any:
        """Return the optimizer, on 1.x in its wrapper, for a SegcoreModel or what wraps it."""
        model = getattr(model, "module", model)
        if not isinstance(model, SegcoreModel):
            raise UserError(f"SegcoreOptimizer is for SegcoreModel, not {type(model).__name__}; leave out constructor")
        optimizer = build_optimizer(model.net, self.settings(model.experiment.optimizer))
        if not ONE:
            return optimizer
        return OPTIM_WRAPPERS.build({"type": "OptimWrapper", **self.wrapper}, default_args={"optimizer": optimizer})

    def settings(self, own: OptimizerConfig) -> OptimizerConfig:
        """Return `own` with the values of the config; raises UserError for one that it has no counterpart of."""
        given, custom = dict(self.optimizer), self.paramwise.get("custom_keys", {})
        if "type" in given:
            given["kind"] = str(given.pop("type")).lower()
        wrong = [f"optimizer.{name}" for name in given.keys() - {"kind", "lr", "weight_decay", "betas", "momentum"}]
        wrong += [f"optimizer {given['kind']}"] if given.get("kind", "sgd") not in ("adamw", "sgd") else []
        wrong += [f"paramwise_cfg.{name}" for name in self.paramwise.keys() - {"custom_keys"}]
        wrong += [f"custom_keys.{k}.{n}" for k, factors in custom.items() for n in factors.keys() - FACTORS]
        if wrong:
            raise UserError(
                f"SegcoreOptimizer knows no {wrong[0]}; it has AdamW and SGD with lr, weight_decay, betas, momentum, "
                f"and {' and '.join(sorted(FACTORS))} of custom_keys"
            )
        if "betas" in given:
            given["betas"] = tuple(given["betas"])
        if self.paramwise:
            given["rules"] = tuple(ParamRule(key, **factors) for key, factors in custom.items())
        return replace(own, **given)


def _loss(exp: Experiment) -> LossConfig:
    loss = replace(exp.loss, class_weight=None) if weights_are_of_row(exp) else exp.loss
    weights, classes = loss.class_weight, exp.model.num_classes
    if isinstance(weights, str):
        raise UserError(f"loss.class_weight is {weights}, which counts labels of ours; give one per class, or None")
    if weights is not None and len(weights) != classes:
        raise UserError(f"loss.class_weight has {len(weights)} values for {classes} classes; give one per class")
    return loss


def _preprocessor(exp: Experiment) -> nn.Module:
    """Return 1.x's normalization, of images that it reads as BGR, and padding to the crop, as in the experiment."""
    data = exp.data
    settings = {"mean": data.mean, "std": data.std, "bgr_to_rgb": data.channels == 3, "size": data.crop}
    ignored = ignored_label(exp.model.num_classes)
    return MODELS.build({"type": "SegDataPreProcessor", "pad_val": 0, "seg_pad_val": ignored, **settings})


def _kinds(net: nn.Module) -> dict[str, tuple[type, bool]]:
    """Return, by name, each module's type and whether its `forward` was replaced."""
    return {name: (type(module), "forward" in vars(module)) for name, module in net.named_modules()}


def _publish(model: _Published, state: MutableMapping[str, Tensor], prefix: str, _: Any) -> None:
    """Rename the network's tensors in `state` to the published names, in the published layout."""
    for name, official in model.net.key_map().items():
        own = state.pop(f"{prefix}net.{name}")
        state[f"{prefix}{official}"] = tensor = model.net.publish(official, own)
        if tensor is not own and any(f.f_globals.get("__name__") == _AVERAGES for f, _ in traceback.walk_stack(None)):
            raise UserError(f"EMAHook would not average {official}, which is a copy; set its update_buffers=False")


def _statistic(owner: Any, name: str) -> Any:
    """Return a method of HistoryBuffer; mmengine's checkpoints hold some, as calls of `getattr`."""
    if owner is HistoryBuffer and name in ("min", "max", "current", "mean"):
        return vars(HistoryBuffer)[name]
    raise UserError(f"a checkpoint asks for getattr of {owner!r:.80}, which mmengine does not write; nothing was run")


def _know_harmless() -> None:
    """Tell torch's reader, which executes nothing that it does not know, what OpenMMLab writes besides tensors.

    That is NumPy's scalars and arrays, also under their names before NumPy 2, and mmengine's history of the log.
    """
    functions = (np._core.multiarray.scalar, np._core.multiarray._reconstruct)  # type: ignore[attr-defined]
    known = [np.ndarray, np.dtype, *functions, *(type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd")]
    known += [(function, f"numpy.core.multiarray.{function.__name__}") for function in functions]
    if ONE:
        # onedl-mmengine's own reads again, unsafely, what torch refuses; mmengine has no function of that name
        checkpoint._safe_torch_load = lambda file, **how: torch.load(file, **{**how, "weights_only": True})
        known += [HistoryBuffer, (_statistic, "builtins.getattr"), (_statistic, "__builtin__.getattr")]
    torch.serialization.add_safe_globals(known)


_know_harmless()
