"""A base model and its mask prior for own images and masks, trained one after the other (docs/own_data.md)."""

from dataclasses import replace

from ddps_seg.configs import base_models, camvid, published, toy
from segcore.config import own_data
from segcore.config.schema import Experiment, ModelConfig, OptimizerConfig, ScheduleConfig


def ddps_segformer_b0_base_from_scratch() -> Experiment:
    """The first stage: SegFormer on MiT-B0 with a narrow head, from random weights."""
    return _base("ddps_segformer_b0_base_from_scratch", toy.BASE, camvid.OPTIMIZER, own_data.FROM_SCRATCH, None)


def ddps_segformer_b0_from_scratch() -> Experiment:
    """The second stage: a narrow UNet, T = 20, three evaluations; the base model's weights stay."""
    start = "runs/ddps_segformer_b0_base_from_scratch"
    return _prior("ddps_segformer_b0_from_scratch", toy.PRIOR, camvid.OPTIMIZER, start)


def ddps_segformer_b0_base_fine_tuned() -> Experiment:
    """The first stage: SegFormer on MiT-B0, from MMSegmentation's Cityscapes weights."""
    exp = base_models.segformer("mit_b0", "cityscapes", 1024)
    start = f"official:{exp.name}"
    return _base("ddps_segformer_b0_base_fine_tuned", exp.model, exp.optimizer, own_data.FINE_TUNED, start)


def ddps_segformer_b0_fine_tuned() -> Experiment:
    """The second stage: the published prior's size, T = 20; the base model's weights stay."""
    model = published.multistep("mit_b0", "cityscapes").model
    start = "runs/ddps_segformer_b0_base_fine_tuned"
    return _prior("ddps_segformer_b0_fine_tuned", model, published.OPTIMIZER, start)


def _base(
    name: str, model: ModelConfig, optimizer: OptimizerConfig, schedule: ScheduleConfig, start: str | None
) -> Experiment:
    return Experiment(
        name=name,
        model=model,
        data=own_data.DATA,
        optimizer=optimizer,
        schedule=schedule,
        loss=own_data.LOSS,
        train=replace(own_data.TRAIN, device_batch_size=4, init_from=start),
        evaluate=own_data.EVALUATE,
    )


def _prior(name: str, model: ModelConfig, optimizer: OptimizerConfig, start: str) -> Experiment:
    return Experiment(
        name=name,
        model=model,
        data=replace(own_data.DATA, add_background_class=True),
        optimizer=optimizer,
        schedule=own_data.FINE_TUNED,
        loss=own_data.LOSS,
        train=replace(own_data.TRAIN, device_batch_size=4, init_from=start),
        evaluate=replace(own_data.EVALUATE, steps=(0, 10, 19)),
    )
