"""A method of your own in one file: a small U-Net (arXiv 1505.04597).

segcore train examples/unet.py:unet
segcore test examples/unet.py:unet runs/unet
segcore predict examples/unet.py:unet runs/unet photos/ results/
"""

from dataclasses import dataclass

import torch
from torch import nn

from segcore import Experiment, Segmentor
from segcore.config import toy
from segcore.config.fields import setting
from segcore.config.schema import LossConfig, ModelConfig, OptimizerConfig
from segcore.models.layers import ConvNorm, resize
from segcore.models.losses import head_losses


def block(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(*(ConvNorm(c, width, 3, nn.BatchNorm2d, nn.ReLU()) for c in (channels, width)))


class UNet(Segmentor):
    def __init__(self, num_classes: int, in_channels: int, width: int, depth: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        widths = [width * 2**level for level in range(depth)]
        self.down = nn.ModuleList(block(c, w) for c, w in zip((in_channels, *widths[:-1]), widths, strict=True))
        self.up = nn.ModuleList(block(3 * w, w) for w in widths[:-1])
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def logits(self, images, seeds=None):
        x, maps = images, []
        for down in self.down:
            x = down(nn.functional.max_pool2d(x, 2, ceil_mode=True) if maps else x)
            maps.append(x)
        for up, finer in zip(reversed(self.up), reversed(maps[:-1]), strict=True):
            x = up(torch.cat([finer, resize(x, finer.shape[-2:])], 1))
        return self.classifier(x)

    def losses(self, images, labels, *, seeds=None, draws=None, loss=LossConfig()):  # noqa: B008
        return head_losses({"decode": (self.logits(images), 1.0)}, labels, loss, ignore_index=self.ignore_index)


@dataclass(frozen=True)
class UNetConfig(ModelConfig):
    """The fields are options of every command, such as `--model.width 64`."""

    width: int = setting(16, least=1)
    """Channels of the finest level; each level below has twice as many."""
    depth: int = setting(4, least=1)
    """Levels."""

    def build(self) -> UNet:
        return UNet(**self.arguments())


def unet() -> Experiment:
    """Generated street scenes; `--data.dataset folder --data.root …` takes images of your own."""
    loss = LossConfig(("cross_entropy", "dice"), weights=(1.0, 0.5))
    optimizer = OptimizerConfig("adamw", lr=2e-3)
    return Experiment("unet", UNetConfig(), toy.DATA, optimizer, toy.SCHEDULE, loss, toy.TRAIN, toy.EVALUATE)
