"""How a run begins: model, optimizer and loss module."""

from __future__ import annotations

import torch
from timm.layers import convert_sync_batchnorm  # unlike torch's own it knows timm's norms with an activation
from torch import Tensor, nn

from segcore import distributed
from segcore.config.record import describe
from segcore.config.schema import Experiment, LossConfig
from segcore.models.segmentor import Segmentor
from segcore.training.ema import start_ema
from segcore.training.optimizer import build_optimizer
from segcore.training.state import Run


class Losses(nn.Module):
    """`Segmentor.losses` as the forward pass of a module: what is compiled and put in parallel."""

    def __init__(self, model: Segmentor, loss: LossConfig) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, images: Tensor, labels: Tensor, seeds: list[int]) -> dict[str, Tensor]:
        return self.model.losses(images, labels, seeds=seeds, loss=self.loss)


def build(exp: Experiment, device: torch.device) -> Run:
    """Return a run at its beginning: random weights that follow from the seed, on `device`."""
    torch.manual_seed(exp.seed)
    model = exp.model.build()  # on the CPU, so that the weights do not depend on the device
    model = model.to(device)
    if exp.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if distributed.world_size() > 1 and device.type == "cuda":
        model = convert_sync_batchnorm(model)
    scaler = torch.amp.GradScaler(device.type, enabled=exp.train.precision == "fp16")
    average = start_ema(model) if exp.train.ema is not None else None
    return Run(model, Losses(model, exp.loss), build_optimizer(model, exp.optimizer), scaler, average, describe(exp))


def prepare(exp: Experiment, run: Run, loss: LossConfig) -> None:
    """Compile the losses and join the other processes: last, when the weights are those to go on with."""
    run.losses = distributed.in_parallel(Losses(run.model, loss), run.device)
    if exp.train.compile:
        run.losses = torch.compile(run.losses)  # type: ignore[assignment]
